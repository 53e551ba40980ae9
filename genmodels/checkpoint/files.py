"""Write, upload, download and verify the files of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genmodels.checkpoint.manifest import CONFIG, WEIGHTS, File, Manifest, read_manifest, write_manifest
from genmodels.checkpoint.snapshot import Snapshot
from genmodels.errors import CheckpointError, KeyNotFound, StorageError
from genmodels.family import Family
from genmodels.storage import Storage
from genmodels.storage.base import check_key
from genmodels.storage.disk import disk_outages


def write_files(folder: Path, family: Family[Any, Any], snapshot: Snapshot) -> None:
    """Write all files of a checkpoint except the manifest and the assets."""
    from safetensors.torch import save_file

    (folder / "state").mkdir(parents=True, exist_ok=True)
    (folder / "assets").mkdir(exist_ok=True)
    save_file(snapshot.serving_weights, folder / WEIGHTS)
    write_config(folder, family)
    for role, weights in snapshot.roles.items():
        save_file(weights, folder / "state" / f"{role}.safetensors")
        for i, tensors in enumerate(snapshot.optimizers[role]):
            save_file(tensors, folder / "state" / f"{role}.optimizer-{i}.safetensors")


def write_config(folder: Path, family: Family[Any, Any]) -> None:
    config, data = family.config.model_dump(mode="json"), family.data.model_dump(mode="json")
    document = {"family": family.family_name(), "config": config, "data": data}
    (folder / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    for name, data in assets.items():
        (folder / "assets" / name).write_bytes(data)


def describe_files(folder: Path) -> dict[str, File]:
    """Return the size and sha256 of every file under `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): File(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths
    }


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(storage: Storage, prefix: str, folder: Path, manifest: Manifest, fence: Callable[[], None]) -> None:
    """Upload the files of a checkpoint, check the fence, then write the manifest, which completes the checkpoint."""
    for name in manifest.files:
        storage.upload(folder / name, f"{prefix}/{name}")
    fence()
    write_manifest(storage, prefix, manifest)


def download(storage: Storage, keys: Mapping[str, str], files: Mapping[str, File], folder: Path) -> None:
    """Download files and verify the size and sha256 of each.

    Args:
        keys: the storage key of each file in `files`.
        folder: an empty folder to fill.

    Raises:
        CheckpointError: a file is missing, or its size or sha256 differs.
    """
    for name, expected in files.items():
        try:
            check_key(name)
        except StorageError:
            raise CheckpointError(f"{name!r} is not a valid file name in a checkpoint") from None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(keys[name], path)
        except KeyNotFound:
            raise CheckpointError(f"{keys[name]}: missing") from None
        if path.stat().st_size != expected.size or sha256_of(path) != expected.sha256:
            raise CheckpointError(f"{keys[name]}: damaged (size or sha256 differs from the manifest)")


def fetch(storage: Storage, prefix: str, folder: Path) -> Manifest:
    """Download a checkpoint and verify every byte.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    manifest = read_manifest(storage, prefix)
    download(storage, {name: f"{prefix}/{name}" for name in manifest.files}, manifest.files, folder)
    return manifest


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Make a folder for the files of one checkpoint; remove it at the end.

    Raises:
        StorageUnavailable: the disk of this machine is full or fails; raised instead of the original error.
    """
    with disk_outages(), tempfile.TemporaryDirectory(prefix="genmodels-", ignore_cleanup_errors=True) as name:
        yield name
