"""The interface of model hosts that the routes use: hosts in this process or behind Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from genmodels.engine.history import History
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.requests import ImageRequest
from genmodels.engine.model import Contract
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.registry.catalogue import CatalogueReader
from services.gateway.catalog import CatalogEntry
from services.gateway.model_host import CompletionStarted

VERSION = "x-genmodels-version"  # the response header with the version that answered

T = TypeVar("T")


class HostCalls(Protocol):
    """Model hosts. Errors of a request are returned as values; see `unwrap`."""

    async def health(self) -> str | None: ...
    async def model(self, name: str) -> CatalogEntry | RequestError: ...
    async def contract(self, name: str) -> Contract | RequestError: ...
    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError: ...
    async def vocabulary(self, name: str) -> Vocabulary | RequestError: ...
    async def history(self, name: str, points: int) -> History | RequestError: ...
    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError: ...
    def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[CompletionStarted | TextDelta | RequestError, None]: ...


class Pool(HostCalls, Protocol):
    """Model hosts, and what is known of all models without them."""

    @property
    def catalogue(self) -> CatalogueReader: ...


def unwrap(value: T | RequestError) -> T:
    """Return the value, or raise it if it is an error."""
    if isinstance(value, RequestError):
        raise value
    return value
