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
    state/part-<rank>.safetensors, state/index.json        instead of these, if the ranks share the state: see `parts`
    manifest.json          every file with size and sha256, step, metrics, lineage, and its own digest; written last

`model.safetensors`, `config.json` and `assets/` are the serving files. Nothing is unpickled: tensors are safetensors,
the rest is JSON.
"""

from __future__ import annotations

from genmodels.checkpoint.files import (
    complete,
    describe_files,
    download,
    fetch,
    fetch_serving,
    read_file,
    read_tensors,
    scratch_folder,
    sha256_of,
    upload_file,
)
from genmodels.checkpoint.loading import (
    config_bytes,
    load_family,
    load_tensors,
    parse_config,
    read_assets,
    read_config,
    read_outline,
)
from genmodels.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    CheckpointRef,
    File,
    Lineage,
    Manifest,
    Metrics,
    read_manifest,
    serving_files,
    write_manifest,
)
from genmodels.checkpoint.snapshot import Snapshot, SnapshotMemory, load_optimizer, optimizer_tensors
from genmodels.checkpoint.tensor_file import TensorFile

__all__ = [
    "CONFIG",
    "MANIFEST",
    "WEIGHTS",
    "CheckpointRef",
    "File",
    "Lineage",
    "Manifest",
    "Metrics",
    "Snapshot",
    "SnapshotMemory",
    "TensorFile",
    "complete",
    "config_bytes",
    "describe_files",
    "download",
    "fetch",
    "fetch_serving",
    "load_family",
    "load_optimizer",
    "load_tensors",
    "optimizer_tensors",
    "parse_config",
    "read_assets",
    "read_config",
    "read_file",
    "read_manifest",
    "read_outline",
    "read_tensors",
    "scratch_folder",
    "serving_files",
    "sha256_of",
    "upload_file",
    "write_manifest",
]
