"""Record a function and replay it as a CUDA graph does: the same operations on the same tensors, without Python.

What is not in the tensors when it is recorded (a slot, a length, a number of the host) is the same in each replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genmodels.nn.cuda_graphs import Function


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:
                return function.decompose(*args, **(kwargs or {}))
        results = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, results))
        return results


def recorded_graph(function: Function, example: Tensor) -> Function:
    """Return the recorded function, for inputs of the shape of `example`."""
    inputs = example.clone()
    with _Recording() as recording:
        outputs = function(inputs)

    @torch.inference_mode()
    def replay(values: Tensor) -> Tensor:
        inputs.copy_(values)
        for operation, args, kwargs, results in recording.operations:
            _write(operation(*args, **kwargs), results)
        return outputs.clone()

    return replay


def _write(new: Any, old: Any) -> None:
    """Write results over those of the recording, where the later operations read them."""
    for source, target in zip(tree_leaves(new), tree_leaves(old), strict=True):
        if isinstance(source, Tensor) and source.data_ptr() != target.data_ptr():
            target.copy_(source)
