"""Autoencoder: images through a narrow latent space and back; with noise, also a denoiser.

Compression: Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks".
Denoising: Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders".
Similarity of structure in the loss: Zhao et al. 2017, "Loss Functions for Image Restoration with Neural Networks".
Latent penalty and the density fitted over latents: Ghosh et al. 2020, "From Variational to Deterministic Autoencoders".

With `noise_std` > 0 the encoder sees noisy images and the target is clean. `latent_dim` numbers cannot
hold all the detail of an image, so `denoise` also hands the encoder's feature maps across to the decoder
(symmetric skip connections: Mao et al. 2016); encode, decode and reconstruct use the same weights without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from genmodels.declarations.autoencoder import NOISE_LEVELS, AutoencoderConfig, AutoencoderDeclaration
from genmodels.errors import RequestError
from genmodels.evals.filters import best_filter, noisy
from genmodels.evals.images import components, evenly_spaced, mean_psnr, mean_ssim, pictures
from genmodels.family import (
    EvaluationData,
    EvaluationMetric,
    EvaluationResult,
    Note,
    OptimizerConfig,
    Role,
)
from genmodels.nn.latents import DensityFamily, GaussianMixture, first_rows, image_normal, interpolate
from genmodels.nn.networks import (
    EncoderDecoder,
    ImageDecoder,
    ImageEncoder,
    inference,
    placed,
    psnr,
    ssim,
)
from genmodels.nn.optim import make_optimizers
from genmodels.schema.base import Section

if TYPE_CHECKING:
    import numpy as np

    from genmodels.family import Batch, Interpolation


EVALUATED = 500  # validation images; a thorough evaluation takes all
EVALUATED_AT_ONCE = 256


class AutoencoderRequest(Section):
    """Options of a generation request."""

    temperature: float = Field(1.0, ge=0, le=2, description="spread around the means of the density's Gaussians")


class Autoencoder(AutoencoderDeclaration, DensityFamily[AutoencoderConfig, AutoencoderRequest]):
    """An autoencoder, and a denoiser where `noise_std` is above 0."""

    Request = AutoencoderRequest
    repeated = "blocks"

    network: AutoencoderNetwork

    def build_network(self) -> AutoencoderNetwork:
        return AutoencoderNetwork(self.config, self.data.shape)

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        loss = AutoencoderLoss(self.network, self.config)
        return [Role("model", loss, make_optimizers(loss, optimizer))]

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"]
        with inference(self.network):
            logits = self.network(images)
            quality = denoised_quality = psnr(logits.float().sigmoid(), images)
            losses = _pixel_losses(logits, images, self.config.loss)
        if self.config.noise_std > 0:
            noisy = images + self.config.noise_std * image_normal(images, self.data.shape)
            denoised_quality = psnr(self.denoise(noisy), images)
        sums = {
            "loss": losses.mean((1, 2, 3)),
            "psnr": quality,
            "denoise_psnr": denoised_quality,
            "images": torch.ones(len(images)),
        }
        return {name: values.double().sum().to(images.device) for name, values in sums.items()}

    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return means over images.

        `val_loss` is per pixel, of clean images through the latent space, `val_psnr` of the same in dB;
        `val_denoise_psnr` of images with noise of `noise_std`, clamped to [0, 1]; it equals `val_psnr` without noise.
        """
        return {f"val_{name}": float(sums[name] / sums["images"]) for name in ("loss", "psnr", "denoise_psnr")}

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        """Compare compression with as many principal components, and denoising with the best classical filter.

        The noise levels of denoising are `noise_std`, half of it, and 1.5 times of it, which training never shows.
        """
        val = data.val["images"]
        shown = evenly_spaced(len(val), len(val) if data.thorough else EVALUATED)
        images = pictures(val[shown])
        metrics = self._compression(data, images, shown)
        if self.config.noise_std > 0:
            for name, factor in NOISE_LEVELS.items():
                metrics |= self._denoising(data, images, shown, name, factor * self.config.noise_std)
        notes: dict[str, Note] = {"pictures": len(shown), "latent_dim": self.latent_dim}
        if self.config.noise_std > 0:
            notes["noise_std"] = [round(factor * self.config.noise_std, 4) for factor in NOISE_LEVELS.values()]
        return EvaluationResult(metrics=metrics, notes=notes)

    def fit(self, batches: Iterable[Batch], seed: int) -> None:
        latents = first_rows(self.encode(batch["images"]) for batch in batches)
        self.density = GaussianMixture.fit(latents, self.config.density_components, seed)

    @property
    def verbs(self) -> frozenset[str]:
        verbs = {"generate", "encode", "decode", "reconstruct", "interpolate"}
        return frozenset(verbs | {"denoise"} if self.config.noise_std > 0 else verbs)

    def sample_latents(self, n: int, seed: int, request: AutoencoderRequest) -> Tensor:
        """Draw latents from the density over the latents of training images.

        Raises:
            RequestError: `fit` has not been called, so there is no density.
        """
        if self.density is None:
            raise RequestError(
                "this checkpoint has no density over latents yet, so it cannot generate: ask a published version",
                code="not_fitted",
            )
        return self.density.sample(n, seed, request.temperature)

    def encode(self, images: Tensor) -> Tensor:
        with inference(self.network):
            return self.network.encoder(placed(images, self.network)).float()

    def denoise(self, images: Tensor) -> Tensor:
        """Return clean images of noisy images, (n, C, H, W) both; pixels are clamped to [0, 1], as in training."""
        with inference(self.network):
            return self.network.denoise(placed(images, self.network).clamp(0, 1)).float().sigmoid()

    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        return interpolate(start, end, steps, method or "linear")

    def preview(self, examples: Batch, seed: int) -> dict[str, Tensor]:
        request, images = self.Request(), examples["images"]
        pictures = {"reconstructions": self.decode(self.encode(images), request)}
        if self.density:
            pictures["samples"] = self.decode(self.sample_latents(len(images), seed, request), request)
        if "denoise" in self.verbs:
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
            pictures["noisy"] = (images + self.config.noise_std * noise.to(images.device)).clamp(0, 1)
            pictures["denoised"] = self.denoise(pictures["noisy"])
        return pictures

    def probe(self) -> dict[str, Tensor]:
        outputs = super().probe()
        if "denoise" in self.verbs:
            outputs["denoise"] = self.denoise(
                torch.linspace(0, 1, 2 * math.prod(self.data.shape)).view(2, *self.data.shape)
            )
        return outputs

    def _compression(self, data: EvaluationData, images: Tensor, shown: np.ndarray) -> dict[str, EvaluationMetric]:
        parts = []
        for part in images.split(EVALUATED_AT_ONCE):
            parts.append(self.decode(self.encode(part), self.Request()).cpu())
            data.report_progress()
        decoded = torch.cat(parts)
        pca_psnr, pca_ssim = components(data, self.latent_dim, shown)
        pca, quality = f"PCA, {self.latent_dim} components", mean_psnr(decoded, images)
        return {
            "psnr": EvaluationMetric(value=quality, unit="dB", baselines={pca: pca_psnr}),
            "ssim": EvaluationMetric(value=mean_ssim(decoded, images), baselines={pca: pca_ssim}),
            "pca_gain": EvaluationMetric(value=quality - pca_psnr, unit="dB"),
        }

    def _denoising(
        self, data: EvaluationData, images: Tensor, shown: np.ndarray, name: str, std: float
    ) -> dict[str, EvaluationMetric]:
        noisy_images = noisy(images, std)
        parts = []
        for part in noisy_images.split(EVALUATED_AT_ONCE):
            parts.append(self.denoise(part).cpu())
            data.report_progress()
        denoised, clamped = torch.cat(parts), noisy_images.clamp(0, 1)
        filtered, filter_psnr = best_filter(data, std, shown)
        quality = mean_psnr(denoised, images)
        baselines = {"noisy": mean_psnr(noisy_images, images), "noisy, clamped": mean_psnr(clamped, images)}
        metrics = {
            name: EvaluationMetric(
                value=quality, unit="dB", baselines={**baselines, f"best filter: {filtered}": filter_psnr}
            )
        }
        if name == "denoise_psnr":
            similar = {"noisy, clamped": mean_ssim(clamped, images)}
            metrics["denoise_ssim"] = EvaluationMetric(value=mean_ssim(denoised, images), baselines=similar)
            metrics["denoise_gain"] = EvaluationMetric(value=quality - filter_psnr, unit="dB")
        return metrics


class AutoencoderNetwork(EncoderDecoder):
    """Images (n, C, H, W) in [0, 1] -> latents (n, latent_dim) -> logits of images (n, C, H, W)."""

    def __init__(self, config: AutoencoderConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        width, blocks, norm = config.width, config.blocks, config.norm
        self.encoder = ImageEncoder(shape, config.latent_dim, width=width, blocks=blocks, norm=norm)
        self.decoder = ImageDecoder(
            config.latent_dim, shape, width=width, blocks=blocks, norm=norm, skips=config.noise_std > 0
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    def denoise(self, images: Tensor) -> Tensor:
        """Return logits of clean images, by way of the latent space and the skip connections."""
        features = self.encoder.features(images)
        return self.decoder(self.encoder.head(features[-1]), features)


class AutoencoderLoss(nn.Module):
    """Mean loss of a pixel: reconstruction, plus denoising if there is noise.

    Each image has new noise, of a strength uniform between 0 and `noise_std`: so one model denoises each strength up to
    that, without knowing it, and still sees clean images. Noisy pixels are clamped to [0, 1], for the images of a
    request have no others.
    """

    def __init__(self, network: AutoencoderNetwork, config: AutoencoderConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        images, config, network = batch["images"], self.config, self.network
        noisy = images
        if config.noise_std > 0:
            strength = config.noise_std * torch.rand(len(images), 1, 1, 1, device=images.device)
            noisy = (images + strength * torch.randn_like(images)).clamp(0, 1)
        features = network.encoder.features(noisy)
        latents = network.encoder.head(features[-1])
        decoded = network.decoder(latents)
        parts = {"reconstruction": _pixel_losses(decoded, images, config.loss).mean()}
        if config.noise_std > 0:
            parts["denoising"] = _pixel_losses(network.decoder(latents, features), images, config.loss).mean()
        penalty = latents.float().square().mean()
        loss = sum(parts.values()) + config.latent_penalty * penalty
        if config.ssim_weight > 0:
            parts["dissimilarity"] = 1 - ssim(decoded.float().sigmoid(), images).mean()
            loss = loss + config.ssim_weight * parts["dissimilarity"]
        return {
            "loss": loss,
            **{name: part.detach() for name, part in parts.items()},
            "latent_square": penalty.detach(),
        }


def _pixel_losses(logits: Tensor, images: Tensor, loss: Literal["bce", "mse"]) -> Tensor:
    """Return the loss of each pixel, (n, C, H, W), in float32 also under autocast."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits.float(), images, reduction="none")
    return (logits.float().sigmoid() - images).square()
