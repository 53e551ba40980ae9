"""List the models of the catalogue, page by page, without an operation in storage."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from pydantic import Field

from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.entries import ModelEntry
from services.http.query import Strict

MAX_PAGE = 1000


class ModelsQuery(Strict):
    limit: int = Field(MAX_PAGE, ge=1, le=MAX_PAGE, description="largest number of models on a page")
    after: str = Field("", max_length=256, description="`last_id` of the page before; its models come before this page")


class Listing:
    """Give pages of the catalogue as JSON. The JSON of a model is made once for each state of the model.

    Args:
        view: return a model as the list shows it.
        name: return the name by which the list refers to a model: the model's own, or one of its versions.
    """

    def __init__(self, view: Callable[[ModelEntry], dict[str, Any]], name: Callable[[ModelEntry], str]) -> None:
        self._view, self._name = view, name
        self._shown: dict[str, tuple[ModelEntry, bytes]] = {}

    def page(self, catalogue: CatalogueReader, query: ModelsQuery, may_use: Callable[[str], bool]) -> bytes:
        """Return one page, in the form of OpenAI's lists.

        Args:
            may_use: return whether the caller may use the model.
        """
        names = catalogue.models()
        if len(shown := self._shown) > len(names):  # some were deleted
            self._shown = {name: shown[name] for name in names if name in shown}
        start = bisect_right(names, query.after.partition("@")[0])
        page: list[ModelEntry] = []
        has_more = False
        for name in names[start:]:
            if not may_use(name) or (entry := catalogue.get(name)) is None:
                continue
            if has_more := len(page) == query.limit:
                break
            page.append(entry)
        ends = {"first_id": self._name(page[0]), "last_id": self._name(page[-1])} if page else {}
        about = json.dumps({"object": "list", **ends, "has_more": has_more}, separators=(",", ":"))
        models = b",".join(map(self._show, page))
        return about[:-1].encode() + b',"data":[' + models + b"]}"

    def _show(self, entry: ModelEntry) -> bytes:
        shown = self._shown.get(entry.model)
        if shown is None or shown[0] is not entry:
            data = json.dumps(self._view(entry), allow_nan=False, separators=(",", ":")).encode()
            shown = self._shown[entry.model] = entry, data
        return shown[1]
