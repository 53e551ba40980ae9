"""Completions: a prompt in, text out piece by piece, with stop strings, seeds and counts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from genmodels.data.text import Tokenizer
from genmodels.engine.batching import Text
from genmodels.engine.loaded import Loaded, TextModel
from genmodels.engine.requests import Count, Request, Seed, seed_or_random
from genmodels.errors import RequestError
from genmodels.sampling import Sampler

MAX_PROMPT = 65_536  # characters
MAX_TOKENS = 16_384  # in all choices of one request
MAX_STOPS = 4


class CompletionRequest(Request):
    """Continue a prompt. Options of the family (`max_tokens`, `temperature`, ...) stand beside these fields."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="the text to go on from")
    n: Count = 1
    seed: Seed | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_STOPS)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


@dataclass(frozen=True)
class Piece:
    """The next part of a choice's text. Exactly the last one of each choice has a `finish_reason`."""

    index: int
    text: str
    tokens: int  # generated for this piece; more than its text shows where a stop string was cut off
    finish_reason: Literal["stop", "length"] | None = None


class Completion:
    """An answer under way: its n choices are texts of their own, whose pieces come as the engine makes them.

    Either iterate over it, which runs the engine in this thread, or `start` it beside an engine that runs in another.
    """

    def __init__(self, model: TextModel, prompt: list[int], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.seed = seed_or_random(request.seed)
        self.prompt_tokens = len(prompt)
        self._batcher = model.batcher
        self._take: Callable[[Piece | Exception], None] = _nobody
        self._unfinished = request.n
        self._texts = [self._choice(index, model.tokenizer, prompt, request, options) for index in range(request.n)]

    def start(self, take: Callable[[Piece | Exception], None]) -> None:
        """Join the engine. `take` gets each piece, from the engine's thread, or the error that ends it all.

        Raises:
            RequestError: the engine is full.
        """
        self._take = take
        self._batcher.add(*self._texts)

    def leave(self) -> None:
        """Nobody waits for it any more: its slots are free from the next step on."""
        for text in self._texts:
            text.unwanted = True

    def __iter__(self) -> Iterator[Piece]:
        arrived: deque[Piece | Exception] = deque()
        self.start(arrived.append)
        try:
            while self._unfinished or arrived:
                while arrived:
                    piece = arrived.popleft()
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
                self._batcher.step()
        finally:
            self.leave()

    def _choice(
        self, index: int, tokenizer: Tokenizer, prompt: list[int], request: CompletionRequest, options: Any
    ) -> Text:
        sampler = Sampler(options, choice_seed(self.seed, index), prompt, tokenizer.vocab_size)
        stops = StopStrings(request.stop)

        def take(token: int) -> bool:
            text = stops.feed(tokenizer.decode([token]))
            self._take(Piece(index, text, 1, "stop" if stops.found else None))
            return not stops.found

        def end(error: Exception | None) -> None:
            self._unfinished -= 1
            if error is not None:
                self._take(error)
            elif not stops.found:
                self._take(Piece(index, stops.rest(), 0, "length"))

        return Text(prompt, sampler, take, end)


def _nobody(_: object) -> None:
    pass


def complete(loaded: Loaded, request: CompletionRequest) -> Completion:
    """Check a request completely; nothing is generated before the answer is iterated over or started.

    Raises:
        RequestError: the model cannot complete, or the request does not fit it; names the field.
    """
    options = loaded.options("complete", request)
    if request.n * options.max_tokens > MAX_TOKENS:
        most = MAX_TOKENS // request.n
        message = f"max_tokens: got {options.max_tokens}, expected at most {most} with n = {request.n}"
        raise RequestError(message, param="max_tokens", code="invalid_value")
    assert isinstance(loaded, TextModel)
    return Completion(loaded, loaded.tokenizer.encode(request.prompt), request, options)


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of n choices: the first has the request's own, the others ones that no counting up meets."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} choice {index}".encode(), digest_size=8).digest(), "big") >> 1


class StopStrings:
    """Lets text through up to the first stop string, and keeps back what may become one.

    Of several, the one that is complete first counts, so that the result does not depend on where pieces were cut.
    """

    def __init__(self, stops: list[str]) -> None:
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
