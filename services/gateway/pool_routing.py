"""Send each request to the pool of model hosts that its model's version names."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from genmodels.engine.history import History
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.requests import ImageRequest
from genmodels.engine.model import Contract
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.evaluations import Evaluation
from services.gateway import pool_config
from services.gateway.catalog import CatalogEntry
from services.gateway.cold_start import ColdStart
from services.gateway.model_host import CompletionStarted
from services.gateway.pool import HostCalls
from services.gateway.pool_config import DEFAULT

HOST_SECONDS = 2.0  # that a description waits for what only a host knows
NO_ANSWER = ("host_lost", "too_many_requests", "storage_unavailable")  # codes of errors that say nothing of the model


class Hosts(HostCalls, Protocol):
    """A pool whose hosts may all have stopped."""

    def is_running(self) -> bool: ...
    async def wake(self) -> None: ...  # return when a host answers


class Models(Protocol):
    """What is known of the models."""

    reader: CatalogueReader

    def pool_of(self, name: str) -> str: ...  # of the version behind a name
    def describe(self, name: str) -> CatalogEntry | None: ...  # without host and evaluation
    def check(self, name: str) -> None: ...  # raise ModelNotFound if there is no such model; may read storage
    def evaluation(self, model: str, version: int) -> Evaluation | None: ...  # read from storage
    def stalled(self) -> str | None: ...  # why that may be out of date


@dataclass(frozen=True)
class _Member:
    config: pool_config.Pool
    hosts: Hosts
    cold_start: ColdStart


class PoolRouting:
    """Act as one pool in front of all configured ones. All methods are for one event loop.

    Args:
        connect: return the hosts of a configured pool.
    """

    def __init__(self, models: Models, connect: Callable[[str], Hosts]) -> None:
        self._models, self._connect = models, connect
        self._members: dict[str, _Member] = {}

    def configure(self, pools: pool_config.Pools) -> None:
        """Set the pools. A pool that has not changed keeps its connection and the requests that wait."""
        self._members = {pool.name: self._member(pool) for pool in pools.pools}

    @property
    def catalogue(self) -> CatalogueReader:
        return self._models.reader

    async def health(self) -> str | None:
        """Return why the gateway or a host is unhealthy, or None.

        The hosts of a pool that may scale to zero are not asked: a call would wake the pool, or keep it from stopping.
        """
        if stalled := self._models.stalled():
            return stalled
        asked = [member.hosts.health() for member in self._members.values() if member.config.min_replicas]
        return next(filter(None, await asyncio.gather(*asked)), None)

    async def model(self, name: str) -> CatalogEntry | RequestError:
        """Describe a model. No pool is woken for a version that the catalogue has.

        What only a host knows is in it if a host runs and answers soon: which versions it refuses, so that an older one
        answers.
        """
        known = self._models.describe(name)
        version = known.resolved.version if known else None
        if known is None or version is None:
            return await self._ask_about("model", name)
        pool = self._models.pool_of(name)
        member = self._members.get(pool)
        if member is None:
            known = dataclasses.replace(known, problem=_missing(pool).message)
        elif member.hosts.is_running():
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(member.hosts.model(name), HOST_SECONDS)
                if not isinstance(answer, RequestError) or answer.code not in NO_ANSWER:
                    return answer
        read = asyncio.to_thread(self._models.evaluation, known.model, version)
        return dataclasses.replace(known, evaluation=await read)

    async def contract(self, name: str) -> Contract | RequestError:
        return await self._ask_about("contract", name)

    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError:
        return await self._ask_about("answer", name, request)

    async def vocabulary(self, name: str) -> Vocabulary | RequestError:
        return await self._ask_about("vocabulary", name)

    async def history(self, name: str, points: int) -> History | RequestError:
        return await self._ask(DEFAULT, "history", name, points)  # read from storage: any host can

    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError:
        return await self._ask(DEFAULT, "sample", name, step, file)

    async def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[CompletionStarted | TextDelta | RequestError, None]:
        try:
            hosts = await self._started(self._models.pool_of(name), name)
        except RequestError as error:
            yield error
            return
        items = hosts.complete(name, request)
        try:
            async for item in items:
                yield item
        finally:  # a client that disconnects between two items ends this generator alone
            await items.aclose()

    async def _ask_about(self, method: str, name: str, *arguments: Any) -> Any:
        return await self._ask(self._models.pool_of(name), method, name, *arguments)

    async def _ask(self, pool: str, method: str, name: str, *arguments: Any) -> Any:
        try:
            hosts = await self._started(pool, name)
        except RequestError as error:
            return error
        return await getattr(hosts, method)(name, *arguments)

    async def _started(self, pool: str, name: str) -> Hosts:
        """Return the hosts of a pool; wait for the first one if the pool has none.

        Raises:
            RequestError: there is no such pool, no host has started, or none is started because there is no such model.
        """
        member = self._members.get(pool)
        if member is None:
            raise _missing(pool)
        if member.cold_start.is_needed():
            await asyncio.to_thread(self._models.check, name)
        await member.cold_start.wait()
        return member.hosts

    def _member(self, pool: pool_config.Pool) -> _Member:
        known = self._members.get(pool.name)
        if known and known.config == pool:
            return known
        hosts = known.hosts if known else self._connect(pool.name)
        return _Member(pool, hosts, ColdStart(pool, hosts.is_running, hosts.wake))


def _missing(pool: str) -> RequestError:
    message = f"this model is for the pool {pool!r}, which the endpoint does not have"
    remedy = "add it to the file of the pools, or train the model with another serve.pool"
    return RequestError(f"{message}; {remedy}", param="model", status=503, code="pool_missing")
