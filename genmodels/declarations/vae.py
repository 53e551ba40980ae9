"""The settings of the VAE: see `genmodels.models.vae`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genmodels.declarations.image_networks import ImageDeclaration, Norm
from genmodels.family import ImageInfo
from genmodels.schema.base import Section

Likelihood = Literal["bernoulli", "bernoulli-binarized", "gaussian"]


class VAEConfig(Section):
    """The `model` section.

    Likelihoods: `bernoulli` is the usual cross-entropy on greys, not a true likelihood of them; `bernoulli-binarized`
    draws black or white pixels anew each time, with the grey as probability (dynamic binarisation); `gaussian` has one
    learned standard deviation for all pixels.
    """

    latent_dim: int = Field(16, ge=1, le=4096, description="numbers in a latent")
    width: int = Field(
        16, ge=1, le=512, description="channels at half size; smaller sizes have up to four times as many"
    )
    blocks: int = Field(1, ge=0, le=8, description="residual blocks at each size")
    norm: Norm = Field("group", description="normalisation of the convolutions: GroupNorm, or none")
    likelihood: Likelihood = Field(
        "bernoulli",
        description="bernoulli: cross-entropy on greys; bernoulli-binarized: black or white pixels drawn by their "
        "grey; gaussian: one learned standard deviation",
    )
    beta: float = Field(1.0, ge=0, description="weight of the KL divergence; 1 is the ELBO")
    kl_warmup: float = Field(0.1, ge=0, le=1, description="fraction of training in which the weight beta rises from 0")
    free_bits: float = Field(
        0.0, ge=0, description="nats of KL divergence in each latent dimension that the loss does not count"
    )
    density_components: int = Field(30, ge=1, le=500, description="Gaussians in the fitted prior")


class VAEDeclaration(ImageDeclaration):
    """A VAE with a diagonal Gaussian posterior."""

    Config = VAEConfig
    metric_names = ("val_loss", "val_reconstruction", "val_kl", "val_psnr", "val_active_units")
    evaluation_names = ("nll", "negative_elbo", "reconstruction", "kl", "active_units", "psnr", "ssim")
    known_to_fit = (
        VAEConfig(latent_dim=256, width=32, blocks=4, density_components=100),
        ImageInfo(channels=4, height=128, width=128),
    )
