"""Repair the catalogue, at a rate that does not depend on its size: as the holder of the dispatcher's lease does.

So does `genmodels run`, which has no dispatcher. Several keepers at once do no harm: each change is conditional.

Each LOOK_SECONDS one list finds the intents of writers that died, and what readers have reported. Each SWEEP_SECONDS
one model is compared with its versions and aliases, shard by shard, so that objects which were changed by hand are
noticed: with 200 models within hours, with 10,000 within a week. After such changes, `genmodels catalogue rebuild` is
faster.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import threading
from collections.abc import Iterator

from genmodels.errors import DamagedObject
from genmodels.registry.catalogue import HEAD, PENDING, SHARDS, Catalogue, shard_of
from genmodels.spec.names import LABEL
from genmodels.storage import Storage
from genmodels.threads import Rounds

LOOK_SECONDS = 5.0
SWEEP_SECONDS = 60.0
LOOKS_BEFORE_REPAIR = 2  # an intent is younger at its first look than most writers take
LOOKS_BEFORE_DELETION = 120  # a writer that was paused for less time still has its intent
MAX_INTENTS = 1000  # that are read at once

log = logging.getLogger("genmodels.registry")


class CatalogueKeeper:
    def __init__(self, storage: Storage) -> None:
        self._storage, self._catalogue = storage, Catalogue(storage)
        self._looks: dict[str, int] = {}  # at each intent
        self._shards = itertools.cycle(SHARDS)
        self._models: list[str] = []  # of the current shard, not compared yet
        self._is_built = False
        self._rounds = Rounds("catalogue", log)

    def run(self, over: threading.Event) -> None:
        """Keep the catalogue until `over` is set."""
        for count in itertools.count(1):
            with self._rounds.round():
                self.look()
            if count % round(SWEEP_SECONDS / LOOK_SECONDS) == 0:
                with self._rounds.round():
                    self.sweep()
            if over.wait(LOOK_SECONDS):
                return

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the catalogue in a thread of its own: to build a large one takes minutes."""
        over = threading.Event()
        threading.Thread(target=self.run, args=(over,), name="catalogue", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def look(self) -> None:
        """Build the catalogue if there is none, then repair what writers have left and readers have reported."""
        if not self._is_built:
            self._catalogue.ensure()
            self._is_built = True
        names = [key.removeprefix(PENDING) for key in self._storage.list(PENDING, limit=MAX_INTENTS)]
        self._looks = {name: self._looks.get(name, 0) + 1 for name in names}
        for name, looks in self._looks.items():
            model = name.rpartition("-")[0]
            if name == "head" or name in SHARDS:
                self._rebuild(name)
                self._storage.delete(PENDING + name)
            elif re.fullmatch(LABEL, model) and (looks == LOOKS_BEFORE_REPAIR or looks >= LOOKS_BEFORE_DELETION):
                self._repair(model)
                if looks >= LOOKS_BEFORE_DELETION:
                    self._storage.delete(PENDING + name)

    def sweep(self) -> None:
        """Compare the next model with its versions and aliases."""
        if not self._models:
            shard = next(self._shards)
            try:
                self._models = self._catalogue.models_of(shard)
            except DamagedObject:
                self._rebuild(shard)
        if self._models:
            self._repair(self._models.pop())

    def _repair(self, model: str) -> None:
        try:
            if self._catalogue.update(model):
                log.info("the catalogue was behind for model %r", model)
        except DamagedObject as error:
            self._rebuild("head" if error.key == HEAD else shard_of(model))

    def _rebuild(self, name: str) -> None:
        log.warning("the catalogue's %s is built again", name if name == "head" else f"shard {name}")
        if name == "head":
            self._catalogue.rebuild()
        else:
            self._catalogue.rebuild_shard(name)
