"""Shared by families: the convolutional encoder and decoder of images, and inference without side effects.

Encoder and decoder have the same sizes: an image is halved (rounding up) as long as its shorter side is at least 8, so
that 28 x 28 goes 28, 14, 7 and 256 x 256 ends at 4 x 4; non-square and odd sizes work alike. No feature map is computed
at full size: this makes the networks quick on a CPU. Normalisation is GroupNorm (Wu & He 2018) or none, never
BatchNorm: so there are no buffers, training and serving compute the same function, and the result of an image does not
depend on the other images of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from genmodels.declarations.image_networks import MIN_SIDE, Norm
from genmodels.sizing.memory import FLOAT

MAPS_AT_ONCE = 5  # feature maps of one size that a residual block holds at once
SSIM_RADIUS, SSIM_SIGMA = 5, 1.5  # pixels


def image_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes from the whole image to the coarsest feature map, e.g. [(28, 28), (14, 14), (7, 7)]."""
    sizes = [(height, width)]
    while min(sizes[-1]) >= MIN_SIDE:
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


class ImageEncoder(nn.Module):
    """Images (n, C, H, W) -> vectors (n, out_features).

    Args:
        shape: (C, H, W), each side at least 8.
        width: channels at half size; they double with each halving, up to four times that.
        blocks: residual blocks at each size.
    """

    def __init__(
        self, shape: tuple[int, int, int], out_features: int, *, width: int = 32, blocks: int = 1, norm: Norm = "group"
    ) -> None:
        super().__init__()
        sizes, channels = _ladder(shape, width)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fine, coarse, 3, stride=2, padding=1), *(ResidualBlock(coarse, norm) for _ in range(blocks))
            )
            for fine, coarse in pairwise(channels)
        )
        h, w = sizes[-1]
        self.head = nn.Sequential(
            _norm(channels[-1], norm), nn.SiLU(), nn.Flatten(), nn.Linear(channels[-1] * h * w, out_features)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[-1])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps from half size to the coarsest, the input of `head`."""
        maps, x = [], images
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


class ImageDecoder(nn.Module):
    """Vectors (n, in_features) -> unbounded images (n, C, H, W): logits, or greys to clamp, depending on the loss.

    The mirror of `ImageEncoder`. With `skips=True` it can also take the encoder's feature maps, which it adds at each
    size after a 1 x 1 convolution (symmetric skip connections: Mao et al. 2016, Ronneberger et al. 2015).
    """

    def __init__(
        self,
        in_features: int,
        shape: tuple[int, int, int],
        *,
        width: int = 32,
        blocks: int = 1,
        norm: Norm = "group",
        skips: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, channels = _ladder(shape, width)
        self.channels = channels[-1]
        h, w = self.sizes[-1]
        self.stem = nn.Linear(in_features, self.channels * h * w)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(ResidualBlock(coarse, norm) for _ in range(blocks)),
                _norm(coarse, norm),
                nn.SiLU(),
                nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1),
            )
            for fine, coarse in pairwise(channels)
        )
        self.skips = nn.ModuleList(nn.Conv2d(coarse, coarse, 1) for coarse in channels[1:]) if skips else None

    def forward(self, latents: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        x = self.stem(latents).unflatten(1, (self.channels, *self.sizes[-1]))
        for i in reversed(range(len(self.levels))):
            if features is not None and self.skips is not None:
                x = x + self.skips[i](features[i])
            h, w = self.sizes[i]
            x = self.levels[i](x)[..., :h, :w]  # the halving rounded up, so doubling may be one too many
        return x


class EncoderDecoder(nn.Module):
    """A network with an encoder and a decoder of this file; a subclass builds both."""

    encoder: ImageEncoder
    decoder: ImageDecoder


def pass_bytes(shape: tuple[int, int, int], width: int, rows: int) -> int:
    """Return the maximum number of bytes of feature maps while a served model encodes or decodes `rows` images."""
    maps = [channels * math.prod(size) for size, channels in zip(*_ladder(shape, width), strict=True)]
    return FLOAT * rows * (sum(maps) + MAPS_AT_ONCE * max(maps))


class ResidualBlock(nn.Module):
    """Pre-activation residual block, (n, C, h, w) -> (n, C, h, w) (He et al. 2016). Starts as the identity."""

    def __init__(self, channels: int, norm: Norm = "group") -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(
            _norm(channels, norm),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels, norm),
            nn.SiLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@contextmanager
def inference(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the mode at the end.

    A served network is in evaluation mode already: a switch visits each module, twice, which takes longer than a layer.
    """
    if not network.training:
        with torch.inference_mode():
            yield
        return
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train()


def placed(tensor: Tensor, network: nn.Module) -> Tensor:
    """Return the tensor on the device and in the dtype of the network's weights."""
    return tensor.to(next(network.parameters()))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Compute the structural similarity of images with values in [0, 1], 1 for equal ones: (n, C, H, W) twice -> (n,).

    Wang et al. 2004, with their Gaussian window of 11 pixels (or what fits) and where it lies wholly inside. It has
    gradients, and takes the window as two products with a matrix, which on a CPU are quicker than a convolution.
    """
    rows, columns = (_window(side, images.device) for side in images.shape[2:])

    def blur(x: Tensor) -> Tensor:
        return rows @ x @ columns.T

    x, y = images.float(), targets.float()
    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x) - mean_x.square() + blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    return (likeness / ((mean_x.square() + mean_y.square() + 0.01**2) * (variances + 0.03**2))).mean((1, 2, 3))


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image with values in [0, 1], in dB: (n, C, H, W) twice -> (n,)."""
    errors = (images.float() - targets.float()).square().flatten(1).mean(1)
    return -10 * errors.clamp_min(1e-10).log10()  # equal images count as 100 dB, not as infinity


def _window(side: int, device: torch.device) -> Tensor:
    """Return SSIM's window at each place along one side: (places, side); each row sums to 1."""
    radius = min(SSIM_RADIUS, (side - 1) // 2)
    pixels = torch.arange(side, device=device)
    distances = pixels - pixels[radius : side - radius, None]
    weights = torch.exp(-distances.square() / (2 * SSIM_SIGMA**2)) * (distances.abs() <= radius)
    return weights / weights.sum(1, keepdim=True)


def _ladder(shape: tuple[int, int, int], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    sizes = image_sizes(*shape[1:])
    return sizes, [shape[0], *(width * 2 ** min(i, 2) for i in range(len(sizes) - 1))]


def _norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)
