"""Say where and how a model host keeps its models: device, dtype, rows of a forward pass.

Nothing is imported from torch at the top, so that settings are checked quickly and on machines without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from genmodels.errors import SpecError
from genmodels.sizing.memory import HOST_MEMORY, MORE_TEXTS, SERVED_ROWS, gibibytes

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "bfloat16", "float16"]
NUMBER_BYTES: Final[dict[DType, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_DTYPES: Final[tuple[DType, ...]] = ("float32", "bfloat16")  # float16 has neither range nor speed on a CPU
MAX_ROWS = 1024
DEVICE_SHARE = 0.8  # of a GPU's free memory; its context, libraries, graphs and the allocator's gaps take the rest


@dataclass(frozen=True)
class Placement:
    """The device, the dtype and the batch size of a host's models.

    Args:
        device: `cpu`, `cuda` or `cuda:<index>`.
        rows: rows of a forward pass: texts in one decoding step, or images.
        small: bytes; a text model that takes no more with MORE_TEXTS rows gets so many.

    Raises:
        SpecError: a value is unknown, or the device has no such dtype; names the option.
    """

    device: str = "cpu"
    dtype: DType = "float32"
    rows: int = SERVED_ROWS
    small: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            raise SpecError(f"device: got {self.device!r}; write cpu, cuda or cuda:<index>")
        allowed = NUMBER_BYTES if self.on_gpu else CPU_DTYPES
        if self.dtype not in allowed:
            raise SpecError(f"dtype: got {self.dtype!r}; on {self.device} write {' or '.join(allowed)}")
        if not 1 <= self.rows <= MAX_ROWS:
            raise SpecError(f"slots: got {self.rows}; write 1 to {MAX_ROWS}")

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def number_bytes(self) -> int:
        """Return the bytes of a weight, and of a key or value."""
        return NUMBER_BYTES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Return the device; that of a GPU has an index, as its tensors have."""
        import torch

        return torch.device("cuda:0" if self.device == "cuda" else self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def budget(self, memory: int | None = None) -> int:
        """Return the bytes of models that a host keeps there.

        Args:
            memory: what the operator set. Default: `HOST_MEMORY` on a CPU, on a GPU `DEVICE_SHARE` of the memory that
                is free now.

        Raises:
            SpecError: this machine has no such device, or the device has less memory than `memory`.
        """
        if not self.on_gpu:
            return HOST_MEMORY if memory is None else memory
        free, total = self._device_memory()
        if memory is not None and memory > total:
            raise SpecError(f"memory: got {gibibytes(memory)}, and {self.device} has {gibibytes(total)}; write less")
        return int(free * DEVICE_SHARE) if memory is None else memory

    def for_texts(self, memory: Callable[[Placement], int]) -> Placement:
        """Return the placement of a text model: with more rows a step costs less for each text.

        The rows depend on the model's settings and `small` alone, so that hosts of equal memory give the same bits.

        Args:
            memory: returns the bytes that the model takes.
        """
        larger = (replace(self, rows=rows) for rows in MORE_TEXTS if rows > self.rows)
        return next((placement for placement in larger if memory(placement) <= self.small), self)

    def prepare(self) -> None:
        """Set torch so that equal inputs give equal bits on the device, and float32 is not rounded to TF32."""
        if self.on_gpu:
            import torch

            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose by stream
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.deterministic = True  # a transposed convolution may add in any order
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def check_device(self) -> None:
        """Compute on the device, and raise its error if it no longer works; a device that hangs makes this call hang.

        After some errors of CUDA each later call fails, until a new process starts.
        """
        if self.on_gpu:
            import torch

            torch.zeros(1, device=self.device).add_(1).cpu()

    def _device_memory(self) -> tuple[int, int]:
        """Return the free and the total bytes of the GPU."""
        import torch

        if not torch.cuda.is_available():
            raise SpecError(f"device: got {self.device!r}, and this machine has no GPU that torch can use; write cpu")
        index = self.torch_device.index
        if index >= (count := torch.cuda.device_count()):
            raise SpecError(f"device: got {self.device!r}, and this machine has {count} GPUs; the first is cuda:0")
        free, total = torch.cuda.mem_get_info(index)
        return free, total


DEFAULT_PLACEMENT = Placement()
