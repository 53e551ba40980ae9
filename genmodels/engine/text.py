"""Completions: a prompt in, text out piece by piece, with stop strings, seeds and counts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

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
    best_of: Count | None = Field(None, description="write this many, answer with the n most probable per token")
    seed: Seed | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_STOPS)
    echo: bool = Field(False, description="the prompt stands before each answer")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="tell each token's log-probability, and those of this many others; by the model alone, in nats, "
        "before temperature, penalties and filters",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def written(self) -> int:
        """Choices that are written, of which the n best are the answer."""
        return max(self.n, self.best_of or 0)


@dataclass(frozen=True)
class TokenLogprob:
    """How probable the model thought a token, in nats, and the most probable ones there."""

    token: str
    offset: int  # where it begins in the choice's text
    logprob: float | None  # None for a token that the model saw nothing before
    top: dict[str, float] | None


@dataclass(frozen=True)
class Piece:
    """The next part of a choice's text. Exactly the last one of each choice has a `finish_reason`."""

    index: int
    text: str
    tokens: int  # generated for this piece; more than its text shows where a stop string was cut off
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, later: Piece) -> Piece:
        """Both as one; `later` comes after this one in the same choice."""
        return Piece(
            self.index,
            self.text + later.text,
            self.tokens + later.tokens,
            later.finish_reason,
            self.logprobs + later.logprobs,
        )


class Completion:
    """An answer under way: its choices are texts of their own, whose pieces come as the engine makes them.

    Either iterate over it, which runs the engine in this thread, or `start` it beside an engine that runs in another.
    """

    def __init__(self, model: TextModel, prompt: list[int], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.seed = seed_or_random(request.seed)
        self.prompt_tokens = len(prompt)
        self._batcher = model.batcher
        self._take: Callable[[Piece | Exception], None] = _nobody
        self._unfinished = request.written
        self._texts = []
        for index in range(request.written):
            choice = Choice(index, model.tokenizer, prompt, request, self._pass_on)
            sampler = Sampler(options, choice_seed(self.seed, index), prompt, model.tokenizer.vocab_size)
            see = choice.see if request.echo and choice.tells_logprobs else None
            self._texts.append(Text(prompt, sampler, choice.take, choice.end, see))

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

    def _pass_on(self, item: Piece | Exception) -> None:
        self._unfinished -= isinstance(item, Exception) or item.finish_reason is not None
        self._take(item)


class Choice:
    """One of a completion's texts, from tokens to pieces.

    Args:
        emit: gets its pieces; or an error, and nothing after it.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: list[int],
        request: CompletionRequest,
        emit: Callable[[Piece | Exception], None],
    ) -> None:
        self.tells_logprobs = request.logprobs is not None or request.written > request.n
        self._index, self._tokenizer, self._emit = index, tokenizer, emit
        self._top = request.logprobs or 0
        self._stops = StopStrings(request.stop)
        self._echo = prompt if request.echo else []  # still to be shown
        self._seen: list[tuple[int, Tensor]] = []  # tokens of the prompt and the logits of their places
        self._written = self._shown = 0  # characters, without the prompt's
        self._prompt_length = len(tokenizer.decode(self._echo))
        self._held: deque[TokenLogprob] = deque()  # of text that is not shown yet

    def see(self, tokens: Sequence[int], logits: Tensor) -> None:
        self._seen.extend(zip(tokens, logits, strict=True))

    def take(self, token: int, logits: Tensor) -> bool:
        text = self._tokenizer.decode([token])
        if self.tells_logprobs:
            self._held.append(self._logprob(token, logits, self._prompt_length + self._written))
        self._written += len(text)
        self._show(self._stops.feed(text), 1, "stop" if self._stops.found else None)
        return not self._stops.found

    def end(self, error: Exception | None) -> None:
        if error is not None:
            self._emit(error)
        elif not self._stops.found:
            self._show(self._stops.rest(), 0, "length")

    def _show(self, text: str, tokens: int, finish_reason: Literal["stop", "length"] | None) -> None:
        logprobs = self._echoed() if self.tells_logprobs else []
        shown, self._echo = self._tokenizer.decode(self._echo) + text, []
        self._shown += len(text)
        while self._held and self._held[0].offset < self._prompt_length + self._shown:
            logprobs.append(self._held.popleft())
        self._emit(Piece(self._index, shown, tokens, finish_reason, tuple(logprobs)))

    def _echoed(self) -> list[TokenLogprob]:
        """The prompt's: none for its first token, and for those that are out of the window."""
        unseen, offset, found = len(self._echo) - len(self._seen), 0, []
        for place, token in enumerate(self._echo):
            text = self._tokenizer.decode([token])
            if place < unseen:
                found.append(TokenLogprob(text, offset, None, None))
            else:
                found.append(self._logprob(token, self._seen[place - unseen][1], offset))
            offset += len(text)
        self._seen.clear()
        return found

    def _logprob(self, token: int, logits: Tensor, offset: int) -> TokenLogprob:
        logprobs = logits.double().log_softmax(-1)
        values, best = logprobs.topk(min(self._top, len(logprobs)))
        top = {
            self._tokenizer.decode([other]): value for other, value in zip(best.tolist(), values.tolist(), strict=True)
        }
        return TokenLogprob(self._tokenizer.decode([token]), offset, float(logprobs[token]), top)


def _nobody(_: object) -> None:
    pass


def complete(loaded: Loaded, request: CompletionRequest) -> Completion:
    """Check a request completely; nothing is generated before the answer is iterated over or started.

    Raises:
        RequestError: the model cannot complete, or the request does not fit it; names the field.
    """
    options = loaded.options("complete", request)
    if request.best_of is not None and request.best_of < request.n:
        message = f"best_of: got {request.best_of}, expected at least n = {request.n}"
        raise RequestError(message, param="best_of", code="invalid_value")
    if options.max_tokens == 0 and not request.echo:
        message = "max_tokens: got 0, expected at least 1; 0 goes with echo alone"
        raise RequestError(message, param="max_tokens", code="invalid_value")
    most = MAX_TOKENS // request.written
    choices = f"n = {request.n}" if request.written == request.n else f"best_of = {request.written}"
    if options.max_tokens > most:
        message = f"max_tokens: got {options.max_tokens}, expected at most {most} with {choices}"
        raise RequestError(message, param="max_tokens", code="invalid_value")
    assert isinstance(loaded, TextModel)
    prompt = loaded.tokenizer.encode(request.prompt)
    if request.echo and request.logprobs is not None and len(prompt) > most:
        message = f"prompt: has {len(prompt)} tokens, and with echo, logprobs and {choices} at most {most}"
        raise RequestError(message, param="prompt", code="invalid_value")
    return Completion(loaded, prompt, request, options)


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
