"""Dynamic batching: rows of requests that wait at the same time go through a network in one batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genmodels.engine.device_errors import request_error
from genmodels.engine.image.metrics import ImageMetrics
from genmodels.nn.transfer import to_device
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement


@dataclass(eq=False)
class _Call:
    """The rows of one `apply` call and the results so far."""

    key: Hashable
    function: Callable[[Tensor], Tensor]
    rows: Tensor
    num_scheduled: int = 0  # rows that are in a batch already
    results: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or sum(map(len, self.results)) == len(self.rows)


class DynamicBatcher:
    """Run batches through one model's networks; thread-safe.

    Every batch has as many rows as the placement says, padded at the end. Matrix products of different heights round
    differently; with one height a row's result depends neither on the number of rows of its request nor on the other
    rows in the batch. Each request gets one batch at a time, in turn, so that a large request does not delay small
    ones.
    """

    def __init__(self, placement: Placement = DEFAULT_PLACEMENT) -> None:
        self._device, self._rows = placement.torch_device, placement.rows
        self._waiting: deque[_Call] = deque()
        self._changed = threading.Lock()
        self._turn = threading.Lock()  # the thread that holds it computes one batch for all waiting calls
        self.metrics: ImageMetrics | None = None  # None while the model is only warmed up

    def apply(self, key: Hashable, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Apply `function` to each row: (n, ...) -> (n, ...).

        Args:
            key: calls with equal keys may share a batch; the `function` of any of them is then used for all.
        """
        call = _Call(key, function, to_device(rows, self._device))
        with self._changed:
            self._waiting.append(call)
            self._update_metrics()
        while not call.done:
            with self._turn:
                if not call.done:
                    self._run_batch()
        if call.error is not None:
            raise call.error
        return torch.cat(call.results)

    def _run_batch(self) -> None:
        parts = self._schedule()
        if self.metrics:
            self.metrics.batch_size.observe(sum(end - start for _, start, end in parts))
        self._compute(parts)

    def _compute(self, parts: list[tuple[_Call, int, int]]) -> None:
        try:
            rows = torch.cat([call.rows[start:end] for call, start, end in parts])
            padding = rows.new_zeros(self._rows - len(rows), *rows.shape[1:])
            outputs = parts[0][0].function(torch.cat((rows, padding)))
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0][0], error)
            else:  # alone, a call gets the same numbers: only the one that causes the error fails
                for part in parts:
                    self._compute([part])
            return
        offset = 0
        for call, start, end in parts:
            call.results.append(outputs[offset : offset + end - start])
            offset += end - start

    def _fail(self, call: _Call, error: Exception) -> None:
        call.error = request_error(error)
        with self._changed:
            self._waiting = deque(other for other in self._waiting if other is not call)
            self._update_metrics()

    def _schedule(self) -> list[tuple[_Call, int, int]]:
        """Return the next batch as (call, first row, last row + 1): the longest waiting call and others of its key."""
        free, parts, skipped = self._rows, [], deque[_Call]()
        unfinished = []
        with self._changed:
            key = self._waiting[0].key
            for call in self._waiting:
                if call.key != key or not free:
                    skipped.append(call)
                    continue
                start, call.num_scheduled = call.num_scheduled, min(call.num_scheduled + free, len(call.rows))
                free -= call.num_scheduled - start
                parts.append((call, start, call.num_scheduled))
                if call.num_scheduled < len(call.rows):
                    unfinished.append(call)
            self._waiting = deque([*skipped, *unfinished])
            self._update_metrics()
        return parts

    def _update_metrics(self) -> None:
        if self.metrics:
            self.metrics.waiting.set(len(self._waiting))
