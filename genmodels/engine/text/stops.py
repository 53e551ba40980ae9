"""Find stop strings in text that arrives in parts."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Pass text on up to the first stop string, and hold back text that may become a stop string.

    The stop string that is completed first ends the text, so the result does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Add `text` and return the text that may be shown now."""
        if not self._stops:
            return text
        self._held += text
        matches = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if matches:
            self.matched = True
            return self._held[: min(matches)[1]]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """Return the text that was held back; called when no more text arrives."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
