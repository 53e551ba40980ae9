"""Check requests against the contract of the model's family before they are sent to a model host."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from genmodels.engine.model import Contract
from genmodels.engine.requests import Request
from genmodels.errors import RequestError
from services.gateway.pool import Pool, unwrap

CONTRACT_TTL_SECONDS = 1.0  # an alias may then point to a version of another family
MAX_CONTRACTS = 1024  # kept; clients choose the names


class Contracts:
    """The contracts of the models that clients request, by name. All methods are for one event loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._contracts: OrderedDict[str, tuple[float, asyncio.Future[Contract]]] = OrderedDict()

    async def check(self, name: str, request: Request) -> None:
        """Check that a model supports the verb and the options of a request.

        Raises:
            ModelNotFound: there is no such model, or it does not support the verb.
            RequestError: an option is unknown or wrong, or no model host answers.
        """
        contract = await self._get(name)
        try:
            contract.parse_options(request.verb, request)
        except RequestError as error:
            error.refused_by = contract.name, contract.family
            raise

    async def _get(self, name: str) -> Contract:
        entry = self._contracts.get(name)
        if entry is None or time.monotonic() - entry[0] > CONTRACT_TTL_SECONDS or _has_failed(entry[1]):
            entry = time.monotonic(), asyncio.ensure_future(self._read(name))
            self._contracts[name] = entry
            self._contracts.move_to_end(name)
            if len(self._contracts) > MAX_CONTRACTS:
                self._contracts.popitem(last=False)
        return await asyncio.shield(entry[1])  # other requests wait for it too: one client may disconnect

    async def _read(self, name: str) -> Contract:
        return unwrap(await self._pool.contract(name))


def _has_failed(contract: asyncio.Future[Contract]) -> bool:
    return contract.done() and (contract.cancelled() or contract.exception() is not None)
