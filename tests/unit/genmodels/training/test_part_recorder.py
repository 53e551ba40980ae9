"""A rank that saves a part of a checkpoint: it tells rank 0 what is in storage, or that it failed."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from genmodels.checkpoint import CheckpointRef, Snapshot, SnapshotMemory
from genmodels.checkpoint.parts import Part, joined, lay_out
from genmodels.errors import StorageError, StorageUnavailable, TrainingDiverged
from genmodels.runs.store import Run
from genmodels.training.group import SideGroup
from genmodels.training.part_recorder import PartRecorder
from tests.support.storages import Wrapped

NAME = "state/part-00001.safetensors"


class Told:
    """Keep what a rank tells to rank 0."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    def gather(self, data: bytes) -> list[bytes]:
        self.entries.append(data)
        return []


class Uploads(Wrapped):
    """Fail the first uploads with these errors."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def upload_memory(self, key: str, data: memoryview) -> None:
        if self.errors:
            raise self.errors.pop(0)
        super().upload_memory(key, data)


def take(memory: SnapshotMemory, step: int) -> Snapshot:
    layout = lay_out({}, rank=1)
    layout.tensors["state/model/weight"] = torch.arange(6.0).view(2, 3)
    layout.shapes["state/model/weight"], layout.offsets["state/model/weight"] = [4, 3], [2, 0]
    files = memory.allocate({layout.name: layout.tensors}, {layout.name: layout.metadata})
    files[layout.name].copy(layout.tensors)
    return Snapshot(step, 0, {}, files, layout)


def recorder(storage: Uploads) -> tuple[PartRecorder, Told, Run]:
    told, run = Told(), Run(storage, "job-00000000", "m")
    return PartRecorder(run, 1, cast(SideGroup, told)), told, run


def save(saver: PartRecorder, *steps: int, error: Exception | None = None) -> None:
    with saver:
        for step in steps:
            saver.save(step, lambda: take(SnapshotMemory(), step))  # noqa: B023  called at once
        if error:
            raise error


def test_an_outage_is_waited_for_and_the_entry_describes_the_file() -> None:
    storage = Uploads(StorageUnavailable("no answer"))
    saver, told, run = recorder(storage)
    save(saver, 3)
    (part,) = joined(told.entries).parts
    data = storage.get(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=3))}/{NAME}")[0]
    assert (part.name, part.file.size) == (NAME, len(data))
    rows = part.rows["state/model/weight"]
    assert (rows.whole, rows.offset, rows.shape) == ([4, 3], [2, 0], [2, 3])
    assert torch.frombuffer(bytearray(data[rows.begin :]), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_failure_reaches_rank_0_and_the_next_save() -> None:
    saver, told, _ = recorder(Uploads(StorageError("not allowed")))
    with pytest.raises(StorageError, match="not allowed"):
        save(saver, 3, 6)
    assert told.entries == [b""]
    sound = Part.model_validate({"name": "a", "file": {"size": 0, "sha256": "0" * 64}, "rows": {}})
    with pytest.raises(StorageError, match="a worker could not save its part"):
        joined([sound.model_dump_json().encode(), b""])


def test_a_divergence_waits_for_the_last_part_and_another_error_does_not() -> None:
    saver, told, _ = recorder(Uploads())
    with pytest.raises(TrainingDiverged):
        save(saver, 3, error=TrainingDiverged(4, "loss = nan"))
    assert len(told.entries) == 1
    assert not saver.thread.is_alive()
    saver, _, _ = recorder(Uploads())
    with pytest.raises(RuntimeError, match="peer is gone"):
        save(saver, error=RuntimeError("peer is gone"))
    assert saver.thread.is_alive()
    saver.snapshots.put(None)
    saver.thread.join()
