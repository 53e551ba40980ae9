"""Check requests against the contract of the model's family before they are sent to a model host."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from genmodels import models
from genmodels.engine.model import Contract
from genmodels.engine.requests import Request
from genmodels.errors import RequestError
from genmodels.registry.catalogue import CatalogueReader
from services.gateway.pool import Pool, unwrap

CONTRACT_TTL_SECONDS = 1.0  # an alias may then point to a version of another family
MAX_CONTRACTS = 1024  # kept; clients choose the names


class Contracts:
    """The contracts of the models that clients request, by name. All methods are for one event loop.

    The catalogue tells those of aliases and latest versions; a model host tells the others.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._contracts: OrderedDict[str, tuple[float, asyncio.Future[Contract]]] = OrderedDict()

    async def check(self, name: str, request: Request) -> None:
        """Check that a model supports the verb and the options of a request.

        Raises:
            ModelNotFound: there is no such model, or it does not support the verb.
            RequestError: an option is unknown or wrong, or no model host answers.
        """
        contract = contract_of(self._pool.catalogue, name) or await self._get(name)
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


def contract_of(catalogue: CatalogueReader, name: str) -> Contract | None:
    """Return the contract of the version behind a name; None if the catalogue does not have this version."""
    model, _, reference = name.partition("@")
    entry = catalogue.get(model)
    number = entry.number(reference or "production") if entry else None
    summary = entry.versions.get(number) if entry and number else None
    if summary is None or summary.family not in models.names():  # the host says what is wrong
        return None
    options = models.load(summary.family).Request
    return Contract(f"{model}@{number}", summary.family, frozenset(summary.serving.verbs), options)


def _has_failed(contract: asyncio.Future[Contract]) -> bool:
    return contract.done() and (contract.cancelled() or contract.exception() is not None)
