"""Declare what the families with the networks of `genmodels.nn.networks` have in common."""

from __future__ import annotations

import math
from typing import Any, Literal

from genmodels.errors import SpecError
from genmodels.family import Declaration, ImageInfo, TextInfo

MIN_SIDE = 8  # pixels; smaller images are not halved
Norm = Literal["group", "none"]


class ImageDeclaration(Declaration):
    """A family that makes images from latents of `latent_dim` numbers."""

    kind = "image"

    @classmethod
    def check(cls, config: Any, data: ImageInfo | TextInfo) -> None:
        super().check(config, data)
        assert isinstance(data, ImageInfo)
        if min(data.height, data.width) < MIN_SIDE:
            raise SpecError(
                f"model.family: {cls.family_name()} needs images of at least {MIN_SIDE} x {MIN_SIDE}, "
                f"but they are {data.height} x {data.width}"
            )
        if config.latent_dim > (numbers := math.prod(data.shape)):
            raise SpecError(
                f"model.latent_dim: {config.latent_dim} is more than the {numbers} numbers of an image; "
                "write less, e.g. 32"
            )
