"""What a person sees of training: one bar for each model, with loss and time left; plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from genmodels import models
from genmodels.registry import Registry
from genmodels.run import Heartbeat, Result, Status
from genmodels.spec import ModelSpec
from services.dispatch import Watch

LINE_SECONDS = 10.0  # between two lines of a model where the output is no terminal


class TrainingView:
    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def follow(self, spec: ModelSpec) -> Iterator[Watch]:
        """A watcher that shows one run while the context is open."""
        if not self.console.is_terminal:
            yield _Lines(self.console, spec)
            return
        progress = Progress(
            TextColumn("[bold]{task.fields[model]:<20}"),
            TextColumn("{task.fields[phase]:<12}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:>8}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]:>12}"),
            console=self.console,
            expand=True,
        )
        with progress:
            total = spec.train.max_steps
            yield _Bar(progress, progress.add_task("", total=total, model=spec.name, phase="queued", loss="-", left=""))


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        if heartbeat is None:
            self.progress.update(self.task, phase=status.state, left="")
            return
        loss = "-" if heartbeat.loss is None else f"{heartbeat.loss:.4g}"
        left = "" if heartbeat.seconds_left is None else f"{clock(heartbeat.seconds_left)} left"
        self.progress.update(self.task, completed=heartbeat.step, phase=heartbeat.phase, loss=loss, left=left)


class _Lines:
    def __init__(self, console: Console, spec: ModelSpec) -> None:
        self.console, self.spec, self.last, self.state = console, spec, 0.0, ""

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        due = time.monotonic() - self.last >= LINE_SECONDS
        if not due and status.state == self.state:
            return
        self.last, self.state = time.monotonic(), status.state
        line = f"{self.spec.name}: {status.state}"
        if heartbeat and heartbeat.step:
            line += f", step {heartbeat.step}/{heartbeat.max_steps}"
            line += "" if heartbeat.loss is None else f", loss {heartbeat.loss:.4g}"
            line += "" if heartbeat.seconds_left is None else f", {clock(heartbeat.seconds_left)} left"
        elif status.reason:
            line += f" ({status.reason})"
        self.console.print(line, markup=False, highlight=False)


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


def registry_table(registry: Registry) -> Table:
    """model, family, version, aliases, metrics, job"""
    table = Table("model", "family", "version", "aliases", "metrics", "job", "step")
    for model in registry.models():
        aliases = registry.aliases(model)
        for number in registry.versions(model):
            version = registry.version(model, number)
            names = ", ".join(name for name, alias in aliases.items() if alias.version == number)
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in version.metrics.items())
            table.add_row(model, version.family, str(number), names, metrics, version.job, str(version.place.step))
    return table
