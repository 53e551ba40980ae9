"""Count the floating point operations of an optimizer step, and measure how many the device can do: for metrics only.

Neither changes the trained model or a random number generator.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from genmodels.family import Batch, Family
from genmodels.spec.sections import TrainConfig

PEAK_SECONDS = 0.05
PEAK_SIZE = {"cpu": 384, "cuda": 8192}  # of the matrices

log = logging.getLogger(__name__)


class StepFlops(NamedTuple):
    """The operations of one step, and the speed of one device."""

    step: float  # floating point operations of forward and backward passes, of all workers together
    peak: float  # floating point operations per second of one device, in matrix products


def estimate(family: Family[Any, Any], batch: Batch, config: TrainConfig, device: torch.device) -> StepFlops | None:
    """Return the operations of a step, or None if they cannot be counted: training does not need them.

    Args:
        family: the model; it does not change, because the count uses a copy without data.
        batch: the examples of one micro-batch of all workers, on the CPU.
        device: the device of the training.
    """
    try:
        return StepFlops(_step(family, batch, config) * config.accumulation_steps, _peak(device, config.precision))
    except Exception as error:  # e.g. an operation without a shape formula, or too little memory
        log.info("floating point operations are not counted: %s: %s", type(error).__name__, str(error).split("\n")[0])
        return None


def _step(family: Family[Any, Any], batch: Batch, config: TrainConfig) -> float:
    """Count with tensors that have a shape and no data: this takes no memory, no random numbers and little time."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counter = _Counter()
    with FakeTensorMode() as mode, sdpa_kernel(SDPBackend.MATH):  # fused attention on the CPU has no formula
        twin = type(family)(family.config, family.data)
        shapes, progress = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}, torch.zeros(())
        for role in twin.roles(config):
            with counter:
                role.loss(shapes, progress)["loss"].backward()
    return float(counter.total)


class _Counter(TorchDispatchMode):
    """Count as torch's `FlopCounterMode`, which follows modules and so cannot count the gradient of a gradient."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _peak(device: torch.device, precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    out = matrix @ matrix  # the first product includes the set-up
    best, deadline = 0.0, time.perf_counter() + PEAK_SECONDS
    while not best or time.perf_counter() < deadline:
        _await(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        _await(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    if device.type == "cuda":  # the peak memory in the metrics is that of the run
        del matrix, out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
