"""How much the benchmark of serving measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of a whole run; a test enters every part with smaller ones."""

    rounds: int = 7
    streams: tuple[int, ...] = (1, 8, 16, 64)
    tokens: int = 100  # of each stream
    texts: int = 32  # that a measurement of text writes at least, in batches of as many streams
    long_tokens: int = 1500  # so many that the cost of the request itself is small
    empty: int = 300  # requests
    first: int = 25  # requests of each of 8 clients
    pictures: int = 64  # of a request
    picture_requests: int = 10
    refusals: int = 50  # requests while all slots are taken
    swaps: int = 20
    swap_seconds: float = 25.0

    def batches(self, streams: int) -> int:
        """Return how many times a measurement starts `streams` texts at once."""
        return max(1, self.texts // streams)
