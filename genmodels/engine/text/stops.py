"""Stop strings, found in text that comes in parts."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and keeps back what may become one.

    Of several, the one that is complete first counts, so that the result does not depend on where pieces were cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        self._held += text
        places = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)[1]]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was kept back, when no more text comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
