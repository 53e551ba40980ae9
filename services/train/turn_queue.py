"""The queue through which a driver gives attempts to its worker group, as an actor of Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NamedTuple


class Turn(NamedTuple):
    """One attempt that a worker group is to carry out."""

    job: str
    model: str
    attempt: int


class TurnQueue:
    """Attempts in the order of their turns. Each rank takes each of them, and says when it has done its part."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._turns: list[Turn | None] = []
        self._done = Counter[int]()  # ranks, by number of the turn
        self._changed = asyncio.Condition()

    async def give(self, turn: Turn | None) -> None:
        """Add a turn, and wait until all ranks have done it; None: the ranks are to end."""
        async with self._changed:
            number = len(self._turns)
            self._turns.append(turn)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._done[number] == self._workers)

    async def take(self, number: int) -> Turn | None:
        """Wait for a turn, the first is 0."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._turns) > number)
            return self._turns[number]

    async def done(self, number: int) -> None:
        async with self._changed:
            self._done[number] += 1
            self._changed.notify_all()
