"""Quality of pictures that have a target, and principal components as the baseline of every compression.

SSIM: Wang et al. 2004, with their Gaussian window, by scikit-image.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from genmodels.family import EvaluationData
from genmodels.nn.networks import psnr

WINDOW = 11  # pixels that SSIM's Gaussian window spans; smaller pictures get an even one of 7
MAX_NUMBERS = 2**26  # of training pixels that components are fitted to
CLOSED_FORM = 2048  # pixels up to which their covariance is taken apart whole


def pictures(images: np.ndarray) -> Tensor:
    """uint8 (n, C, H, W) -> float32 in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / np.float32(255))


def evenly_spaced(n: int, count: int) -> np.ndarray:
    """At most `count` of 0 .. n-1, evenly spread: datasets are often sorted by class."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(np.int64)


def mean_psnr(images: Tensor, targets: Tensor) -> float:
    """In dB, mean over (n, C, H, W)."""
    return float(psnr(images, targets).double().mean())


def mean_ssim(images: Tensor, targets: Tensor) -> float:
    """Structural similarity, mean over (n, C, H, W) in [0, 1]; 1 for equal pictures."""
    from skimage.metrics import structural_similarity

    wide = min(images.shape[2:]) >= WINDOW
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if wide else {}
    values = [
        structural_similarity(image, target, data_range=1.0, channel_axis=0, **gaussian)
        for image, target in zip(images.numpy(), targets.numpy(), strict=True)
    ]
    return float(np.mean(values))


def components(data: EvaluationData, latent_dim: int, shown: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of validation pictures that went through the first principal components.

    Args:
        latent_dim: how many numbers a picture is taken to.
        shown: (n,) indices of the validation pictures.
    """
    name = f"pca-{data.digest[:16]}-{latent_dim}-{len(shown)}.json"
    found = json.loads(data.cached(name, lambda: json.dumps(_components(data, latent_dim, shown)).encode()))
    return found["psnr"], found["ssim"]


def _components(data: EvaluationData, latent_dim: int, shown: np.ndarray) -> dict[str, float]:
    from sklearn.decomposition import PCA

    train, val = data.train["images"], data.val["images"][shown]
    pixels = train[0].size
    chosen = evenly_spaced(len(train), MAX_NUMBERS // pixels)
    solver = "covariance_eigh" if pixels <= CLOSED_FORM else "randomized"
    pca = PCA(min(latent_dim, len(chosen)), svd_solver=solver, random_state=0)
    data.report_progress()
    pca.fit(pictures(train[chosen]).flatten(1).numpy())
    data.report_progress()
    targets = pictures(val)
    through = pca.inverse_transform(pca.transform(targets.flatten(1).numpy()))
    images = torch.from_numpy(through).float().clamp(0, 1).view_as(targets)
    return {"psnr": mean_psnr(images, targets), "ssim": mean_ssim(images, targets)}
