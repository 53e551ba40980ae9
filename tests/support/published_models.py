"""Publish tiny untrained models as versions of a registry, so that tests of serving need no training run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from genmodels import checkpoint, models
from genmodels.checkpoint import CheckpointRef, Lineage, Manifest
from genmodels.data.text import CharTokenizer
from genmodels.engine.loader import load_folder
from genmodels.engine.model import LoadedModel
from genmodels.family import Family, ImageInfo, TextInfo
from genmodels.registry.catalogue import Catalogue
from genmodels.registry.store import Registry
from genmodels.registry.versions import Alias, Move, Version, VersionReader, alias_key, version_key
from genmodels.runs.job_index import index_runs
from genmodels.runs.store import Run
from genmodels.storage import Storage, open_storage, write_document
from genmodels.storage.documents import now
from tests.support.storages import MemoryStorage, upload

VOCABULARY = "\n !,.?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
IMAGES = ImageInfo(channels=1, height=16, width=16)
LINEAGE = Lineage(spec_digest="0", data_digest="0", code_version="0", world_size=1, parent=None)
CONFIGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"latent_dim": 4, "width": 4, "noise_std": 0.2},
    "vae": {"latent_dim": 4, "width": 4},
    "gan": {"latent_dim": 8, "width": 4},
    "minigpt": {"n_embd": 16, "n_layer": 1, "n_head": 2, "block_size": 16},
}


def build(
    name: str, seed: int = 0, pictures: ImageInfo | None = None, **config: Any
) -> tuple[Family[Any, Any], dict[str, bytes]]:
    """Build an untrained model and its assets."""
    pictures = pictures or IMAGES
    cls = models.load(name)
    tokenizer = CharTokenizer(VOCABULARY)
    data = TextInfo(vocab_size=tokenizer.vocab_size) if cls.kind == "text" else pictures
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = cls(cls.Config.model_validate({**CONFIGS.get(name, {}), **config}), data)
    images = torch.rand(64, *pictures.shape, generator=torch.Generator().manual_seed(seed))
    if cls.kind == "image":
        family.fit([{"images": images}], seed)
    return family, family.assets() | ({"tokenizer.json": tokenizer.to_json()} if cls.kind == "text" else {})


def write(folder: Path, family: Family[Any, Any], assets: dict[str, bytes]) -> None:
    (folder / "assets").mkdir()
    save_file(family.network.state_dict(), folder / checkpoint.WEIGHTS)
    (folder / checkpoint.CONFIG).write_bytes(checkpoint.config_bytes(family))
    for name, data in assets.items():
        (folder / "assets" / name).write_bytes(data)


def loaded(name: str, folder: Path, **config: Any) -> LoadedModel:
    """Return a tiny model as a host has it in memory, without a registry."""
    write(folder, *build(name, **config))
    return load_folder(folder, f"{name}@1")


def publish(
    storage: Storage,
    model: str,
    family: str,
    *,
    step: int = 1,
    alias: str | None = "production",
    pool: str = "default",
    **config: Any,
) -> Version:
    """Publish a version to the registry; another `step` gives other weights."""
    registry = Registry(storage)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, *build(family, seed=step, **config))
        files = checkpoint.describe_files(folder)
        manifest = Manifest(
            step=step, samples=step, metrics={"val_loss": 1.5, "odd": float("nan")}, lineage=LINEAGE, files=files
        )
        version = registry.publish(
            Run(storage, "test-00000000", model), CheckpointRef(attempt=1, step=step), manifest, folder, None, pool
        )
    if alias:
        registry.promote(model, alias, version.version, "test")
    return version


def publish_copies(storage: Storage, count: int, family: str = "vae") -> list[str]:
    """Publish one tiny model under so many names, far faster than one by one; return the names."""
    version, truth = publish(storage, "copy-0", family), VersionReader(storage)
    blobs = {name: storage.get(key)[0] for name, key in truth.keys(version).items()}
    names = [f"copy-{i}" for i in range(count)]
    for name in names[1:]:
        copy = version.model_copy(update={"model": name})
        for file, key in truth.keys(copy).items():
            storage.put(key, blobs[file])
        write_document(storage, version_key(name, version.version), copy.model_dump(mode="json"))
        move = Move(version=version.version, time=now(), reason="test")
        alias = Alias(version=version.version, history=[move])
        write_document(storage, alias_key(name, "production"), alias.model_dump(mode="json"))
    Catalogue(storage).rebuild()
    return names


def publish_examples(folder: Path) -> Storage:
    """Make a registry with a text model, a VAE of two versions, and a model without the alias production."""
    storage = open_storage(folder.as_uri())
    publish(storage, "play", "minigpt")
    publish(storage, "shapes", "vae")
    publish(storage, "shapes", "vae", step=2, alias="next")
    publish(storage, "clean", "autoencoder", alias=None)
    return storage


def save_checkpoint(
    storage: Storage, job: str, model: str, family: str, *, step: int, attempt: int = 1, spoil: bool = False
) -> None:
    """Save a checkpoint of a run in progress; with `spoil` its weights are not finite."""
    run = Run(storage, job, model)
    if run.attempt_start(attempt) is None:
        storage.put(f"jobs/{job}/spec.json", b"")
        index_runs(storage, job, [model], now())
        run.start_attempt(attempt, None, 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built, assets = build(family, seed=step)
        if spoil:
            for parameter in built.network.parameters():
                parameter.data.fill_(float("nan"))
        write(folder, built, assets)
        manifest = Manifest(
            step=step, samples=step, metrics={"val_loss": 2.5}, lineage=LINEAGE, files=checkpoint.describe_files(folder)
        )
        prefix = run.checkpoint_prefix(CheckpointRef(attempt=attempt, step=step))
        upload(storage, prefix, folder, manifest, lambda: run.fence(attempt))


def copy_model(storage: Storage, template: MemoryStorage, *names: str) -> None:
    """Put copies of the model `template` under other names, without its files; the catalogue does not follow."""
    for name in names:
        for key, data in template.objects.items():
            if key.startswith(("models/template/versions/", "models/template/aliases/")):
                storage.put(key.replace("template", name), data.replace(b'"template"', json.dumps(name).encode()))
