"""What a person sees of training: a bar for each model, with loss and time left; plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from genmodels import models
from genmodels.run import Heartbeat, Result, State, Status
from genmodels.spec import ModelSpec
from services.supervise import Watch

LINE_SECONDS = 10.0  # between two lines of a model where the output is no terminal
STYLES: dict[State, str] = {
    "starting": "cyan",
    "running": "cyan",
    "publishing": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}


@dataclass(frozen=True)
class Shown:
    """How far a run is. `note`: why it is in its state, or what it waits for."""

    model: str
    state: State
    phase: str = ""
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    note: str = ""


class Board:
    """Shows any number of runs while the context is open: bars on a terminal; elsewhere a line for each change of a
    run's state or note, and one now and then as it trains."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("[bold]{task.fields[run].model}", table_column=Column(max_width=24, no_wrap=True)),
            _State(),
            _Middle(),
            TextColumn("{task.fields[numbers]}", justify="right"),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, tuple[float, Shown]] = {}  # the last one of each model, and when

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def show(self, run: Shown) -> None:
        if not self.console.is_terminal:
            self._line(run)
            return
        if run.model not in self._tasks:
            self._tasks[run.model] = self._bars.add_task("", total=None, run=run, numbers="")
        total = run.max_steps or None
        self._bars.update(self._tasks[run.model], completed=run.step, total=total, run=run, numbers=_numbers(run))

    def say(self, line: str) -> None:
        """A line that stays: above the bars, or among the others."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, run: Shown) -> None:
        when, last = self._lines.get(run.model, (0.0, None))
        changed = last is None or (run.state, run.note) != (last.state, last.note)
        if not changed and (run == last or time.monotonic() - when < LINE_SECONDS):
            return
        self._lines[run.model] = time.monotonic(), run
        numbers, note = _numbers(run, ", "), run.note if changed else ""
        self.say(f"{run.model}: {run.state}" + (numbers and f", {numbers}") + (note and f" ({note})"))


class TrainingView:
    """Shows runs one after the other, as a dispatcher of this process carries them."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def follow(self, spec: ModelSpec) -> Iterator[Watch]:
        """A watcher that shows one run while the context is open."""
        with Board(self.console) as board:

            def watch(status: Status, heartbeat: Heartbeat | None) -> None:
                beat = heartbeat.model_dump(include={"phase", "step", "loss", "seconds_left"}) if heartbeat else {}
                board.show(Shown(spec.name, status.state, max_steps=spec.train.max_steps, note=status.reason, **beat))

            yield watch


class _State(ProgressColumn):
    """The state of a run, or the phase that it is in."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        run: Shown = task.fields["run"]
        phase = run.phase if run.state == "running" and run.phase else run.state
        return Text(phase, STYLES.get(run.state, ""))


class _Middle(ProgressColumn):
    """A bar while there are steps to show, else the note."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=None)

    def get_table_column(self) -> Column:
        return Column(ratio=1, no_wrap=True, overflow="ellipsis")

    def render(self, task: Task) -> RenderableType:
        run: Shown = task.fields["run"]
        if run.note and (run.state not in ("running", "publishing") or not run.step):
            return Text(run.note, "red" if run.state == "failed" else "dim")
        return self._bar.render(task)


def _numbers(run: Shown, between: str = "  ") -> str:
    """step 120/600  loss 1.823  0:42 left"""
    parts = [f"step {run.step}/{run.max_steps}"] if run.step else []
    if run.state in ("running", "starting"):
        parts += [f"loss {run.loss:.4g}"] if run.loss is not None else []
        parts += [f"{clock(run.seconds_left)} left"] if run.seconds_left is not None else []
    return between.join(parts)


def summary(rows: list[tuple[ModelSpec, Status, Result | None]], endpoint: str | None) -> Table:
    """model, family, steps, metric, gate, version, seconds, endpoint"""
    table = Table(title=f"Endpoints at {endpoint}" if endpoint else "No endpoint: no model was published")
    for heading in ("model", "family", "steps", "metric", "gate", "version", "seconds", "endpoint"):
        table.add_column(heading, overflow="fold")
    for spec, status, result in rows:
        published = status.state == "succeeded" and result is not None
        route = "/v1/completions" if models.load(spec.family).kind == "text" else "/v1/images/generations"
        table.add_row(
            spec.name,
            spec.family,
            str(result.step) if result else "-",
            _metric(spec, result),
            _gate(result),
            str(result.version) if published and result else "[red]none",
            f"{result.training_seconds:.0f}" if result else "-",
            route if endpoint and published else "-",
        )
    return table


def clock(seconds: float) -> str:
    """2:05 for 125 seconds"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _metric(spec: ModelSpec, result: Result | None) -> str:
    if result is None or not result.metrics:
        return "-"
    name = spec.serve.gate.metric if spec.serve.gate else models.load(spec.family).metric_names[0]
    return f"{name} {result.metrics[name]:.4g}"


def _gate(result: Result | None) -> str:
    if result is None or result.gate is None:
        return "none"
    return "[green]passed" if result.gate.passed else f"[red]{result.gate.reason}"
