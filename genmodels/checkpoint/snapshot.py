"""Copy what a checkpoint saves into memory of the host, and give it back to modules and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genmodels.checkpoint.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

    from genmodels.checkpoint.parts import Layout


@dataclass(frozen=True)
class Snapshot:
    """Hold the content of a checkpoint in memory, which training does not change before the checkpoint is saved."""

    step: int
    samples: int
    metrics: dict[str, float]
    files: dict[str, TensorFile]  # `model.safetensors` (averaged if the spec asks for it) and those of `state/`
    layout: Layout | None = None  # of the part that this rank saves, if the ranks share the state


class SnapshotMemory:
    """Hold the memory of one snapshot: allocated at the first one, filled again by each later one.

    Args:
        files: memory to begin with: that of the checkpoint from which a run resumes.
        pinned: lock the pages in memory, from which a GPU copies faster.
    """

    def __init__(self, files: Mapping[str, TensorFile] | None = None, pinned: bool = False) -> None:
        self._files, self._pinned = dict(files or {}), pinned

    def fill(self, content: Mapping[str, Mapping[str, Tensor]]) -> dict[str, TensorFile]:
        """Copy tensors by file and name, and return the files: the same objects as at the last call."""
        for name, file in self.allocate(content).items():
            file.copy(content[name])
        if self._pinned:  # the copies run on the GPU's own time
            import torch

            torch.cuda.synchronize()
        return self._files

    def allocate(
        self, content: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Mapping[str, str]] | None = None
    ) -> dict[str, TensorFile]:
        """Return files of these names, dtypes and shapes; their values are those of an earlier snapshot, or nothing.

        Args:
            metadata: by file, further text for its header.
        """
        texts = metadata or {}
        self._files = {name: self._file(name, tensors, texts.get(name)) for name, tensors in content.items()}
        return self._files

    def _file(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> TensorFile:
        file = self._files.pop(name, None)
        return file if file and file.fits(tensors, metadata) else TensorFile.like(tensors, self._pinned, metadata)


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of `Optimizer.state_dict()` in one flat dict; hyper-parameters come from the spec instead."""
    return {
        f"{index}.{name}": value.detach() for index, values in state["state"].items() for name, value in values.items()
    }


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors` into an optimizer of the same parameters, which then owns the tensors."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value.cpu() if name == "step" else value  # torch counts on the CPU
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
