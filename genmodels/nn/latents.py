"""Latent space: random rows keyed by (seed, i), a density fitted to latents, paths between two points.

Row i of each sample depends on (seed, i) alone, so that an answer is the same in a batch of any size.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from genmodels.declarations.image_networks import ImageDeclaration
from genmodels.family import ConfigT, ImageFamily, ImageInfo, Interpolation, RequestT, TextInfo
from genmodels.nn.networks import EncoderDecoder, inference, pass_bytes, placed
from genmodels.schema.base import Section
from genmodels.sizing.memory import FLOAT, Footprint, network_bytes
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement

DENSITY_FILE = "density.safetensors"
MAX_FIT = 4096  # latents; more of them hardly change the density, and a fit must take seconds


def row_generators(n: int, seed: int) -> Iterator[np.random.Generator]:
    """Yield a generator for each row, keyed by (seed, i): Philox (Salmon et al. 2011) has a stream for each key."""
    for i in range(n):
        yield np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, i], dtype=np.uint64)))


def standard_normal(n: int, dim: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Draw (n, dim) float32 from N(0, temperature^2 I); row i depends on (seed, i) alone."""
    rows = [generator.standard_normal(dim) * temperature for generator in row_generators(n, seed)]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(n, dim))


def image_normal(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw (n, *shape) float32 from N(0, 1); row i depends on image i alone.

    For evaluation: a validation image gets the same noise at each step, in a batch of any size, on each worker.
    """
    keys = [zlib.crc32(image.tobytes()) for image in images.cpu().numpy()]
    rows = [np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(images.device)


def first_rows(chunks: Iterable[Tensor], limit: int = MAX_FIT) -> Tensor:
    """Return the first `limit` rows of chunks (n, d), on the CPU; later chunks are not computed."""
    taken: list[Tensor] = []
    for chunk in chunks:
        taken.append(chunk[: limit - sum(map(len, taken))].cpu())
        if sum(map(len, taken)) >= limit:
            break
    if not taken:
        raise ValueError("a density needs at least one batch to fit to")
    return torch.cat(taken)


@dataclass(frozen=True)
class GaussianMixture:
    """A density over latents: mixture of k Gaussians with full covariance.

    It is fitted after training to the latents of the training data. It turns an autoencoder into a generator, and gives
    a VAE a better prior (Ghosh et al. 2020, "From Variational to Deterministic Autoencoders").
    """

    weights: Tensor  # (k,), of sum 1
    means: Tensor  # (k, d)
    scales: Tensor  # (k, d, d) lower triangular; the covariance is scale @ scale.T

    @classmethod
    def fit(cls, latents: Tensor, n_components: int, seed: int) -> GaussianMixture:
        """Fit by expectation-maximisation to latents (n, d), at most the first `MAX_FIT`.

        The same latents and seed give the same density. With few latents the density has fewer components; with equal
        latents its covariances are still positive.

        Raises:
            ValueError: there are no latents, or some are not finite.
        """
        from sklearn.mixture import GaussianMixture as SklearnMixture  # here, because the import is slow

        points = latents[:MAX_FIT].double().cpu().numpy()
        if not len(points) or not np.isfinite(points).all():
            raise ValueError(f"a density needs at least one latent and finite values; got shape {tuple(latents.shape)}")
        centre, spread = points.mean(0), np.maximum(points.std(0), 1e-6)
        n_components = _max_components(n_components, *points.shape)
        if len(points) == 1:
            points = np.repeat(points, 2, axis=0)  # scikit-learn needs two
        mixture = SklearnMixture(n_components, reg_covar=1e-3, max_iter=50, tol=1e-2, random_state=seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of equal points and of an early stop: both are allowed here
            mixture.fit((points - centre) / spread)
        return cls(
            weights=torch.from_numpy(mixture.weights_).float(),
            means=torch.from_numpy(mixture.means_ * spread + centre).float(),
            scales=torch.from_numpy(np.linalg.cholesky(mixture.covariances_) * spread[:, None]).float(),
        )

    def sample(self, n: int, seed: int, temperature: float = 1.0) -> Tensor:
        """Draw (n, d) float32; `temperature` scales the spread within each component, 0 gives component means."""
        edges = self.weights.double().cumsum(0).numpy()
        components: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # those that are drawn, in float64
        dim = self.means.shape[1]
        rows = np.empty((n, dim), dtype=np.float32)
        for row, generator in zip(rows, row_generators(n, seed), strict=True):
            k = min(int(np.searchsorted(edges, generator.random() * edges[-1], side="right")), len(edges) - 1)
            if k not in components:
                components[k] = self.means[k].double().numpy(), self.scales[k].double().numpy()
            mean, scale = components[k]
            row[:] = mean + scale @ generator.standard_normal(dim) * temperature
        return torch.from_numpy(rows)

    def to_bytes(self) -> bytes:
        """Return the density as a safetensors file."""
        return safetensors.torch.save({"weights": self.weights, "means": self.means, "scales": self.scales})

    @classmethod
    def from_bytes(cls, data: bytes) -> GaussianMixture:
        """Load the density from a safetensors file."""
        tensors = safetensors.torch.load(data)
        return cls(tensors["weights"], tensors["means"], tensors["scales"])


def _max_components(wanted: int, points: int, dim: int) -> int:
    """Return the number of components that `points` can have: full rank needs dim + 1 points for each."""
    return max(1, min(wanted, points // (dim + 1)))


def density_bytes(n_components: int, dim: int) -> int:
    """Return the size in bytes of a density at its largest."""
    return FLOAT * _max_components(n_components, MAX_FIT, dim) * (dim**2 + dim + 1)


class DensityFamily(ImageDeclaration, ImageFamily[ConfigT, RequestT]):
    """An image family with a convolutional encoder and decoder, and a density over latents that `fit` makes.

    Its Config has at least the fields `latent_dim`, `width` and `density_components`.
    """

    network: EncoderDecoder
    density: GaussianMixture | None = None

    @classmethod
    def footprint(
        cls, config: ConfigT, data: ImageInfo | TextInfo, placement: Placement = DEFAULT_PLACEMENT
    ) -> Footprint:
        assert isinstance(data, ImageInfo)
        settings = _settings(config)
        density = density_bytes(settings.density_components, settings.latent_dim)
        working = pass_bytes(data.shape, settings.width, placement.rows) + 2 * density  # a density draws in float64
        return Footprint(network_bytes(cls, config, data, placement.number_bytes), kept=density, working=working)

    @property
    def latent_dim(self) -> int:
        return _settings(self.config).latent_dim

    def decode(self, latents: Tensor, request: RequestT) -> Tensor:
        with inference(self.network):
            return self.network.decoder(placed(latents, self.network)).float().sigmoid()

    def assets(self) -> dict[str, bytes]:
        return {DENSITY_FILE: self.density.to_bytes()} if self.density else {}

    def load_assets(self, assets: Mapping[str, bytes]) -> None:
        if DENSITY_FILE in assets:
            self.density = GaussianMixture.from_bytes(assets[DENSITY_FILE])


class _DensitySettings(Protocol):
    latent_dim: int
    width: int
    density_components: int


def _settings(config: Section) -> _DensitySettings:
    return cast(_DensitySettings, config)


def interpolate(start: Tensor, end: Tensor, steps: int, method: Interpolation) -> Tensor:
    """Return the path from `start` to `end` (d,), both included: (steps, d)."""
    return slerp(start, end, steps) if method == "spherical" else lerp(start, end, steps)


def lerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return the straight path from `start` to `end` (d,), both included: (steps, d)."""
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)[:, None]
    return start * (1 - t) + end * t


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return the path along the great circle, both ends included: (steps, d) (Shoemake 1985).

    It stays in the shell where a Gaussian of many dimensions has its mass; the straight path leaves that shell (White
    2016). Without a useful angle (a zero vector, parallel or opposite ends) the path is straight.
    """
    a, b = start.double(), end.double()
    cosine = (a @ b) / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4 or min(a.norm(), b.norm()) < 1e-6:
        return lerp(start, end, steps)
    t = torch.linspace(0, 1, steps, device=start.device, dtype=torch.float64)[:, None]
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b).div(angle.sin()).to(start.dtype)
