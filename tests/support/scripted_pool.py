"""A pool of the gateway whose completions are given by a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from genmodels.engine.model import Contract
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.nn.sampling import SamplingOptions
from genmodels.registry.catalogue import CatalogueReader
from tests.support.storages import MemoryStorage


class ScriptedPool:
    """Act as a pool that sends the given messages."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.catalogue = CatalogueReader(MemoryStorage())

    async def contract(self, name: str) -> Contract:
        return Contract("m@1", "minigpt", frozenset({"complete"}), SamplingOptions)

    async def complete(self, name: str, request: CompletionRequest) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, Exception) and not isinstance(item, RequestError):
                raise item
            yield item
