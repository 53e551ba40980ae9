"""What a model's name means: a version of the registry, or a checkpoint of a run, also of one in progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, File, Metrics
from genmodels.errors import CheckpointError, KeyNotFound, ModelNotFound
from genmodels.registry.pin import checkpoint_name, find_checkpoint, names_checkpoint
from genmodels.registry.store import Registry, Version
from genmodels.storage import Storage


@dataclass(frozen=True)
class ResolvedModel:
    """Something that can be loaded. Two with one name are the same."""

    name: str  # exact, as in `shapes@3` or `shapes@study-0123abcd:step-500`
    model: str
    version: int | None
    job: str  # which trained it, and where in that run it stands
    checkpoint: CheckpointRef
    family: str
    created: str
    metrics: Metrics
    files: dict[str, File]
    keys: dict[str, str]  # where each file lies in storage

    @property
    def size(self) -> int:
        """Bytes of its files: at least what it takes in memory."""
        return sum(file.size for file in self.files.values())

    def fetch(self, storage: Storage, folder: Path) -> None:
        """Download its files into an empty folder and verify every byte.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        checkpoint.download(storage, self.keys, self.files, folder)


def is_mutable(name: str) -> bool:
    """Whether a name may mean something else later: an alias, `latest`, `live`, or a step that is written again."""
    return not name.partition("@")[2].isdecimal() and ":step-" not in name


def with_default_alias(name: str) -> str:
    """A bare name is that of the alias production."""
    return name if "@" in name else f"{name}@production"


def resolve_model(storage: Storage, name: str) -> ResolvedModel:
    """Look up `m`, `m@alias`, `m@3`, `m@latest`, `m@live`, `m@step-500` or `m@<job>:step-500`.

    Raises:
        ModelNotFound: there is none; the message says what there is.
    """
    if not names_checkpoint(name):
        registry = Registry(storage)
        return of_version(registry, registry.resolve(name))
    run, ref = find_checkpoint(name, storage)
    prefix = run.checkpoint_prefix(ref)
    try:
        manifest = run.manifest(ref)
        config, _ = storage.get(f"{prefix}/{checkpoint.CONFIG}")
    except KeyNotFound:
        raise ModelNotFound(f"{name}: that checkpoint was cleaned away just now; ask for {run.model}@live") from None
    try:
        family = str(checkpoint.parse_config(config)["family"])
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}/{error}") from None
    start = run.attempt_start(ref.attempt)
    files = checkpoint.served(manifest.files)
    return ResolvedModel(
        name=checkpoint_name(run, ref),
        model=run.model,
        version=None,
        job=run.job,
        checkpoint=ref,
        family=family,
        created=start.time if start else "",
        metrics=manifest.metrics,
        files=files,
        keys={name: f"{prefix}/{name}" for name in files},
    )


def of_version(registry: Registry, version: Version) -> ResolvedModel:
    return ResolvedModel(
        name=version.name,
        model=version.model,
        version=version.version,
        job=version.job,
        checkpoint=version.checkpoint,
        family=version.family,
        created=version.created,
        metrics=version.metrics,
        files=version.files,
        keys=registry.keys(version),
    )
