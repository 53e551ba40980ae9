"""Distances between two sets of points (features of images).

Frechet distance: Heusel et al. 2017. Kernel distance: Binkowski et al. 2018. Precision and recall by nearest
neighbours: Kynkaanniemi et al. 2019. Density and coverage: Naeem et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5  # Naeem et al.'s k, for all four
ROWS = 1024  # rows of a matrix of distances at a time: the whole matrix is never in memory


def moments(features: Tensor) -> Tensor:
    """Return number, sum and outer products of features (n, d), summed in one float64 matrix (d + 1, d + 1)."""
    x = F.pad(features.double(), (1, 0), value=1.0)
    return x.T @ x


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the squared 2-Wasserstein distance of the Gaussians with these `moments` (Dowson & Landau 1982)."""
    (mean_a, cov_a), (mean_b, cov_b) = map(_gaussian, (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy, unbiased, with the kernel (x.y / d + 1)^3: (n, d), (m, d).

    n and m are above 1. All pairs count; the usual KID is a mean over random subsets.
    """

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([_kernel(rows, y).sum() for rows in x.split(ROWS)]).sum()

    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    within_a = (total(a, a) - _own_kernel(a).sum()) / (n * (n - 1))
    within_b = (total(b, b) - _own_kernel(b).sum()) / (m * (m - 1))
    return float(within_a + within_b - 2 * total(a, b) / (n * m))


@dataclass(frozen=True)
class Neighbours:
    """Four metrics by nearest neighbours. They are shares; only `density` may exceed 1."""

    precision: float  # share of fakes within reach of a real point
    recall: float  # share of real points within reach of a fake
    density: float  # number of real points that reach a fake, divided by the expected number
    coverage: float  # share of real points that reach a fake


def neighbours(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> Neighbours:
    """Compare (n, d) with (m, d), n and m > k. A point reaches as far as its k-th neighbour in its own set."""
    real_reach, fake_reach = _reach(real, k), _reach(fake, k)
    near_fake = covered = 0  # reals
    hits = torch.zeros(len(fake))  # for each fake: number of real points that reach it
    for reach, distances in zip(real_reach.split(ROWS), _distances(real, fake), strict=True):
        within = distances < reach[:, None]
        hits += within.sum(0)
        covered += int(within.any(1).sum())
        near_fake += int((distances < fake_reach).any(1).sum())
    return Neighbours(
        precision=float((hits > 0).double().mean()),
        recall=near_fake / len(real),
        density=float(hits.mean() / k),
        coverage=covered / len(real),
    )


def nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each point to the nearest of the others: (n, d), (m, d) -> (n,)."""
    return torch.cat([distances.amin(1) for distances in _distances(points, others)])


def _gaussian(sums: Tensor) -> tuple[Tensor, Tensor]:
    second = sums.cpu() / sums[0, 0].clamp_min(1).cpu()
    mean = second[0, 1:]
    return mean, second[1:, 1:] - mean.outer(mean)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _own_kernel(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield the distances of `ROWS` points of x at a time to all points of y."""
    for rows in x.split(ROWS):
        yield torch.cdist(rows, y)


def _reach(points: Tensor, k: int) -> Tensor:
    """Return the distance of each point to its k-th neighbour: (n,). The nearest point is the point itself."""
    reach = [distances.topk(k + 1, largest=False).values[:, -1] for distances in _distances(points, points)]
    return torch.cat(reach)
