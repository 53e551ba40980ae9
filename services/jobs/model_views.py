"""Models and datasets as the job API shows them."""

from __future__ import annotations

from typing import Any

from genmodels.data import DATASETS, added
from genmodels.registry.entries import ModelEntry
from genmodels.storage import Storage


def model_view(entry: ModelEntry) -> dict[str, Any]:
    """Describe a model by its newest version, from the catalogue."""
    newest = entry.versions.get(entry.latest)
    problem = entry.damaged.get(str(entry.latest)) or entry.problem
    return {
        "name": entry.model,
        "versions": entry.numbers,
        "aliases": entry.aliases,
        "family": newest.family if newest else None,
        "metrics": newest.metrics if newest else {},
        "created": newest.created if newest else None,
        **({"problem": problem} if problem else {}),
    }


def dataset_views(storage: Storage) -> list[dict[str, Any]]:
    """Describe the built-in datasets, then the added ones."""
    built_in = [
        {"name": source.name, "kind": source.kind, "what": source.what, "built_in": True}
        for source in DATASETS.values()
    ]
    return [*built_in, *({**dataset.model_dump(mode="json"), "built_in": False} for dataset in added.catalog(storage))]
