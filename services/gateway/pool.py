"""Model hosts as the HTTP routes see them, in this process or behind Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from genmodels.engine.history import History
from genmodels.engine.image.requests import ImageAnswer, ImageRequest
from genmodels.engine.text.choices import Piece
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from services.gateway.model_host import Entry, Opened

VERSION = "x-genmodels-version"  # the header that tells which version answered

T = TypeVar("T")


class Pool(Protocol):
    """What is wrong with a request comes back as a value."""

    async def health(self) -> str | None: ...
    async def models(self) -> list[Entry] | RequestError: ...
    async def model(self, name: str) -> Entry | RequestError: ...
    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError: ...
    async def vocabulary(self, name: str) -> Vocabulary | RequestError: ...
    async def history(self, name: str, points: int) -> History | RequestError: ...
    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError: ...
    def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[Opened | Piece | RequestError, None]: ...


def checked(value: T | RequestError) -> T:
    """The value, unless it is an error: that is raised."""
    if isinstance(value, RequestError):
        raise value
    return value
