"""Driver of one attempt of one run: Ray Train's worker group, then gate and publish.

    python -m services.train --storage URL --job JOB --model MODEL --attempt N [--workers N]

It is started the same way everywhere: as a subprocess by `genmodels run`, as a Ray Job, as a RayJob on Kubernetes.
Its results go to storage (`heartbeat.json`, `result.json`); the dispatcher decides what comes next.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from genmodels.metrics import GATES
from genmodels.runs.jobs import Jobs
from genmodels.runs.logs import LogShipper
from genmodels.runs.metric_rows import training_seconds
from genmodels.runs.records import Result
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import begin_writing, open_storage
from genmodels.storage.retry import retry_until_available
from genmodels.training.attempt import work
from genmodels.training.group import Group
from services.cluster.logs import log_to_stderr
from services.cluster.settings import settings
from services.train import remote_publish
from services.train.control import DriverWatch
from services.train.failures import classify_failure
from services.train.publish import publish_when_available

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

log = logging.getLogger("genmodels")

# Timeout of a collective. It is long, for an outage of the store may last; the dispatcher detects a hanging worker.
COLLECTIVE_SECONDS = 24 * 3600


def drive(
    storage_url: str,
    job: str,
    model: str,
    attempt: int,
    workers: int | None = None,
    on_worker: bool = False,
    train: Callable[..., None] | None = None,
) -> Result:
    """Train, check the gate and publish. Each end is a `Result`, in storage before this returns.

    An attempt that was taken over writes no result, because the newer attempt reports on the run. Call this in the main
    thread of a process: the output of the process goes to storage as well.

    Args:
        workers: size of the group; default: the smallest that the spec allows.
        on_worker: publish on a node of the workers, not in this process.
        train: train the attempt, with the arguments of `_train`; default: in a worker group of its own.
    """
    began = time.time()
    storage = open_storage(storage_url, in_use=True)
    run = Run(storage, job, model)
    with LogShipper(run, attempt, "driver") as logs, DriverWatch(run, attempt, logs) as watch:
        watch.catch_sigterm()
        try:
            retry_until_available(lambda: begin_writing(storage))
            spec = retry_until_available(lambda: Jobs(storage).model_spec(job, model))
            if not retry_until_available(lambda: _complete(run, spec)):
                watch.training(spec.train.max_steps)
                try:
                    (train or _train)(storage_url, job, spec, attempt, workers or spec.world_sizes[0], watch)
                finally:
                    watch.trained()
            if not retry_until_available(lambda: _complete(run, spec)):
                result = retry_until_available(lambda: _stopped(run))
            elif on_worker:
                result = remote_publish.publish_on_worker(storage_url, job, model, attempt, watch.catch_sigterm)
            else:
                result = publish_when_available(run, spec, attempt)
            if result.gate:
                GATES.labels(spec.family, str(result.gate.passed).lower()).inc()
        except Exception as error:  # the dispatcher has to learn of each failure
            traceback.print_exc()
            result = retry_until_available(lambda: _killed(run, attempt)) or classify_failure(error)
        facts = retry_until_available(
            lambda: {"step": result.step or _reached_step(run, attempt), **_seconds(run, attempt, began)}
        )
        result = result.model_copy(update=facts)
        if result.cause != "superseded":
            retry_until_available(lambda: run.write_result(attempt, result))
        log.info("attempt %d of %s/%s: %s. %s", attempt, job, model, result.outcome, result.message)
    return result


def worker(config: dict[str, Any]) -> None:
    """Run one Ray Train worker."""
    work(open_storage(config["storage"], in_use=True), config["job"], config["model"], config["attempt"], ray_group())


def ray_group() -> Group:
    """Return this worker's place in its group; Ray has made the process group."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    return Group(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def connect(watch: DriverWatch) -> None:
    """Connect this process to Ray, if it is not connected."""
    # Detect a dead worker within a second, do not wait for a hanging worker, give up on a group that cannot be placed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # 30 by default
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(settings().start_timeout_seconds))
    # The dispatcher and `pre_stop` handle preemption: save the process of each group that looks for it, and its start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if not ray.is_initialized():
        # Each worker ships its own output to storage, so Ray need not send it to the driver.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)
    watch.catch_sigterm()


def trainer(
    function: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    workers: int,
    scratch: str,
    name: str,
    *,
    use_gpu: bool,
) -> TorchTrainer:
    """Return a trainer whose workers call a function. It retries and keeps nothing."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray retries nothing and keeps nothing: the recorder writes the checkpoints, the dispatcher retries.
    no_retries = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)  # type: ignore[call-arg]
    return TorchTrainer(
        function,
        train_loop_config=config,
        torch_config=TorchConfig("nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(name=name, storage_path=scratch, failure_config=no_retries),
    )


def _train(storage_url: str, job: str, spec: ModelSpec, attempt: int, workers: int, watch: DriverWatch) -> None:
    """Train an attempt in a worker group of its own."""
    config = {"storage": storage_url, "job": job, "model": spec.name, "attempt": attempt}
    connect(watch)
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as scratch:
        try:
            trainer(worker, config, workers, scratch, f"attempt-{attempt}", use_gpu=spec.scaling.use_gpu).fit()
        finally:
            ray.shutdown()


def _complete(run: Run, spec: ModelSpec) -> bool:
    return any(ref.step >= spec.train.max_steps for ref in run.checkpoints())


def _saved_step(run: Run) -> int:
    return max((ref.step for ref in run.checkpoints()), default=0)


def _reached_step(run: Run, attempt: int) -> int:
    """Return the last step that a failed attempt is known to have made, saved or not."""
    heartbeat = run.heartbeat(attempt)
    return max(_saved_step(run), heartbeat.step if heartbeat else 0)


def _killed(run: Run, attempt: int) -> Result | None:
    """Return the result of a failed attempt that was killed: rank 0 reads the command, and the driver sees it end."""
    kill = next((command for command in run.commands(attempt) if command.action == "kill"), None)
    return Result(outcome="failed", cause="infrastructure", message=f"killed: {kill.reason}") if kill else None


def _stopped(run: Run) -> Result:
    step = _saved_step(run)
    return Result(outcome="stopped", message=f"saved at step {step} and stopped", step=step)


def _seconds(run: Run, attempt: int, began: float) -> dict[str, float]:
    training, startup = training_seconds(run), 0.0
    start = run.attempt_start(attempt)
    if start:
        startup = max(0.0, datetime.fromisoformat(start.time).timestamp() - began)
    return {"training_seconds": training, "startup_seconds": startup}


def main() -> None:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Train one model of a job, check its gate and publish it.")
    for name in ("storage", "job", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--workers", type=int, help="size of the group; default: the smallest that the spec allows")
    parser.add_argument("--publish-on-worker", action="store_true", help="publish on a node where a worker ran")
    options = parser.parse_args()
    drive(options.storage, options.job, options.model, options.attempt, options.workers, options.publish_on_worker)


if __name__ == "__main__":
    main()
