"""What a person sees of training: a bar for each model, with loss and time left; plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from genmodels import models
from genmodels.runs.records import ACTIVE, Heartbeat, Phase, Result, Status
from genmodels.spec.sections import ModelSpec
from services.dispatch.backends.base import Watch
from services.jobs.schemas import ShownState

MANY_EXAMPLES, FEW_EXAMPLES = 1000, 100
LINE_SECONDS = 10.0  # between two lines of a model where the output is no terminal
QUIET_SECONDS = 15.0  # without news of a model that trains, after which that is said
STORAGE_AWAY: Phase = "waiting for storage"
SHOWN_PHASES: tuple[Phase, ...] = ("starting", "compiling", "evaluating", "saving", "publishing")  # for `running`
STYLES: dict[str, str] = {
    "starting": "cyan",
    "running": "cyan",
    "publishing": "cyan",
    "succeeded": "green",
    "failed": "red",
    "damaged": "red",
    "cancelled": "yellow",
}


@dataclass(frozen=True)
class Shown:
    """How far a run is. `note`: why it is in its state; `waiting`: that its attempt waits and why, else ""."""

    model: str
    state: ShownState
    phase: str = ""
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    note: str = ""
    waiting: str = ""


class Board:
    """Shows any number of runs while the context is open: bars on a terminal; elsewhere a line for each change of a
    run's state or note, and one now and then as it trains."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._runs: dict[str, Shown] = {}
        self._lines: dict[str, float] = {}  # when each model had its last one
        self._news: dict[str, tuple[Shown, float]] = {}  # of each model, and since when nothing new has come
        self._live = Live(console=console, get_renderable=self._bars, refresh_per_second=4)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def show(self, run: Shown) -> None:
        run = self._aged(run)
        if not self.console.is_terminal:
            self._line(run)
        else:
            self._runs[run.model] = run

    def say(self, line: str) -> None:
        """A line that stays: above the bars, or among the others."""
        self.console.print(line, soft_wrap=True)

    def _aged(self, run: Shown) -> Shown:
        """The same run; where it should train and shows no step any more, that is said instead of a time left."""
        now = time.monotonic()
        news, since = self._news.get(run.model, (None, now))
        if run != news:
            self._news[run.model] = run, now
        elif run.phase == "training" and not run.waiting and now - since >= QUIET_SECONDS:
            return replace(run, waiting=f"no step for over {QUIET_SECONDS:.0f} s")
        return run

    def _line(self, run: Shown) -> None:
        last = self._runs.get(run.model)
        changed = not last or (run.state, run.note, run.waiting) != (last.state, last.note, last.waiting)
        due = time.monotonic() - self._lines.get(run.model, 0.0) >= LINE_SECONDS
        if not last or changed or (due and _numbers(run) != _numbers(last)):
            self._runs[run.model], self._lines[run.model] = run, time.monotonic()
            numbers = "".join(f", {number}" for number in _numbers(run) if number)
            said = run.waiting or (run.note if changed else "")
            note = f" ({said})" if said else ""
            self.say(f"{run.model}: {run.state}{numbers}{note}")

    def _bars(self) -> Table:
        """A row for each run: model, state, and a bar with numbers or the note."""
        table = Table.grid(Column(max_width=24, no_wrap=True), Column(no_wrap=True), Column(ratio=1), padding=(0, 1))
        table.expand = True
        for run in list(self._runs.values()):  # another thread draws than tells
            table.add_row(
                Text(run.model, "bold"),
                Text(f"{current(run.state, run.phase):<10}", STYLES.get(run.state, "")),
                _rest(run),
            )
        return table


def current(state: ShownState, phase: str | None) -> str:
    """Return what a run is doing: its state, or, while it is `running` but does not train, the phase."""
    return phase if state == "running" and phase in SHOWN_PHASES else state


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
                waiting = waits(heartbeat.phase, heartbeat.waiting) if heartbeat else ""
                steps, note = spec.train.max_steps, status.reason
                board.show(Shown(spec.name, status.state, max_steps=steps, note=note, waiting=waiting, **beat))

            yield watch


def _rest(run: Shown) -> RenderableType:
    if run.waiting and run.state in ACTIVE:
        return Text(", ".join(filter(None, [*_numbers(run)[:2], run.waiting])), "yellow", no_wrap=True)
    if run.note and (run.state not in ("running", "publishing") or not run.step):
        return Text(run.note, "red" if run.state == "failed" else "dim", no_wrap=True, overflow="ellipsis")
    steps, loss, left = _numbers(run)
    row = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
    row.add_row(ProgressBar(run.max_steps or None, run.step), f"{steps:>14} {loss:<12} {left:>12}".rstrip())
    return row


def _numbers(run: Shown) -> tuple[str, str, str]:
    """steps, loss and time left, each empty where there is none"""
    running = run.state == "running"
    left = None if run.waiting else run.seconds_left
    return (
        f"step {run.step}/{run.max_steps}" if run.step else "",
        f"loss {run.loss:.4g}" if running and run.loss is not None else "",
        f"{clock(left)} left" if running and left is not None else "",
    )


def waits(phase: str | None, reason: str | None) -> str:
    """That an attempt waits, and why; "" while it does not."""
    if reason:
        return f"waiting, because {reason}"
    return STORAGE_AWAY if phase == STORAGE_AWAY else ""


def summary(
    rows: list[tuple[ModelSpec, Status, Result | None]], endpoint: str | None, validation: Mapping[str, int]
) -> Table:
    """model, family, steps, metric, gate, version, seconds, endpoint

    Args:
        validation: by model, how many validation examples its metrics are of: pictures or characters.
    """
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
            _metric(spec, result, validation.get(spec.name)),
            _gate(result),
            str(result.version) if published and result else Text("none", "red"),
            f"{result.training_seconds:.0f}" if result else "-",
            route if endpoint and published else "-",
        )
    return table


def clock(seconds: float) -> str:
    """2:05 for 125 seconds"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def digits(examples: float | None) -> int:
    """How many digits of a mean over so many examples mean anything: its error is of the order of 1/sqrt(examples)."""
    if examples is None or examples >= MANY_EXAMPLES:
        return 4
    return 3 if examples >= FEW_EXAMPLES else 2


def of_few(examples: float | None) -> str:
    """What to say beside figures of few validation examples; nothing of many."""
    return f"of {examples:.0f} validation examples" if examples is not None and examples < FEW_EXAMPLES else ""


def _metric(spec: ModelSpec, result: Result | None, examples: int | None) -> str:
    if result is None or not result.metrics:
        return "-"
    name = spec.serve.gate.metric if spec.serve.gate else models.load(spec.family).metric_names[0]
    value = f"{name} {result.metrics.get(name, math.nan):.{digits(examples)}g}"
    return f"{value} ({of_few(examples)})" if of_few(examples) else value


def _gate(result: Result | None) -> Text:
    if result is None or result.gate is None:
        return Text("none")
    return Text("passed", "green") if result.gate.passed else Text(result.gate.reason, "red")
