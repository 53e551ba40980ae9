"""The driver of one attempt: what class a failure is of, and what is published. No Ray is started."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from published import build, write
from stores import LINEAGE, MemoryStorage
from tiny import job, make_data, model

from genmodels import checkpoint
from genmodels.checkpoint import WEIGHTS, Manifest, Place
from genmodels.errors import (
    CheckpointError,
    DataError,
    GenmodelsError,
    ModelNotFound,
    RequestError,
    SpecError,
    StorageUnavailable,
    Superseded,
    TrainingDiverged,
)
from genmodels.registry import Registry
from genmodels.run import Result, Run
from genmodels.spec import ModelSpec
from services.train import _failure, _publish, _seconds

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:552] Connection closed by peer [127.0.0.1]:47315"
)


class ranks(Exception):
    """As Ray's WorkerGroupError: what each rank that failed had raised."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nTraceback ...")
        self.worker_failures = {int(rank.removeprefix("rank")): failure for rank, failure in failures.items()}


def actor_died() -> Exception:
    """What a killed worker is seen as: wrapped twice."""
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())


def startup_timeout() -> Exception:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(WorkerGroupStartupTimeoutError(2))


def ray_out_of_memory() -> Exception:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.", failure=OutOfMemoryError("the node's memory"))


def controller_of_workers() -> Exception:
    from ray.train.v2.api.exceptions import ControllerError

    return ControllerError(ranks(rank0=GLOO, rank1=SHORT))


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
        (lambda: ranks(rank0=StorageUnavailable("s3: no answer")), "infrastructure", "s3: no answer"),
        (lambda: ranks(rank0=GLOO, rank1=CheckpointError("a: missing")), "infrastructure", "a: missing"),
        (lambda: ranks(rank1=actor_died()), "infrastructure", LOST + "(ActorDiedError: "),
        (lambda: ranks(rank0=GLOO, rank1=actor_died()), "infrastructure", LOST + "(RuntimeError: "),
        (lambda: ranks(rank0=GLOO), "infrastructure", LOST + "(RuntimeError: [/pytorch"),
        (startup_timeout, "infrastructure", LOST + "(WorkerGroupStartupTimeoutError: "),
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
    result = _failure(make())
    assert (result.outcome, result.cause) == ("failed", cause)
    assert result.message.startswith(message)
    assert result.step == (8 if cause == "diverged" else 0)
    if cause not in ("user", "diverged"):
        assert "\n" not in result.message
    assert Result.model_validate(result.model_dump(mode="json")) == result


def test_ray_still_calls_things_so() -> None:
    """The names that `_failure` goes by."""
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    assert WorkerGroupError("said", {1: DIVERGED}).worker_failures == {1: DIVERGED}
    assert ControllerError(DIVERGED).controller_failure is DIVERGED
    assert actor_died().health_check_failure.__class__.__module__ == "ray.exceptions"  # type: ignore[attr-defined]
    assert _failure(WorkerGroupError("said", {0: GLOO, 1: DIVERGED})).cause == "diverged"


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
    found = through(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))


# ---- publishing


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    entry = model(make_data(tmp_path_factory.mktemp("data")), "minigpt", max_steps=3)
    return job("tiny", entry | {"serve": {"gate": {"metric": "val_loss", "max": 2.0}}}).models[0]


def save(run: Run, step: int, val_loss: float, seed: int | None = None) -> Place:
    """A whole checkpoint of a real model."""
    place = Place(attempt=1, step=step)
    with checkpoint.scratch_folder() as name:
        folder = Path(name)
        write(folder, *build("minigpt", seed=step if seed is None else seed))
        files = checkpoint.describe_files(folder)
        manifest = Manifest(step=step, samples=step, metrics={"val_loss": val_loss}, lineage=LINEAGE, files=files)
        checkpoint.upload(run.storage, run.checkpoint_prefix(place), folder, manifest, lambda: None)
    return place


def trained(*losses: float) -> Run:
    run = Run(MemoryStorage(), "tiny-00000000", "minigpt")
    run.start(1, None, 1)
    for step, loss in enumerate(losses, 1):
        save(run, step, loss)
    return run


def test_the_best_is_published_and_promoted(spec: ModelSpec) -> None:
    run = trained(1.9, 1.5, 1.7)
    result = _publish(run, spec, 1)
    assert (result.outcome, result.version, result.step, result.metrics) == ("succeeded", 1, 2, {"val_loss": 1.5})
    assert result.gate is not None
    assert (result.gate.reason, result.message) == ("val_loss 1.5 is <= 2", "published as minigpt@1")
    version = Registry(run.storage).resolve("minigpt")
    assert (version.version, version.place, version.gate) == (1, Place(attempt=1, step=2), result.gate)
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert (heartbeat.phase, heartbeat.step) == ("publishing", 3)


def test_publishing_twice_changes_nothing_and_undoes_no_rollback(spec: ModelSpec) -> None:
    run = trained(1.9)
    first = _publish(run, spec, 1)
    save(run, 2, 1.2)
    assert _publish(run, spec, 1).version == 2
    Registry(run.storage).promote("minigpt", "production", 1, "a person rolls back")
    assert _publish(run, spec, 2).version == 2
    store = Registry(run.storage)
    assert (store.versions("minigpt"), store.resolve("minigpt").version, first.version) == ([1, 2], 1, 1)


@pytest.mark.parametrize("losses", [(2.5, 2.25), (math.nan,), (-math.inf, math.nan)])
def test_what_fails_its_gate_is_not_published(spec: ModelSpec, losses: tuple[float, ...]) -> None:
    run = trained(*losses)
    result = _publish(run, spec, 1)
    assert (result.outcome, result.cause, result.version) == ("failed", "gate", None)
    assert result.message.startswith("not published: val_loss ")
    assert result.message.endswith(" is not <= 2")
    assert run.storage.list("models/") == []


def test_without_a_gate_the_last_is_published(spec: ModelSpec) -> None:
    run = trained(1.0, 9.0)
    result = _publish(run, spec.model_copy(update={"serve": spec.serve.model_copy(update={"gate": None})}), 1)
    assert (result.outcome, result.step, result.gate) == ("succeeded", 2, None)


def test_a_damaged_best_gives_way_to_the_next(spec: ModelSpec) -> None:
    run = trained(1.9, 1.5, 1.7)
    run.storage.put(f"{run.checkpoint_prefix(Place(attempt=1, step=2))}/{WEIGHTS}", b"spoiled")
    result = _publish(run, spec, 1)
    assert (result.outcome, result.step, result.metrics) == ("succeeded", 3, {"val_loss": 1.7})
    for step in (1, 3):
        run.storage.delete(f"{run.checkpoint_prefix(Place(attempt=1, step=step))}/{WEIGHTS}")
    with pytest.raises(CheckpointError, match="runs/tiny-00000000/minigpt: no checkpoint is whole"):
        _publish(run, spec, 1)


def test_seconds_are_of_the_chain_and_of_this_start() -> None:
    run = Run(MemoryStorage(), "j", "m")
    assert _seconds(run, 1, 100.0) == {"training_seconds": 0.0, "startup_seconds": 0.0}
    start = run.start(1, None, 1)
    run.write_metrics(1, [{"step": 1, "seconds": 2.5}])
    began = datetime.fromisoformat(start.time).timestamp() - 14.0
    assert _seconds(run, 1, began) == {"training_seconds": 2.5, "startup_seconds": pytest.approx(14.0)}
    assert _seconds(run, 1, began + 60)["startup_seconds"] == 0.0, "the clocks of two machines differ"
    assert _seconds(run, 2, began)["startup_seconds"] == 0.0
