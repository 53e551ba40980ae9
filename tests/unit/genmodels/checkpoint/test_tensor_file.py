"""Test safetensors files in memory: the bytes of the library, and no file that is damaged or hostile."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import weakref
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from genmodels import checkpoint, metrics
from genmodels.checkpoint import File, SnapshotMemory, TensorFile, files
from genmodels.checkpoint.tensor_file import DTYPES
from genmodels.errors import CheckpointError
from genmodels.storage.instrumented import MeasuredStorage
from tests.support.metric_values import value
from tests.support.storages import MemoryStorage


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Return a tensor of each dtype, and of odd names and shapes."""
    draw = torch.Generator().manual_seed(seed)
    numbers = {
        f"{(i * 7) % len(DTYPES)}.{dtype}": torch.rand(3, 5, generator=draw).mul(9).to(getattr(torch, dtype))
        for i, dtype in enumerate(DTYPES.values())
    }
    odd = {'"quoted" \\ é\n': torch.rand((), generator=draw), "empty": torch.empty(2, 0), "z": torch.ones(1, 1, 7)}
    return numbers | odd


def test_the_bytes_are_those_of_the_library() -> None:
    content = tensors()
    file = TensorFile.like(content)
    file.copy(content)
    assert bytes(file.data) == safetensors.torch.save(content)


def test_what_the_library_wrote_is_read_in_place() -> None:
    content = tensors()
    memory = torch.frombuffer(bytearray(safetensors.torch.save(content, metadata={"format": "pt"})), dtype=torch.uint8)
    file = TensorFile(memory)
    assert file.tensors.keys() == content.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in content.items())
    assert {tensor.untyped_storage().data_ptr() for tensor in file.tensors.values()} == {memory.data_ptr()}


def test_tensors_of_any_layout_are_copied() -> None:
    content = {"a": torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last), "b": torch.rand(3, 4).T}
    file = TensorFile.like(content)
    file.copy(content)
    stored = safetensors.torch.load(bytes(file.data))
    assert all(torch.equal(stored[name], tensor) for name, tensor in content.items())


def test_memory_is_allocated_once() -> None:
    memory = SnapshotMemory()
    first = memory.fill({"f": tensors(1)})["f"]
    place = first.memory.data_ptr()
    second = memory.fill({"f": tensors(2)})["f"]
    assert second is first
    assert bytes(second.data) == safetensors.torch.save(tensors(2))
    resumed = SnapshotMemory({"f": second}).fill({"f": tensors(3)})["f"]
    assert resumed.memory.data_ptr() == place
    changed = memory.fill({"f": tensors(3) | {"new": torch.ones(3)}})["f"]
    assert "new" in changed.tensors


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"3", b'{"a": 1}', b'{"a": {}}', b"\xff\xfe", b"[" * 100_000,
        *(
            json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}).encode()
            for change in (
                {"dtype": "F128"}, {"shape": [3]}, {"shape": [-1, -2]}, {"shape": [2.0]}, {"data_offsets": [4, 12]},
                {"data_offsets": [0, 800]}, {"data_offsets": [0]}, {"more": 1}, {"shape": [1 << 62, 4]}, {"shape": "2"},
            )
        ),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        TensorFile(torch.frombuffer(bytearray(data), dtype=torch.uint8))


@pytest.mark.parametrize("data", [b"\0", bytes(7), b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_a_cut_file_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        TensorFile(torch.frombuffer(bytearray(data), dtype=torch.uint8))


# ---- to storage and back


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 1000)


def test_a_file_goes_to_storage_and_back(small_parts: None) -> None:
    storage, content = MemoryStorage(), {"a": torch.rand(5000)}
    file = TensorFile.like(content)
    file.copy(content)
    described = checkpoint.upload_file(storage, "k", file.data)
    assert described.sha256 == hashlib.sha256(safetensors.torch.save(content)).hexdigest()
    back = checkpoint.read_tensors(storage, "k", described)
    assert torch.equal(back.tensors["a"], content["a"])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_no_damaged_file_is_read(small_parts: None, damage: str) -> None:
    storage, content = MemoryStorage(), {"a": torch.rand(5000)}
    described = checkpoint.upload_file(storage, "k", TensorFile.like(content).data)
    sound = storage.objects.pop("k")
    place = random.Random(0).randrange(len(sound))
    flipped = sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :]
    damaged: dict[str, Any] = {"empty": b"", "cut": sound[:-1500], "flipped": flipped}
    if damage in damaged:
        storage.objects["k"] = damaged[damage]
    with pytest.raises(CheckpointError, match="k: missing" if damage == "missing" else "k: damaged"):
        checkpoint.read_tensors(storage, "k", described)


def test_a_failed_read_keeps_no_memory(small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read of an older checkpoint follows: it must not need memory for two."""
    empty, buffers = torch.empty, []

    def remembered(*shape: int, **options: Any) -> torch.Tensor:
        buffer = empty(*shape, **options)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(torch, "empty", remembered)
    gc.disable()  # a reference cycle would last until the collector comes by
    try:
        with pytest.raises(CheckpointError, match="k: missing"):
            checkpoint.read_tensors(MemoryStorage(), "k", File(size=5000, sha256="0" * 64))
        (buffer,) = buffers
        assert buffer() is None
    finally:
        gc.enable()


class Counting(MemoryStorage):
    read: int = 0

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        count = super().read_into(key, start, target)
        self.read += count
        return count


def test_each_byte_is_read_once(small_parts: None) -> None:
    storage, content = Counting(), {"a": torch.rand(5000)}
    described = checkpoint.upload_file(storage, "k", TensorFile.like(content).data)
    checkpoint.read_tensors(storage, "k", described)
    assert storage.read == described.size


def test_bytes_are_counted_by_operation() -> None:
    storage, content = MeasuredStorage(MemoryStorage()), {"a": torch.rand(5000)}
    sent, read = (value(metrics.STORAGE_BYTES, operation) for operation in ("upload", "get"))
    described = checkpoint.upload_file(storage, "k", TensorFile.like(content).data)
    checkpoint.read_tensors(storage, "k", described)
    assert value(metrics.STORAGE_BYTES, "upload") == sent + described.size
    assert value(metrics.STORAGE_BYTES, "get") == read + described.size
    _, etag = storage.get_if_changed("k", None) or (b"", "")
    assert storage.get_if_changed("k", etag) is None
    assert value(metrics.STORAGE_BYTES, "get") == read + 2 * described.size
