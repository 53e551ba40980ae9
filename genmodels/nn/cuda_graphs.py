"""Capture a function of static shapes as a CUDA graph: one launch instead of one for each kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Function: TypeAlias = Callable[[Tensor], Tensor]
Capture: TypeAlias = Callable[[Function, Tensor], Function]

WARM_UPS = 2  # before a capture: libraries choose kernels and allocate workspaces, which a capture forbids

logger = logging.getLogger("genmodels.engine")


def cuda_graph(function: Function, example: Tensor) -> Function:
    """Return a graph of the function, or the function itself if it cannot be captured or the graph's result differs.

    Args:
        function: a pure function of its input and of tensors that stay where they are; it may write to those.
        example: an input of the only shape that the graph will get. The function is called with it several times.
    """
    try:
        graph = _recorded(function, example)
        if torch.equal(graph(example), function(example)):
            return graph
        logger.warning("a CUDA graph of shape %s gives another result, and is not used", tuple(example.shape))
    except RuntimeError as error:
        logger.warning("shape %s cannot be captured as a CUDA graph: %s", tuple(example.shape), error)
    return function


def _recorded(function: Function, example: Tensor) -> Function:
    inputs, graph, stream = example.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function(inputs)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other models compute meanwhile
        outputs = function(inputs)

    def replay(values: Tensor) -> Tensor:
        inputs.copy_(values)
        graph.replay()
        return outputs.clone()  # the next replay writes over `outputs`

    return replay
