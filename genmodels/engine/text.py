"""Completions: a prompt in, text out piece by piece, with stop strings, seeds and counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from genmodels.engine.loaded import Loaded, TextModel
from genmodels.engine.requests import Count, Request, Seed, seed_or_random
from genmodels.errors import RequestError

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
    """An answer under way: iterate over its pieces, one choice after the other."""

    def __init__(self, model: TextModel, prompt: list[int], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.seed = seed_or_random(request.seed)
        self.prompt_tokens = len(prompt)
        self._family, self._tokenizer = model.family, model.tokenizer
        self._prompt, self._request, self._options = prompt, request, options

    def __iter__(self) -> Iterator[Piece]:
        for index in range(self._request.n):
            yield from self._choice(index)

    def _choice(self, index: int) -> Iterator[Piece]:
        stops = StopStrings(self._request.stop)
        count = 0
        for token in self._family.generate(self._prompt, choice_seed(self.seed, index), self._options):
            count += 1
            text = stops.feed(self._tokenizer.decode([token]))
            if stops.found:
                yield Piece(index, text, 1, "stop")
                return
            yield Piece(index, text, 1)
        yield Piece(index, stops.rest(), 0, "length" if count >= self._options.max_tokens else "stop")


def complete(loaded: Loaded, request: CompletionRequest) -> Completion:
    """Check a request completely; nothing is generated before the answer is iterated over.

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
