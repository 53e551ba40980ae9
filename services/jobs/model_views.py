"""Models and datasets as the job API shows them."""

from __future__ import annotations

from typing import Any

from genmodels.data import DATASETS, added
from genmodels.errors import DamagedObject, ModelNotFound
from genmodels.registry.store import Registry
from genmodels.storage import Storage, encode_floats


def model_view(registry: Registry, name: str) -> dict[str, Any] | None:
    """Describe a model by its newest version; None if its last version has just been deleted."""
    versions = registry.versions(name)
    aliases = {alias: target.version for alias, target in registry.aliases(name).items()}
    view = {"name": name, "versions": versions, "aliases": aliases}
    try:
        newest = registry.version(name, versions[-1])
    except (IndexError, ModelNotFound):
        return None
    except DamagedObject as error:
        return {**view, "family": None, "metrics": {}, "created": None, "problem": str(error)}
    metrics = encode_floats(newest.metrics)
    return {**view, "family": newest.family, "metrics": metrics, "created": newest.created}


def dataset_views(storage: Storage) -> list[dict[str, Any]]:
    """Describe the built-in datasets, then the added ones."""
    built_in = [
        {"name": source.name, "kind": source.kind, "what": source.what, "built_in": True}
        for source in DATASETS.values()
    ]
    return [*built_in, *({**dataset.model_dump(mode="json"), "built_in": False} for dataset in added.catalog(storage))]
