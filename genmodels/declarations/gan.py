"""The settings of the GAN: see `genmodels.models.gan`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genmodels.declarations.image_networks import ImageDeclaration
from genmodels.errors import SpecError
from genmodels.family import ImageInfo, TextInfo
from genmodels.schema.base import Section

Loss = Literal["relativistic", "non-saturating"]


class GANConfig(Section):
    """The `model` section."""

    latent_dim: int = Field(
        64, ge=1, le=4096, description="numbers of noise that a picture is made from; classes are added to them"
    )
    width: int = Field(
        16, ge=1, le=512, description="channels at half size; smaller sizes have up to four times as many"
    )
    blocks: int = Field(1, ge=0, le=8, description="residual blocks at each size below half")
    loss: Loss = Field("relativistic", description="adversarial loss: relativistic pairing, or non-saturating")
    gradient_penalty: float = Field(
        4.0, ge=0, description="weight (gamma) of the penalties R1 and R2; a low weight is sharper and less stable"
    )
    penalty_share: float = Field(
        0.25, gt=0, le=1, description="share of each batch that the penalties are estimated on; they cost the most time"
    )
    conditional: bool = Field(False, description="learn the classes of the dataset, so that a request can name a class")


class GANDeclaration(ImageDeclaration):
    """A GAN, class-conditional where `conditional` is set."""

    Config = GANConfig
    metric_names = ("val_frechet", "val_frechet_floor")
    evaluation_names = (
        "frechet",
        "frechet_ratio",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_ratio",
        "label_accuracy",
        "nearest_train",
    )
    known_to_fit = (
        GANConfig(latent_dim=256, width=32, blocks=4),
        ImageInfo(channels=4, height=128, width=128, num_classes=100),
    )

    @classmethod
    def check(cls, config: GANConfig, data: ImageInfo | TextInfo) -> None:
        super().check(config, data)
        assert isinstance(data, ImageInfo)
        if config.conditional and not data.num_classes:
            raise SpecError("model.conditional: got true, but the images of data have no classes; write false")
