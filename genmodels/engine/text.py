"""Completions: a prompt in, text out piece by piece, with stop strings, seeds, log-probabilities and counts."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from genmodels.data.text import Tokenizer
from genmodels.engine.batching import Text
from genmodels.engine.loaded import Loaded, TextModel
from genmodels.engine.logprobs import TokenLogprob, token_logprobs
from genmodels.engine.requests import Count, Request, Seed, seed_or_random
from genmodels.engine.stops import StopStrings
from genmodels.errors import RequestError
from genmodels.explain import wrong
from genmodels.sampling import Sampler

MAX_PROMPT = 65_536  # characters
MAX_TOKENS = 16_384  # in all texts of one request, with what is echoed
MAX_STOPS = 4
MAX_LOGPROBS = 5

Finish: TypeAlias = Literal["stop", "length"]


class CompletionRequest(Request):
    """Continue a prompt. Options of the family (`max_tokens`, `temperature`, ...) stand beside these fields."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="text to continue")
    n: Count = Field(1, description="number of answers")
    best_of: Count | None = Field(
        None,
        description="write this many answers and return the n with the most probable tokens on average; default: n",
    )
    seed: Seed | None = Field(None, description="the same seed gives the same answer; default: a random seed")
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        [], max_length=MAX_STOPS, description="texts that end an answer; they are not part of it"
    )
    echo: bool = Field(False, description="return the prompt before the answer; max_tokens may then be 0")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="return the log-probability of each token, and of this many of the most probable tokens in its "
        "place. They are the log-softmax of the model's logits, before temperature, penalties, biases and filters. "
        "With echo, tokens of the prompt have them too, except the first token that the model reads and those "
        "before it. Of a prompt longer than block_size the model reads the last block_size/2 tokens",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("best_of")
    @classmethod
    def _there_are_n_to_give(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", 1)
        if best_of is not None and best_of < n:
            raise wrong(f"got {best_of}, expected at least n, which is {n}")
        return best_of

    @property
    def texts(self) -> int:
        """How many are written."""
        return self.best_of or self.n


@dataclass(frozen=True)
class Piece:
    """The next part of a choice's text. Exactly the last one of each choice has a `finish_reason`."""

    index: int
    text: str
    tokens: int  # generated for this piece; more than its text shows where a stop string or a worse text was cut off
    finish_reason: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that begin in this text, where they are asked for

    def __add__(self, later: Piece) -> Piece:
        text, logprobs = self.text + later.text, self.logprobs + later.logprobs
        return Piece(self.index, text, self.tokens + later.tokens, later.finish_reason, logprobs)


class Completion:
    """An answer under way: its choices are texts of their own, whose pieces come as the engine makes them.

    Either iterate over it, which runs the engine in this thread, or `start` it beside an engine that runs in another.
    Where the best of several are wanted, all pieces come when the last text has ended.
    """

    def __init__(self, model: TextModel, prompt: list[int], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.seed = seed_or_random(request.seed)
        self.prompt_tokens = len(prompt)
        self._batcher = model.batcher
        self._take: Callable[[Piece | Exception], None] = _nobody
        self._n, self._unfinished = request.n, request.texts
        self._choices = [
            self._choice(index, model.tokenizer, prompt, request, options) for index in range(request.texts)
        ]
        self._held = [Piece(index, "", 0) for index in range(request.texts)]
        self._began: float | None = None  # until its first token

    def start(self, take: Callable[[Piece | Exception], None], began: float | None = None) -> None:
        """Join the engine. `take` gets each piece, from the engine's thread, or the error that ends it all.

        Args:
            began: when the request came, on the monotonic clock; now if left out.

        Raises:
            RequestError: the engine is full.
        """
        self._take, self._began = take, time.monotonic() if began is None else began
        self._batcher.add(*(choice.text for choice in self._choices))
        if self._batcher.meter:
            self._batcher.meter.prompt.inc(self.prompt_tokens)

    def leave(self) -> None:
        """Nobody waits for it any more: its slots are free from the next step on."""
        for choice in self._choices:
            choice.text.unwanted = True

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
    ) -> _Choice:
        sampler = Sampler(options, choice_seed(self.seed, index), prompt, tokenizer.vocab_size)
        return _Choice(index, tokenizer, prompt, request, sampler, self._give)

    def _give(self, item: Piece | Exception) -> None:
        if isinstance(item, Exception):
            self._unfinished -= 1
            self._take(item)
            return
        self._unfinished -= item.finish_reason is not None
        if item.tokens and self._began is not None:
            if self._batcher.meter:
                self._batcher.meter.first_token.observe(time.monotonic() - self._began)
            self._began = None
        if len(self._choices) == self._n:
            self._take(item)
            return
        self._held[item.index] += item
        if not self._unfinished:
            self._give_best()

    def _give_best(self) -> None:
        ranked = sorted(self._choices, key=lambda choice: choice.mean_logprob, reverse=True)  # stable: ties by index
        unseen = sum(self._held[choice.index].tokens for choice in ranked[self._n :])
        for index, choice in enumerate(ranked[: self._n]):
            piece = self._held[choice.index]
            self._take(replace(piece, index=index, tokens=piece.tokens + (0 if index else unseen)))


def complete(loaded: Loaded, request: CompletionRequest) -> Completion:
    """Check a request completely; nothing is generated before the answer is iterated over or started.

    Raises:
        RequestError: the model cannot complete, or the request does not fit it; names the field.
    """
    options = loaded.options("complete", request)
    assert isinstance(loaded, TextModel)
    prompt = loaded.tokenizer.encode(request.prompt)
    _check_sizes(request, options.max_tokens, len(prompt))
    return Completion(loaded, prompt, request, options)


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of n choices: the first has the request's own, the others ones that no counting up meets."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} choice {index}".encode(), digest_size=8).digest(), "big") >> 1


class _Choice:
    """One text of a completion: the engine's tokens become pieces."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: list[int],
        request: CompletionRequest,
        sampler: Sampler,
        give: Callable[[Piece | Exception], None],
    ) -> None:
        self.index, self._tokenizer, self._prompt, self._give = index, tokenizer, prompt, give
        self._echo, self._stops = request.prompt if request.echo else "", StopStrings(request.stop)
        self._ranked, self._most = request.texts > request.n, request.logprobs
        self._sum, self._count = 0.0, 0  # of the log-probabilities of generated tokens
        lists_prompt = request.echo and self._most is not None
        self._prompt_listed = 0 if lists_prompt else len(prompt)  # tokens of it
        self._unshown: deque[TokenLogprob] = deque()  # listed, but their text may still be cut off
        self._shown = self._listed = 0  # characters
        self.text = Text(prompt, sampler, self._accept, self._end, self._read if lists_prompt else None)

    @property
    def mean_logprob(self) -> float:
        return self._sum / max(self._count, 1)

    def _read(self, place: int, logits: Tensor) -> None:
        self._list_unread(place + 1)
        tokens = self._prompt[place + 1 : place + 1 + len(logits)]
        self._prompt_listed += len(tokens)
        self._list(token_logprobs(logits[: len(tokens)], tokens, self._listed, self._most or 0, self._tokenizer))

    def _accept(self, token: int, logits: Tensor) -> bool:
        if self._ranked or self._most is not None:
            self._list_unread(len(self._prompt))
            found = token_logprobs(logits[None], [token], self._listed, self._most or 0, self._tokenizer)
            self._sum, self._count = self._sum + (found[0].logprob or 0.0), self._count + 1
            if self._most is not None:
                self._list(found)
        text = self._stops.feed(self._tokenizer.decode([token]))
        self._show(text, 1, "stop" if self._stops.found else None)
        return not self._stops.found

    def _end(self, error: Exception | None) -> None:
        if error is not None:
            self._give(error)
        elif not self._stops.found:
            self._list_unread(len(self._prompt))
            self._show(self._stops.rest(), 0, "length")

    def _list_unread(self, end: int) -> None:
        """The prompt's tokens up to `end` that are not listed: those that the network has read nothing before."""
        for token in self._prompt[self._prompt_listed : end]:
            self._list([TokenLogprob(self._tokenizer.decode([token]), self._listed)])
        self._prompt_listed = max(self._prompt_listed, end)

    def _list(self, tokens: list[TokenLogprob]) -> None:
        self._unshown += tokens
        self._listed += sum(len(token.text) for token in tokens)

    def _show(self, text: str, tokens: int, finish_reason: Finish | None) -> None:
        text, self._echo = self._echo + text, ""
        self._shown += len(text)
        logprobs = []
        while self._unshown and self._unshown[0].offset < self._shown:
            logprobs.append(self._unshown.popleft())
        self._give(Piece(self.index, text, tokens, finish_reason, tuple(logprobs)))


def _check_sizes(request: CompletionRequest, max_tokens: int, prompt_tokens: int) -> None:
    if max_tokens == 0 and not request.echo:
        message = "max_tokens: got 0, expected a whole number at least 1; 0 is only for echo"
        raise RequestError(message, param="max_tokens", code="invalid_value")
    echoed = prompt_tokens if request.echo else 0
    most = MAX_TOKENS // request.texts - echoed
    if max_tokens <= most:
        return
    many = f"best_of = {request.best_of}" if request.best_of else f"n = {request.n}"
    if most < 0:
        message = f"echo: got a prompt of {echoed} tokens, expected at most {most + echoed} to echo with {many}"
        raise RequestError(message, param="echo", code="invalid_value")
    also = f" and {echoed} tokens to echo" if echoed else ""
    message = f"max_tokens: got {max_tokens}, expected at most {most} with {many}{also}"
    raise RequestError(message, param="max_tokens", code="invalid_value")


def _nobody(_: object) -> None:
    pass
