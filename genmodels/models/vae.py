"""Variational autoencoder: a latent space with a prior to draw from, trained on the evidence lower bound (ELBO).

Kingma & Welling 2014, "Auto-Encoding Variational Bayes".
KL warm-up: Bowman et al. 2016; beta: Higgins et al. 2017; free bits: Kingma et al. 2016.
Dynamic binarisation: Salakhutdinov & Murray 2008. Learned variance of the Gaussian likelihood: Rybkin et al. 2021.
Fitted prior: Ghosh et al. 2020. Active units, importance-weighted likelihood: Burda et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from genmodels.declarations.vae import VAEConfig, VAEDeclaration
from genmodels.errors import RequestError
from genmodels.evals.images import components, evenly_spaced, mean_psnr, mean_ssim, pictures
from genmodels.family import (
    EvaluationData,
    EvaluationMetric,
    EvaluationResult,
    Note,
    OptimizerConfig,
    Role,
)
from genmodels.nn.latents import (
    MAX_FIT,
    DensityFamily,
    GaussianMixture,
    first_rows,
    image_normal,
    interpolate,
    standard_normal,
)
from genmodels.nn.networks import (
    EncoderDecoder,
    ImageDecoder,
    ImageEncoder,
    inference,
    placed,
    psnr,
)
from genmodels.nn.optim import make_optimizers
from genmodels.schema.base import Section

if TYPE_CHECKING:
    from genmodels.family import Batch, Interpolation

ACTIVE_VARIANCE = 0.01  # a latent counts as active if its mean varies more than this over images (Burda et al. 2016)

EVALUATED, DRAWS = 500, 64  # validation pictures, and draws of the latents for each
THOROUGH_DRAWS = 256  # for all of them
AT_ONCE, DRAWS_AT_ONCE = 64, 8

# The quantity that the nats of each likelihood measure, for comparisons.
BINARISATION = {
    "bernoulli": "none: cross-entropy on greys, which is not a likelihood",
    "bernoulli-binarized": "each pixel drawn once, black or white, with its grey as probability",
    "gaussian": "none: density of greys from 0 to 1, not dequantised, one standard deviation for all pixels",
}


class VAERequest(Section):
    """Options of a generation request."""

    temperature: float = Field(
        1.0, ge=0, le=2, description="spread of the drawn latents; lower gives more typical, less varied pictures"
    )
    prior: Literal["auto", "standard", "fitted"] = Field(
        "auto",
        description="standard: N(0, I); fitted: a mixture over training images; auto: fitted if it exists",
    )


class VAE(VAEDeclaration, DensityFamily[VAEConfig, VAERequest]):
    """A VAE with a diagonal Gaussian posterior."""

    Request = VAERequest
    repeated = "blocks"

    network: VAENetwork

    def build_network(self) -> VAENetwork:
        return VAENetwork(self.config, self.data.shape)

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        loss = ELBO(self.network, self.config)
        return [Role("model", loss, make_optimizers(loss, optimizer))]

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        greys = batch["images"]
        with inference(self.network):
            images = self._observed(greys)
            mean, log_variance = self.network.posterior(images)
            noise = image_normal(greys, (self.latent_dim,))
            logits = self.network.decoder(mean + noise * (0.5 * log_variance).exp())
            quality = psnr(self.network.decoder(mean).float().sigmoid(), greys)
            reconstruction = self.network.nll(logits, images)
        mean = mean.double()
        return {
            "images": mean.new_tensor(len(greys)),
            "reconstruction": reconstruction.double().sum(),
            "kl": kl_divergence(mean, log_variance.double()).sum(),
            "psnr": quality.double().sum(),
            "means": mean.sum(0),
            "square_means": mean.square().sum(0),
        }

    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return means over images.

        `val_loss` is the negative ELBO under `likelihood` (one draw of the latents, beta 1), `val_reconstruction` and
        `val_kl` are its parts, in nats per image; `val_psnr` is of decoded posterior means, in dB.
        """
        n = sums["images"]
        reconstruction, kl = float(sums["reconstruction"] / n), float(sums["kl"] / n)
        variance = sums["square_means"] / n - (sums["means"] / n).square()
        return {
            "val_loss": reconstruction + kl,
            "val_reconstruction": reconstruction,
            "val_kl": kl,
            "val_psnr": float(sums["psnr"] / n),
            "val_active_units": float((variance > ACTIVE_VARIANCE).sum()),
        }

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        """Compute `nll`, the importance-weighted bound on -log p(x) in nats, and the other `evaluation_names`.

        With one draw `nll` is the negative ELBO. Its baseline is a model without latents, in which each pixel has its
        own mean: a collapsed VAE is no better.
        """
        val = data.val["images"]
        shown = evenly_spaced(len(val), len(val) if data.thorough else EVALUATED)
        draws = THOROUGH_DRAWS if data.thorough else DRAWS
        greys, generator = pictures(val[shown]), torch.Generator().manual_seed(0)
        images = self._observed(greys)
        bounds, means, decoded = [], [], []
        for part in images.split(AT_ONCE):
            bounds.append(self._bounds(part, draws, generator, data.report_progress))
            means.append(self.encode(part).cpu())
            decoded.append(self.decode(means[-1], self.Request()).cpu())
        nll, reconstruction, kl = torch.cat(bounds).mean(0).tolist()
        alone = self._without_latents(data, images)
        pca_psnr, pca_ssim = components(data, self.latent_dim, shown)
        pca, through = f"PCA, {self.latent_dim} components", torch.cat(decoded)
        active = (torch.cat(means).double().var(0, correction=0) > ACTIVE_VARIANCE).sum()
        measures = {
            "nll": EvaluationMetric(value=nll, unit="nats", baselines={"each pixel its mean": alone}),
            "negative_elbo": EvaluationMetric(
                value=reconstruction + kl, unit="nats", baselines={"each pixel its mean": alone}
            ),
            "reconstruction": EvaluationMetric(value=reconstruction, unit="nats"),
            "kl": EvaluationMetric(value=kl, unit="nats"),
            "active_units": EvaluationMetric(value=float(active), baselines={"all": float(self.latent_dim)}),
            "psnr": EvaluationMetric(value=mean_psnr(through, greys), unit="dB", baselines={pca: pca_psnr}),
            "ssim": EvaluationMetric(value=mean_ssim(through, greys), baselines={pca: pca_ssim}),
        }
        likelihood = self.config.likelihood
        notes: dict[str, Note] = {"pictures": len(shown), "draws": draws}
        notes |= {"likelihood": likelihood, "binarisation": BINARISATION[likelihood]}
        return EvaluationResult(metrics=measures, notes=notes)

    def fit(self, batches: Iterable[Batch], seed: int) -> None:
        """Fit a mixture to the aggregate posterior: to draws of the latents, as their means lie closer together."""
        means, log_variances = first_rows(torch.cat(self._posterior(batch["images"]), 1) for batch in batches).chunk(
            2, 1
        )
        draws = means + standard_normal(len(means), self.latent_dim, seed) * (0.5 * log_variances).exp()
        self.density = GaussianMixture.fit(draws, self.config.density_components, seed)

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset({"generate", "encode", "decode", "reconstruct", "interpolate"})

    def sample_latents(self, n: int, seed: int, request: VAERequest) -> Tensor:
        """Draw latents from N(0, I) or from the fitted prior.

        Raises:
            RequestError: the request names the fitted prior, and `fit` has not been called.
        """
        if request.prior == "fitted" and self.density is None:
            raise RequestError(
                "this checkpoint has no fitted prior yet: ask for prior standard, or a published version", param="prior"
            )
        if request.prior == "standard" or self.density is None:
            return standard_normal(n, self.latent_dim, seed, request.temperature)
        return self.density.sample(n, seed, request.temperature)

    def encode(self, images: Tensor) -> Tensor:
        """Return posterior means, (n, C, H, W) -> (n, latent_dim)."""
        return self._posterior(images)[0]

    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        return interpolate(start, end, steps, method or "spherical")

    def _observed(self, greys: Tensor) -> Tensor:
        """Return the images that the likelihood sees, (n, C, H, W): the greys, or black and white pixels.

        The draw of black and white is keyed by the content of each image.
        """
        if self.config.likelihood != "bernoulli-binarized":
            return greys
        return (torch.special.ndtr(image_normal(greys, self.data.shape)) < greys).to(greys)

    def _bounds(
        self, images: Tensor, draws: int, generator: torch.Generator, report_progress: Callable[[], None]
    ) -> Tensor:
        """Compute importance-weighted -log p(x), mean reconstruction and KL divergence of images: (n, 3) float64."""
        with inference(self.network):
            images = placed(images, self.network)
            mean, log_variance = self.network.posterior(images)
            weights, reconstructions = [], []
            for first in range(0, draws, DRAWS_AT_ONCE):
                noise = torch.randn(min(DRAWS_AT_ONCE, draws - first), *mean.shape, generator=generator).to(mean)
                latents = mean + noise * (0.5 * log_variance).exp()
                logits = self.network.decoder(latents.flatten(0, 1))
                nll = self.network.nll(logits, images.repeat(len(noise), 1, 1, 1)).view(len(noise), -1).double()
                prior_over_posterior = 0.5 * (noise.square() + log_variance - latents.square()).double().sum(2)
                weights.append(prior_over_posterior - nll)
                reconstructions.append(nll)
                report_progress()
            bound = math.log(draws) - torch.cat(weights).logsumexp(0)
            kl = kl_divergence(mean.double(), log_variance.double()).sum(1)
            return torch.stack((bound, torch.cat(reconstructions).mean(0), kl), 1).cpu()

    def _without_latents(self, data: EvaluationData, images: Tensor) -> float:
        """Compute -log p(x) in nats by a model with independent pixels, fitted to training images."""
        train = pictures(data.train["images"][evenly_spaced(len(data.train["images"]), MAX_FIT)])
        mean = train.mean(0)
        if self.config.likelihood == "gaussian":
            variance = (train - mean).square().mean()
            nll = 0.5 * ((images - mean).square() / variance + (2 * math.pi * variance).log())
        else:
            nll = F.binary_cross_entropy(mean.clamp(1e-3, 1 - 1e-3).expand_as(images), images, reduction="none")
        return float(nll.double().sum((1, 2, 3)).mean())

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with inference(self.network):
            return self.network.posterior(placed(images, self.network))


class VAENetwork(EncoderDecoder):
    """Encoder to the posterior q(z|x), decoder to the logits of pixels in [0, 1]."""

    def __init__(self, config: VAEConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        width, blocks, norm = config.width, config.blocks, config.norm
        self.encoder = ImageEncoder(shape, 2 * config.latent_dim, width=width, blocks=blocks, norm=norm)
        self.decoder = ImageDecoder(config.latent_dim, shape, width=width, blocks=blocks, norm=norm)
        self.log_std = nn.Parameter(torch.tensor(-1.0)) if config.likelihood == "gaussian" else None

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log-variances of the Gaussian q(z|x): (n, C, H, W) -> (n, latent_dim) twice, float32."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)  # keeps exp finite for unusual images

    def nll(self, logits: Tensor, images: Tensor) -> Tensor:
        """Compute -log p(x|z) in nats per image, in float32: (n, C, H, W) twice -> (n,)."""
        if self.log_std is None:
            return F.binary_cross_entropy_with_logits(logits.float(), images, reduction="none").sum((1, 2, 3))
        errors = (logits.float().sigmoid() - images) * (-self.log_std).exp()
        return (0.5 * errors.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


class ELBO(nn.Module):
    """The negative ELBO, in nats per image, by one reparametrised draw of the latents."""

    def __init__(self, network: VAENetwork, config: VAEConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        images = batch["images"]
        if self.config.likelihood == "bernoulli-binarized":
            images = (torch.rand_like(images) < images).to(images)
        mean, log_variance = self.network.posterior(images)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        reconstruction = self.network.nll(self.network.decoder(latents), images).mean()
        kl = kl_divergence(mean, log_variance).mean(0)  # (latent_dim,)
        charged = kl.clamp_min(self.config.free_bits).sum()
        loss = reconstruction + kl_weight(self.config, progress) * charged
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.sum().detach()}


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute KL(N(mean, exp(log_variance)) || N(0, 1)) of each latent, in nats: (n, d) twice -> (n, d)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def kl_weight(config: VAEConfig, progress: Tensor) -> Tensor:
    """Return the weight of the KL divergence: it rises linearly to `beta` over the first `kl_warmup` of training."""
    if config.kl_warmup == 0:
        return torch.full_like(progress, config.beta)
    return config.beta * (progress / config.kl_warmup).clamp(max=1)
