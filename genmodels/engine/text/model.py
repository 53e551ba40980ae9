"""TODO"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from genmodels.data.text import Tokenizer
from genmodels.engine.metrics import TextMeter
from genmodels.engine.model import Loaded
from genmodels.engine.text.batcher import Batcher
from genmodels.family import TextFamily


@dataclass(frozen=True)
class TextModel(Loaded):
    family: TextFamily[Any, Any]
    tokenizer: Tokenizer

    @cached_property
    def batcher(self) -> Batcher:
        """What its texts share; made when the first comes."""
        return Batcher(self.family)

    def meter(self) -> None:
        self.batcher.meter = TextMeter(self.labels, self.batcher.slots)

    def close(self) -> None:
        self.batcher.close()
