"""Hold safetensors files in memory, so that tensors go from training to storage and back without another copy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from genmodels.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, a limit of the format
# Names of dtypes in a file and in torch, in the order in which safetensors writes them: the last ones first.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
    "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
RANKS = {f"torch.{dtype}": rank for rank, dtype in enumerate(DTYPES.values())}
NAMES = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file: its dtype and shape, and where its bytes begin and end after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file in memory. Its tensors are views of its bytes: what is copied into them is in the file."""

    def __init__(self, memory: Tensor) -> None:
        """Args:
        memory: the bytes of a file.

        Raises:
            CheckpointError: they are no safetensors file.
        """
        self.memory = memory
        self.header = read_header(self.data)
        first = len(self.header)
        try:
            self.tensors = {
                name: memory[first + entry.begin : first + entry.end].view(entry.dtype).view(entry.shape)
                for name, entry in read_entries(self.header).items()
            }
        except RuntimeError:  # the file ends too early, or its tensors are not aligned
            raise _damaged("its size or alignment is wrong") from None

    @classmethod
    def like(
        cls, tensors: Mapping[str, Tensor], pinned: bool = False, metadata: Mapping[str, str] | None = None
    ) -> TensorFile:
        """Allocate the file of these tensors, without their values.

        Args:
            metadata: further text for the header.
            pinned: lock the pages in memory, from which a GPU copies faster.
        """
        import torch

        header = make_header(tensors, metadata)
        size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        return cls(memory)

    @property
    def data(self) -> memoryview:
        """Return the bytes of the file, without a copy."""
        return self.memory.numpy().data

    def fits(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bool:
        """Return whether the file has these names, dtypes and shapes."""
        return self.header == make_header(tensors, metadata)

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of tensors, of any device, into the file."""
        import torch

        names = list(self.tensors)
        with torch.no_grad():
            torch._foreach_copy_([self.tensors[name] for name in names], [tensors[name] for name in names], True)


def make_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the header of a file, the same bytes as safetensors writes."""
    at, entries = 0, dict[str, Any](__metadata__=dict(metadata)) if metadata else dict[str, Any]()
    for name in sorted(tensors, key=lambda name: (-RANKS[str(tensors[name].dtype)], name)):
        tensor = tensors[name]
        offsets = [at, at := at + tensor.nbytes]
        entries[name] = {"dtype": NAMES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(data: memoryview) -> bytes:
    """Return the header at the beginning of a file, with its length."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise _damaged("its header is not whole")
    return bytes(data[: 8 + size])


def read_entries(header: bytes) -> dict[str, Entry]:
    """Return the tensors that a header describes, in the order of their bytes.

    Raises:
        CheckpointError: the header is wrong: its tensors overlap, or leave bytes out.
    """
    try:
        document = json.loads(header[8:])
        document.pop("__metadata__", None)
        entries = {name: _entry(**fields) for name, fields in document.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(f"its header is wrong: {type(error).__name__}") from None
    ordered = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    at = 0
    for name, entry in ordered.items():
        if entry.begin != at or entry.end - at != math.prod(entry.shape) * entry.dtype.itemsize:
            raise _damaged(f"{name[:100]} has wrong offsets")
        at = entry.end
    return ordered


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    import torch

    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("not a size")
    return Entry(getattr(torch, DTYPES[dtype]), tuple(shape), begin, end)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"not readable as safetensors ({what})")
