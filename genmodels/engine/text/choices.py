"""The choices of a completion: turn tokens into text deltas, with stop strings and log-probabilities."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

from genmodels.data.text import Tokenizer
from genmodels.engine.text.logprobs import TokenLogprob, token_logprobs
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.text.sequence import Sequence
from genmodels.engine.text.stops import StopStrings
from genmodels.nn.sampling import Sampler

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class TextDelta:
    """The next part of a choice's text. Exactly the last delta of each choice has a `finish_reason`."""

    index: int
    text: str
    tokens: int  # tokens generated for this delta, also those of text that a stop string or `best_of` removed
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that begin in this text, if they are requested

    def __add__(self, later: TextDelta) -> TextDelta:
        text, logprobs = self.text + later.text, self.logprobs + later.logprobs
        return TextDelta(self.index, text, self.tokens + later.tokens, later.finish_reason, logprobs)


class Choices:
    """The candidates generated for one prompt of a request, and the choices selected from them.

    Args:
        prompt_index: position of the prompt among the request's prompts.
        emit: called with each delta of each candidate (numbered over all prompts of the request), or with the error
            that ended a candidate.
    """

    def __init__(
        self,
        prompt_index: int,
        tokenizer: Tokenizer,
        prompt: list[int],
        seed: int,
        request: CompletionRequest,
        options: Any,
        emit: Callable[[TextDelta | Exception], None],
    ) -> None:
        self._n, self._first = request.n, prompt_index * request.n
        self._first_candidate = prompt_index * request.candidates
        self._candidates = []
        for number in range(request.candidates):
            sampler = Sampler(options, choice_seed(seed, number), prompt, tokenizer.vocab_size)
            self._candidates.append(
                _Candidate(self._first_candidate + number, tokenizer, prompt, request, sampler, emit)
            )
        self._held = [TextDelta(candidate.index, "", 0) for candidate in self._candidates]

    @property
    def sequences(self) -> list[Sequence]:
        return [candidate.sequence for candidate in self._candidates]

    def ready(self, delta: TextDelta) -> list[TextDelta]:
        """Return the deltas to send after this one; with `best_of > n`, none before the last candidate ends."""
        if len(self._candidates) == self._n:
            return [delta]
        self._held[delta.index - self._first_candidate] += delta
        return self._best() if all(held.finish_reason for held in self._held) else []

    def _best(self) -> list[TextDelta]:
        pairs = zip(self._candidates, self._held, strict=True)
        ranked = [held for _, held in sorted(pairs, key=lambda pair: pair[0].mean_logprob, reverse=True)]  # stable
        discarded_tokens = sum(held.tokens for held in ranked[self._n :])
        return [
            replace(held, index=self._first + rank, tokens=held.tokens + (0 if rank else discarded_tokens))
            for rank, held in enumerate(ranked[: self._n])
        ]


def choice_seed(seed: int, number: int) -> int:
    """Derive a candidate's seed: the first has the prompt's seed, the others hashes, unlike seeds that count up."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} choice {number}".encode(), digest_size=8).digest(), "big") >> 1


class _Candidate:
    """One generated text: turn the tokens of its sequence into deltas."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: list[int],
        request: CompletionRequest,
        sampler: Sampler,
        emit: Callable[[TextDelta | Exception], None],
    ) -> None:
        self.index, self._tokenizer, self._prompt, self._emit = index, tokenizer, prompt, emit
        self._echo = tokenizer.decode(prompt) if request.echo else ""
        self._stops = StopStrings([tokenizer.normalize(stop) for stop in request.stop])
        self._ranked, self._num_logprobs = request.candidates > request.n, request.logprobs
        self._sum, self._count = 0.0, 0  # of the log-probabilities of generated tokens
        lists_prompt = request.echo and self._num_logprobs is not None
        self._num_listed = 0 if lists_prompt else len(prompt)  # tokens of the prompt that have a TokenLogprob
        self._pending: deque[TokenLogprob] = deque()  # tokens whose text may still be removed
        self._sent_length = self._listed_length = 0  # characters
        self.sequence = Sequence(
            prompt,
            sampler,
            self._on_token,
            self._on_finish,
            self._on_prompt_logits if lists_prompt else None,
            wants_logits=self._ranked or self._num_logprobs is not None,
        )

    @property
    def mean_logprob(self) -> float:
        return self._sum / max(self._count, 1)

    def _on_prompt_logits(self, position: int, logits: Tensor) -> None:
        self._list_without_logits(position + 1)
        tokens = self._prompt[position + 1 : position + 1 + len(logits)]
        self._num_listed += len(tokens)
        self._list(self._logprobs(logits[: len(tokens)], tokens))

    def _on_token(self, token: int, logits: Tensor | None) -> bool:
        if logits is not None:
            self._list_without_logits(len(self._prompt))
            logprobs = self._logprobs(logits[None], [token])
            self._sum, self._count = self._sum + (logprobs[0].logprob or 0.0), self._count + 1
            if self._num_logprobs is not None:
                self._list(logprobs)
        text = self._stops.feed(self._tokenizer.decode([token]))
        self._send(text, 1, "stop" if self._stops.matched else None)
        return not self._stops.matched

    def _on_finish(self, error: Exception | None) -> None:
        if error is not None:
            self._emit(error)
        elif not self._stops.matched:
            self._list_without_logits(len(self._prompt))
            self._send(self._stops.rest(), 0, "length")

    def _logprobs(self, logits: Tensor, tokens: list[int]) -> list[TokenLogprob]:
        return token_logprobs(logits, tokens, self._listed_length, self._num_logprobs or 0, self._tokenizer)

    def _list_without_logits(self, end: int) -> None:
        """List the prompt's tokens up to `end` without log-probabilities: the network sees no token before them."""
        for token in self._prompt[self._num_listed : end]:
            self._list([TokenLogprob(self._tokenizer.decode([token]), self._listed_length)])
        self._num_listed = max(self._num_listed, end)

    def _list(self, tokens: list[TokenLogprob]) -> None:
        self._pending += tokens
        self._listed_length += sum(len(token.text) for token in tokens)

    def _send(self, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
        text, self._echo = self._echo + text, ""
        self._sent_length += len(text)
        logprobs = []
        while self._pending and self._pending[0].offset < self._sent_length:
            logprobs.append(self._pending.popleft())
        self._emit(TextDelta(self.index, text, tokens, finish_reason, tuple(logprobs)))
