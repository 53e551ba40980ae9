"""The progress of training: on a terminal a bar for each model, with loss and time left; in a log file, lines."""

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
from services.console.curl import SAMPLE_ROUTES
from services.dispatch.backends.base import Watch
from services.jobs.schemas import ShownState

MANY_EXAMPLES, FEW_EXAMPLES = 1000, 100
LINE_SECONDS = 10.0  # between two lines of a model, if the output is not a terminal
QUIET_SECONDS = 15.0  # without a new step of a model that trains, after which the view says so
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
    """The progress of a run.

    Attributes:
        note: why the run is in its state.
        waiting: why its attempt waits; "": the attempt does not wait.
    """

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
    """Show any number of runs while the context is open.

    On a terminal, each run has a bar. Elsewhere, each change of a run's state or note prints a line, and training
    prints one every LINE_SECONDS.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._runs: dict[str, Shown] = {}
        self._lines: dict[str, float] = {}  # when the last line of each model was printed
        self._news: dict[str, tuple[Shown, float]] = {}  # the last news of each model, and when it came
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

    def print(self, line: str) -> None:
        """Print a line that stays: above the bars, or among the other lines."""
        self.console.print(line, soft_wrap=True)

    def _aged(self, run: Shown) -> Shown:
        """Return the run; if it should train but makes no steps, `waiting` says so, and no time left is shown."""
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
            note = run.waiting or (run.note if changed else "")
            note = f" ({note})" if note else ""
            self.print(f"{run.model}: {run.state}{numbers}{note}")

    def _bars(self) -> Table:
        """Return a table with a row for each run: model, state, and a bar with numbers or the note."""
        table = Table.grid(Column(max_width=24, no_wrap=True), Column(no_wrap=True), Column(ratio=1), padding=(0, 1))
        table.expand = True
        for run in list(self._runs.values()):  # a copy: another thread draws
            table.add_row(
                Text(run.model, "bold"),
                Text(f"{current(run.state, run.phase):<10}", STYLES.get(run.state, "")),
                _rest(run),
            )
        return table


def current(state: ShownState, phase: str | None) -> str:
    """Return the state of a run, or its phase if the state is `running` but the run does not train."""
    return phase if state == "running" and phase in SHOWN_PHASES else state


class TrainingView:
    """Show runs that this process supervises, one after the other."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def follow(self, spec: ModelSpec) -> Iterator[Watch]:
        """Yield a watcher that shows one run while the context is open."""
        with Board(self.console) as board:

            def watch(status: Status, heartbeat: Heartbeat | None) -> None:
                facts = heartbeat.model_dump(include={"phase", "step", "loss", "seconds_left"}) if heartbeat else {}
                waiting = waiting_note(heartbeat.phase, heartbeat.waiting) if heartbeat else ""
                steps, note = spec.train.max_steps, status.reason
                board.show(Shown(spec.name, status.state, max_steps=steps, note=note, waiting=waiting, **facts))

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
    """Return the texts of steps, loss and time left; each is "" if it is unknown."""
    running = run.state == "running"
    left = None if run.waiting else run.seconds_left
    return (
        f"step {run.step}/{run.max_steps}" if run.step else "",
        f"loss {run.loss:.4g}" if running and run.loss is not None else "",
        f"{clock(left)} left" if running and left is not None else "",
    )


def waiting_note(phase: str | None, reason: str | None) -> str:
    """Describe why an attempt waits; return "" if it does not wait."""
    if reason:
        return f"waiting, because {reason}"
    return STORAGE_AWAY if phase == STORAGE_AWAY else ""


def summary(
    rows: list[tuple[ModelSpec, Status, Result | None]], endpoint: str | None, validation: Mapping[str, int]
) -> Table:
    """Return a table with the columns model, family, steps, metric, gate, version, seconds and endpoint.

    Args:
        validation: number of validation examples (pictures or characters) by model.
    """
    table = Table(title=f"Endpoints at {endpoint}" if endpoint else "No endpoint: no model was published")
    for heading in ("model", "family", "steps", "metric", "gate", "version", "seconds", "endpoint"):
        table.add_column(heading, overflow="fold")
    for spec, status, result in rows:
        published = status.state == "succeeded" and result is not None
        route = SAMPLE_ROUTES[models.load(spec.family).sample_verb]
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
    """Format a duration: 125 seconds are 2:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def digits(examples: float | None) -> int:
    """Return how many digits of a mean are significant: its error is of the order of 1/sqrt(examples)."""
    if examples is None or examples >= MANY_EXAMPLES:
        return 4
    return 3 if examples >= FEW_EXAMPLES else 2


def few_examples_note(examples: float | None) -> str:
    """Return a note for values computed from few validation examples; "" if there are many."""
    return f"{examples:.0f} validation examples" if examples is not None and examples < FEW_EXAMPLES else ""


def _metric(spec: ModelSpec, result: Result | None, examples: int | None) -> str:
    if result is None or not result.metrics:
        return "-"
    name = spec.serve.gate.metric if spec.serve.gate else models.load(spec.family).metric_names[0]
    value = f"{name} {result.metrics.get(name, math.nan):.{digits(examples)}g}"
    few = few_examples_note(examples)
    return f"{value} (of {few})" if few else value


def _gate(result: Result | None) -> Text:
    if result is None or result.gate is None:
        return Text("none")
    return Text("passed", "green") if result.gate.passed else Text(result.gate.reason, "red")
