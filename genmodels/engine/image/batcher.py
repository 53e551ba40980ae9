"""Dynamic batching: rows of requests that wait at the same time go through a network together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genmodels.engine.metrics import ImageMeter
from genmodels.sizing.memory import SERVED_ROWS

CHUNK = SERVED_ROWS  # rows in every pass


@dataclass(eq=False)
class _Part:
    """What one request wants to know, and has so far."""

    key: Hashable
    function: Callable[[Tensor], Tensor]
    rows: Tensor
    taken: int = 0
    results: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or sum(map(len, self.results)) == len(self.rows)


class Passes:
    """The passes through one model's networks; safe between threads.

    Every pass has `CHUNK` rows, the last ones padded: matrix products of another height round differently, and with one
    height a row's result depends neither on how many its request has, nor on whose rows are beside it. A request gets
    one pass at a time, in turn, so that a large one does not hold up small ones.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Part] = deque()
        self._changed = threading.Lock()
        self._turn = threading.Lock()  # who has it computes for all who wait
        self.meter: ImageMeter | None = None

    def apply(self, key: Hashable, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`function` of each row: (n, ...) -> (n, ...).

        Args:
            key: equal for calls whose rows may go through one another's `function`.
        """
        part = _Part(key, function, rows)
        with self._changed:
            self._waiting.append(part)
            self._tell_meter()
        while not part.done:
            with self._turn:
                if not part.done:
                    self._pass()
        if part.error is not None:
            raise part.error
        return torch.cat(part.results)

    def _pass(self) -> None:
        taken = self._take()
        if self.meter:
            self.meter.batch_size.observe(sum(end - start for _, start, end in taken))
        self._compute(taken)

    def _compute(self, taken: list[tuple[_Part, int, int]]) -> None:
        try:
            rows = torch.cat([part.rows[start:end] for part, start, end in taken])
            padding = rows.new_zeros(CHUNK - len(rows), *rows.shape[1:])
            found = taken[0][0].function(torch.cat((rows, padding)))
        except Exception as error:
            if len(taken) == 1:
                self._fail(taken[0][0], error)
            else:  # each alone, as its numbers are the same then: the one at fault ends, not all
                for one in taken:
                    self._compute([one])
            return
        place = 0
        for part, start, end in taken:
            part.results.append(found[place : place + end - start])
            place += end - start

    def _fail(self, part: _Part, error: Exception) -> None:
        part.error = error
        with self._changed:
            self._waiting = deque(other for other in self._waiting if other is not part)
            self._tell_meter()

    def _take(self) -> list[tuple[_Part, int, int]]:
        """(request, first row, last row + 1) of the next pass: the longest waiting, and what fits beside it."""
        free, taken, left = CHUNK, [], deque[_Part]()
        unfinished = []
        with self._changed:
            key = self._waiting[0].key
            for part in self._waiting:
                if part.key != key or not free:
                    left.append(part)
                    continue
                start, part.taken = part.taken, min(part.taken + free, len(part.rows))
                free -= part.taken - start
                taken.append((part, start, part.taken))
                if part.taken < len(part.rows):
                    unfinished.append(part)
            self._waiting = deque([*left, *unfinished])
            self._tell_meter()
        return taken

    def _tell_meter(self) -> None:
        if self.meter:
            self.meter.waiting.set(len(self._waiting))
