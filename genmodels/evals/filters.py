"""The baseline of denoising: filters of scikit-image, tuned on training images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genmodels.evals.images import evenly_spaced, mean_psnr, pictures
from genmodels.family import EvaluationData
from genmodels.nn.latents import image_normal

TUNED_ON = 24  # training pictures
Filter = Callable[[np.ndarray], np.ndarray]


def noisy(images: Tensor, std: float) -> Tensor:
    """Add Gaussian noise, keyed by the content of each image; pixels may be outside [0, 1]."""
    return images + std * image_normal(images, tuple(images.shape[1:]))


def best_filter(data: EvaluationData, std: float, shown: np.ndarray) -> tuple[str, float]:
    """Return the filter with the best PSNR on training images, and its PSNR in dB on validation images.

    Each filter is tried on the noisy images as they are, and on the images clamped to [0, 1], which a model sees.

    Args:
        std: standard deviation of the noise.
        shown: (n,) indices of the validation images.
    """
    name = f"filters-{data.digest[:16]}-{std:g}-{len(shown)}.json"
    best = json.loads(data.cached(name, lambda: json.dumps(_best(data, std, shown)).encode()))
    return best["filter"], best["psnr"]


def _best(data: EvaluationData, std: float, shown: np.ndarray) -> dict[str, Any]:
    train = data.train["images"]
    targets = pictures(train[evenly_spaced(len(train), TUNED_ON)])
    scores: list[tuple[float, str, Filter, bool]] = []
    for name, function in _candidates(std):
        scores += [(_score(function, targets, std, clamped), name, function, clamped) for clamped in (False, True)]
        data.report_progress()
    _, name, function, clamped = max(scores, key=lambda score: score[0])
    parts = [pictures(data.val["images"][part]) for part in np.array_split(shown, max(1, len(shown) // 100))]
    total = 0.0
    for part in parts:
        total += _score(function, part, std, clamped) * len(part)
        data.report_progress()
    return {"filter": name, "psnr": total / len(shown)}


def _score(function: Filter, targets: Tensor, std: float, clamped: bool) -> float:
    images = noisy(targets, std)
    images = images.clamp(0, 1) if clamped else images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too small for as many wavelet levels; one channel is no RGB
        # Channels last and contiguous: some filters read others wrong. One of them drops a single channel.
        last = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in images.numpy()]
        filtered = np.stack([function(image).reshape(image.shape) for image in last])
    return mean_psnr(torch.from_numpy(filtered).float().clamp(0, 1).permute(0, 3, 1, 2), targets)


def _candidates(std: float) -> list[tuple[str, Filter]]:
    """Return filters of (H, W, C), with parameters that suit this noise."""
    from scipy.ndimage import median_filter
    from skimage.filters import gaussian
    from skimage.restoration import denoise_bilateral, denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

    last: dict[str, Any] = {"channel_axis": -1}
    patches: dict[str, Any] = {"patch_size": 3, "patch_distance": 9, **last}
    means = ((0.4, std), (0.6, std), (0.6, 0.0), (0.8, 0.0), (1.0, 0.0))
    choices: dict[str, list[Filter]] = {
        "gaussian": [partial(gaussian, sigma=sigma, **last) for sigma in (0.4, 0.55, 0.7, 0.85, 1.0)],
        "median": [partial(median_filter, size=(size, size, 1)) for size in (2, 3, 4)],
        "total variation": [
            partial(denoise_tv_chambolle, weight=factor * std, **last) for factor in (0.4, 0.6, 0.7, 0.8, 1.0)
        ],
        "non-local means": [
            partial(denoise_nl_means, h=factor * std, sigma=known, **patches) for factor, known in means
        ],
        "bilateral": [
            partial(denoise_bilateral, sigma_color=factor * std, sigma_spatial=spatial, **last)
            for factor in (3, 6)
            for spatial in (0.8, 1.2)
        ],
        "wavelet": [
            partial(denoise_wavelet, sigma=std, method=method, wavelet=wavelet, **last)
            for method in ("BayesShrink", "VisuShrink")
            for wavelet in ("haar", "db2")
        ],
    }
    return [(name, function) for name, functions in choices.items() for function in functions]
