"""Look up and list the datasets that users have added."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

from genmodels.data.uploads import FILES, NAME, Kind, StoredDataset, current
from genmodels.errors import DamagedObject
from genmodels.storage import Storage


def catalog(storage: Storage) -> list[StoredDataset]:
    """Return the current content of each added dataset, by name, without damaged ones."""
    datasets = []
    for name in sorted(_list_kinds(storage)):
        with contextlib.suppress(DamagedObject):
            datasets.append(current(storage, name))
    return [dataset for dataset in datasets if dataset]


class Kinds(Mapping[str, Kind]):
    """The kind of each added dataset by name. A look-up reads that dataset alone; only an iteration lists all of them.

    Args:
        may_use: return whether the reader may know a dataset of this name.
    """

    def __init__(self, storage: Storage, may_use: Callable[[str], bool] = lambda _: True) -> None:
        self._storage, self._may_use = storage, may_use
        self._looked_up: dict[str, Kind | None] = {}
        self._listed: dict[str, Kind] | None = None

    def __getitem__(self, name: str) -> Kind:
        if name not in self._looked_up:
            may_exist = re.fullmatch(NAME, name) and self._may_use(name)
            dataset = current(self._storage, name) if may_exist else None
            self._looked_up[name] = dataset.kind if dataset else None
        if kind := self._looked_up[name]:
            return kind
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Kind]:
        if self._listed is None:
            listed = _list_kinds(self._storage)
            self._listed = {name: kind for name, kind in listed.items() if self._may_use(name)}
        return self._listed


def _list_kinds(storage: Storage) -> dict[str, Kind]:
    keys = storage.list("datasets/")
    files = (re.fullmatch(r"datasets/([^/]+)/[0-9a-f]{64}/([^/]+)", key) for key in keys)
    by_file = {file: kind for kind, file in FILES.items()}
    by_name = {match[1]: by_file[match[2]] for match in files if match and match[2] in by_file}
    return {name: kind for name, kind in by_name.items() if f"datasets/{name}/current.json" in keys}
