"""Driver of one attempt of one run: Ray Train's worker group, then gate and publish.

    python -m services.train --storage URL --job JOB --model MODEL --attempt N [--workers N]

It is started the same way everywhere: as a subprocess by `genmodels run`, as a Ray Job, as a RayJob on Kubernetes.
What it learns goes to storage (`heartbeat.json`, `result.json`); the dispatcher decides what comes next.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from genmodels import checkpoint, models
from genmodels.checkpoint import Manifest, Place
from genmodels.errors import (
    CheckpointError,
    DamagedObject,
    DataError,
    GenmodelsError,
    StorageError,
    StorageUnavailable,
    Superseded,
    TrainingDiverged,
)
from genmodels.family import Findings
from genmodels.metrics import GATES
from genmodels.registry import evaluations
from genmodels.registry import store as registry
from genmodels.registry.evaluate import evaluate
from genmodels.registry.store import Registry
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Heartbeat, Result, Run, patiently
from genmodels.spec.sections import ModelSpec
from genmodels.storage import begin_writing, open_storage
from genmodels.storage.disk import outage_of_disk
from genmodels.training.attempt import stored_model, work
from genmodels.training.loop import Group
from services.train.control import DriverWatch

log = logging.getLogger("genmodels")

BEAT_SECONDS = 1.0  # at least, between two signs of progress while a model is evaluated
START_SECONDS = 120.0  # for the group to be placed; GENMODELS_START_TIMEOUT_S overrides it, e.g. where nodes autoscale
# For one collective. A worker that hangs is found by its ticks, and an outage of the store may last: long.
COLLECTIVE_SECONDS = 24 * 3600
NEVER_PLACED = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")  # Ray's; private, so by name
# What the other ranks see when one of them is killed; none of it is the user's fault.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connect timeout",
    "Timed out waiting",
    "Connection was likely closed",  # DistNetworkError, of the store that a group meets at
    "remote process exit",  # NCCL
)


def drive(storage_url: str, job: str, model: str, attempt: int, workers: int | None = None) -> Result:
    """Train, judge and publish; every way to end is a `Result`, in storage before this returns.

    Only an attempt that was taken over leaves none: what became of the run is the newer one's to say. To be called in
    the main thread of a process of its own, whose output goes to storage as well.

    Args:
        workers: in the group; default: the fewest that the spec allows.
    """
    began = time.time()
    storage = open_storage(storage_url, in_use=True)
    run = Run(storage, job, model)
    with LogShipper(run, attempt, "driver") as logs, DriverWatch(run, attempt, logs) as watch:
        watch.catch_sigterm()
        try:
            patiently(lambda: begin_writing(storage))
            spec = patiently(lambda: stored_model(storage, job, model))
            if not patiently(lambda: _complete(run, spec)):
                watch.training(spec.train.max_steps)
                try:
                    _train(storage_url, job, spec, attempt, workers or spec.world_sizes[0], watch)
                finally:
                    watch.trained()
            # An outage of the store or of the disk is waited for: what is done twice here changes nothing.
            tell = _teller(run, attempt, spec)
            result = patiently(lambda: _publish(run, spec, attempt) if _complete(run, spec) else _left(run), tell)
            if result.gate:
                GATES.labels(spec.family, str(result.gate.passed).lower()).inc()
        except Exception as error:  # whatever it was, the dispatcher has to learn of it
            traceback.print_exc()
            result = _failure(error)
            if watch.killed:
                result = Result(outcome="failed", cause="infrastructure", message=f"killed: {watch.killed.reason}")
        facts = patiently(lambda: {"step": result.step or _saved_step(run), **_seconds(run, attempt, began)})
        result = result.model_copy(update=facts)
        if result.cause != "superseded":
            patiently(lambda: run.end(attempt, result))
        log.info("attempt %d of %s/%s: %s. %s", attempt, job, model, result.outcome, result.message)
    return result


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; Ray has made the process group."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    work(open_storage(config["storage"], in_use=True), config["job"], config["model"], config["attempt"], group)


def _train(storage_url: str, job: str, spec: ModelSpec, attempt: int, workers: int, watch: DriverWatch) -> None:
    # Detect a dead worker within a second, wait for no hanging one; give up on a group that cannot be placed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # 30 by default
    start_seconds = os.environ.get("GENMODELS_START_TIMEOUT_S") or str(START_SECONDS)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", start_seconds)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = spec.scaling
    # Ray retries nothing and keeps nothing: checkpoints are the recorder's, retries the dispatcher's.
    no_retries = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)  # type: ignore[call-arg]
    with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as scratch:
        # Each worker brings its own output to storage: it need not come this way as well.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)
        watch.catch_sigterm()
        try:
            TorchTrainer(
                worker,
                train_loop_config={"storage": storage_url, "job": job, "model": spec.name, "attempt": attempt},
                torch_config=TorchConfig("nccl" if scaling.use_gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=scaling.use_gpu,
                    resources_per_worker={"CPU": 1, "GPU": 1} if scaling.use_gpu else {"CPU": 1},
                ),
                run_config=RunConfig(name=f"attempt-{attempt}", storage_path=scratch, failure_config=no_retries),
            ).fit()
        finally:
            ray.shutdown()


def _complete(run: Run, spec: ModelSpec) -> bool:
    return any(place.step >= spec.train.max_steps for place in run.checkpoints())


def _saved_step(run: Run) -> int:
    return max((place.step for place in run.checkpoints()), default=0)


def _left(run: Run) -> Result:
    step = _saved_step(run)
    return Result(outcome="left", message=f"saved at step {step} and left", step=step)


def _publish(run: Run, spec: ModelSpec, attempt: int) -> Result:
    """Evaluate the best checkpoint, and publish it if it passes its gate.

    Doing it twice gives the same version and no second move.
    """
    tick = _ticker(run, attempt, spec)
    candidates = list(run.manifests())
    wanted = spec.serve.gate
    needed = wanted is not None and wanted.metric in models.load(spec.family).evaluation_names
    while candidates:
        place, manifest = registry.best(wanted, candidates)
        gate = None if needed else registry.judge(wanted, manifest.metrics)
        facts: dict[str, Any] = {"step": place.step, "metrics": manifest.metrics, "gate": gate}
        if gate and not gate.passed:
            return _refused(facts)
        with checkpoint.scratch_folder() as name:
            folder = Path(name)
            try:
                checkpoint.fetch(run.storage, run.checkpoint_prefix(place), folder)
            except CheckpointError as error:
                log.warning("%s; the next best is published", error)
                candidates.remove((place, manifest))
                continue
            registry.finite_probe(checkpoint.load_family(folder))  # nothing else of spoiled weights is worth a look
            began = time.monotonic()
            found = _evaluate(run, place, spec, manifest, folder, tick, needed=needed)
            seconds = time.monotonic() - began
            facts["metrics"] = manifest.metrics | {name: measure.value for name, measure in found.measures.items()}
            if needed:
                facts["gate"] = gate = registry.judge(wanted, facts["metrics"])
            if gate and not gate.passed:
                return _refused(facts)
            store = Registry(run.storage)
            version = store.publish(run, place, manifest, folder, gate)
        if found.measures:
            evaluations.record(store, version, found, thorough=False, seconds=seconds, publication=True)
        store.promote(run.model, spec.serve.alias, version.version, f"published by job {run.job}", forward_only=True)
        return Result(outcome="succeeded", version=version.version, message=f"published as {version.name}", **facts)
    raise CheckpointError(f"{run.prefix}: no checkpoint is whole")


def _evaluate(
    run: Run,
    place: Place,
    spec: ModelSpec,
    manifest: Manifest,
    folder: Path,
    tick: Callable[[], None],
    *,
    needed: bool,
) -> Findings:
    """What is measured of a checkpoint; nothing where its data has gone, unless the gate needs it."""
    try:
        return evaluate(run, place, spec, manifest.lineage, folder, tick=tick)
    except DataError as error:
        if needed:
            raise
        log.warning("published without an evaluation: %s", error)
        return Findings()


def _refused(facts: dict[str, Any]) -> Result:
    return Result(outcome="failed", cause="gate", message=f"not published: {facts['gate'].reason}", **facts)


def _ticker(run: Run, attempt: int, spec: ModelSpec) -> Callable[[], None]:
    """Shows now, and whenever it is called, that publishing gets on."""
    steps = spec.train.max_steps
    last = Heartbeat(phase="publishing", step=steps, max_steps=steps)
    run.beat(attempt, last)
    beaten = time.monotonic()

    def tick() -> None:
        nonlocal last, beaten
        if time.monotonic() - beaten >= BEAT_SECONDS:
            last = last.model_copy(update={"tick": last.tick + 1})
            run.beat(attempt, last)
            beaten = time.monotonic()

    return tick


def _teller(run: Run, attempt: int, spec: ModelSpec) -> Callable[[StorageUnavailable], None]:
    """Shows, as far as storage takes it, what publishing waits for."""
    steps, ticks = spec.train.max_steps, itertools.count(1)

    def tell(outage: StorageUnavailable) -> None:
        beat = Heartbeat(phase="publishing", step=steps, max_steps=steps, tick=-next(ticks), waiting=outage.reason)
        with contextlib.suppress(StorageError):
            run.beat(attempt, beat)

    return tell


def _failure(error: BaseException) -> Result:
    """The class of a failure. What one rank says of its own comes before what the others saw of its end."""
    error = _original(error)
    causes = [_original(cause) for cause in getattr(error, "worker_failures", {}).values()] or [error]
    for cause in causes:
        match cause:
            case TrainingDiverged():
                return Result(outcome="failed", cause="diverged", message=str(cause), step=cause.step)
            case Superseded():
                return Result(outcome="failed", cause="superseded", message=str(cause))
        if outage := outage_of_disk(cause):
            return Result(outcome="failed", cause="storage", message=str(outage))
        match cause:
            # The next attempt passes over a damaged checkpoint; another object may have been mended by then.
            case CheckpointError() | DamagedObject() | StorageError():
                return Result(outcome="failed", cause="infrastructure", message=str(cause))
            case GenmodelsError():
                return Result(outcome="failed", cause="user", message=str(cause))
    if any(map(_is_out_of_memory, causes)):
        message = "out of memory; lower train.batch_size or the size of the model"
        return Result(outcome="failed", cause="out of memory", message=message)
    if type(error).__name__ in NEVER_PLACED:
        said = _one_line(error).partition(". ")[0]
        return Result(outcome="failed", cause="no workers", message=f"the workers were not placed ({said})")
    bug = next((cause for cause in causes if not _is_loss(cause)), None)
    if bug is None:
        return Result(outcome="failed", cause="infrastructure", message=f"a worker was lost ({_one_line(causes[0])})")
    return Result(outcome="failed", cause="user", message=_one_line(bug))


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError on a GPU, ray.exceptions.OutOfMemoryError; on the CPU torch raises a plain RuntimeError
    named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return named or "can't allocate memory" in str(error)


def _is_loss(error: BaseException) -> bool:
    """Whether a process or the way to it went away."""
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("ray."):
        return True
    return any(sign in str(error) for sign in LOST_PEER)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _original(error: BaseException) -> BaseException:
    """What Ray wrapped."""
    inner = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None)
    return _original(inner) if isinstance(inner, BaseException) else error


def _seconds(run: Run, attempt: int, began: float) -> dict[str, float]:
    training, startup = run.training_seconds(), 0.0
    start = run.start_of(attempt)
    if start:
        startup = max(0.0, datetime.fromisoformat(start.time).timestamp() - began)
    return {"training_seconds": training, "startup_seconds": startup}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description="Train one model of a job, judge it and publish it.")
    for name in ("storage", "job", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--workers", type=int, help="in the group; default: the fewest that the spec allows")
    options = parser.parse_args()
    drive(options.storage, options.job, options.model, options.attempt, options.workers)


if __name__ == "__main__":
    main()
