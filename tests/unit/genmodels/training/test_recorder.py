"""The writes of rank 0: nothing is lost while the store is away, nothing is written after a takeover."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genmodels import metrics, models
from genmodels.checkpoint import MANIFEST, WEIGHTS, CheckpointRef, Snapshot, SnapshotMemory
from genmodels.errors import StorageError, StorageUnavailable, Superseded, TrainingDiverged
from genmodels.registry.references import resolve_reference
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage
from genmodels.training import recorder
from genmodels.training.recorder import RunRecorder
from tests.support.metric_values import value
from tests.support.published_models import CONFIGS, IMAGES, build
from tests.support.storages import LINEAGE, FailingStorage, MemoryStorage, RecordingStorage, Wrapped
from tests.support.tiny_jobs import job, make_data, model

FIT_BATCH = {"images": torch.rand(24, *IMAGES.shape, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(recorder, "METRICS_SECONDS", 0.02)
    monkeypatch.setattr("genmodels.storage.retry.MAX_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def spec(data: Path) -> ModelSpec:
    entry = model(data, "vae", max_steps=100)
    entry |= {"checkpoints": {"num_to_keep": 2}, "serve": {"gate": {"metric": "val_loss", "max": 10.0}}}
    return job("tiny", entry).models[0]


@pytest.fixture
def make(spec: ModelSpec) -> Callable[[Storage, int], RunRecorder]:
    def make(storage: Storage, attempt: int = 1, start: bool = True) -> RunRecorder:
        run = Run(storage, "job", "vae")
        if start:
            run.start_attempt(attempt, None, 1)
        family, _ = build("vae", density_components=1)
        return RunRecorder(run, attempt, spec, family, {"labels.json": b"[]"}, lambda: [FIT_BATCH], LINEAGE)

    return make


def snapshot(step: int, val_loss: float | None = None) -> Snapshot:
    """Return a snapshot: weights differ from step to step, and the loss falls unless it is given."""
    family, _ = build("vae", seed=step, density_components=1)
    weights = family.network.state_dict()
    content = {
        WEIGHTS: weights,
        "state/model.safetensors": {name: tensor + 1 for name, tensor in weights.items()},
        "state/model.optimizer-0.safetensors": {"0.step": torch.tensor(float(step))},
    }
    metrics = {"val_loss": 1 / step if val_loss is None else val_loss}
    return Snapshot(step, step * 12, metrics, SnapshotMemory().fill(content))


def save(rank0: RunRecorder, step: int, val_loss: float | None = None) -> None:
    rank0.save(step, lambda: snapshot(step, val_loss))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


def manifests(storage: Storage) -> list[str]:
    return [key for key in storage.list("runs/") if key.endswith(MANIFEST)]


# ---- an undisturbed run


def test_everything_arrives(make: Any) -> None:
    storage = MemoryStorage()
    with make(storage) as rank0:
        for step in (1, 2):
            rank0.report_progress("training", step, 0.5)
            rank0.log({"step": step, "loss": 0.5, "seconds": step * 1.0})
        rank0.sample(2, "samples.png", b"png")
        rank0.report_progress("saving", 2)
        save(rank0, 2, 1.25)
    run = Run(storage, "job", "vae")
    (result,) = run.manifests()
    ref, manifest = result
    assert ref == CheckpointRef(attempt=1, step=2)
    assert (manifest.step, manifest.samples, manifest.metrics, manifest.lineage) == (2, 24, {"val_loss": 1.25}, LINEAGE)
    assert sorted(manifest.files) == [
        "assets/density.safetensors",
        "assets/labels.json",
        "config.json",
        "model.safetensors",
        "state/model.optimizer-0.safetensors",
        "state/model.safetensors",
    ]
    assert [row["step"] for row in metric_rows(run)] == [1, 2]
    assert run.samples() == [(2, "runs/job/vae/attempt-1/samples/00000002/samples.png")]
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert (heartbeat.phase, heartbeat.step, heartbeat.max_steps, heartbeat.loss) == ("saving", 2, 100, 0.5)
    assert not rank0.heartbeat_writer.is_alive()
    assert not rank0.uploader.is_alive()


def test_a_heartbeat_says_how_long_it_will_take(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rank0, heartbeats = make(MemoryStorage()), []

    def report_progress(second: float, *arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: second)
            rank0.report_progress(*arguments)
        heartbeats.append(rank0.heartbeat)

    report_progress(50.0, "evaluating", 10)
    report_progress(60.0, "training", 11, 3.0)  # the first step, of a resumed run, says nothing of the pace
    report_progress(62.0, "training", 15, 2.5)
    report_progress(70.0, "evaluating", 15)
    assert [heartbeat.seconds_left for heartbeat in heartbeats] == [None, None, 2.0 / 4 * 85, 10.0 / 4 * 85]
    assert [heartbeat.loss for heartbeat in heartbeats] == [None, 3.0, 2.5, 2.5]
    assert [heartbeat.progress_count for heartbeat in heartbeats] == [1, 2, 3, 4]


def test_a_heartbeat_has_the_median_of_the_latest_steps(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step lasts from the progress report before it, of any phase; evaluations and waits are not steps."""
    monkeypatch.setattr(recorder, "MEDIAN_OF", 5)
    storage = MemoryStorage()
    rank0, run = make(storage), Run(storage, "job", "vae")

    def median_after(second: float, phase: str, step: int) -> float | None:
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: second)
            rank0.report_progress(phase, step)
        rank0._write_heartbeat()
        heartbeat = run.heartbeat(1)
        assert heartbeat is not None
        return heartbeat.step_seconds

    assert median_after(0, "compiling", 0) is None
    assert median_after(30, "training", 1) == 30
    assert median_after(32, "training", 2) == 16  # of 30 and 2
    assert median_after(35, "training", 3) == 3
    assert median_after(100, "evaluating", 3) == 3
    assert median_after(104, "training", 4) == 3.5  # of 30, 2, 3, 4
    assert median_after(200, "waiting for storage", 4) == 3.5
    assert median_after(205, "training", 5) == 4
    assert median_after(205.5, "training", 6) == 3  # of 2, 3, 4, 5, 0.5
    assert median_after(206.5, "training", 7) == 3
    assert median_after(208, "training", 8) == 1.5


def test_what_a_manifest_commits_has_its_metrics(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill right after the manifest, long before metrics are due, the rows of its steps are in storage."""
    monkeypatch.setattr(recorder, "METRICS_SECONDS", 1e9)
    storage = RecordingStorage()
    with make(storage) as rank0:
        for step in (1, 2, 3):
            rank0.log({"step": step})
        rank0.sample(3, "a.png", b"")
        save(rank0, 3)
    keys = [key for key, _ in storage.log]
    committed = next(i for i, key in enumerate(keys) if key.endswith(MANIFEST))
    assert "runs/job/vae/attempt-1/metrics/00000000-00000003.jsonl" in keys[:committed]
    assert "runs/job/vae/attempt-1/samples/00000003/a.png" in keys[:committed]


# ---- a store that is away


def test_an_outage_loses_nothing_and_holds_no_step_up(make: Any) -> None:
    storage = FailingStorage(RecordingStorage())
    with make(storage) as rank0:
        storage.away = True
        for step in range(1, 51):
            rank0.report_progress("training", step, 1.0)
            rank0.log({"step": step, "loss": 1.0})
            if step % 10 == 0:
                rank0.sample(step, "a.png", b"%d" % step)
        save(rank0, 50)
        until(lambda: rank0.waiting == "the storage does not answer")
        assert (rank0.heartbeat.phase, rank0.heartbeat.step) == ("training", 50)
        until(lambda: storage.refused > 20)
        assert rank0.error is None
        assert manifests(storage.inner) == []
        storage.away = False
        until(lambda: manifests(storage))
    run = Run(storage, "job", "vae")
    assert [row["step"] for row in metric_rows(run)] == list(range(1, 51))
    assert [(step, storage.get(key)[0]) for step, key in run.samples()] == [(s, b"%d" % s) for s in range(10, 51, 10)]
    assert [manifest.step for _, manifest in run.manifests()] == [50]


def test_what_waits_has_no_time_left(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time left that grows with the wait looks like progress."""
    rank0 = make(MemoryStorage())
    lefts = []
    for second, phase in ((0.0, "training"), (1.0, "training"), (11.0, "waiting for storage"), (21.0, "training")):
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda second=second: second)
            rank0.report_progress(phase, 10 + int(second), 1.0)
        lefts.append(rank0.heartbeat.seconds_left is not None)
    assert lefts == [False, True, False, True]


def test_an_outage_that_begins_with_the_last_save_is_waited_for(make: Any) -> None:
    storage = FailingStorage()
    with make(storage) as rank0:
        rank0.log({"step": 1})
        save(rank0, 1)
        storage.away = True
        timer = threading.Timer(0.3, setattr, (storage, "away", False))
        timer.start()
    timer.join()
    run = Run(storage, "job", "vae")
    assert [ref.step for ref in run.checkpoints()] == [1]
    assert [row["step"] for row in metric_rows(run)] == [1]
    assert storage.refused


def test_checkpoints_are_counted_and_tries_that_the_store_did_not_take(make: Any) -> None:
    kinds = (metrics.CHECKPOINT_FAILURES, metrics.CHECKPOINT_SECONDS, metrics.CHECKPOINT_STALL_SECONDS)
    failures, saved, stalls = (value(metric, "vae") for metric in kinds)
    size = value(metrics.CHECKPOINT_BYTES, "vae")
    storage = FailingStorage(only=MANIFEST)
    storage.away = True
    with make(storage) as rank0:
        save(rank0, 1)
        until(lambda: storage.refused >= 3)
        assert value(metrics.CHECKPOINT_SECONDS, "vae") == saved
        storage.away = False
    assert failures < value(metrics.CHECKPOINT_FAILURES, "vae") <= failures + storage.refused  # a try asks twice
    assert value(metrics.CHECKPOINT_SECONDS, "vae") == saved + 1
    assert value(metrics.CHECKPOINT_STALL_SECONDS, "vae") == stalls + 1
    ((_, manifest),) = Run(storage, "job", "vae").manifests()
    assert value(metrics.CHECKPOINT_BYTES, "vae") == size + sum(file.size for file in manifest.files.values())


def test_a_save_waits_for_the_one_before(make: Any) -> None:
    """There is memory for one snapshot: the next one is taken when the upload is done; heartbeats continue."""
    storage, taken = FailingStorage(only="/checkpoints/"), list[int]()
    with make(storage) as rank0:
        storage.away = True
        save(rank0, 1)
        second = threading.Thread(target=rank0.save, args=(2, lambda: taken.append(2) or snapshot(2)))
        second.start()
        until(lambda: rank0.heartbeat.phase == "waiting for storage" and rank0.heartbeat.step == 2)
        count = rank0.heartbeat.progress_count
        until(lambda: rank0.heartbeat.progress_count > count + 2)
        assert second.is_alive()
        assert taken == []
        until(lambda: (heartbeat := rank0.run.heartbeat(1)) and heartbeat.phase == "waiting for storage")
        storage.away = False
        second.join()
    assert [ref.step for ref in Run(storage, "job", "vae").checkpoints()] == [1, 2]


def test_an_outage_in_the_middle_sends_no_file_twice(make: Any) -> None:
    log = RecordingStorage()
    storage = FailingStorage(log, only="state/model.optimizer")
    with make(storage) as rank0:
        storage.away = True
        save(rank0, 1)
        until(lambda: storage.refused > 3)
        storage.away = False
    sent = [key for key, _ in log.log if "/checkpoints/" in key]
    assert len(sent) == len(set(sent)) == 7


@pytest.mark.parametrize(
    ("limit", "add"),
    [
        ("MAX_ROWS", lambda rank0, step: rank0.log({"step": step})),
        ("MAX_PICTURES", lambda rank0, step: rank0.sample(step, "a.png", b"")),
    ],
)
def test_what_waits_for_the_store_is_bounded(make: Any, monkeypatch: pytest.MonkeyPatch, limit: str, add: Any) -> None:
    monkeypatch.setattr(recorder, limit, 5)
    storage = FailingStorage()
    with make(storage) as rank0:
        storage.away = True
        writer = threading.Thread(target=lambda: [add(rank0, step) for step in range(1, 21)])
        writer.start()
        until(lambda: rank0.heartbeat.phase == "waiting for storage" and rank0.heartbeat.progress_count > 2)
        assert writer.is_alive()
        assert len(rank0.rows) + len(rank0.pictures) == 6
        storage.away = False
        writer.join()
    run = Run(storage, "job", "vae")
    assert [row["step"] for row in metric_rows(run)] + [step for step, _ in run.samples()] == list(range(1, 21))


# ---- superseded, failed, asked to leave


def test_a_superseded_attempt_writes_no_manifest_and_hears_of_it(make: Any) -> None:
    storage = MemoryStorage()

    def train() -> None:
        with make(storage) as rank0:
            save(rank0, 1)
            until(lambda: manifests(storage))
            Run(storage, "job", "vae").start_attempt(2, CheckpointRef(attempt=1, step=1), 1)
            save(rank0, 2)
            until(lambda: rank0.error)
            rank0.report_progress("training", 3)
            pytest.fail("the next call did not raise")

    with pytest.raises(Superseded, match="attempt 2 of job/vae has taken over from attempt 1"):
        train()
    assert manifests(storage) == ["runs/job/vae/attempt-1/checkpoints/step-00000001/manifest.json"]


def test_a_superseded_attempt_hears_of_it_at_the_latest_when_it_ends(make: Any) -> None:
    storage = MemoryStorage()

    def train() -> None:
        with make(storage) as rank0:
            Run(storage, "job", "vae").start_attempt(2, None, 1)
            save(rank0, 1)

    with pytest.raises(Superseded):
        train()
    assert manifests(storage) == []


def test_a_superseded_attempt_is_not_left_waiting_for_room(make: Any) -> None:
    storage = FailingStorage(only="/checkpoints/")

    def train() -> None:
        with make(storage) as rank0:
            storage.away = True
            save(rank0, 1)
            Run(storage, "job", "vae").start_attempt(2, None, 1)
            threading.Timer(0.1, setattr, (storage, "away", False)).start()
            save(rank0, 2)
            save(rank0, 3)

    with pytest.raises(Superseded):
        train()
    assert manifests(storage) == []


def test_a_superseded_attempt_deletes_nothing(make: Any) -> None:
    """The attempt is superseded after its manifest and before its clean-up."""

    class Overtaken(RecordingStorage):
        def after(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith(f"step-00000003/{MANIFEST}"):
                Run(self.inner, "job", "vae").start_attempt(2, CheckpointRef(attempt=1, step=2), 1)
                self.inner.put(unfinished, b"an upload that never ended")

    unfinished = "runs/job/vae/attempt-1/checkpoints/step-00000000/model.safetensors"
    storage = Overtaken()

    def train() -> None:
        with make(storage) as rank0:
            for step in (1, 2, 3):
                save(rank0, step)

    with pytest.raises(Superseded):
        train()
    assert [key for key, data in storage.log if data is None] == []
    assert [ref.step for ref in Run(storage, "job", "vae").checkpoints()] == [1, 2]


def test_what_was_saved_arrives_when_training_fails(make: Any) -> None:
    storage = FailingStorage(only="/checkpoints/")

    def train() -> None:
        with make(storage) as rank0:
            storage.away = True
            rank0.log({"step": 7, "loss": 1e30})
            save(rank0, 7)
            threading.Timer(0.1, setattr, (storage, "away", False)).start()
            raise TrainingDiverged(8, "loss = nan")

    with pytest.raises(TrainingDiverged):
        train()
    run = Run(storage, "job", "vae")
    assert [ref.step for ref in run.checkpoints()] == [7]
    assert list(metric_rows(run)) == [{"step": 7, "loss": 1e30}]


def test_a_store_that_refuses_ends_the_attempt(make: Any) -> None:
    class Refusing(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and "/checkpoints/" in key:
                raise StorageError("not allowed")

    storage = Refusing()

    def train() -> None:
        with make(storage) as rank0:
            rank0.log({"step": 1})
            save(rank0, 1)

    with pytest.raises(StorageError, match="not allowed"):
        train()
    assert [row["step"] for row in metric_rows(Run(storage, "job", "vae"))] == [1]


def test_ctrl_c_does_not_wait_for_uploads(make: Any) -> None:
    storage = FailingStorage(only="/checkpoints/")
    rank0 = make(storage)

    def train() -> None:
        with rank0:
            storage.away = True
            save(rank0, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    rank0.error = InterruptedError()  # lets the thread that still waits for the store end
    rank0.uploader.join()


def test_it_hears_of_a_command_to_leave(make: Any) -> None:
    rank0 = make(MemoryStorage())
    assert not rank0.should_stop()
    rank0.stop_event.set()
    assert rank0.should_stop()


# ---- clean-up


def test_clean_up_keeps_the_newest_and_the_best(make: Any) -> None:
    storage = RecordingStorage()
    run = Run(storage, "job", "vae")
    losses = {1: 5.0, 2: 2.0, 3: float("nan"), 4: 4.0, 5: float("-inf"), 6: 1.0, 7: 3.0, 8: 3.0}
    # the best so far among what is finite, and the two newest
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6], 7: [6, 7], 8: [6, 7, 8]}
    with make(storage) as rank0:
        for step, loss in losses.items():
            save(rank0, step, loss)
            until(lambda step=step: idle(rank0, step))
            assert [ref.step for ref in run.checkpoints()] == kept[step]
            # the files of what went are there for one save more, and then gone
            files = {int(key.split("/step-")[1][:8]) for key in storage.list("runs/job/vae/attempt-1/checkpoints/")}
            assert files == {*kept[step], *kept.get(step - 1, [])}
    deleted = [key for key, data in storage.log if data is None]
    for step in (1, 2, 3, 4):
        of_step = [key for key in deleted if f"step-{step:08d}/" in key]
        assert of_step[0].endswith(MANIFEST)
        assert len(of_step) == 7


def test_clean_up_keeps_what_others_start_from(make: Any) -> None:
    storage = MemoryStorage()
    run = Run(storage, "job", "vae")
    with make(storage) as rank0:
        for step in range(1, 6):
            save(rank0, step, 9.0 - step)
            until(lambda step=step: idle(rank0, step))
            if step == 1:
                assert resolve_reference("vae@job:step-1", storage) == "vae@job:step-1"
    assert [ref.step for ref in run.checkpoints()] == [1, 4, 5]


def idle(rank0: RunRecorder, step: int) -> bool:
    """Return True if the upload thread has finished a step and waits at its empty queue."""
    done = any(ref.step == step for ref in rank0.run.checkpoints())
    return done and rank0.snapshots.empty() and len(rank0.snapshots.not_empty._waiters) > 0  # type: ignore[attr-defined]


def test_an_outage_in_a_clean_up_does_not_hurry_it(make: Any) -> None:
    """The store fails after the first manifest is deleted: its files are still kept until the next save."""

    class Breaking(RecordingStorage):
        refusals = 0

        def before(self, verb: str, key: str) -> None:
            deletions = sum(data is None for _, data in self.log)
            if verb == "delete" and deletions and not self.refusals:
                self.refusals += 1
                raise StorageUnavailable(key)

    storage = Breaking()
    run = Run(storage, "job", "vae")
    run.start_attempt(1, None, 1)
    with make(storage, start=False) as rank0:
        rank0.spec = rank0.spec.model_copy(
            update={"checkpoints": rank0.spec.checkpoints.model_copy(update={"num_to_keep": 9})}
        )
        for step in (1, 2, 3):
            save(rank0, step)
            until(lambda step=step: idle(rank0, step))
        rank0.spec = rank0.spec.model_copy(
            update={"checkpoints": rank0.spec.checkpoints.model_copy(update={"num_to_keep": 2})}
        )
        save(rank0, 4)
    assert storage.refusals == 1
    deleted = [key for key, data in storage.log if data is None]
    assert deleted == [f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=step))}/{MANIFEST}" for step in (1, 2)]


def test_without_a_gate_the_newest_are_kept(make: Any) -> None:
    storage = MemoryStorage()
    with make(storage) as rank0:
        rank0.spec = rank0.spec.model_copy(update={"serve": rank0.spec.serve.model_copy(update={"gate": None})})
        for step in (1, 2, 3, 4):
            save(rank0, step, float(step))
    assert [ref.step for ref in Run(storage, "job", "vae").checkpoints()] == [3, 4]


# ---- in threads of their own


@pytest.mark.parametrize("family", [name for name in models.names() if models.load(name).kind == "image"])
def test_fitting_beside_the_steps_draws_no_global_random_number(family: str) -> None:
    """The upload thread fits densities while steps draw from the global generator."""
    built, _ = build(family)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    built.fit(iter([FIT_BATCH]), 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert family in CONFIGS


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until(lambda: not [t for t in threading.enumerate() if t.name in ("heartbeat", "upload")])
