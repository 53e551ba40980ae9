"""Metrics of a run equal what storage has of the same run."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from genmodels import metrics, models
from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.family import TextFamily
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.records import Status
from genmodels.runs.store import Run
from genmodels.spec.sections import TrainConfig
from genmodels.storage import Storage, instrumented
from genmodels.storage.instrumented import MeasuredStorage
from genmodels.storage.retry import PassingFailure
from genmodels.training import flops
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from services.dispatch.supervisor import Supervisor
from tests.support.metric_values import series, value
from tests.support.published_models import build, publish
from tests.support.scripted_drivers import Drivers, succeeds
from tests.support.storages import FailingStorage, MemoryStorage
from tests.support.tiny_jobs import job, make_data, model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


# ---- names


def test_every_metric_is_listed_once_and_has_no_other_labels() -> None:
    named = [result for result in vars(metrics).values() if isinstance(result, MetricWrapperBase)]
    assert named == metrics.ALL
    names = [metric.describe()[0].name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("genmodels_[a-z_]+", name) for name in names)
    labels = {label for metric in metrics.ALL for label in metric._labelnames}
    assert labels == {
        "job", "model", "family", "version", "role", "part", "metric", "cause", "state", "passed", "operation", "kind",
        "route", "code", "verb", "thread", "pool",
    }  # fmt: skip


# ---- training


@pytest.mark.parametrize("family", models.names())
def test_gauges_say_what_storage_says(family: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.DIRECTORY, "read")  # as where an exporter is
    storage = MemoryStorage()
    name, _ = Jobs(storage).submit(job(f"shown-{family}", model(data, family)))
    saved = value(metrics.CHECKPOINT_SECONDS, family)
    size = value(metrics.CHECKPOINT_BYTES, family)
    assert run_attempt(storage, name, family, 1, Group())
    run = Run(storage, name, family)

    def shown(metric: Any) -> dict[tuple[str, ...], float]:
        """Return values by their further labels, in the order family, job, metric, model, part, role."""
        result = {labels: number for labels, number in series(metric).items() if name in labels}
        return {tuple(word for word in labels if word not in (name, family)): n for labels, n in result.items()}

    heartbeat, row = run.heartbeat(1), list(metric_rows(run))[-1]
    assert heartbeat
    assert shown(metrics.TRAINING_STEP) == {(): heartbeat.step} == {(): 6}
    assert shown(metrics.TRAINING_MAX_STEPS) == {(): heartbeat.max_steps}
    assert shown(metrics.TRAINING_ETA) == {(): heartbeat.seconds_left} == {(): 0}
    assert shown(metrics.TRAINING_WORKERS) == {(): 1}
    assert shown(metrics.TRAINING_CHECKPOINT_STEP) == {(): 6}
    assert shown(metrics.TRAINING_SAMPLES) == {(): row["samples"]}
    assert shown(metrics.TRAINING_LEARNING_RATE) == {(): row["learning_rate"]}
    assert shown(metrics.TRAINING_STEP_SECONDS) == {(): row["step_seconds"]}
    assert shown(metrics.TRAINING_SAMPLES_PER_SECOND) == {(): row["samples_per_second"]}
    assert shown(metrics.TRAINING_DATA_WAIT) == {(): row["data_share"]}
    assert shown(metrics.TRAINING_VALIDATION) == {(n,): row[n] for n in models.load(family).metric_names}

    two = ("discriminator", "generator")
    roles = {role: f"{role}_" for role in two} if family == "gan" else {"model": ""}
    assert shown(metrics.TRAINING_LOSS) == {(role,): row[f"{prefix}loss"] for role, prefix in roles.items()}
    norms = {(role,): row[f"{prefix}gradient_norm"] for role, prefix in roles.items()}
    assert shown(metrics.TRAINING_GRADIENT_NORM) == norms
    parts = shown(metrics.TRAINING_PART)
    assert all(number == row[f"{roles[role]}{part}"] for (part, role), number in parts.items())
    health = {
        "vae": {("kl", "model")},
        "gan": {("accuracy_real", "discriminator"), ("accuracy_fake", "discriminator")},
    }
    assert health.get(family, set()) <= set(parts)
    if family == "vae":
        assert {("val_kl",), ("val_active_units",)} <= set(shown(metrics.TRAINING_VALIDATION))

    tokens = {(): 16 * row["samples_per_second"]} if family == "minigpt" else {}
    assert shown(metrics.TRAINING_TOKENS_PER_SECOND) == tokens
    (rate,), (share,) = shown(metrics.TRAINING_FLOPS).values(), shown(metrics.TRAINING_MFU).values()
    assert rate > 0
    assert 0 < share < 1
    assert shown(metrics.TRAINING_GPU_MEMORY).keys() == ({()} if torch.cuda.is_initialized() else set())

    files = [file for _, manifest in run.manifests() for file in manifest.files.values()]
    assert value(metrics.CHECKPOINT_SECONDS, family) == saved + 2
    assert value(metrics.CHECKPOINT_BYTES, family) >= size + sum(file.size for file in files)


def test_counting_changes_no_bit_of_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for family in ("gan", "minigpt"):
        for exported in (False, True):
            storage = MemoryStorage()
            name, _ = Jobs(storage).submit(job("same", model(data, family, max_steps=3)))
            with monkeypatch.context() as patch:
                patch.delenv(metrics.DIRECTORY, raising=False)
                if exported:
                    patch.setenv(metrics.DIRECTORY, "read")
                run_attempt(storage, name, family, 1, Group())
            assert any(name in labels for labels in series(metrics.TRAINING_FLOPS)) == exported, "where it is exported"
            ((_, manifest),) = Run(storage, name, family).manifests()
            digests.append({name: file.sha256 for name, file in manifest.files.items()})
        assert digests[-1] == digests[-2]


@pytest.mark.slow
@pytest.mark.parametrize("family", models.names())
def test_operations_grow_with_the_batch_and_are_those_of_the_matrices(family: str) -> None:
    result, _ = build(family)
    config = TrainConfig(max_steps=1, batch_size=8)

    def step(rows: int, accumulation: int = 1) -> float:
        batch = {"images": torch.rand(rows, 1, 16, 16)}
        if isinstance(result, TextFamily):
            tokens = torch.zeros(rows, result.block_size, dtype=torch.long)
            batch = {"tokens": tokens, "targets": tokens}
        settings = config.model_copy(update={"accumulation_steps": accumulation})
        state = torch.get_rng_state()
        effort = flops.estimate(result, batch, settings, torch.device("cpu"))
        assert torch.equal(state, torch.get_rng_state())
        assert effort
        assert effort.peak > 1e6
        return effort.step

    assert step(16) == pytest.approx(2 * step(8), rel=0.01)
    assert step(8, accumulation=3) == 3 * step(8)
    if family == "minigpt":  # 2 for each weight forward, 4 backward; attention and the untrained inputs aside
        matrices = sum(p.numel() for p in result.network.parameters() if p.dim() == 2)
        assert 0.5 < step(8) / (6 * matrices * 8 * 16) < 2


def test_what_cannot_be_told_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = build("vae")
    batch = {"wrong": torch.zeros(1)}
    assert flops.estimate(result, batch, TrainConfig(max_steps=1, batch_size=8), torch.device("cpu")) is None


# ---- jobs, registry, storage


def test_each_end_counts_once_however_many_tries_it_takes() -> None:
    storage = FailingStorage(only="status.json")
    run = Run(storage, "counted-00000000", "m")
    before = [series(metric) for metric in (metrics.ATTEMPTS, metrics.RUNS_ENDED, metrics.QUEUE_WAIT_SECONDS)]
    supervisor = Supervisor(run, Drivers(storage, succeeds), Status(state="queued"), None)
    supervisor.stamp(1)
    supervisor.start(1)
    while supervisor.status.state != "publishing":
        supervisor.step()
    storage.away = True
    while storage.refused < 3:
        with contextlib.suppress(StorageUnavailable):
            supervisor.step()
    storage.away = False
    while supervisor.status.state != "succeeded":
        supervisor.step()
    after = [series(metric) for metric in (metrics.ATTEMPTS, metrics.RUNS_ENDED, metrics.QUEUE_WAIT_SECONDS)]
    for then, now, labels in zip(before, after, (("succeeded",), ("succeeded",), ()), strict=True):
        assert now == then | {labels: then.get(labels, 0) + 1}


def test_versions_and_moves_count_once(tmp_path: Path) -> None:
    storage = MemoryStorage()
    versions, moves = value(metrics.PUBLISHED, "vae"), value(metrics.PROMOTED, "vae")
    for step in (1, 2, 2):
        publish(storage, "m", "vae", step=step)
    assert value(metrics.PUBLISHED, "vae") == versions + 2
    assert value(metrics.PROMOTED, "vae") == moves + 2
    Registry(storage).promote("m", "production", 1, "back")
    assert value(metrics.PROMOTED, "vae") == moves + 3


class OfThisThread:
    """Return a metric of storage that counts this thread alone: other tests may use the storage meanwhile."""

    def __init__(self, metric: MetricWrapperBase) -> None:
        self.shared, self.thread = metric, threading.current_thread()
        self.own = type(metric)("own", "", metric._labelnames, registry=CollectorRegistry())

    def labels(self, *values: str) -> Any:
        return (self.own if threading.current_thread() is self.thread else self.shared).labels(*values)


@pytest.fixture
def storage_seconds(monkeypatch: pytest.MonkeyPatch) -> MetricWrapperBase:
    counted = OfThisThread(metrics.STORAGE_SECONDS)
    monkeypatch.setattr(instrumented, "STORAGE_SECONDS", counted)
    return counted.own


@pytest.fixture
def storage_errors(monkeypatch: pytest.MonkeyPatch) -> MetricWrapperBase:
    counted = OfThisThread(metrics.STORAGE_ERRORS)
    monkeypatch.setattr(instrumented, "STORAGE_ERRORS", counted)
    return counted.own


def test_operations_on_storage(storage: Storage, tmp_path: Path, storage_seconds: MetricWrapperBase) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    storage.put("a/b", b"data")
    storage.upload(path, "a/c")
    storage.get("a/b")
    storage.get_range("a/b", 1, 2)
    storage.download("a/c", tmp_path / "copy")
    storage.list("a/")
    storage.sizes("a/")
    storage.folders("")
    storage.exists("a/b")
    storage.delete("a/b")
    counts = {"put": 1, "upload": 1, "get": 2, "download": 1, "list": 3, "exists": 1, "delete": 1}
    assert series(storage_seconds) == {(operation,): count for operation, count in counts.items()}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageUnavailable("no"), "StorageUnavailable"),
        (PassingFailure("no"), "StorageUnavailable"),
        (StorageError("no"), "StorageError"),
        (KeyNotFound("no"), None),
        (Conflict("no"), None),
    ],
)
def test_errors_of_storage(
    error: StorageError, kind: str | None, storage_seconds: MetricWrapperBase, storage_errors: MetricWrapperBase
) -> None:
    class Broken(MemoryStorage):
        def get(self, key: str) -> tuple[bytes, str]:
            raise error

    with pytest.raises(type(error)):
        MeasuredStorage(Broken()).get("a")
    assert series(storage_errors) == ({(kind, "get"): 1} if kind else {})
    assert series(storage_seconds) == {("get",): 1}
