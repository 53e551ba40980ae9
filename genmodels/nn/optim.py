"""Optimizers of a module: AdamW, or Muon for its hidden matrices and AdamW for the rest.

AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from genmodels.family import OptimizerConfig
from genmodels.nn.muon import Muon


def make_optimizers(module: nn.Module, config: OptimizerConfig, outputs: Iterable[nn.Module] = ()) -> list[Optimizer]:
    """Return optimizers that together train each parameter of `module` that requires a gradient, exactly once.

    Weight decay applies to tensors of two or more dimensions only (matrices, convolution kernels, embeddings): biases
    and the gains of norms have no reason to be near zero. The `lr` of each param group is its peak.

    With `optimizer: muon`, the weights of hidden Linear layers go to Muon at `muon_learning_rate`; the rest goes to
    AdamW at `learning_rate`: vectors, embeddings, output layers, and convolution kernels, whose flattening into
    matrices Muon's authors leave open and which AdamW trains well.

    Args:
        outputs: modules of `module` whose matrices face the output rather than a hidden layer (a classifier's or
            language model's head): never Muon's, as its authors advise.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = _hidden_matrices(module, outputs) if config.optimizer == "muon" else []
    muons = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in muons]

    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    if rest:
        optimizers.append(_adamw(rest, config))
    return optimizers


def _hidden_matrices(module: nn.Module, outputs: Iterable[nn.Module]) -> list[nn.Parameter]:
    facing_output = {id(parameter) for output in outputs for parameter in output.parameters()}
    hidden = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)} - facing_output
    return [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) in hidden]


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: one pass over all tensors; the default loop takes longer on a small model than its backward pass
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
