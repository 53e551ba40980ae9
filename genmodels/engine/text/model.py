"""A text model in memory."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from genmodels.data.text import Tokenizer
from genmodels.engine.model import LoadedModel
from genmodels.engine.text.batcher import ContinuousBatcher
from genmodels.engine.text.metrics import TextMetrics
from genmodels.family import TextFamily
from genmodels.sizing.memory import SERVED_ROWS
from genmodels.threads import Rounds

RETRY_SECONDS = 1.0  # after an error of the decoding thread

logger = logging.getLogger("genmodels.serving")


@dataclass(frozen=True)
class TextModel(LoadedModel):
    family: TextFamily[Any, Any]
    tokenizer: Tokenizer
    slots: int = SERVED_ROWS

    @cached_property
    def batcher(self) -> ContinuousBatcher:
        """Return the batcher that all requests share; the first call builds it."""
        return ContinuousBatcher(self.family, self.slots)

    def describe(self) -> dict[str, int | str]:
        return self.family.sizes | {"example_prompt": self.tokenizer.example_prompt}

    def start(self, torch_threads: int) -> None:
        """Start the decoding thread, which ends after `close`."""
        name = f"decode {self.name}"
        threading.Thread(target=_decode, args=(self.batcher, torch_threads), name=name, daemon=True).start()

    def enable_metrics(self) -> None:
        self.batcher.metrics = TextMetrics(self.labels, self.batcher.slots)

    def close(self) -> None:
        self.batcher.close()


def _decode(batcher: ContinuousBatcher, torch_threads: int) -> None:
    torch.set_num_threads(torch_threads)
    rounds, ended = Rounds("decode", logger), False
    while not ended:
        with rounds.round():
            batcher.run()
            ended = True
        if not ended:
            time.sleep(RETRY_SECONDS)
