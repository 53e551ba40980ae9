"""Save a state that the ranks share as parts, one file for each rank, and read the rows that a rank needs.

With `train.strategy: fsdp2` a checkpoint has these files instead of `state/<role>.safetensors` and so on:

    state/part-00000.safetensors, ...     the rows that each rank holds, written by that rank
    state/index.json                      the place of all rows: file, first byte, offset in the tensor

torch's distributed checkpoint (DCP) plans which rows a rank writes, and which it reads after the number of ranks has
changed. Its storage layer is not used: its index is a pickle (`.metadata`), and its writer of safetensors makes a
second copy of a file in memory. The parts are in that writer's format, so `HuggingFaceStorageReader` reads them too.

A tensor is named after the file and the key that it has in a checkpoint without parts, e.g.
`state/generator.optimizer-0/3.exp_avg`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from genmodels.checkpoint.files import read_file, read_tensors
from genmodels.checkpoint.manifest import File, Manifest
from genmodels.checkpoint.tensor_file import TensorFile, read_entries
from genmodels.errors import CheckpointError, KeyNotFound, StorageError
from genmodels.storage import Document, Storage

INDEX, PARTS, SUFFIX = "state/index.json", "state/part-", ".safetensors"
READ_BYTES = 2**24  # of a part of another rank that are read at once


class Rows(Document):
    """Rows of a tensor in a file."""

    whole: list[int]  # the shape of the tensor
    offset: list[int]  # of the first element in it
    shape: list[int]  # of the rows
    dtype: str
    begin: int  # byte in the file


class Part(Document):
    """A file, and the rows in it by the name of the tensor."""

    name: str
    file: File
    rows: dict[str, Rows]


class Index(Document):
    object_kind = "checkpoint"

    parts: list[Part]


@dataclass(frozen=True)
class Layout:
    """The rows of all tensors that one rank saves."""

    name: str  # of the file
    tensors: dict[str, Tensor]  # the rows, on the device of the training
    shapes: dict[str, list[int]]  # of the whole tensors
    offsets: dict[str, list[int]]

    @property
    def metadata(self) -> dict[str, str]:
        """Return what the header of the file says to the readers of DCP."""
        offsets = {name: {"saved_offsets": offset} for name, offset in self.offsets.items()}
        return {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}

    def described(self, content: TensorFile, file: File) -> Part:
        """Return the entry of the index, once the file is in storage."""
        entries, first = read_entries(content.header), len(content.header)
        rows = {
            name: Rows(
                whole=self.shapes[name],
                offset=self.offsets[name],
                shape=list(entry.shape),
                dtype=str(entry.dtype),
                begin=first + entry.begin,
            )
            for name, entry in entries.items()
        }
        return Part(name=self.name, file=file, rows=rows)


def lay_out(tensors: Mapping[str, Tensor], rank: int) -> Layout:
    """Plan which rows a rank saves: its own of a distributed tensor; rank 0 also what all ranks have."""
    plan = create_default_local_save_plan(dict(tensors), rank == 0)
    layout = Layout(f"{PARTS}{rank:05}{SUFFIX}", {}, {}, {})
    for item in plan.items:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        tensor = tensors[name]
        if 0 in data.chunk.sizes or (rank > 0 and _is_replicated(tensor)):
            continue
        layout.tensors[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        layout.shapes[name], layout.offsets[name] = list(data.size), list(data.chunk.offsets)
    return layout


def joined(entries: Iterable[bytes]) -> Index:
    """Return the index of all parts, from the entries that the ranks have made of theirs.

    Raises:
        StorageError: a rank could not save its part.
    """
    entries = list(entries)
    if not all(entries):
        raise StorageError("a worker could not save its part of the checkpoint; see the log of the worker")
    return Index(parts=[Part.model_validate_json(entry) for entry in entries])


def tensor_name(file: str, key: str) -> str:
    """Return the name that a tensor has in an index: by its file and key in a checkpoint without parts."""
    return f"{file.removesuffix(SUFFIX)}/{key}"


def assemble(storage: Storage, prefix: str, manifest: Manifest, pinned: bool) -> dict[str, TensorFile]:
    """Return the files in `state/` that a checkpoint in parts would have without parts, one part in memory at a time.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    parts = StoredState.read(storage, prefix, manifest, (), pinned).index.parts
    empty: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for name, rows in part.rows.items():
            file, _, key = name.rpartition("/")
            dtype = getattr(torch, rows.dtype.removeprefix("torch."))
            empty.setdefault(file, {})[key] = torch.empty(rows.whole, dtype=dtype, device="meta")
    files = {file: TensorFile.like(tensors, pinned) for file, tensors in empty.items() if file.startswith("state/")}
    for part in parts:
        content = read_tensors(storage, f"{prefix}/{part.name}", manifest.files[part.name], pinned)
        for name, rows in part.rows.items():
            file, _, key = name.rpartition("/")
            if file not in files:
                continue
            target, first = files[file].tensors[key], rows.offset[:1]
            (target[first[0] : first[0] + rows.shape[0]] if first else target).copy_(content.tensors[name])
    return {f"{file}{SUFFIX}": content for file, content in files.items()}


def share(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """Return the parts that a rank reads as a whole and verifies: with as many ranks as before its own one.

    Rows of other parts are read by ranges; another rank verifies their file.
    """
    return sorted(name for name in manifest.files if name.startswith(PARTS))[rank::world_size]


@dataclass
class StoredState:
    """The tensors of a checkpoint in parts: rows come from the files in memory, and all others from storage."""

    storage: Storage
    prefix: str
    index: Index
    files: dict[str, TensorFile] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage, prefix: str, manifest: Manifest, names: Iterable[str], pinned: bool) -> StoredState:
        """Read the index and some parts as a whole, all verified.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        content = read_file(storage, f"{prefix}/{INDEX}", manifest.files[INDEX])
        try:
            index = Index.model_validate_json(content)
        except ValidationError as error:
            raise CheckpointError(f"{prefix}/{INDEX}: {error.error_count()} fields are wrong") from None
        files = {name: read_tensors(storage, f"{prefix}/{name}", manifest.files[name], pinned) for name in names}
        return cls(storage, prefix, index, files)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes of all tensors, by name."""
        return {name: rows.whole for part in self.index.parts for name, rows in part.rows.items()}

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Copy rows into tensors: into a distributed tensor only those that this rank holds.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        planner = DefaultLoadPlanner()
        planner.set_up_planner(dict(targets), self._metadata())
        try:
            plan = planner.create_local_plan()
        except (RuntimeError, ValueError) as error:  # of DCP: a tensor is missing, or has another shape
            raise CheckpointError(f"{self.prefix}: {error}") from None
        with torch.no_grad():
            for item in plan.items:
                self._read(item, planner.resolve_tensor(item))

    def _read(self, item: ReadItem, target: Tensor) -> None:
        """Copy whole rows: parts are divided along the first dimension only."""
        name, offset = item.dest_index.fqn, list(item.storage_index.offset or ())
        part = next(part for part in self.index.parts if name in part.rows and part.rows[name].offset == offset)
        first, count = (item.storage_offsets[0], item.lengths[0]) if offset else (0, 1)
        target = target if offset else target.view(1)
        if file := self.files.get(part.name):
            target.copy_(file.tensors[name].view(-1, *target.shape[1:])[first : first + count])
            return
        row_bytes = target[0].nbytes
        at_once = max(1, READ_BYTES // row_bytes)
        for done in range(0, count, at_once):
            rows = torch.empty_like(target[done : done + at_once], device="cpu")
            self._fill(rows, f"{self.prefix}/{part.name}", part.rows[name].begin + (first + done) * row_bytes)
            target[done : done + at_once].copy_(rows)

    def _fill(self, rows: Tensor, key: str, start: int) -> None:
        view = rows.view(-1).view(torch.uint8).numpy().data
        try:
            if self.storage.read_into(key, start, view) == len(view):
                return
        except KeyNotFound:
            raise CheckpointError(f"{key}: missing") from None
        raise CheckpointError(f"{key}: damaged (it ends too early)")

    def _metadata(self) -> Metadata:
        """Describe the stored tensors to DCP."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for part in self.index.parts:
            for name, rows in part.rows.items():
                properties = TensorProperties(dtype=getattr(torch, rows.dtype.removeprefix("torch.")))
                stored = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(rows.whole), []))
                stored.chunks.append(ChunkStorageMetadata(torch.Size(rows.offset), torch.Size(rows.shape)))
        return Metadata(dict(tensors))


def _is_replicated(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(placement.is_replicate() for placement in tensor.placements)
