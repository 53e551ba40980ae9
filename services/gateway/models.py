"""Resolve the names of models and keep their models in memory while requests use them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from genmodels.engine.alias_watcher import AliasWatcher
from genmodels.engine.model import LoadedModel
from genmodels.engine.model_cache import ModelCache
from genmodels.errors import GenmodelsError, RequestError, StorageUnavailable
from genmodels.registry.references import ResolvedModel

MAX_LOADS = 3  # per request: other requests may unload the model again before it is used

T = TypeVar("T")


class Models:
    """The models of a host, by name. All methods are for one event loop.

    Args:
        threads: for reading from storage and for loading.
    """

    def __init__(self, watcher: AliasWatcher, cache: ModelCache, threads: ThreadPoolExecutor) -> None:
        self._watcher, self._cache, self._threads = watcher, cache, threads

    async def resolve(self, name: str) -> ResolvedModel:
        """Return the model behind a name.

        Raises:
            GenmodelsError: there is no such model, or it cannot be served.
        """
        cached = self._watcher.cached(name)
        return cached if cached else await in_thread(self._threads, self._watcher.resolve, name)

    @contextlib.asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[LoadedModel]:
        """Yield the model behind a name and keep it in memory during the context.

        Raises:
            GenmodelsError: there is no such model.
            RequestError: the model cannot be served; `refused_by` names its version.
        """
        resolved = await self.resolve(name)
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(MAX_LOADS):
                    try:
                        model = stack.enter_context(self._cache.acquire(resolved.name))
                        break
                    except KeyError:  # not loaded yet, or unloaded to make room
                        await in_thread(self._threads, self._cache.load, resolved)
                else:
                    message = "requests need more models at once than fit in memory; try again"
                    raise RequestError(message, status=503, code="memory_full")
                yield model
        except GenmodelsError as error:
            request_error = as_request_error(error)
            request_error.refused_by = resolved.name, resolved.family
            raise request_error from None


def as_request_error(error: GenmodelsError) -> RequestError:
    """Return the error that a client gets."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, StorageUnavailable):
        return RequestError(
            "the storage of models does not answer; try again in a moment", status=503, code="storage_unavailable"
        )
    return RequestError(f"this model cannot be served: {error}", param="model", status=503, code="version_damaged")


async def in_thread(threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in one of `threads` and wait for its result."""
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
