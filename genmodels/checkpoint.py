"""Write, upload, read and verify checkpoints.

A checkpoint is a directory to resume training from or to publish. It is complete or invisible: nothing reads a
directory in storage that has no manifest. The same content has these forms:

    Snapshot               in the memory of a training process
    CheckpointRef          attempt and step, which name a directory of a run; `Manifest` lists its files
    registry.Version       the serving files of a checkpoint, published
    ResolvedModel          the serving files that a reference names, of a version or of a checkpoint
    LoadedModel            a resolved model in the memory of a model host

Files of the directory:

    model.safetensors      the serving weights (the EMA if there is one)
    config.json            family, its config, and the shape of the data: enough to build the networks
    assets/                tokenizer, fitted density: what serving needs in addition to the weights
    state/<role>.safetensors, state/<role>.optimizer-<i>.safetensors       raw weights and optimizers, to resume
    manifest.json          every file with size and sha256, step, metrics, lineage, and its own digest; written last

`model.safetensors`, `config.json` and `assets/` are the serving files. Nothing is unpickled: tensors are safetensors,
the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from genmodels import models
from genmodels.errors import CheckpointError, DamagedObject, KeyNotFound, SpecError, StorageError
from genmodels.family import DataInfo, Family
from genmodels.storage import Document, Storage, encode_floats, write_document
from genmodels.storage.base import check_key
from genmodels.storage.disk import disk_outages
from genmodels.storage.documents import damaged, parse_object

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class File(Document):
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CheckpointRef(Document):
    """Name a checkpoint of a run by its attempt and step."""

    attempt: int = Field(ge=0)
    step: int = Field(ge=0)


class Lineage(Document):
    """Record what a checkpoint was made from."""

    spec_digest: str
    data_digest: str
    code_version: str
    world_size: int
    parent: CheckpointRef | None  # the checkpoint that its attempt resumed from


# A metric may be NaN, which JSON cannot express: such values are stored as text.
Metrics = dict[str, Annotated[float, Field(allow_inf_nan=True)]]


class Manifest(Document):
    object_kind = "checkpoint"
    remedy = "the run resumes from another checkpoint; delete the folder of this one"

    step: int
    samples: int  # that all workers have seen together: the position in the data
    metrics: Metrics
    lineage: Lineage
    files: dict[str, File]


@dataclass(frozen=True)
class Snapshot:
    """Hold the content of a checkpoint as CPU copies, which training no longer changes."""

    step: int
    samples: int
    metrics: dict[str, float]
    serving_weights: dict[str, Tensor]  # averaged (EMA) if the spec asks for it
    roles: dict[str, dict[str, Tensor]]  # raw weights
    optimizers: dict[str, list[dict[str, Tensor]]]  # per role and optimizer: "<parameter index>.<name>" -> tensor


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of `Optimizer.state_dict()` in one flat dict; hyper-parameters come from the spec instead."""
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, values in state["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors` into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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


def serving_files(files: Mapping[str, File]) -> dict[str, File]:
    """Return the files that a model needs to answer requests, without those that only training needs."""
    return {name: file for name, file in files.items() if not name.startswith("state/")}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(storage: Storage, prefix: str, folder: Path, manifest: Manifest, fence: Callable[[], None]) -> None:
    """Upload the files of a checkpoint, check the fence, then write the manifest, which completes the checkpoint."""
    for name in manifest.files:
        storage.upload(folder / name, f"{prefix}/{name}")
    fence()
    document = encode_floats(manifest.model_dump(mode="json"))
    write_document(storage, f"{prefix}/{MANIFEST}", {**document, "digest": _digest(document)})


def read_manifest(storage: Storage, prefix: str) -> Manifest:
    """Read the manifest of a checkpoint in storage.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    key = f"{prefix}/{MANIFEST}"
    try:
        data, etag = storage.get(key)
    except KeyNotFound:
        raise CheckpointError(f"{prefix}: no complete checkpoint (it has no {MANIFEST})") from None
    except DamagedObject as error:
        raise CheckpointError(str(damaged(key, error.what, Manifest, error.etag))) from None
    try:
        document = parse_object(data)
        written, _ = document.pop("digest"), document.pop("nonce")
        manifest = Manifest.model_validate(document)
        if written != _digest(document):
            raise ValueError("its digest does not match its content")
    except (ValueError, KeyError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else _summarize(error)
        raise CheckpointError(str(damaged(key, what, Manifest, etag))) from None
    return manifest


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


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _not_readable(path, error) from error


def load_family(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Family[Any, Any]:
    """Load the model of a checkpoint or version: serving weights and assets, in eval mode, on the CPU.

    The shapes of the weights are checked first, so a wrong file allocates no memory for networks.

    Args:
        folder: contains `config.json`, `assets/` and, unless `weights` is given, `model.safetensors`.
        weights: the serving weights, if they are already in memory.

    Raises:
        CheckpointError: config, weights and code do not match.
    """
    import torch

    outline = read_outline(folder)
    if weights is None:
        _check_shapes(outline, _stored_shapes(folder / WEIGHTS))
        weights = load_tensors(folder / WEIGHTS)
    else:
        _check_shapes(outline, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    with torch.random.fork_rng(devices=[]):  # building draws initial weights: do not advance the RNG of the caller
        family = type(outline)(outline.config, outline.data)
    family.network.load_state_dict(dict(weights))
    family.load_assets(read_assets(folder))
    family.network.eval().requires_grad_(False)
    return family


def read_outline(folder: Path) -> Family[Any, Any]:
    """Build the model that `config.json` describes, with networks that have shapes but no memory.

    Raises:
        CheckpointError: this release does not know such a model.
    """
    from genmodels.sizing.outline import shapes_only

    try:
        document = read_config(folder)
        cls = models.load(document["family"])
        # Lenient: a newer release may have added settings. If they matter, the shapes or the probe differ.
        config = cls.Config.model_validate(document["config"], strict=False, extra="ignore")
        data: Any = TypeAdapter(DataInfo).validate_python(document["data"], strict=False, extra="ignore")
        with shapes_only():
            return cls(config, data)
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, SpecError) as error:
        raise CheckpointError(f"{CONFIG}: {' '.join(str(error).split())[:1000]}") from error


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in a file from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _not_readable(path, error) from error


def _check_shapes(outline: Family[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in outline.network.state_dict().items()}
    if shapes == expected:
        return
    wrong = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    stored, configured = (_format_shape(named.get(wrong[0])) for named in (shapes, expected))
    more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
    raise CheckpointError(f"{WEIGHTS}: {wrong[0]} is {stored}, but {CONFIG} says {configured}{more}")


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "one number"


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder. Raises CheckpointError if the file is missing or damaged."""
    try:
        return parse_config((folder / CONFIG).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{CONFIG}: {error.strerror}") from None


def parse_config(data: bytes) -> dict[str, Any]:
    """Parse a `config.json` into `family`, `config` and the shape of the `data`. Raises CheckpointError if damaged."""
    try:
        document = parse_object(data)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: damaged ({error})") from None
    for name, kind in (("family", str), ("config", dict), ("data", dict)):
        if not isinstance(document.get(name), kind):
            raise CheckpointError(f"{CONFIG}: damaged ({name} is missing or has the wrong type)")
    return document


def read_assets(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "assets").glob("*")) if path.is_file()}


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Make a folder for the files of one checkpoint; remove it at the end.

    Raises:
        StorageUnavailable: the disk of this machine is full or fails; raised instead of the original error.
    """
    with disk_outages(), tempfile.TemporaryDirectory(prefix="genmodels-", ignore_cleanup_errors=True) as name:
        yield name


def _not_readable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path.name}: not readable as safetensors ({error})")


def _summarize(error: ValueError) -> str:
    return f"{error.error_count()} fields are wrong" if isinstance(error, ValidationError) else str(error)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
