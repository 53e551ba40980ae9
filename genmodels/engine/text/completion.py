"""Completions: prompts in, text out piece by piece, with stop strings, seeds, log-probabilities and counts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from genmodels.data.text import Tokenizer
from genmodels.engine.model import Loaded
from genmodels.engine.requests import seed_or_random
from genmodels.engine.text.choices import Choices, Piece
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError

MAX_TEXTS = 128  # of one request: an engine with nothing else to do has room for them
MAX_TOKENS = 16_384  # in all texts of one request, with what is echoed


@dataclass(frozen=True)
class Vocabulary:
    """The text of each token of a model, by id."""

    model: str
    family: str
    tokens: tuple[str, ...]


class Completion:
    """An answer under way: its choices are texts of their own, whose pieces come as the engine makes them.

    Either iterate over it, which runs the engine in this thread, or `start` it beside an engine that runs in another.
    The choices of prompt i are numbered from i * n.
    """

    def __init__(self, model: TextModel, prompts: list[list[int]], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.prompt_tokens = sum(map(len, prompts))
        seeds = _seeds(request)
        self.seed = request.seed if request.seed is not None else seeds if len(seeds) > 1 else seeds[0]
        self._batcher = model.batcher
        self._take: Callable[[Piece | Exception], None] = _nobody
        self._unfinished, self._texts_each = request.choices, request.texts
        self._choices = [
            Choices(place, model.tokenizer, prompt, seed, request, options, self._put)
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._texts = [text for choices in self._choices for text in choices.texts]
        self._began: float | None = None  # until its first token

    def start(self, take: Callable[[Piece | Exception], None], began: float | None = None) -> None:
        """Join the engine. `take` gets each piece, from the engine's thread, or the error that ends it all.

        Args:
            began: when the request came, on the monotonic clock; now if left out.

        Raises:
            RequestError: the engine is full.
        """
        self._take, self._began = take, time.monotonic() if began is None else began
        self._batcher.add(*self._texts)
        if self._batcher.meter:
            self._batcher.meter.prompt.inc(self.prompt_tokens)

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

    def _put(self, item: Piece | Exception) -> None:
        if isinstance(item, Exception):
            self._take(item)
            return
        if item.tokens and self._began is not None:
            if self._batcher.meter:
                self._batcher.meter.first_token.observe(time.monotonic() - self._began)
            self._began = None
        for piece in self._choices[item.index // self._texts_each].ready(item):
            self._unfinished -= piece.finish_reason is not None
            self._take(piece)


def complete(loaded: Loaded, request: CompletionRequest) -> Completion:
    """Check a request completely; nothing is generated before the answer is iterated over or started.

    Raises:
        RequestError: the model cannot complete, or the request does not fit it; names the field.
    """
    options = loaded.options("complete", request)
    assert isinstance(loaded, TextModel)
    prompts = [
        _encoded(loaded.tokenizer, prompt, request.param_of(place)) for place, prompt in enumerate(request.prompts)
    ]
    _check_sizes(request, options.max_tokens, prompts)
    return Completion(loaded, prompts, request, options)


def vocabulary(loaded: Loaded) -> Vocabulary:
    """List what the tokens of a model mean.

    Raises:
        ModelNotFound: it is no text model.
    """
    loaded.check_verb("complete")
    assert isinstance(loaded, TextModel)
    texts = tuple(loaded.tokenizer.decode([token]) for token in range(loaded.tokenizer.vocab_size))
    return Vocabulary(loaded.name, loaded.family.family_name(), texts)


def _seeds(request: CompletionRequest) -> list[int]:
    """One for each prompt."""
    if isinstance(request.seed, list):
        return request.seed
    return [seed_or_random(request.seed) for _ in request.prompts]


def _encoded(tokenizer: Tokenizer, prompt: str | list[int], param: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, param)
    unknown = next((place for place, token in enumerate(prompt) if token >= tokenizer.vocab_size), None)
    if unknown is None:
        return prompt
    message = f"token {prompt[unknown]} does not exist; this model's are 0 to {tokenizer.vocab_size - 1}"
    raise _wrong(f"{param}[{unknown}]", message)


def _check_sizes(request: CompletionRequest, max_tokens: int, prompts: list[list[int]]) -> None:
    """Refuse what is too much work, before any of it is begun."""
    texts = request.texts * len(prompts)
    of_each = f"best_of = {request.best_of}" if request.best_of else f"n = {request.n}"
    many = of_each if len(prompts) == 1 else f"{of_each} and {len(prompts)} prompts"
    if texts > MAX_TEXTS:
        most = MAX_TEXTS // request.texts
        raise _wrong("prompt", f"got {len(prompts)} prompts, expected at most {most} with {of_each}")
    if max_tokens == 0 and not request.echo:
        raise _wrong("max_tokens", "got 0, expected a whole number at least 1; 0 is only for echo")
    echoed = request.texts * sum(map(len, prompts)) if request.echo else 0
    if echoed > MAX_TOKENS:
        got, most = echoed // request.texts, MAX_TOKENS // request.texts
        raise _wrong("echo", f"got {got} tokens of prompts, expected at most {most} to echo with {many}")
    most = (MAX_TOKENS - echoed) // texts
    if max_tokens > most:
        also = f" and {echoed // request.texts} tokens to echo" if echoed else ""
        raise _wrong("max_tokens", f"got {max_tokens}, expected at most {most} with {many}{also}")


def _wrong(param: str, text: str) -> RequestError:
    return RequestError(f"{param}: {text}", param=param, code="invalid_value")


def _nobody(_: object) -> None:
    pass
