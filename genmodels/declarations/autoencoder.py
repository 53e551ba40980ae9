"""The settings of the autoencoder: see `genmodels.models.autoencoder`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genmodels.declarations.image_networks import ImageDeclaration, Norm
from genmodels.family import ImageInfo
from genmodels.schema.base import Section

NOISE_LEVELS = {"denoise_psnr": 1.0, "denoise_psnr_half": 0.5, "denoise_psnr_beyond": 1.5}  # times `noise_std`


class AutoencoderConfig(Section):
    """The `model` section."""

    latent_dim: int = Field(32, ge=1, le=4096, description="numbers in a latent")
    width: int = Field(
        16, ge=1, le=512, description="channels at half size; smaller sizes have up to four times as many"
    )
    blocks: int = Field(1, ge=0, le=8, description="residual blocks at each size")
    norm: Norm = Field("group", description="normalisation of the convolutions: GroupNorm, or none")
    noise_std: float = Field(
        0.0, ge=0, le=2, description="above 0: also train a denoiser, for noise up to this value (pixels are 0 to 1)"
    )
    loss: Literal["bce", "mse"] = Field(
        "bce", description="loss of a pixel: cross-entropy on its grey value, or squared error"
    )
    ssim_weight: float = Field(
        0.0, ge=0, description="weight of 1 - SSIM of reconstructions, added to the mean loss of a pixel"
    )
    latent_penalty: float = Field(
        3e-4, ge=0, description="weight of the mean squared latent, added to the mean loss of a pixel"
    )
    density_components: int = Field(
        30, ge=1, le=500, description="Gaussians in the density over latents, from which new pictures are drawn"
    )


class AutoencoderDeclaration(ImageDeclaration):
    """An autoencoder, and a denoiser where `noise_std` is above 0."""

    Config = AutoencoderConfig
    metric_names = ("val_loss", "val_psnr", "val_denoise_psnr")
    evaluation_names = ("psnr", "ssim", "pca_gain", *NOISE_LEVELS, "denoise_ssim", "denoise_gain")
    known_to_fit = (
        AutoencoderConfig(latent_dim=256, width=32, blocks=4, density_components=100),
        ImageInfo(channels=4, height=128, width=128),
    )
