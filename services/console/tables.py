"""The tables that commands print. Each function's first line lists the columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from genmodels.keys import Key
from genmodels.registry.evaluations import Evaluation
from services.console.progress import STYLES, clock, current, digits, few_examples_note, waiting_note
from services.jobs.schemas import JobView, RunView, ShownState


def jobs_table(jobs: Iterable[JobView]) -> Table:
    """Return the columns job, state, priority, submitted, models."""
    table = _table("job", "state", "priority", "submitted", "models")
    for job in jobs:
        runs = Text(", ").join(_short(run) for run in job.models)
        table.add_row(job.job, _state(job.state), str(job.priority), age(job.submitted), runs)
    return table


def runs_table(job: JobView) -> Table:
    """Return the columns model, state, step, loss, left, attempt, workers, version, reason."""
    table = _table("model", "state", "step", "loss", "left", "attempt", "workers", "version", "reason")
    table.title = f"{job.job}: {job.state}, priority {job.priority}, submitted {age(job.submitted)}"
    table.title_justify = "left"
    for run in job.models:
        table.add_row(
            run.model,
            _state(run.state),
            _of(run.step, run.max_steps),
            "-" if run.loss is None else f"{run.loss:.4g}",
            "-" if run.seconds_left is None else clock(run.seconds_left),
            str(run.attempt or "-"),
            str(run.workers or "-"),
            str(run.version or "-"),
            Text(note(run)),
        )
    return table


def history_table(job: JobView) -> Table:
    """Return the columns time, model, state, reason, with a row for each change of a run's state, oldest first."""
    table = _table("time", "model", "state", "reason")
    changes = [(change, run.model) for run in job.models for change in run.history]
    for change, model in sorted(changes, key=lambda item: item[0].time):
        table.add_row(_local(change.time), model, _state(change.state), Text(change.reason))
    return table


def dry_run_table(report: Mapping[str, Any]) -> Table:
    """Return the columns model, family, dataset, steps, epochs, workers, parameters, checkpoint, serving, fits."""
    table = _table(
        "model", "family", "dataset", "steps", "epochs", "workers", "parameters", "checkpoint", "serving", "fits"
    )
    for model in report["models"]:
        fewest, most = model["workers"]
        fits = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("?")}[model["fits"]]
        kept, size = model["checkpoints_kept"], model["checkpoint_bytes"]
        table.add_row(
            model["model"],
            model["family"],
            model["dataset"],
            str(model["max_steps"]),
            "?" if model["epochs"] is None else f"{model['epochs']:g}",
            (str(most) if fewest == most else f"{fewest} to {most}") + (" GPU" if model["use_gpu"] else ""),
            "?" if model["parameters"] is None else f"{model['parameters']:,}",
            "?" if size is None else f"{amount(size)}, {kept} kept",
            _serving(model),
            fits,
        )
    return table


def _serving(model: Mapping[str, Any]) -> str:
    """Format the memory that a model host needs for a model."""
    if model["serving_bytes"] is None:
        return "?"
    return amount(model["serving_bytes"]) + ("" if model["servable"] else " [red]too large")


def models_table(models: Iterable[Mapping[str, Any]]) -> Table:
    """Return the columns model, family, versions, aliases, newest version's metrics."""
    table = _table("model", "family", "versions", "aliases", "newest version's metrics")
    for model in models:
        aliases = ", ".join(f"{alias}: {number}" for alias, number in model["aliases"].items())
        versions = ", ".join(map(str, model["versions"]))
        shown = model.get("problem") or _metrics(model["metrics"])
        table.add_row(model["name"], model["family"] or "?", versions, aliases, Text(shown))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return a table with the columns metric, value and baselines; its caption has the notes of the evaluation."""
    table = _table("metric", "value", "baselines")
    table.title = f"{evaluation.model}@{evaluation.version}, {evaluation.seconds:.0f} s"
    table.title_justify = table.caption_justify = "left"
    examples = evaluation.notes.get("validation_examples")
    count = examples if isinstance(examples, int | float) else None
    exact = digits(count)
    for name, metric in evaluation.metrics.items():
        baselines = ", ".join(f"{baseline}: {value:.{exact}g}" for baseline, value in metric.baselines.items())
        table.add_row(name, f"{metric.value:.{exact}g} {metric.unit}".rstrip(), Text(baselines))
    few = few_examples_note(count)
    notes = [f"computed from {few}: more digits are not significant"] if few else []
    table.caption = Text("; ".join([*notes, *(f"{name}: {note}" for name, note in evaluation.notes.items())]))
    return table


def datasets_table(datasets: Iterable[Mapping[str, Any]]) -> Table:
    """Return the columns dataset, kind, added, what."""
    table = _table("dataset", "kind", "added", "what")
    for dataset in datasets:
        added = "built in" if dataset["built_in"] else age(dataset["added"])
        what = dataset["what"] if dataset["built_in"] else "; ".join(dataset["notes"])
        table.add_row(dataset["name"], dataset["kind"], added, Text(what))
    return table


def keys_table(keys: Iterable[Key]) -> Table:
    """Return the columns id, name, scopes, models, limits, created, revoked."""
    table = _table("id", "name", "scopes", "models", "limits", "created", "revoked")
    for key in keys:
        models = ", ".join(f"{prefix}..." for prefix in key.prefixes) or "all"
        limits = [f"{key.rate} a minute"] if key.rate else []
        limits += [f"{key.concurrency} at once"] if key.concurrency else []
        revoked = Text(age(key.revoked), "red") if key.revoked else Text("-")
        scopes = ", ".join(key.scopes)
        table.add_row(key.id, key.name, scopes, models, ", ".join(limits) or "none", age(key.created), revoked)
    return table


def garbage_table(items: Iterable[Mapping[str, Any]]) -> Table:
    """Return the columns items, size, why, with a row for each reason; an item is an object or a folder of objects."""
    sums: dict[str, tuple[int, int]] = {}
    for item in items:
        count, size = sums.get(item["why"], (0, 0))
        sums[item["why"]] = count + 1, size + item["bytes"]
    table = _table("items", "size", "why")
    for why, (count, size) in sums.items():
        table.add_row(str(count), amount(size), Text(why))
    return table


def note(run: RunView) -> str:
    """Describe why a run is in its state, or what it waits for."""
    if waiting := waiting_note(run.phase, run.waiting):
        return waiting
    if run.position is None:
        return run.reason
    return f"number {run.position} in the queue" + (f": {run.wait}" if run.wait else "")


def amount(size: float) -> str:
    """Format a number of bytes: 1572864 bytes are 1.5 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def age(time: str) -> str:
    """Format the time since a moment, as in `5 min ago`."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "just now"


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _short(run: RunView) -> Text:
    """Format a run in a list of jobs: its model, coloured by the state, and its progress."""
    doing = current(run.state, run.phase)
    trains = doing == "running" and run.phase != "starting"
    share = f" {min(99, 100 * run.step // run.max_steps)}%" if trains and run.step and run.max_steps else ""
    place = f" (number {run.position})" if run.position is not None else ""
    state = "" if run.state == "succeeded" else f" {doing}"
    return Text(f"{run.model}{state}{share}{place}", STYLES.get(run.state, ""))


def _state(state: ShownState) -> Text:
    return Text(state, STYLES.get(state, ""))


def _of(step: int | None, max_steps: int | None) -> str:
    return f"{'-' if step is None else step}/{'?' if max_steps is None else max_steps}"


def _metrics(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in metrics.items())


def _local(time: str) -> str:
    return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M:%S}"
