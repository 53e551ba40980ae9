"""A GPU for tests on machines without one: its tensors say `cuda:0`, and their numbers are computed on the CPU.

As on a GPU, tensors of both devices do not mix: a tensor that was made without `device=` raises. Index tensors of the
CPU raise too, although torch accepts them: each would be a hidden copy that waits for the GPU. Copies between the
devices, and reads of numbers (`item`, `bool`, `equal`), are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")  # each waits for the GPU


class GpuTensor(Tensor):
    """A tensor that says it is on a GPU."""

    numbers: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, numbers: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=GPU,
        )
        made.numbers = numbers
        return made

    # torch's own of these need a build with CUDA.

    def contiguous(self) -> GpuTensor:  # type: ignore[override]
        return GpuTensor(self.numbers.contiguous())

    def copy_(self, source: Tensor) -> GpuTensor:  # type: ignore[override]
        assert isinstance(source, GpuTensor), "a tensor of the CPU is written to one of the GPU"
        self.numbers.copy_(source.numbers)
        return self

    def __getitem__(self, index: Any) -> GpuTensor:
        return GpuTensor(self.numbers[_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        assert isinstance(value, GpuTensor | int | float | bool), "a tensor of the CPU is written to one of the GPU"
        self.numbers[_index(index)] = _numbers_of(value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} outside of the fake GPU")


class FakeGpu(TorchDispatchMode):
    """Compute for tensors of the GPU on the CPU."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[tuple[torch.Size, torch.dtype]] = []  # copies to the host
        self.to_device = 0  # copies to the device
        self.reads: list[str] = []  # of single numbers

    def forget(self) -> None:
        """Begin to count anew."""
        self.to_host, self.to_device, self.reads = [], 0, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode passes on what consists of other functions
                return function.decompose(*args, **options)
        tensors = [value for value in tree_flatten((args, options))[0] if isinstance(value, Tensor)]
        on_gpu, name = any(isinstance(tensor, GpuTensor) for tensor in tensors), function.overloadpacket.__name__
        target = options.get("device")
        if name in READS and on_gpu:
            self.reads.append(name)
        if name == "_to_copy":
            self._count(tensors[0], target)
        elif name == "copy_":
            self._count(args[1], args[0].device)
        elif on_gpu and (strays := [one for one in tensors if one.dim() and not isinstance(one, GpuTensor)]):
            raise RuntimeError(f"{function}: a tensor {tuple(strays[0].shape)} is on the CPU, others on the GPU")
        if target is not None:
            options["device"] = CPU
        owners = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
        results = function(*tree_map(_numbers_of, args), **tree_map(_numbers_of, options))
        wraps = on_gpu if target is None else torch.device(target).type == "cuda"
        return tree_map(lambda one: owners[id(one)] if id(one) in owners else _wrapped(one, wraps), results)

    def _count(self, source: Tensor, target: Any) -> None:
        if target is None or torch.device(target).type == source.device.type:
            return
        if isinstance(source, GpuTensor):
            self.to_host.append((source.shape, source.dtype))
        else:
            self.to_device += 1


def _numbers_of(value: Any) -> Any:
    return value.numbers if isinstance(value, GpuTensor) else value


def _index(index: Any) -> Any:
    """Return an index of tensors of the CPU. A list or a mask as an index would make the GPU and the host wait."""
    for part in index if isinstance(index, tuple) else (index,):
        assert not isinstance(part, list), "a list as an index is copied to the GPU"
        if isinstance(part, Tensor):
            assert isinstance(part, GpuTensor), "an index of the CPU is copied to the GPU"
            assert part.dtype != torch.bool, "a mask as an index is copied to the host"
    return tree_map(_numbers_of, index)


def _wrapped(value: Any, wraps: bool) -> Any:
    return GpuTensor(value) if wraps and isinstance(value, Tensor) else value


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let `cuda` be a fake GPU during the context, in this thread."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here: tests/gpu tests it")
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, FakeGpu() as gpu:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a GPU's tensors are of another type
        try:
            yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
