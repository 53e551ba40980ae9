"""The choices of a completion: tokens of the engine become pieces of text, with stop strings and log-probabilities."""

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
from genmodels.engine.text.sequence import Text
from genmodels.engine.text.stops import StopStrings
from genmodels.nn.sampling import Sampler

Finish: TypeAlias = Literal["stop", "length"]


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


class Choices:
    """The texts written for one prompt of a request, and which of them become its choices.

    Args:
        place: of the prompt among those of the request.
        put: gets each piece of each text, numbered through over all texts of the request, or the error that ended one.
    """

    def __init__(
        self,
        place: int,
        tokenizer: Tokenizer,
        prompt: list[int],
        seed: int,
        request: CompletionRequest,
        options: Any,
        put: Callable[[Piece | Exception], None],
    ) -> None:
        self._n, self._first, self._first_text = request.n, place * request.n, place * request.texts
        self._choices = []
        for number in range(request.texts):
            sampler = Sampler(options, choice_seed(seed, number), prompt, tokenizer.vocab_size)
            self._choices.append(_Choice(self._first_text + number, tokenizer, prompt, request, sampler, put))
        self._held = [Piece(choice.index, "", 0) for choice in self._choices]

    @property
    def texts(self) -> list[Text]:
        return [choice.text for choice in self._choices]

    def ready(self, piece: Piece) -> list[Piece]:
        """Return what can be given after this piece: where the best are wanted, nothing until the last text ends."""
        if len(self._choices) == self._n:
            return [piece]
        self._held[piece.index - self._first_text] += piece
        return self._best() if all(held.finish_reason for held in self._held) else []

    def _best(self) -> list[Piece]:
        pairs = zip(self._choices, self._held, strict=True)
        ranked = [held for _, held in sorted(pairs, key=lambda pair: pair[0].mean_logprob, reverse=True)]  # stable
        unseen = sum(held.tokens for held in ranked[self._n :])
        return [
            replace(held, index=self._first + rank, tokens=held.tokens + (0 if rank else unseen))
            for rank, held in enumerate(ranked[: self._n])
        ]


def choice_seed(seed: int, number: int) -> int:
    """Derive a choice's seed: the first has that of its prompt, the others have seeds that no counting up meets."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} choice {number}".encode(), digest_size=8).digest(), "big") >> 1


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
        self._echo = tokenizer.decode(prompt) if request.echo else ""
        self._stops = StopStrings([tokenizer.normalize(stop) for stop in request.stop])
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
