"""Generative adversarial network: a generator imitates the data, a discriminator learns to tell the two apart.

Goodfellow et al. 2014, "Generative Adversarial Networks".
Relativistic pairing loss with both gradient penalties, the default: Huang et al. 2024, "The GAN is dead; long live the
GAN! A Modern Baseline GAN" (R3GAN); R1 alone: Mescheder et al. 2018, "Which Training Methods for GANs do actually
Converge?". Classes: the projection discriminator, Miyato & Koyama 2018, "cGANs with Projection Discriminator".

The generator is served; with `train.ema` it is averaged over the steps. A latent is standard normal noise. In a
conditional model it also has one weight for each class, so that there is a path from one class to another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from genmodels.declarations.gan import GANConfig, GANDeclaration, Loss
from genmodels.errors import RequestError
from genmodels.evals import generative
from genmodels.evals.distances import frechet_distance, moments
from genmodels.family import EvaluationData, EvaluationResult, ImageFamily, ImageInfo, OptimizerConfig, Role, TextInfo
from genmodels.nn.latents import interpolate, row_generators, standard_normal
from genmodels.nn.networks import image_sizes, inference, pass_bytes, placed
from genmodels.nn.optim import make_optimizers
from genmodels.schema.base import Section
from genmodels.sizing.memory import Footprint, network_bytes
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement

if TYPE_CHECKING:
    from genmodels.family import Batch, Interpolation

HEAD_FEATURES = 128  # of the discriminator, in front of its logit
OVERSHOOT = 0.02  # see Generator
SLOPE = 0.2  # of leaky ReLUs, below zero
MEASURE_FEATURES = 64
MEASURE_SEED = 0


class GANRequest(Section):
    """Options of a generation request."""

    temperature: float = Field(
        1.0, ge=0, le=2, description="scale of the noise (truncation); lower gives more typical, less varied pictures"
    )
    label: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="class to draw, for a conditional model; default: a random class for each image",
    )


class GAN(GANDeclaration, ImageFamily[GANConfig, GANRequest]):
    """A GAN, class-conditional where `conditional` is set."""

    Request = GANRequest
    repeated = "blocks"
    tracked_metrics = ("discriminator_accuracy_real", "discriminator_accuracy_fake", "val_frechet")

    network: Generator

    def __init__(self, config: GANConfig, data: ImageInfo | TextInfo) -> None:
        super().__init__(config, data)
        self.discriminator = Discriminator(config, self.num_classes, self.data.shape)
        self.features = RandomFeatures(self.data.channels)

    def build_network(self) -> Generator:
        return Generator(self.config, self.latent_dim, self.data.shape)

    @classmethod
    def footprint(
        cls, config: GANConfig, data: ImageInfo | TextInfo, placement: Placement = DEFAULT_PLACEMENT
    ) -> Footprint:
        assert isinstance(data, ImageInfo)
        working = pass_bytes(data.shape, config.width, placement.rows)
        return Footprint(network_bytes(cls, config, data, placement.number_bytes), working=working)

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        judging = DiscriminatorLoss(self.discriminator, self.network, self.config)
        drawing = GeneratorLoss(self.network, self.discriminator, self.config)
        heads = [self.discriminator.logit]
        return [
            # R1 and R2 differentiate a gradient
            Role("discriminator", judging, make_optimizers(judging, optimizer, heads), compilable=False),
            Role("generator", drawing, make_optimizers(drawing, optimizer)),
        ]

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return moments of real and generated images in random features.

        For each real image one image of its class is generated. The noise is keyed by the content of the real image, so
        it does not depend on the step, or on how the validation set is divided into batches and ranks.
        """
        images = batch["images"]
        keys = [_content_key(image) for image in (images * 255).round().byte().cpu()]
        noise = torch.cat([standard_normal(1, self.config.latent_dim, key) for key in keys])
        latents = with_classes(noise.to(images.device), batch.get("labels"), self.num_classes)
        with inference(self.network):
            fakes = self.network(latents).clamp(0, 1)
        real, fake = (self.features(x) for x in (images, fakes))
        odd = torch.tensor([key % 2 == 1 for key in keys], device=images.device)
        return {"real_even": moments(real[~odd]), "real_odd": moments(real[odd]), "fake": moments(fake)}

    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return Frechet distances between Gaussians fitted to features of images; 0 is a perfect match.

        `val_frechet` compares the validation images with as many generated images. The features are those of a small
        network with fixed random weights (`RandomFeatures`), so this is not FID, and two values compare only on the
        same dataset. `val_frechet_floor` is the part that is due to chance: half the distance between two halves of the
        validation images, because the error of estimation is inversely proportional to their number.
        """
        real = sums["real_even"] + sums["real_odd"]
        floor = frechet_distance(sums["real_even"], sums["real_odd"]) / 2
        return {"val_frechet": frechet_distance(real, sums["fake"]), "val_frechet_floor": floor}

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        """Compute the metrics of `genmodels.evals.generative`, on images drawn as an endpoint draws them."""

        def draw(n: int) -> tuple[Tensor, Tensor | None]:
            latents = self.sample_latents(n, MEASURE_SEED, self.Request())
            images = []
            for part in latents.split(generative.PART):
                images.append(self.decode(part, self.Request()).cpu())
                data.report_progress()
            return torch.cat(images), latents[:, self.config.latent_dim :].argmax(1) if self.num_classes else None

        return generative.evaluate(data, draw)

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset({"generate", "decode", "interpolate"})

    @property
    def num_classes(self) -> int:
        return (self.data.num_classes or 0) if self.config.conditional else 0

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim + self.num_classes

    def sample_latents(self, n: int, seed: int, request: GANRequest) -> Tensor:
        """Draw noise and, in a conditional model, a class for each image unless the request names one.

        Raises:
            RequestError: the class does not exist.
        """
        noise = standard_normal(n, self.config.latent_dim, seed, request.temperature)
        label = self._label(request)
        if not self.num_classes:
            return noise
        labels = torch.full((n,), label) if label is not None else self._drawn_labels(n, seed)
        return with_classes(noise, labels, self.num_classes)

    def decode(self, latents: Tensor, request: GANRequest) -> Tensor:
        """Return images of latents, (n, latent_dim) -> (n, C, H, W); a `label` replaces the classes of the latents.

        Raises:
            RequestError: the class does not exist.
        """
        label = self._label(request)
        if label is not None:
            noise = latents[:, : self.config.latent_dim]
            labels = torch.full((len(latents),), label, device=latents.device)
            latents = with_classes(noise, labels, self.num_classes)
        with inference(self.network):
            return self.network(placed(latents, self.network)).clamp(0, 1)

    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        """Interpolate noise along the great circle, where its mass is, and classes along the straight line."""
        split = self.config.latent_dim
        noise = interpolate(start[:split], end[:split], steps, method or "spherical")
        return torch.cat((noise, interpolate(start[split:], end[split:], steps, "linear")), dim=1)

    def _label(self, request: GANRequest) -> int | None:
        label, classes = request.label, self.num_classes
        if label is None or label < classes:
            return label
        known = (
            f"this model's classes are 0 to {classes - 1}" if classes else "this model knows no classes; leave it out"
        )
        raise RequestError(f"label: got {label}, {known}", param="label", code="invalid_value")

    def _drawn_labels(self, n: int, seed: int) -> Tensor:
        labels = []
        for generator in row_generators(n, seed):
            generator.standard_normal(self.config.latent_dim)  # the row's noise comes first in its stream
            labels.append(int(generator.integers(self.num_classes)))
        return torch.tensor(labels, dtype=torch.long)


class Generator(nn.Module):
    """Latents (n, latent_dim) -> images (n, C, H, W), in [0, 1] with a small overshoot: clamp them.

    A sigmoid reaches black and white only where its gradient vanishes, and an early lead of the discriminator can drive
    it there for ever. Stretched by `OVERSHOOT`, it passes both while it still has a gradient. Doubling is by sub-pixel
    convolution (Shi et al. 2016): only the image itself is computed at full size.
    """

    def __init__(self, config: GANConfig, latent_dim: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.sizes, channels = _ladder(shape, config.width)
        self.coarsest = (channels[-1], *self.sizes[-1])
        self.stem = nn.Linear(latent_dim, math.prod(self.coarsest))
        self.levels = nn.ModuleList(
            nn.Sequential(
                *_blocks(config, coarse, i),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(coarse, 4 * fine, 3, padding=1),
                nn.PixelShuffle(2),
            )
            for i, (fine, coarse) in enumerate(pairwise(channels))
        )

    def forward(self, latents: Tensor) -> Tensor:
        x = self.stem(latents).unflatten(1, self.coarsest)
        for level, (h, w) in zip(reversed(self.levels), reversed(self.sizes[:-1]), strict=True):
            x = level(x)[..., :h, :w]  # the halving rounded up, so doubling may be one too many
        return x.float().sigmoid() * (1 + 2 * OVERSHOOT) - OVERSHOOT


class Discriminator(nn.Module):
    """Images (n, C, H, W), and their classes (n,) if conditional -> logits (n,), higher for images that look real.

    Neither network has normalisation: with both penalties it is not needed (Huang et al. 2024). The last matrix has no
    bias: the relativistic loss sees only differences.
    """

    def __init__(self, config: GANConfig, num_classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        sizes, channels = _ladder(shape, config.width)
        self.padding = (0, shape[2] % 2, 0, shape[1] % 2)
        self.levels = nn.Sequential()
        for i, (fine, coarse) in enumerate(pairwise(channels)):
            # each pixel of the half-sized picture holds four: the mirror of the generator's last step
            halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1) if i else nn.Conv2d(4 * fine, coarse, 3, padding=1)
            self.levels.extend((halve, *_blocks(config, coarse, i), nn.LeakyReLU(SLOPE)))
        self.head = nn.Linear(channels[-1] * math.prod(sizes[-1]), HEAD_FEATURES)
        self.logit = nn.Linear(HEAD_FEATURES, 1, bias=False)
        self.classes = nn.Embedding(num_classes, HEAD_FEATURES) if num_classes else None
        if self.classes:
            nn.init.normal_(self.classes.weight, std=0.05)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = F.pixel_unshuffle(F.pad(2 * images - 1, self.padding), 2)
        features = F.leaky_relu(self.head(self.levels(x).flatten(1)), SLOPE)
        logits = self.logit(features).squeeze(1)
        if self.classes and labels is not None:
            logits = logits + (features * self.classes(labels)).sum(1)
        return logits.float()


class ResidualBlock(nn.Module):
    """Residual block (n, C, h, w) -> (n, C, h, w), without normalisation (Fixup: Zhang et al. 2019).

    It starts as almost the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.kaiming_normal_(first.weight, SLOPE)
        nn.init.normal_(last.weight, std=1e-3)
        self.body = nn.Sequential(nn.LeakyReLU(SLOPE), first, nn.LeakyReLU(SLOPE), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DiscriminatorLoss(nn.Module):
    """The loss of the discriminator, its only submodule.

    R1 and R2 are the mean squared norms of the logit's gradient by real and by generated images, each weighted by
    half of `gradient_penalty`. They are estimated on the first `penalty_share` of the batch, which is shuffled: this is
    unbiased, costs less, and needs no count of steps, unlike penalties at each k-th step.

    `accuracy_real` and `accuracy_fake` are the shares of images on their own side of a border. The border is 0 if a
    logit has a meaning by itself (non-saturating), and the midpoint between the mean logits of the batch if only
    differences have one (relativistic). At the equilibrium both shares are 1/2.
    """

    def __init__(self, discriminator: Discriminator, generator: Generator, config: GANConfig) -> None:
        super().__init__()
        self.discriminator = discriminator
        self._generator = (generator,)  # in a tuple it is no submodule
        self.config = config

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        images, config = batch["images"], self.config
        labels = batch["labels"] if self.discriminator.classes else None
        with torch.no_grad():
            fakes = draw(self._generator[0], images, labels, config)
        twice = torch.cat((labels, labels)) if labels is not None else None
        real, fake = self.discriminator(torch.cat((images, fakes)), twice).chunk(2)
        loss = discriminator_loss(real, fake, config.loss)

        n = max(1, round(config.penalty_share * len(images)))
        critic = partial(self.discriminator, labels=labels[:n] if labels is not None else None)
        r1, r2 = gradient_penalty(critic, images[:n]), gradient_penalty(critic, fakes[:n])
        parts = {"adversarial": loss, "r1": r1, "r2": r2, "real_logit": real.mean(), "fake_logit": fake.mean()}
        border = (real.mean() + fake.mean()) / 2 if config.loss == "relativistic" else real.new_zeros(())
        parts |= {"accuracy_real": (real > border).float().mean(), "accuracy_fake": (fake < border).float().mean()}
        return {
            "loss": loss + config.gradient_penalty / 2 * (r1 + r2),
            **{name: part.detach() for name, part in parts.items()},
        }


class GeneratorLoss(nn.Module):
    """The loss of the generator, its only submodule."""

    def __init__(self, generator: Generator, discriminator: Discriminator, config: GANConfig) -> None:
        super().__init__()
        self.generator = generator
        self._discriminator = (discriminator,)  # in a tuple it is no submodule
        self.config = config

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        images, discriminator = batch["images"], frozen(self._discriminator[0])
        labels = batch["labels"] if self._discriminator[0].classes else None
        fake = discriminator((draw(self.generator, images, labels, self.config), labels))
        if self.config.loss == "non-saturating":
            return {"loss": F.softplus(-fake).mean()}
        with torch.no_grad():
            real = discriminator((images, labels))
        return {"loss": F.softplus(real - fake).mean()}


class RandomFeatures(nn.Module):
    """Images (n, C, H, W) -> float64 (n, MEASURE_FEATURES): a small convolutional network with fixed random weights.

    Random features show what networks trained for another domain overlook (Naeem et al. 2020, "Reliable Fidelity and
    Diversity Metrics for Generative Models"), and a small number of features needs a small number of images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(MEASURE_SEED)
        self.first = nn.Buffer(torch.randn(32, channels, 5, 5, generator=generator) / (5 * channels**0.5))
        self.second = nn.Buffer(torch.randn(64, 32, 3, 3, generator=generator) / 12)
        self.mix = nn.Buffer(torch.randn(MEASURE_FEATURES, 64 * 4, generator=generator) / 16)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.conv2d(2 * images - 1, self.first, stride=2, padding=2).relu()
        x = F.conv2d(x, self.second, stride=2, padding=1).relu()
        return F.linear(F.adaptive_avg_pool2d(x, 2).flatten(1).double(), self.mix.double())


def draw(generator: Generator, images: Tensor, labels: Tensor | None, config: GANConfig) -> Tensor:
    """Generate an image of the class of each real image, from noise of the global RNG."""
    noise = torch.randn(len(images), config.latent_dim, device=images.device)
    num_classes = generator.latent_dim - config.latent_dim
    return generator(with_classes(noise, labels, num_classes))


def with_classes(noise: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """Return latents (n, d + num_classes) of noise (n, d) and classes (n,), which are one-hot."""
    if not num_classes:
        return noise
    assert labels is not None
    return torch.cat((noise, F.one_hot(labels, num_classes).to(noise)), dim=1)


def frozen(network: nn.Module) -> Callable[[tuple[Tensor | None, ...]], Tensor]:
    """Return the network as a function: gradients flow to its arguments, and none to its weights."""
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return partial(functional_call, network, weights)


def discriminator_loss(real: Tensor, fake: Tensor, loss: Loss) -> Tensor:
    """Compute the loss of real and fake logits (n,). Relativistic: each real image is paired with a generated image."""
    if loss == "relativistic":
        return F.softplus(fake - real).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the mean squared norm of the gradient of logits (n,) by images (n, C, H, W); always in float32."""
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def _content_key(image: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest())


def _ladder(shape: tuple[int, int, int], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the sizes from the whole image down, and the channels at each size."""
    sizes = image_sizes(*shape[1:])
    return sizes, [shape[0], *(width * 2 ** min(i, 2) for i in range(len(sizes) - 1))]


def _blocks(config: GANConfig, channels: int, level: int) -> Iterator[ResidualBlock]:
    """Yield the residual blocks of one size; half size, where they cost most, has none."""
    yield from (ResidualBlock(channels) for _ in range(config.blocks if level else 0))
