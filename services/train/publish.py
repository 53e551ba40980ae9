"""Evaluate the best checkpoint of a run, check its gate, and publish it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genmodels import checkpoint, models
from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.errors import (
    CheckpointError,
    DataError,
    StorageError,
    StorageUnavailable,
)
from genmodels.family import EvaluationResult
from genmodels.registry import gate as gates
from genmodels.registry import probe
from genmodels.registry.evaluate import evaluate
from genmodels.registry.store import Registry
from genmodels.runs.records import Heartbeat, Result
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage.retry import retry_until_available

log = logging.getLogger("genmodels")

HEARTBEAT_SECONDS = 2.0  # minimum time between two heartbeats during an evaluation


def publish_when_available(run: Run, spec: ModelSpec, attempt: int) -> Result:
    """Call `publish_run` until no outage of the store or of the disk prevents it: a second call changes nothing."""
    return retry_until_available(lambda: publish_run(run, spec, attempt), _outage_reporter(run, attempt, spec))


def publish_run(run: Run, spec: ModelSpec, attempt: int) -> Result:
    """Evaluate the best checkpoint, and publish it if it passes its gate.

    A second call gives the same version and does not move the alias again.
    """
    report_progress = _progress_reporter(run, attempt, spec)
    candidates = list(run.manifests())
    wanted = spec.serve.gate
    needed = wanted is not None and wanted.metric in models.load(spec.family).evaluation_names
    while candidates:
        ref, manifest = gates.best(wanted, candidates)
        gate = None if needed else gates.check_gate(wanted, manifest.metrics)
        facts: dict[str, Any] = {"step": ref.step, "metrics": manifest.metrics, "gate": gate}
        if gate and not gate.passed:
            return _refused(facts)
        with checkpoint.scratch_folder() as name:
            folder = Path(name)
            try:
                checkpoint.fetch_serving(run.storage, run.checkpoint_prefix(ref), folder)
            except CheckpointError as error:
                log.warning("%s; the next best is published", error)
                candidates.remove((ref, manifest))
                continue
            probe.finite_probe(checkpoint.load_family(folder))  # before the slow evaluation: spoiled weights fail here
            began = time.monotonic()
            evaluation = _evaluate(run, ref, spec, manifest, folder, report_progress, needed=needed)
            seconds = time.monotonic() - began
            facts["metrics"] = manifest.metrics | {name: metric.value for name, metric in evaluation.metrics.items()}
            if needed:
                facts["gate"] = gate = gates.check_gate(wanted, facts["metrics"])
            if gate and not gate.passed:
                return _refused(facts)
            store = Registry(run.storage)
            version = store.publish(run, ref, manifest, folder, gate, spec.serve.pool)
        if evaluation.metrics:
            store.record_evaluation(version, evaluation, thorough=False, seconds=seconds, publication=True)
        store.promote(run.model, spec.serve.alias, version.version, f"published by job {run.job}", forward_only=True)
        return Result(outcome="succeeded", version=version.version, message=f"published as {version.name}", **facts)
    raise CheckpointError(f"{run.prefix}: no checkpoint is complete")


def _evaluate(
    run: Run,
    ref: CheckpointRef,
    spec: ModelSpec,
    manifest: Manifest,
    folder: Path,
    report_progress: Callable[[], None],
    *,
    needed: bool,
) -> EvaluationResult:
    """Return the evaluation of a checkpoint; without its data an empty one, unless the gate needs it."""
    try:
        return evaluate(run, ref, spec, manifest.lineage, folder, report_progress=report_progress)
    except DataError as error:
        if needed:
            raise
        log.warning("published without an evaluation: %s", error)
        return EvaluationResult()


def _refused(facts: dict[str, Any]) -> Result:
    return Result(outcome="failed", cause="gate", message=f"not published: {facts['gate'].reason}", **facts)


def _progress_reporter(run: Run, attempt: int, spec: ModelSpec) -> Callable[[], None]:
    """Report progress of the publication, and return a function that reports more progress."""
    steps = spec.train.max_steps
    last = Heartbeat(phase="publishing", step=steps, max_steps=steps)
    run.write_heartbeat(attempt, last)
    written = time.monotonic()

    def report_progress() -> None:
        nonlocal last, written
        if time.monotonic() - written >= HEARTBEAT_SECONDS:
            last = last.model_copy(update={"progress_count": last.progress_count + 1})
            run.write_heartbeat(attempt, last)
            written = time.monotonic()

    return report_progress


def _outage_reporter(run: Run, attempt: int, spec: ModelSpec) -> Callable[[StorageUnavailable], None]:
    """Return a callback that writes the reason of an outage into the heartbeat, if the storage takes it."""
    steps, count = spec.train.max_steps, itertools.count(1)

    def report_outage(outage: StorageUnavailable) -> None:
        heartbeat = Heartbeat(
            phase="publishing", step=steps, max_steps=steps, progress_count=-next(count), waiting=outage.reason
        )
        with contextlib.suppress(StorageError):
            run.write_heartbeat(attempt, heartbeat)

    return report_outage
