"""Pass text deltas from a decoding thread to a coroutine."""

from __future__ import annotations

import asyncio
from collections import deque

from genmodels.engine.text.choices import TextDelta


class DeltaQueue:
    """Deltas of one completion; the coroutine is woken once for all deltas that have arrived."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived, self._choice_ended = asyncio.Event(), asyncio.Event()
        self._notified = False
        self._items: deque[TextDelta | Exception] = deque()

    def put(self, item: TextDelta | Exception) -> None:
        """Add a delta, or the error that ends the completion; may be called from any thread."""
        self._items.append(item)
        if not self._notified:
            self._notified = True
            self._loop.call_soon_threadsafe(self._arrived.set)
        if isinstance(item, Exception) or item.finish_reason:
            self._loop.call_soon_threadsafe(self._choice_ended.set)

    async def get(self) -> list[TextDelta]:
        """Wait for at least one delta and return all that have arrived, those of one choice joined.

        Raises:
            Exception: the error that was put, when it is the next item.
        """
        await self._arrived.wait()
        self._arrived.clear()
        self._notified = False  # before the items are read: an item that arrives later wakes the coroutine again
        joined: dict[int, TextDelta] = {}
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Exception):
                raise item
            previous = joined.get(item.index)
            joined[item.index] = previous + item if previous else item
        return list(joined.values())

    async def collect(self, seconds: float) -> None:
        """Wait for more deltas, at most `seconds` and not longer than to the end of a choice."""
        timer = self._loop.call_later(seconds, self._choice_ended.set)
        await self._choice_ended.wait()
        timer.cancel()
        self._choice_ended.clear()
