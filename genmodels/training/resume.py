"""Find the checkpoint that an attempt continues from, and give its tensors to all ranks.

Rank 0 alone reads the tensors: in parallel, into the memory of its next snapshot, verified on the way. The other ranks
receive them from rank 0, tensor by tensor, into the memory where they stay. So storage sends a checkpoint once, however
many workers there are, and no rank holds a second copy: a file must be read whole to be verified, and the network
between the workers carries each gradient anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genmodels import checkpoint
from genmodels.checkpoint import WEIGHTS, CheckpointRef, Manifest, TensorFile, load_optimizer
from genmodels.checkpoint.parts import INDEX, StoredState, assemble, share
from genmodels.checkpoint.tensor_file import read_entries
from genmodels.errors import CheckpointError
from genmodels.family import Family
from genmodels.registry.init_from import TOKENIZER
from genmodels.runs.store import Run
from genmodels.training.group import Group
from genmodels.training.role_trainer import RoleTrainer


@dataclass(frozen=True)
class Parent:
    """The checkpoint that an attempt continues from. Only rank 0 has its tensors, all of them verified."""

    checkpoint: CheckpointRef
    manifest: Manifest
    tokenizer: bytes | None  # of a text
    files: dict[str, TensorFile] = field(default_factory=dict)
    parts: StoredState | None = None  # on each rank, of a checkpoint in parts, if the ranks share the state


def claim(run: Run, attempt: int, group: Group, *, sharded: bool) -> Parent | None:
    """Return the checkpoint to continue from: rank 0 picks it and writes `start.json`, the other ranks read that.

    Args:
        sharded: the ranks share the state, so that each reads its part of it.
    """
    if sharded:
        return _claim_together(run, attempt, group)
    parent = None
    if group.rank == 0:
        parent = newest_complete(run, pinned=group.device.type == "cuda")
        run.start_attempt(attempt, parent.checkpoint if parent else None, group.world_size)
    if dist.is_initialized():
        dist.barrier()
    if group.rank == 0:
        return parent
    ref = run.chain()[-1].parent
    if ref is None:
        return None
    manifest = run.manifest(ref)
    return Parent(ref, manifest, _tokenizer(run, ref, manifest))


def _claim_together(run: Run, attempt: int, group: Group) -> Parent | None:
    """Return the newest checkpoint of which each rank can read what it has to verify."""
    refs = run.checkpoints() if group.rank == 0 else []
    parent = None
    while ref := _from_rank_0(refs.pop() if refs else None, group):
        try:
            parent = _read_share(run, ref, group)
        except CheckpointError:  # damaged, or deleted meanwhile: take the checkpoint before it
            parent = None
        if group.all(parent is not None):
            break
        parent = None  # another rank could not read its part: free the memory before the next one is read
    if group.rank == 0:
        run.start_attempt(attempt, parent.checkpoint if parent else None, group.world_size)
    dist.barrier()
    return parent


def _from_rank_0(ref: CheckpointRef | None, group: Group) -> CheckpointRef | None:
    data = group.receive_bytes(ref.model_dump_json().encode() if ref else b"")
    return CheckpointRef.model_validate_json(data) if data else None


def _read_share(run: Run, ref: CheckpointRef, group: Group) -> Parent:
    manifest, pinned = run.manifest(ref), group.device.type == "cuda"
    if INDEX in manifest.files:
        names = share(manifest, group.rank, group.world_size)
        parts = StoredState.read(run.storage, run.checkpoint_prefix(ref), manifest, names, pinned)
        return Parent(ref, manifest, _tokenizer(run, ref, manifest), parts=parts)
    return _read(run, ref, pinned) if group.rank == 0 else Parent(ref, manifest, _tokenizer(run, ref, manifest))


def newest_complete(run: Run, pinned: bool = False) -> Parent | None:
    """Return the newest checkpoint whose tensors are all there and undamaged."""
    for ref in reversed(run.checkpoints()):
        try:
            return _read(run, ref, pinned)
        except CheckpointError:
            continue  # damaged, or deleted meanwhile: take the checkpoint before it
    return None


def restore(parent: Parent, trainers: list[RoleTrainer], averaged: Family[Any, Any], group: Group) -> None:
    """Set weights and optimizers, on every rank, to those of a checkpoint."""
    _overwrite(averaged.network.state_dict(), parent.files.get(WEIGHTS), group)
    for trainer in trainers:
        _overwrite(trainer.loss.state_dict(), parent.files.get(weights_file(trainer.name)), group)
        for i, optimizer in enumerate(trainer.optimizers):
            load_optimizer(optimizer, _receive(parent.files.get(optimizer_file(trainer.name, i)), group))


def weights_file(role: str) -> str:
    """Return the name of the file with the raw weights of a role."""
    return f"state/{role}.safetensors"


def optimizer_file(role: str, index: int) -> str:
    """Return the name of the file with the state of an optimizer of a role."""
    return f"state/{role}.optimizer-{index}.safetensors"


def _read(run: Run, ref: CheckpointRef, pinned: bool) -> Parent:
    manifest, prefix = run.manifest(ref), run.checkpoint_prefix(ref)
    in_parts = INDEX in manifest.files
    tensors = [name for name in manifest.files if name == WEIGHTS or (name.startswith("state/") and not in_parts)]
    files = {
        name: checkpoint.read_tensors(run.storage, f"{prefix}/{name}", manifest.files[name], pinned) for name in tensors
    }
    if in_parts:
        files |= assemble(run.storage, prefix, manifest, pinned)
    return Parent(ref, manifest, _tokenizer(run, ref, manifest), files)


def _tokenizer(run: Run, ref: CheckpointRef, manifest: Manifest) -> bytes | None:
    expected = manifest.files.get(TOKENIZER)
    return (
        checkpoint.read_file(run.storage, f"{run.checkpoint_prefix(ref)}/{TOKENIZER}", expected) if expected else None
    )


def _overwrite(tensors: Mapping[str, Tensor], file: TensorFile | None, group: Group) -> None:
    """Set tensors to those of a file that rank 0 has."""
    if file and not file.fits(tensors):
        different = sorted(file.tensors.keys() ^ tensors.keys()) or ["the shape of a tensor"]
        raise CheckpointError(f"the checkpoint is of another model or release: {different[0]} differs")
    for name in sorted(tensors):
        group.receive(tensors[name], file.tensors[name] if file else None)


def _receive(file: TensorFile | None, group: Group) -> dict[str, Tensor]:
    """Return the tensors of a file that rank 0 has, as new tensors on the device."""
    header = group.receive_bytes(file.header if file else b"")
    tensors = {}
    for name, entry in read_entries(header).items():
        tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device=group.device)
        group.receive(tensors[name], file.tensors[name] if file else None)
    return tensors
