"""Build models that have shapes but no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLS = ("normal_", "uniform_")
QUOTIENTS = ("div", "__truediv__")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make tensors on the meta device, and draw no initial weights.

    Random draws and quotients on the meta device would make torch load all its shape rules, which takes seconds and
    70 MB.
    """
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = kwargs or {}, getattr(function, "__name__", "")
        if name in FILLS or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else options["tensor"]
        if name in QUOTIENTS and isinstance(args[1], int | float):
            return args[0]
        if function is torch.randn:
            return torch.empty(*args)
        return function(*args, **options)
