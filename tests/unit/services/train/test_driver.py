"""Test the driver of one attempt: the class of a failure, and the published version. No Ray is started."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from genmodels import checkpoint
from genmodels.checkpoint import WEIGHTS, CheckpointRef, Manifest
from genmodels.errors import (
    CheckpointError,
    DataError,
    GenmodelsError,
    ModelNotFound,
    RequestError,
    SpecError,
    StorageError,
    StorageUnavailable,
    Superseded,
    TrainingDiverged,
)
from genmodels.registry.store import Registry
from genmodels.runs.control import KILLED
from genmodels.runs.log_lines import log_lines
from genmodels.runs.records import Heartbeat, Result
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import open_storage
from services.local.platform import submit
from services.train import control, failures
from services.train.control import DriverWatch
from services.train.driver import _seconds, connect
from services.train.failures import classify_failure
from services.train.publish import publish_run
from tests.support import storages
from tests.support.paths import ROOT
from tests.support.published_models import build, write
from tests.support.run_parts import write_metrics
from tests.support.storages import LINEAGE, MemoryStorage, upload
from tests.support.tiny_jobs import job, make_data, model

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:552] Connection closed by peer [127.0.0.1]:47315"
)


class ranks(Exception):
    """Stand in for Ray's WorkerGroupError, with the error of each failed rank."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nTraceback ...")
        self.worker_failures = {int(rank.removeprefix("rank")): failure for rank, failure in failures.items()}


def actor_died() -> Exception:
    """Return the error of a killed worker, wrapped twice as by Ray."""
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())


def startup_timeout() -> Exception:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(WorkerGroupStartupTimeoutError(2))


def never_enough() -> Exception:
    from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(InsufficientClusterResourcesError("Insufficient cluster resources\nmore"))


def ray_out_of_memory() -> Exception:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.", failure=OutOfMemoryError("the node's memory"))


def ray_error(name: str, message: str) -> Exception:
    from ray import exceptions

    error: Exception = getattr(exceptions, name)(message)
    return error


def controller_of_workers() -> Exception:
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(ranks(rank0=GLOO, rank1=SHORT))


def full(error: Exception, number: int = errno.ENOSPC) -> Exception:
    """Return `error`, caused by an error of the disk."""
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def task_error(cause: Exception) -> Exception:
    """Return the error that Ray raises for a failed call of an actor; its text has colours."""
    from ray.exceptions import RayTaskError

    text = f"Traceback (most recent call last):\n  File x\n{cause!r}"
    return RayTaskError("execute", text, cause, proctitle="ray::execute", pid=1, ip="10.0.0.4").as_instanceof_cause()


def wrapped(cause: Exception) -> Exception:
    """Return an error of a rank as Ray hands it on: in a user exception, in a task's error, in the controller's."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(task_error(UserExceptionWithTraceback(cause, "Traceback ...")))


REFUSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/device.cc:93] connect [10.0.0.4]:4711: \x1b[36mConnection refused"
)
RUST = "Error while serializing: I/O error: No space left on device (os error 28)"
ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 4000 bytes")
DIVERGED = TrainingDiverged(8, "model: loss = nan")
SHORT = DataError("data.path: too short")
LOST = "a worker was lost "


@pytest.mark.parametrize(
    ("make", "cause", "message"),
    [
        (lambda: ranks(rank0=DIVERGED, rank1=DIVERGED), "diverged", str(DIVERGED)),
        (lambda: ranks(rank0=DIVERGED, rank1=GLOO), "diverged", str(DIVERGED)),
        (lambda: ranks(rank0=GLOO, rank1=DIVERGED), "diverged", str(DIVERGED)),
        (lambda: ranks(rank0=GLOO, rank1=SHORT), "user", "data.path: too short"),
        (lambda: ranks(rank0=SHORT, rank1=GLOO), "user", "data.path: too short"),
        (controller_of_workers, "user", "data.path: too short"),
        (lambda: SpecError("width: wrong", "depth: wrong"), "user", "width: wrong\ndepth: wrong"),
        (lambda: ranks(rank0=Superseded("overtaken"), rank1=GLOO), "superseded", "overtaken"),
        (lambda: ranks(rank0=StorageUnavailable("s3: no answer")), "storage", "s3: no answer"),
        (lambda: ranks(rank0=GLOO, rank1=StorageUnavailable("s3: no answer")), "storage", "s3: no answer"),
        (lambda: StorageUnavailable("s3: no answer"), "storage", "s3: no answer"),
        (
            lambda: full(DataError("data.path: cannot be read")),
            "storage",
            "the disk of this machine is full: [Errno 28]",
        ),
        (lambda: full(SpecError("x"), errno.EDQUOT), "storage", "the disk of this machine is full: [Errno 122]"),
        (lambda: full(CheckpointError("x"), errno.EIO), "storage", "the disk of this machine fails: [Errno 5]"),
        (lambda: ranks(rank0=GLOO, rank1=full(ValueError("x"))), "storage", "the disk of this machine is full: "),
        (lambda: SafetensorError(RUST), "storage", "the disk of this machine is full: Error while serializing"),
        (lambda: full(DataError("data.path: cannot be read"), errno.EACCES), "user", "data.path: cannot be read"),
        (lambda: full(DataError("no file"), errno.ENOENT), "user", "no file"),
        (lambda: full(DataError("no answer"), errno.ECONNRESET), "user", "no answer"),
        (lambda: StorageError("s3: refused (400 BadDigest)"), "infrastructure", "s3: refused (400 BadDigest)"),
        (lambda: ranks(rank0=GLOO, rank1=CheckpointError("a: missing")), "infrastructure", "a: missing"),
        (lambda: ranks(rank1=actor_died()), "infrastructure", LOST + "(ActorDiedError: "),
        (lambda: ranks(rank0=GLOO, rank1=actor_died()), "infrastructure", LOST + "(ActorDiedError: "),
        (lambda: ranks(rank0=GLOO), "infrastructure", LOST + "(RuntimeError: Connection closed by peer [127."),
        (lambda: task_error(ValueError("shapes differ")), "user", "ValueError: shapes differ"),
        (lambda: wrapped(ValueError("\x1b[31mshapes\x1b[0m differ")), "user", "ValueError: shapes differ"),
        (lambda: wrapped(SHORT), "user", "data.path: too short"),
        (lambda: wrapped(torch.OutOfMemoryError("CUDA")), "out of memory", "out of memory; lower"),
        (lambda: ranks(rank0=GLOO, rank1=wrapped(KeyError("h"))), "user", "KeyError: 'h'"),
        (
            lambda: wrapped(REFUSED),
            "infrastructure",
            "a worker refused the connection of another worker (RuntimeError: connect [10.0.0.4]:4711: Connection ref",
        ),
        (
            lambda: torch.distributed.DistNetworkError("The client socket has timed out after 60000ms"),
            "infrastructure",
            "a connection between workers timed out (DistNetworkError: The client socket",
        ),
        (lambda: ValueError("Connection refused"), "user", "ValueError: Connection refused"),
        (lambda: ray_error("UserCodeException", "odd"), "user", "UserCodeException: odd"),
        (startup_timeout, "no workers", "the workers were not placed (WorkerGroupStartupTimeoutError: "),
        (never_enough, "no workers", "the workers were not placed (InsufficientClusterResourcesError: Insufficient"),
        (lambda: ConnectionError("no Ray there"), "infrastructure", LOST + "(ConnectionError: no Ray there)"),
        (lambda: ranks(rank0=torch.OutOfMemoryError("CUDA")), "out of memory", "out of memory; lower"),
        (lambda: ranks(rank0=GLOO, rank1=MemoryError()), "out of memory", "out of memory; lower"),
        (lambda: ranks(rank0=ALLOCATOR, rank1=GLOO), "out of memory", "out of memory; lower train"),
        (lambda: ranks(rank0=ray_out_of_memory(), rank1=GLOO), "out of memory", "out of memory; lower"),
        (lambda: ranks(rank0=KeyError("h"), rank1=GLOO), "user", "KeyError: 'h'"),
        (lambda: ranks(rank0=GLOO, rank1=KeyError("h")), "user", "KeyError: 'h'"),
        (lambda: ValueError("shapes differ\nlong story"), "user", "ValueError: shapes differ"),
        (lambda: ValueError("\n\nshapes differ"), "user", "ValueError: shapes differ"),
        (lambda: AssertionError(), "user", "AssertionError:"),
    ],
)
def test_the_class_of_a_failure(make: Callable[[], Exception], cause: str, message: str) -> None:
    result = classify_failure(make())
    assert (result.outcome, result.cause) == ("failed", cause)
    assert result.message.startswith(message)
    assert result.step == (8 if cause == "diverged" else 0)
    if cause not in ("user", "diverged"):
        assert "\n" not in result.message
    assert Result.model_validate(result.model_dump(mode="json")) == result


def test_ray_still_has_the_names_that_failures_are_classified_by() -> None:
    """`classify_failure` depends on these names."""
    import ray.exceptions
    import ray.train.v2._internal.exceptions
    import ray.train.v2.api.exceptions
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    assert WorkerGroupError("failed", {1: DIVERGED}).worker_failures == {1: DIVERGED}
    assert ControllerError(DIVERGED).controller_failure is DIVERGED
    assert actor_died().health_check_failure.__class__.__module__ == "ray.exceptions"  # type: ignore[attr-defined]
    modules = ray.exceptions, ray.train.v2._internal.exceptions, ray.train.v2.api.exceptions
    known = {name for module in modules for name in vars(module)}
    assert known >= failures.LOST_PROCESS | failures.NEVER_PLACED
    assert classify_failure(WorkerGroupError("failed", {0: GLOO, 1: DIVERGED})).cause == "diverged"


def test_ray_still_has_the_settings_of_a_worker_group(monkeypatch: pytest.MonkeyPatch, watch: DriverWatch) -> None:
    import ray
    from ray.train.v2._internal import constants

    names = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR")}
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "127.0.0.1:1"})
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(watch, "catch_sigterm", lambda: None)
    connect(watch)
    settings = {name for name in os.environ if name.startswith("RAY_TRAIN_")}
    assert len(settings) == 3
    assert settings <= names


def test_errors_that_ray_wrapped_in_each_other() -> None:
    from ray.exceptions import RayTaskError

    def wrap(cause: Exception) -> Exception:
        return RayTaskError("f", "traceback", cause)

    error: Exception = ValueError("the ünïcode 数 is wrong")
    for _ in range(5):
        error = wrap(error)
    result = classify_failure(error)
    assert (result.cause, result.message) == ("user", "ValueError: the ünïcode 数 is wrong")
    inner = wrap(ValueError())
    outer = wrap(inner)
    inner.cause = outer  # type: ignore[attr-defined]
    assert classify_failure(outer).message.startswith("RayTaskError")


def test_a_message_can_be_shown_and_stored() -> None:
    for error in (RuntimeError("\x1b]0;title\x07 \udce9 \x9b"), DataError("\x1b[2J\udce9"), RuntimeError("x" * 10**6)):
        message = classify_failure(error).message
        assert all(letter.isprintable() for letter in message)
        assert 0 < len(message) < 3000
        message.encode()


@pytest.mark.parametrize(
    "error",
    [
        TrainingDiverged(7, "generator: loss = nan"),
        SpecError("a: wrong", "b: wrong"),
        Superseded("attempt 2 took over"),
        DataError("too small"),
        RequestError("wrong", param="n", status=413, code="too_large"),
        ModelNotFound("no model 'x'"),
        ModelNotFound("no verb", param=None, status=400, code=None),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_errors_cross_process_borders(error: GenmodelsError, through: Callable[[Any], Any]) -> None:
    copied = through(error)
    assert type(copied) is type(error)
    assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))


# ---- publishing


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    entry = model(make_data(tmp_path_factory.mktemp("data")), "minigpt", max_steps=3)
    return job("tiny", entry | {"serve": {"gate": {"metric": "val_loss", "max": 2.0}}}).models[0]


def save(run: Run, step: int, val_loss: float, seed: int | None = None) -> CheckpointRef:
    """Save a complete checkpoint of a real model."""
    ref = CheckpointRef(attempt=1, step=step)
    with checkpoint.scratch_folder() as name:
        folder = Path(name)
        write(folder, *build("minigpt", seed=step if seed is None else seed))
        files = checkpoint.describe_files(folder)
        manifest = Manifest(step=step, samples=step, metrics={"val_loss": val_loss}, lineage=LINEAGE, files=files)
        upload(run.storage, run.checkpoint_prefix(ref), folder, manifest, lambda: None)
    return ref


def trained(*losses: float) -> Run:
    run = Run(MemoryStorage(), "tiny-00000000", "minigpt")
    run.start_attempt(1, None, 1)
    for step, loss in enumerate(losses, 1):
        save(run, step, loss)
    return run


def test_the_best_is_published_and_promoted(spec: ModelSpec) -> None:
    run = trained(1.9, 1.5, 1.7)
    result = publish_run(run, spec, 1)
    assert (result.outcome, result.version, result.step, result.metrics) == ("succeeded", 1, 2, {"val_loss": 1.5})
    assert result.gate is not None
    assert (result.gate.reason, result.message) == ("val_loss 1.5 is <= 2", "published as minigpt@1")
    version = Registry(run.storage).resolve("minigpt")
    assert (version.version, version.checkpoint, version.gate) == (1, CheckpointRef(attempt=1, step=2), result.gate)
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert (heartbeat.phase, heartbeat.step) == ("publishing", 3)


def test_publishing_twice_changes_nothing_and_undoes_no_rollback(spec: ModelSpec) -> None:
    run = trained(1.9)
    first = publish_run(run, spec, 1)
    save(run, 2, 1.2)
    assert publish_run(run, spec, 1).version == 2
    Registry(run.storage).promote("minigpt", "production", 1, "a person rolls back")
    assert publish_run(run, spec, 2).version == 2
    store = Registry(run.storage)
    assert (store.versions("minigpt"), store.resolve("minigpt").version, first.version) == ([1, 2], 1, 1)


@pytest.mark.parametrize("losses", [(2.5, 2.25), (math.nan,), (-math.inf, math.nan)])
def test_what_fails_its_gate_is_not_published(spec: ModelSpec, losses: tuple[float, ...]) -> None:
    run = trained(*losses)
    result = publish_run(run, spec, 1)
    assert (result.outcome, result.cause, result.version) == ("failed", "gate", None)
    assert result.message.startswith("not published: val_loss ")
    assert result.message.endswith(" is not <= 2")
    assert run.storage.list("models/") == []


def test_without_a_gate_the_last_is_published(spec: ModelSpec) -> None:
    run = trained(1.0, 9.0)
    result = publish_run(run, spec.model_copy(update={"serve": spec.serve.model_copy(update={"gate": None})}), 1)
    assert (result.outcome, result.step, result.gate) == ("succeeded", 2, None)


def test_a_damaged_best_gives_way_to_the_next(spec: ModelSpec) -> None:
    run = trained(1.9, 1.5, 1.7)
    run.storage.put(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=2))}/{WEIGHTS}", b"spoiled")
    result = publish_run(run, spec, 1)
    assert (result.outcome, result.step, result.metrics) == ("succeeded", 3, {"val_loss": 1.7})
    for step in (1, 3):
        run.storage.delete(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=step))}/{WEIGHTS}")
    with pytest.raises(CheckpointError, match="runs/tiny-00000000/minigpt: no checkpoint is complete"):
        publish_run(run, spec, 1)


def test_seconds_are_of_the_chain_and_of_this_start() -> None:
    run = Run(MemoryStorage(), "j", "m")
    assert _seconds(run, 1, 100.0) == {"training_seconds": 0.0, "startup_seconds": 0.0}
    start = run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": 1, "seconds": 2.5}])
    began = datetime.fromisoformat(start.time).timestamp() - 14.0
    assert _seconds(run, 1, began) == {"training_seconds": 2.5, "startup_seconds": pytest.approx(14.0)}
    assert _seconds(run, 1, began + 60)["startup_seconds"] == 0.0, "the clocks of two machines differ"
    assert _seconds(run, 2, began)["startup_seconds"] == 0.0


# ---- the watch of the driver while Ray has the main thread


class Ended(Exception):
    """Stand in for the end of the process."""


class Logs:
    """Stand in for LogShipper, without a change to this process's streams."""

    def __init__(self) -> None:
        self.flushed: list[float] = []

    def flush(self, seconds: float, ended: bool = False) -> bool:
        self.flushed.append(seconds)
        return True


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> DriverWatch:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(control, "FENCE_SECONDS", 0.0)
    monkeypatch.setattr(control, "RANK_0_SECONDS", 0.0)
    return DriverWatch(Run(MemoryStorage(), "j", "m"), 1, Logs())


def heartbeat(run: Run) -> Heartbeat:
    result = run.heartbeat(1)
    assert result is not None
    return result


def test_the_driver_writes_heartbeats_until_rank_0_does(watch: DriverWatch) -> None:
    run = watch.run
    watch.look()
    assert run.heartbeat(1) is None
    watch.training(max_steps=9)
    assert heartbeat(run) == Heartbeat(phase="starting", max_steps=9)
    for count in (1, 2):
        watch.look()
        assert heartbeat(run).progress_count == count
    of_rank_0 = Heartbeat(phase="starting", max_steps=9, progress_count=1)
    run.write_heartbeat(1, of_rank_0)
    for _ in range(2):
        watch.look()
        assert heartbeat(run) == of_rank_0


def test_a_driver_whose_attempt_was_taken_over_ends_without_a_result(watch: DriverWatch) -> None:
    watch.training(max_steps=9)
    watch.look()
    watch.run.start_attempt(2, None, 1)
    with pytest.raises(Ended, match=str(control.SUPERSEDED)):
        watch.look()
    assert watch.run.result(1) is None
    assert watch.logs.flushed  # type: ignore[attr-defined]


def test_a_group_that_has_not_begun_leaves_at_once(watch: DriverWatch) -> None:
    run = watch.run
    run.start_attempt(1, None, 1)
    storages.save(run, 1, 4)
    watch.training(max_steps=9)
    run.send_command("stop", 2, "for another")
    watch.look()
    run.send_command("stop", 1, "preempted")
    with pytest.raises(Ended, match="0"):
        watch.look()
    result = run.result(1)
    assert result is not None
    assert (result.outcome, result.cause, result.step) == ("stopped", None, 4)
    assert result.message == "stopped before its workers started; continues from step 4"


def test_a_group_that_has_begun_leaves_by_itself(watch: DriverWatch) -> None:
    watch.training(max_steps=9)
    watch.run.write_heartbeat(1, Heartbeat(phase="training", step=3))
    watch.run.send_command("stop", 1, "preempted")
    for _ in range(2):
        watch.look()
    assert watch.should_stop.is_set()
    assert watch.run.result(1) is None


def test_while_rank_0_works_the_driver_rests_unless_it_was_told_to_end(
    watch: DriverWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RANK_0_SECONDS", 1000.0)
    watch.training(max_steps=9)
    watch.run.write_heartbeat(1, Heartbeat(phase="training", step=3))
    watch.look()  # and learn that rank 0 works
    watch.run.send_command("stop", 2, "for another")
    assert not watch.look()
    watch.terminated.set()
    assert watch.look()
    assert [command.reason for command in watch.run.commands(1)] == ["the driver received SIGTERM"]


def test_sigterm_in_training_is_a_command_to_leave(watch: DriverWatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        watch.catch_sigterm()
        signal.raise_signal(signal.SIGTERM)
        watch.look()
        assert watch.run.commands() == []  # there is nothing to leave yet, or no longer
        watch.training(max_steps=9)
        watch.run.write_heartbeat(1, Heartbeat(phase="training", step=3))
        for _ in range(2):
            watch.look()
    finally:
        signal.signal(signal.SIGTERM, before)
    (command,) = watch.run.commands(1)
    assert (command.action, command.then, command.reason) == ("stop", "queued", "the driver received SIGTERM")
    assert watch.should_stop.is_set()


def test_a_sigterm_after_a_command_adds_none(watch: DriverWatch) -> None:
    watch.training(max_steps=9)
    watch.run.write_heartbeat(1, Heartbeat(phase="training", step=3))
    watch.run.send_command("stop", 1, "preempted")
    watch.terminated.set()
    for _ in range(2):
        watch.look()
    assert [command.reason for command in watch.run.commands(1)] == ["preempted"]
    assert watch.should_stop.is_set()


def test_after_training_nothing_is_looked_after(watch: DriverWatch) -> None:
    watch.training(max_steps=9)
    watch.trained()
    publishing = Heartbeat(phase="publishing", step=9)
    watch.run.write_heartbeat(1, publishing)
    watch.run.send_command("stop", 1, "too late")
    watch.run.start_attempt(2, None, 1)
    watch.look()
    assert heartbeat(watch.run) == publishing


@pytest.mark.parametrize("ended", [False, True])
def test_a_kill_command_ends_a_process_that_has_not_ended_by_then(
    watch: DriverWatch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ended: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    watch.training(max_steps=9)
    watch.kill_seconds = 0.1
    watch.run.send_command("kill", 1, "cancel --now", then="cancelled")
    watch.look()
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    if ended:
        watch.trained()  # does not wait: the ranks end first, and their failure can be reported
        watch.__exit__()
    for timer in timers:
        timer.join()
    assert codes == ([] if ended else [KILLED])
    assert watch.killed.is_set()
    stderr = capfd.readouterr().err
    assert stderr.startswith("Killed: cancel --now. The stacks of all threads:\n")
    main = stderr.partition("Thread MainThread:\n")[2].partition("\nThread ")[0]
    assert "in test_a_kill_command_ends_a_process" in main, "the innermost frames, whatever the number of threads"
    watch.look()
    assert capfd.readouterr().err == "", "the command was read once"


# ---- a driver process; a function that waits replaces Ray

DRIVER = """
import os, sys, time
from genmodels.runs.records import Heartbeat
from services.train import control, driver
control.FENCE_SECONDS = 0.1
def _train(storage_url, job, spec, attempt, workers, watch):
    print("workers:", workers)
    if {body!r} == "lost":
        watch.run.write_heartbeat(attempt, Heartbeat(phase="training", step=812, max_steps=900))
        raise ConnectionError("a peer")
    if {body!r} == "killed":
        watch.look = lambda: False  # rank 0 reads the command and ends
        watch.run.send_command("kill", attempt, "no progress for 120 s")
        raise ConnectionError("a peer")
    if {body!r} == "overtaken":
        watch.run.start_attempt(attempt + 1, None, 1)
    time.sleep(60)
driver._train = _train
driver.main()
"""


def drive(tmp_path: Path, data: Path, body: str, *options: str, signals: int | None = None) -> tuple[Run, int, float]:
    """Run a driver; return the run, the exit code, and the seconds from the signal to the end."""
    storage = open_storage(f"file://{tmp_path}")
    name = submit(storage, job("driven", model(data, "minigpt") | {"scaling": {"num_workers": 3}}))
    run = Run(storage, name, "minigpt")
    command = [sys.executable, "-c", DRIVER.format(body=body), "--storage", storage.url, "--job", name]
    process = subprocess.Popen([*command, "--model", "minigpt", "--attempt", "1", *options], cwd=ROOT)
    try:
        deadline, began = time.monotonic() + 60, time.monotonic()
        while signals and run.heartbeat(1) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if signals:
            process.send_signal(signals)
            began = time.monotonic()
        return run, process.wait(60), time.monotonic() - began
    finally:
        process.kill()
        process.wait()


def log(run: Run) -> list[str]:
    return [line.line for line in log_lines(run, "driver")]


@pytest.mark.slow
def test_a_driver_ended_by_sigterm_leaves_a_result_and_its_log(tmp_path: Path) -> None:
    run, code, seconds = drive(tmp_path, make_data(tmp_path), "wait", "--workers", "2", signals=signal.SIGTERM)
    assert code == 0
    assert seconds < 10
    result = run.result(1)
    assert result is not None
    assert (result.outcome, result.step) == ("stopped", 0)
    assert [command.reason for command in run.commands(1)] == ["the driver received SIGTERM"]
    assert log(run)[0] == "workers: 2"
    assert log(run)[-1].endswith("stopped before its workers started; continues from step 0")


@pytest.mark.slow
def test_a_driver_ends_when_it_is_superseded(tmp_path: Path) -> None:
    run, code, _ = drive(tmp_path, make_data(tmp_path), "overtaken")
    assert code == control.SUPERSEDED
    assert run.result(1) is None
    assert run.commands() == []


def test_a_failure_is_in_result_and_log(tmp_path: Path) -> None:
    run, code, _ = drive(tmp_path, make_data(tmp_path), "lost")
    assert code == 0
    result = run.result(1)
    assert result is not None
    assert (result.outcome, result.cause, result.step) == ("failed", "infrastructure", 812)
    assert log(run)[0] == "workers: 3"
    assert "ConnectionError: a peer" in log(run)
    assert log(run)[-1].endswith("failed. a worker was lost (ConnectionError: a peer)")


def test_the_result_of_a_killed_attempt_names_the_kill_that_rank_0_read(tmp_path: Path) -> None:
    run, _, _ = drive(tmp_path, make_data(tmp_path), "killed")
    result = run.result(1)
    assert result is not None
    assert (result.outcome, result.cause) == ("failed", "infrastructure")
    assert result.message == "killed: no progress for 120 s"
