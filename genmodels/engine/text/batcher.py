"""Continuous batching: many sequences share one network, and each joins and leaves at any decoding step.

Deciding at each step which sequences are in the batch is the idea of Yu et al. 2022 (Orca), OSDI '22.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor

from genmodels.engine.device_errors import request_error
from genmodels.engine.text.metrics import TextMetrics
from genmodels.engine.text.sequence import Sequence
from genmodels.errors import RequestError
from genmodels.family import TextFamily, slide_window
from genmodels.nn.sampling import draw
from genmodels.sizing.memory import SERVED_ROWS

SLOTS = SERVED_ROWS  # sequences in one step
MAX_WAITING = 256  # sequences without a slot
MAX_PREFILLS = 2  # chunks of prompts between two decoding steps: a long prompt delays the other sequences no longer

logger = logging.getLogger("genmodels.engine")


class ContinuousBatcher:
    """Continue the sequences of one model. `add` may be called from any thread, `step` from one thread at a time."""

    def __init__(self, family: TextFamily[Any, Any], slots: int = SLOTS, max_waiting: int = MAX_WAITING) -> None:
        self._block_size, self._decoder = family.block_size, family.decoder(slots)
        self._slots: list[Sequence | None] = [None] * slots
        self._waiting: deque[Sequence] = deque()
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._closed = False
        self.metrics: TextMetrics | None = None  # None while the model is only warmed up

    @property
    def slots(self) -> int:
        return len(self._slots)

    def add(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none.

        Raises:
            RequestError: too many sequences wait already, or the model is being unloaded.
        """
        with self._changed:
            if self._closed:
                raise RequestError("this version was unloaded just now; try again", status=503, code="unloaded")
            if len(self._waiting) + len(sequences) > self._max_waiting + self._slots.count(None):
                message = f"{len(self._waiting)} texts wait already; try again in a moment"
                raise RequestError(message, status=429, code="queue_full")
            self._waiting.extend(sequences)
            self._changed.notify()

    def step(self) -> bool:
        """Continue each running sequence by at most one token; return False if there is no work left."""
        self._admit()
        self._update_metrics()
        computed = [*self._prefill(), *self._decode()]
        if computed:
            self._draw_tokens(computed)
        self._update_metrics()
        return self.busy

    @property
    def busy(self) -> bool:
        """Return True if a sequence is running or waiting."""
        return bool(self._waiting or any(self._slots))

    def run(self) -> None:
        """Step until `close` is called and all running and waiting sequences are finished."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.busy)
                if self._closed and not self.busy:
                    break
            try:
                self.step()
            except Exception as error:
                self._fail_all(error)
        if self.metrics:
            self.metrics.close()

    def close(self) -> None:
        """Accept no more sequences; `run` returns when the running and waiting sequences are finished."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _admit(self) -> None:
        """Give the free slots to waiting sequences."""
        for slot, sequence in self._running():
            if sequence.cancelled:
                self._finish(slot, sequence)
        with self._changed:
            free = [slot for slot, sequence in enumerate(self._slots) if sequence is None]
            while free and self._waiting:
                sequence = self._waiting.popleft()
                if sequence.cancelled:
                    _notify_finished(sequence, None)
                else:
                    sequence.window = slide_window(sequence.window, self._block_size)
                    self._slots[free.pop(0)] = sequence

    def _prefill(self) -> list[tuple[int, Sequence, Tensor]]:
        """Compute one chunk each of some prompts: (slot, sequence, last logits) of the prompts that are complete."""
        complete = []
        for slot in self._slots_to_prefill()[:MAX_PREFILLS]:
            sequence = self._sequence(slot)
            start = sequence.num_computed_tokens
            chunk = sequence.window[start : start + self._decoder.chunk]
            try:
                logits = self._decoder.prefill(slot, chunk, start)
                if sequence.on_prompt_logits and sequence.sampler.count == 0:
                    cut = sequence.num_prompt_tokens - len(sequence.window)  # tokens before the window
                    sequence.on_prompt_logits(cut + start, logits.cpu())
            except Exception as error:
                self._finish(slot, sequence, error)
                continue
            sequence.num_computed_tokens += len(chunk)
            if sequence.num_computed_tokens == len(sequence.window):
                complete.append((slot, sequence, logits[-1]))
        return complete

    def _decode(self) -> list[tuple[int, Sequence, Tensor]]:
        """Compute the last token of each sequence that has only this one left: (slot, sequence, logits)."""
        ready = [(slot, seq) for slot, seq in self._running() if len(seq.window) - seq.num_computed_tokens == 1]
        if not ready:
            return []
        if self.metrics:
            self.metrics.batch_size.observe(len(ready))
        return self._forward(ready)

    def _forward(self, batch: list[tuple[int, Sequence]]) -> list[tuple[int, Sequence, Tensor]]:
        tokens: list[int | None] = [None] * len(self._slots)
        positions = [0] * len(self._slots)
        for slot, sequence in batch:
            tokens[slot], positions[slot] = sequence.window[-1], sequence.num_computed_tokens
        try:
            logits = self._decoder.step(tokens, positions)
        except Exception as error:
            if len(batch) > 1:  # alone, a sequence gets the same logits: only the one that causes the error ends
                return [computed for one in batch for computed in self._forward([one])]
            self._finish(*batch[0], error)
            return []
        for _, sequence in batch:
            sequence.num_computed_tokens += 1
        rows = logits.unbind()
        return [(slot, sequence, rows[slot]) for slot, sequence in batch]

    def _running(self) -> list[tuple[int, Sequence]]:
        return [(slot, sequence) for slot, sequence in enumerate(self._slots) if sequence is not None]

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._slots[slot]
        assert sequence is not None
        return sequence

    def _slots_to_prefill(self) -> list[int]:
        """List the slots with more than one token to compute, the shortest first: they answer soonest."""
        remaining = [(len(seq.window) - seq.num_computed_tokens, slot) for slot, seq in self._running()]
        return [slot for count, slot in sorted(remaining) if count > 1]

    def _draw_tokens(self, computed: list[tuple[int, Sequence, Tensor]]) -> None:
        active = []
        for slot, sequence, logits in computed:
            if sequence.sampler.done:  # no token is requested, only the logits of the prompt
                self._finish(slot, sequence)
            else:
                active.append((slot, sequence, logits))
        if not active:
            return
        tokens = draw(torch.stack([logits for *_, logits in active]), [seq.sampler for _, seq, _ in active], self.slots)
        on_host = _copied_to_host([row if seq.wants_logits else None for _, seq, row in active])
        rows = zip(active, tokens, on_host, strict=True)
        continued = [seq for (slot, seq, _), token, row in rows if self._append(slot, seq, token, row)]
        if self.metrics:
            self.metrics.add_tokens(continued)

    def _append(self, slot: int, sequence: Sequence, token: int | Exception, logits: Tensor | None) -> bool:
        """Append a token to its sequence; return False if the sequence ended with an error."""
        if isinstance(token, Exception):
            self._finish(slot, sequence, token)
            return False
        sequence.sampler.accept(token)
        sequence.window.append(token)
        window = slide_window(sequence.window, self._block_size)
        if window is not sequence.window:
            sequence.window, sequence.num_computed_tokens = window, 0
        try:
            wants_more = sequence.on_token(token, logits)
        except Exception as error:
            self._finish(slot, sequence, error)
            return False
        if not wants_more or sequence.sampler.done:
            self._finish(slot, sequence)
        return True

    def _update_metrics(self) -> None:
        if self.metrics:
            self.metrics.set_load(len(self._waiting), len(self._slots) - self._slots.count(None))

    def _finish(self, slot: int, sequence: Sequence, error: Exception | None = None) -> None:
        self._slots[slot] = None
        _notify_finished(sequence, error)

    def _fail_all(self, error: Exception) -> None:
        """End all sequences, also those that wait: the error comes from no single sequence, so it would occur again."""
        for slot, sequence in self._running():
            self._finish(slot, sequence, error)
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in waiting:
            _notify_finished(sequence, error)
        self._update_metrics()


def _copied_to_host(rows: list[Tensor | None]) -> list[Tensor | None]:
    """Return the rows on the host; all are copied at once."""
    wanted = [row for row in rows if row is not None]
    if not wanted:
        return rows
    copies = iter(torch.stack(wanted).cpu())
    return [None if row is None else next(copies) for row in rows]


def _notify_finished(sequence: Sequence, error: Exception | None) -> None:
    try:
        sequence.on_finish(error and request_error(error))
    except Exception as failure:  # the event loop of the caller is closed
        logger.warning("the caller of a text could not be notified of its end: %s", type(failure).__name__)
