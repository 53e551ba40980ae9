"""The fields of image requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from genmodels.engine.requests import MAX_N, Count, Request, Seeds

Many = Field(min_length=1, max_length=MAX_N, fail_fast=True)
Images = Annotated[list[Any], Many, Field(description="base64 of PNG files, or nested lists of numbers from 0 to 1")]
MAX_LATENT = 65_536  # numbers of one latent
MAX_FLOAT32 = 3.4028234663852886e38
Coordinate = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]


class ImageRequest(Request):
    """A request to an image model. Options of the family (`temperature`, ...) are additional fields."""


class DrawnRequest(ImageRequest):
    """A request whose answer contains images."""

    grid: bool = Field(False, description="return all images as one image")
    output_format: Literal["png", "npy"] = Field(
        "png", description="npy: float32 (C, H, W) from 0 to 1, as numpy.load reads it"
    )

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.grid and self.output_format == "npy":
            raise ValueError("grid: a grid is a PNG; leave out grid, or output_format")
        return self


class GenerateRequest(DrawnRequest):
    """Generate images from seeds."""

    verb = "generate"

    n: Count = Field(1, description="number of images")
    seed: Seeds | None = Field(None, description="one seed for all images, or a list with one seed for each")
    size: str = Field("auto", max_length=32, description="`auto`, or the size of the model's images as WIDTHxHEIGHT")


class EncodeRequest(ImageRequest):
    """Encode images to latents."""

    verb = "encode"

    images: Images


class DecodeRequest(DrawnRequest):
    """Decode latents to images."""

    verb = "decode"

    latents: Annotated[
        list[Annotated[list[Coordinate], Field(max_length=MAX_LATENT, fail_fast=True)]],
        Many,
        Field(description="lists of latent_dim numbers"),
    ]


class ReconstructRequest(DrawnRequest):
    """Encode images to latents, and decode the latents to images."""

    verb = "reconstruct"

    images: Images


class DenoiseRequest(DrawnRequest):
    """Remove the noise from images."""

    verb = "denoise"

    images: Images


class InterpolateRequest(DrawnRequest):
    """Decode latents between a start and an end.

    Each of the two is a seed (a whole number), a latent (a list of numbers) or an image.
    """

    verb = "interpolate"

    start: Any = Field(description="a seed, a latent or an image")
    end: Any = Field(description="a seed, a latent or an image")
    steps: int = Field(8, ge=2, le=MAX_N, description="number of images, including start and end")
    method: Literal["linear", "spherical"] | None = Field(
        None, description="default: the method that suits the family's latent space"
    )


# Each has the route `POST /v1/models/{model}/<verb>`; `generate` has OpenAI's route instead.
VERB_REQUESTS: tuple[type[ImageRequest], ...] = (
    EncodeRequest,
    DecodeRequest,
    ReconstructRequest,
    DenoiseRequest,
    InterpolateRequest,
)
