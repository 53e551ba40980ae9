"""Continuous batching: many texts share one network, each joins and leaves at any step.

The idea of deciding anew at each step who is in the batch: Yu et al. 2022 (Orca), OSDI '22.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genmodels.engine.metrics import TextMeter
from genmodels.engine.text.sequence import Text
from genmodels.errors import RequestError
from genmodels.family import TextFamily, slide_window
from genmodels.nn.sampling import draw
from genmodels.sizing.memory import SERVED_ROWS

SLOTS = SERVED_ROWS  # texts in one step
MAX_WAITING = 256  # texts without a slot
PREFILLS = 2  # chunks read between two steps: a long prompt holds the others up for no longer

logger = logging.getLogger("genmodels.engine")


class Batcher:
    """Runs the texts of one model. `add` may be called from any thread, `step` from one at a time."""

    def __init__(self, family: TextFamily[Any, Any], slots: int = SLOTS, max_waiting: int = MAX_WAITING) -> None:
        self._block_size, self._decoder = family.block_size, family.decoder(slots)
        self._slots: list[Text | None] = [None] * slots
        self._waiting: deque[Text] = deque()
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._closed = False
        self.meter: TextMeter | None = None  # none while it is only tried

    @property
    def slots(self) -> int:
        return len(self._slots)

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
        self._tell_meter()
        texts = [*self._prefill(), *self._decode()]
        if texts:
            self._continue(texts)
        self._tell_meter()
        return self.busy

    @property
    def busy(self) -> bool:
        """Whether a text is under way or waits."""
        return bool(self._waiting or any(self._slots))

    def run(self) -> None:
        """Step until closed; all that is under way or waits then is served first."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.busy)
                if self._closed and not self.busy:
                    break
            try:
                self.step()
            except Exception as error:
                self._fail(error)
        if self.meter:
            self.meter.close()

    def close(self) -> None:
        """Take no more texts; `run` returns when those under way and those that wait have been served."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _admit(self) -> None:
        for slot, text in self._active():
            if text.unwanted:
                self._end(slot, text)
        with self._changed:
            free = [slot for slot, text in enumerate(self._slots) if text is None]
            while free and self._waiting:
                joining = self._waiting.popleft()
                if joining.unwanted:
                    _tell(joining, None)
                else:
                    joining.window = slide_window(joining.window, self._block_size)
                    self._slots[free.pop(0)] = joining

    def _prefill(self) -> list[tuple[int, Text, Tensor]]:
        """Read a chunk each of some prompts: (slot, text, its last logits) of those now read to the end."""
        read = []
        for slot in self._to_prefill()[:PREFILLS]:
            text = self._text(slot)
            part = text.window[text.read : text.read + self._decoder.chunk]
            try:
                logits = self._decoder.prefill(slot, part, text.read)
                if text.on_read and text.sampler.count == 0:
                    text.on_read(text.prompt_tokens - len(text.window) + text.read, logits)
            except Exception as error:
                self._end(slot, text, error)
                continue
            text.read += len(part)
            if text.read == len(text.window):
                read.append((slot, text, logits[-1]))
        return read

    def _decode(self) -> list[tuple[int, Text, Tensor]]:
        """Read the one token that is left of each of the other texts: (slot, text, its logits)."""
        ready = [(slot, text) for slot, text in self._active() if len(text.window) - text.read == 1]
        if not ready:
            return []
        if self.meter:
            self.meter.batch_size.observe(len(ready))
        return self._step(ready)

    def _step(self, texts: list[tuple[int, Text]]) -> list[tuple[int, Text, Tensor]]:
        tokens: list[int | None] = [None] * len(self._slots)
        positions = [0] * len(self._slots)
        for slot, text in texts:
            tokens[slot], positions[slot] = text.window[-1], text.read
        try:
            logits = self._decoder.step(tokens, positions)
        except Exception as error:
            if len(texts) > 1:  # each alone, as its numbers are the same then: the one at fault ends, not all
                return [read for one in texts for read in self._step([one])]
            self._end(*texts[0], error)
            return []
        for _, text in texts:
            text.read += 1
        return [(slot, text, logits[slot]) for slot, text in texts]

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

    def _continue(self, texts: Sequence[tuple[int, Text, Tensor]]) -> None:
        going = []
        for slot, text, row in texts:
            if text.sampler.done:  # wants no token, only to be read
                self._end(slot, text)
            else:
                going.append((slot, text, row))
        if not going:
            return
        tokens = draw(torch.stack([row for *_, row in going]), [text.sampler for _, text, _ in going])
        parts = zip(going, tokens, strict=True)
        made = [text for (slot, text, row), token in parts if self._accept(slot, text, token, row)]
        if self.meter:
            self.meter.made(made)

    def _accept(self, slot: int, text: Text, token: int | Exception, logits: Tensor) -> bool:
        """False if the text has ended in an error."""
        if isinstance(token, Exception):
            self._end(slot, text, token)
            return False
        text.sampler.accept(token)
        text.window.append(token)
        kept = slide_window(text.window, self._block_size)
        if kept is not text.window:
            text.window, text.read = kept, 0
        try:
            more = text.take(token, logits)
        except Exception as error:
            self._end(slot, text, error)
            return False
        if not more or text.sampler.done:
            self._end(slot, text)
        return True

    def _tell_meter(self) -> None:
        if self.meter:
            self.meter.holds(len(self._waiting), len(self._slots) - self._slots.count(None))

    def _end(self, slot: int, text: Text, error: Exception | None = None) -> None:
        self._slots[slot] = None
        _tell(text, error)

    def _fail(self, error: Exception) -> None:
        """End all there are, also those that wait: what breaks between the texts would break again."""
        for slot, text in self._active():
            self._end(slot, text, error)
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for text in waiting:
            _tell(text, error)
        self._tell_meter()


def _tell(text: Text, error: Exception | None) -> None:
    try:
        text.end(error)
    except Exception as unheard:  # whoever waited is gone, with the event loop that it lived in
        logger.warning("a text's end could not be told: %s", type(unheard).__name__)
