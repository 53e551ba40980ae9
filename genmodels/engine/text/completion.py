"""Completions: continue prompts, with stop strings, seeds, log-probabilities and token counts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from genmodels.data.text import Tokenizer
from genmodels.engine.model import LoadedModel
from genmodels.engine.requests import seed_or_random
from genmodels.engine.text.choices import Choices, TextDelta
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError

MAX_CANDIDATES = 128  # texts of one request: an idle batcher has room for them
MAX_TOKENS = 16_384  # in all texts of one request, including echoed prompts


@dataclass(frozen=True)
class Vocabulary:
    """The text of each token of a model, by id."""

    model: str
    family: str
    tokens: tuple[str, ...]


class Completion:
    """A completion in progress. Its candidates are separate sequences; deltas come in the order of the decoding steps.

    Either iterate over it, which runs the batcher in this thread, or call `start` if the batcher runs in another
    thread. The choices of prompt i are numbered from i * n.
    """

    def __init__(self, model: TextModel, prompts: list[list[int]], request: CompletionRequest, options: Any) -> None:
        self.model = model.name
        self.prompt_tokens = sum(map(len, prompts))
        seeds = _seeds(request)
        self.seed = request.seed if request.seed is not None else seeds if len(seeds) > 1 else seeds[0]
        self._batcher = model.batcher
        self._on_delta: Callable[[TextDelta | Exception], None] = _ignore
        self._unfinished, self._candidates_each = request.choices, request.candidates
        self._choices = [
            Choices(place, model.tokenizer, prompt, seed, request, options, self._emit)
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._sequences = [sequence for choices in self._choices for sequence in choices.sequences]
        self._started: float | None = None  # None after the first token

    def start(self, on_delta: Callable[[TextDelta | Exception], None], started: float | None = None) -> None:
        """Add the sequences to the batcher.

        Args:
            on_delta: called in the batcher's thread with each delta, or with the error that ends the completion.
            started: time of the request in seconds of the monotonic clock; default: now.

        Raises:
            RequestError: too many sequences wait already.
        """
        self._on_delta, self._started = on_delta, time.monotonic() if started is None else started
        self._batcher.add(*self._sequences)
        if self._batcher.metrics:
            self._batcher.metrics.prompt.inc(self.prompt_tokens)

    def cancel(self) -> None:
        """Stop generating: the slots are free from the next step on."""
        for sequence in self._sequences:
            sequence.cancelled = True

    def __iter__(self) -> Iterator[TextDelta]:
        arrived: deque[TextDelta | Exception] = deque()
        self.start(arrived.append)
        try:
            while self._unfinished or arrived:
                while arrived:
                    delta = arrived.popleft()
                    if isinstance(delta, Exception):
                        raise delta
                    yield delta
                self._batcher.step()
        finally:
            self.cancel()

    def _emit(self, item: TextDelta | Exception) -> None:
        if isinstance(item, Exception):
            self._on_delta(item)
            return
        if item.tokens and self._started is not None:
            if self._batcher.metrics:
                self._batcher.metrics.first_token.observe(time.monotonic() - self._started)
            self._started = None
        for delta in self._choices[item.index // self._candidates_each].ready(item):
            self._unfinished -= delta.finish_reason is not None
            self._on_delta(delta)


def complete(model: LoadedModel, request: CompletionRequest) -> Completion:
    """Check a request and return its completion; nothing is generated until it is iterated or started.

    Raises:
        RequestError: the model cannot complete, or the request does not fit it; names the field.
    """
    options = model.contract.parse_options(request.verb, request)
    assert isinstance(model, TextModel)
    prompts = [
        _encoded(model.tokenizer, prompt, request.param_of(place)) for place, prompt in enumerate(request.prompts)
    ]
    _check_sizes(request, options.max_tokens, prompts)
    return Completion(model, prompts, request, options)


def vocabulary(model: LoadedModel) -> Vocabulary:
    """List the texts of a model's tokens.

    Raises:
        ModelNotFound: the model is not a text model.
    """
    model.contract.check_verb(CompletionRequest.verb)
    assert isinstance(model, TextModel)
    texts = tuple(model.tokenizer.decode([token]) for token in range(model.tokenizer.vocab_size))
    return Vocabulary(model.name, model.family.family_name(), texts)


def _seeds(request: CompletionRequest) -> list[int]:
    """Return one seed for each prompt."""
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
    raise _field_error(f"{param}[{unknown}]", message)


def _check_sizes(request: CompletionRequest, max_tokens: int, prompts: list[list[int]]) -> None:
    """Raise RequestError for a request that is too large, before any of it is computed."""
    texts = request.candidates * len(prompts)
    of_each = f"best_of = {request.best_of}" if request.best_of else f"n = {request.n}"
    with_all = of_each if len(prompts) == 1 else f"{of_each} and {len(prompts)} prompts"
    if texts > MAX_CANDIDATES:
        limit = MAX_CANDIDATES // request.candidates
        raise _field_error("prompt", f"got {len(prompts)} prompts, expected at most {limit} with {of_each}")
    if max_tokens == 0 and not request.echo:
        raise _field_error("max_tokens", "got 0, expected a whole number at least 1; 0 is allowed only with echo")
    echoed = request.candidates * sum(map(len, prompts)) if request.echo else 0
    if echoed > MAX_TOKENS:
        tokens, limit = echoed // request.candidates, MAX_TOKENS // request.candidates
        raise _field_error("echo", f"got prompts of {tokens} tokens, expected at most {limit} to echo with {with_all}")
    limit = (MAX_TOKENS - echoed) // texts
    if max_tokens > limit:
        also = f" and {echoed // request.candidates} tokens to echo" if echoed else ""
        raise _field_error("max_tokens", f"got {max_tokens}, expected at most {limit} with {with_all}{also}")


def _field_error(param: str, text: str) -> RequestError:
    return RequestError(f"{param}: {text}", param=param, code="invalid_value")


def _ignore(_: object) -> None:
    pass
