"""Continuous batching: many texts share one network, each joins and leaves at any step.

The idea of deciding anew at each step who is in the batch: Yu et al. 2022 (Orca), OSDI '22.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genmodels.errors import RequestError
from genmodels.family import TextFamily, keep_half
from genmodels.sampling import Sampler, choose

SLOTS = 16  # texts in one step
MAX_WAITING = 256  # texts without a slot
PREFILLS = 2  # chunks read between two steps: a long prompt holds the others up for no longer


class Text:
    """One answer under way.

    Args:
        prompt: at least one token.
        take: called in the engine's thread with each token and the logits that it was chosen from, (vocab_size,);
            false if that is enough.
        end: called once, at the end: with an error if that was the reason.
        see: called with tokens of the prompt and the logits they were to be expected from, (n, vocab_size), in order.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        take: Callable[[int, Tensor], bool],
        end: Callable[[Exception | None], None],
        see: Callable[[Sequence[int], Tensor], None] | None = None,
    ) -> None:
        self.window = list(prompt)
        self.read = 0  # tokens of the window that the network has read
        self.sampler, self.take, self.end, self.see = sampler, take, end, see
        self.unwanted = False  # to be set by whoever no longer waits for it

    @property
    def is_read_only(self) -> bool:
        """Nothing is to be written, and the last token of the prompt tells nothing about the prompt."""
        return self.sampler.options.max_tokens == 0 and len(self.window) - self.read <= 1


class Batcher:
    """Runs the texts of one model. `add` may be called from any thread, `step` from one at a time."""

    def __init__(self, family: TextFamily[Any, Any], slots: int = SLOTS, max_waiting: int = MAX_WAITING) -> None:
        self._block_size, self._decoder = family.block_size, family.decoder(slots)
        self._slots: list[Text | None] = [None] * slots
        self._waiting: deque[Text] = deque()
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of what it keeps beside the network."""
        return self._decoder.size

    def add(self, *texts: Text) -> None:
        """Let texts join, all or none.

        Raises:
            RequestError: too many wait already, or the model is about to go.
        """
        with self._changed:
            if self._closed:
                raise RequestError("this version was unloaded just now; try again", status=503, code="unloaded")
            if len(self._waiting) + len(texts) > self._max_waiting + self._slots.count(None):
                message = f"{len(self._waiting)} texts wait already; try again in a moment"
                raise RequestError(message, status=429, code="queue_full")
            self._waiting.extend(texts)
            self._changed.notify()

    def step(self) -> bool:
        """Go on with every text by up to one token; false if there is nothing to do."""
        self._admit()
        rows, texts = [], []
        for slot in self._to_prefill()[:PREFILLS]:
            text = self._text(slot)
            part = text.window[text.read : text.read + self._decoder.chunk]
            logits = self._decoder.prefill(slot, part, text.read)
            text.read += len(part)
            if text.see and text.sampler.count == 0:
                following = text.window[text.read - len(part) + 1 : text.read + 1]
                text.see(following, logits[: len(following)])
            if text.is_read_only:
                self._end(slot, text)
            elif text.read == len(text.window):
                rows.append(logits[-1])
                texts.append((slot, text))
        ready = [(slot, text) for slot, text in self._active() if len(text.window) - text.read == 1]
        if ready:
            tokens: list[int | None] = [None] * len(self._slots)
            positions = [0] * len(self._slots)
            for slot, text in ready:
                tokens[slot], positions[slot] = text.window[-1], text.read
            logits = self._decoder.step(tokens, positions)
            for slot, text in ready:
                text.read += 1
                rows.append(logits[slot])
                texts.append((slot, text))
        self._choose(rows, texts)
        return self.busy

    @property
    def busy(self) -> bool:
        """Whether a text is under way or waits."""
        return bool(self._waiting or any(self._slots))

    def run(self) -> None:
        """Step until closed; all that is under way then is ended first."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.busy)
                if self._closed and not self.busy:
                    return
            try:
                self.step()
            except Exception as error:
                self._fail(error)

    def close(self) -> None:
        """Take no more texts; `run` returns when those that there are have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _admit(self) -> None:
        for slot, text in self._active():
            if text.unwanted:
                self._end(slot, text)
        with self._changed:
            for slot, taken in enumerate(self._slots):
                if taken is None:
                    self._slots[slot] = self._next()

    def _next(self) -> Text | None:
        """The first that waits and needs a slot."""
        while self._waiting:
            text = self._waiting.popleft()
            text.window = keep_half(text.window, self._block_size)
            if not text.unwanted and not text.is_read_only:
                return text
            text.end(None)
        return None

    def _active(self) -> list[tuple[int, Text]]:
        return [(slot, text) for slot, text in enumerate(self._slots) if text is not None]

    def _text(self, slot: int) -> Text:
        text = self._slots[slot]
        assert text is not None
        return text

    def _to_prefill(self) -> list[int]:
        """Slots with more than one unread token, those with the fewest left first: they answer soonest."""
        unread = [(len(text.window) - text.read, slot) for slot, text in self._active()]
        return [slot for left, slot in sorted(unread) if left > 1]

    def _choose(self, rows: list[Tensor], texts: list[tuple[int, Text]]) -> None:
        """The next token of each text, from its row of logits. What is wrong with one ends that one alone."""
        if not rows:
            return
        logits = torch.stack(rows)
        finite = logits.isfinite().all(-1)
        for row in (~finite).nonzero().flatten().tolist():
            message = "the model's output for this text is not finite; another prompt or a shorter one may do"
            slot, text = texts[row]
            self._end(slot, text, RequestError(message, status=500, code="not_finite"))
        whole = finite.nonzero().flatten().tolist()
        chosen = choose(logits[whole], [texts[row][1].sampler for row in whole]) if whole else []
        for row, token in zip(whole, chosen, strict=True):
            slot, text = texts[row]
            try:
                self._accept(slot, text, token, logits[row])
            except Exception as error:
                self._end(slot, text, error)

    def _accept(self, slot: int, text: Text, token: int, logits: Tensor) -> None:
        text.window.append(token)
        kept = keep_half(text.window, self._block_size)
        if kept is not text.window:
            text.window, text.read = kept, 0
        if not text.take(token, logits) or text.sampler.count >= text.sampler.options.max_tokens:
            self._end(slot, text)

    def _end(self, slot: int, text: Text, error: Exception | None = None) -> None:
        self._slots[slot] = None
        text.end(error)

    def _fail(self, error: Exception) -> None:
        for slot, text in self._active():
            self._end(slot, text, error)
