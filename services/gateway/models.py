"""Resolve the names of models, load their models for the first request, and keep them in memory while they are used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from genmodels.engine.alias_watcher import AliasWatcher
from genmodels.engine.model import LoadedModel
from genmodels.engine.model_cache import ModelCache
from genmodels.errors import CheckpointError, GenmodelsError, RequestError, StorageUnavailable, UnexpectedFailure
from genmodels.registry.references import ResolvedModel

MAX_LOADS = 3  # per request: other requests may unload the model again before it is used
LOAD_SECONDS = 30.0  # that a request waits for its model; the load goes on, for the next try

T = TypeVar("T")


class Models:
    """The models of a host, by name. All methods are for one event loop.

    Args:
        threads: for reading from storage.
        max_waiting: requests that wait for loads at the same time; the host answers others with models in memory.
    """

    def __init__(self, watcher: AliasWatcher, cache: ModelCache, threads: ThreadPoolExecutor, max_waiting: int) -> None:
        self._watcher, self._cache, self._threads = watcher, cache, threads
        self._waiting, self._max_waiting = 0, max_waiting

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
                for loads in range(MAX_LOADS):
                    try:
                        model = stack.enter_context(self._cache.acquire(resolved.name))
                        break
                    except KeyError:  # not in memory
                        resolved = await self.resolve(name) if loads else resolved  # unloaded again: it has moved
                        await self._load(name, resolved)
                else:
                    message = "requests need more models at once than fit in memory; try again"
                    raise RequestError(message, status=503, code="memory_full", retry_after=5)
                self._watcher.loaded(name, resolved)
                yield model
        except GenmodelsError as error:
            request_error = as_request_error(error)
            request_error.refused_by = resolved.name, resolved.family
            raise request_error from None

    async def _load(self, name: str, resolved: ResolvedModel) -> None:
        """Wait until a model is loaded; all requests for one model wait for the same load."""
        if self._waiting >= self._max_waiting:
            raise _still_loading("too many requests wait for models that are being loaded")
        self._waiting += 1
        try:
            load = asyncio.wrap_future(self._cache.load(resolved))
            await asyncio.wait_for(asyncio.shield(load), LOAD_SECONDS)
        except TimeoutError:
            raise _still_loading(f"{resolved.name} is still being loaded") from None
        except (CheckpointError, UnexpectedFailure) as error:
            self._watcher.failed(name, resolved, error)
            raise
        finally:
            self._waiting -= 1


def _still_loading(reason: str) -> RequestError:
    message = f"{reason}; try again in a moment"
    return RequestError(message, param="model", status=503, code="model_loading", retry_after=5)


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
