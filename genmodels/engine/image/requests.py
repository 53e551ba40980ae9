"""Image requests: pictures from seeds, latents and other pictures."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from genmodels.data.images import decode_image, grid, pixels_of, png
from genmodels.engine.image.model import ImageModel
from genmodels.engine.model import Loaded
from genmodels.engine.requests import MAX_N, Count, Request, Seeds, seed_or_random
from genmodels.errors import RequestError
from genmodels.schema.field_errors import show

MAX_PIXELS = 2**24  # of all pictures of one answer: 64 of 256 x 256 in three colours

Many = Field(min_length=1, max_length=MAX_N, fail_fast=True)
Images = Annotated[list[Any], Many, Field(description="base64 of PNG files, or nested lists of numbers from 0 to 1")]
MAX_LATENT = 65_536  # numbers of one latent
MAX_FLOAT32 = 3.4028234663852886e38  # of float32
Coordinate = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]


class ImageRequest(Request):
    """Options of the family (`temperature`, ...) stand beside the fields of each request."""

    verb: ClassVar[str]


class DrawnRequest(ImageRequest):
    """Answered with pictures."""

    grid: bool = Field(False, description="return all images as one picture")
    output_format: Literal["png", "npy"] = Field(
        "png", description="npy: float32 (C, H, W) from 0 to 1, as numpy.load reads it"
    )

    @model_validator(mode="after")
    def _a_grid_is_a_picture(self) -> Self:
        if self.grid and self.output_format == "npy":
            raise ValueError("grid: a grid is a PNG; leave out grid, or output_format")
        return self


class GenerateRequest(DrawnRequest):
    """Generate images from seeds."""

    verb = "generate"

    n: Count = Field(1, description="number of images")
    seed: Seeds | None = Field(None, description="one seed for all images, or a list with one seed for each")
    size: str = Field("auto", max_length=32, description="`auto`, or the size of the model's pictures as WIDTHxHEIGHT")


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
    """Encode images to latents and decode these to images."""

    verb = "reconstruct"

    images: Images


class DenoiseRequest(DrawnRequest):
    """Remove the noise of images."""

    verb = "denoise"

    images: Images


class InterpolateRequest(DrawnRequest):
    """Decode the latents between two ends.

    Each end is a seed (a whole number), a latent (a list of numbers) or an image.
    """

    verb = "interpolate"

    start: Any = Field(description="a seed, a latent or an image")
    end: Any = Field(description="a seed, a latent or an image")
    steps: int = Field(8, ge=2, le=MAX_N, description="number of images, both ends included")
    method: Literal["linear", "spherical"] | None = Field(
        None, description="default: the method that suits the family's latent space"
    )


@dataclass(frozen=True)
class ImageAnswer:
    """`images` are PNG or .npy files; with `grid` it is one."""

    model: str
    family: str
    images: tuple[bytes, ...] = ()
    latents: tuple[list[float], ...] = ()
    seed: int | list[int] | None = None


def answer(loaded: Loaded, request: ImageRequest) -> ImageAnswer:
    """Answer any image request.

    Raises:
        ModelNotFound: the model does not answer this verb.
        RequestError: the request does not fit the model; names the field.
    """
    options = loaded.options(request.verb, request)
    assert isinstance(loaded, ImageModel)
    found = _VERBS[type(request).verb](loaded, request, options)
    if meter := loaded.passes.meter:
        meter.answered(request.verb, len(found.images) + len(found.latents))
    return found


def generate(model: ImageModel, request: GenerateRequest, options: Any) -> ImageAnswer:
    info = model.family.data
    native = f"{info.width}x{info.height}"
    if request.size not in ("auto", native):
        raise _wrong("size", f"got {request.size!r}, this model makes {native}; send {native!r} or 'auto'")
    _check_pixels(model, request.n, "n")
    if isinstance(request.seed, list):
        if "n" in request.model_fields_set and request.n != len(request.seed):
            raise _wrong("n", f"got {request.n}, and {len(request.seed)} seeds; leave out n, or send as many seeds")
        rows = [model.family.sample_latents(1, seed, options) for seed in request.seed]
        return _drawn(model, _decode(model, torch.cat(rows), options), request, seed=request.seed)
    seed = seed_or_random(request.seed)
    latents = model.family.sample_latents(request.n, seed, options)
    return _drawn(model, _decode(model, latents, options), request, seed=seed)


def encode(model: ImageModel, request: EncodeRequest, options: Any) -> ImageAnswer:
    latents = _encode(model, read_images(model, request.images, "images"))
    return ImageAnswer(model.name, model.family.family_name(), latents=tuple(_finite(latents, "images").tolist()))


def decode(model: ImageModel, request: DecodeRequest, options: Any) -> ImageAnswer:
    latents = torch.stack([_latent(model, row, f"latents[{i}]") for i, row in enumerate(request.latents)])
    return _drawn(model, _decode(model, latents, options), request)


def reconstruct(model: ImageModel, request: ReconstructRequest, options: Any) -> ImageAnswer:
    latents = _encode(model, read_images(model, request.images, "images"))
    return _drawn(model, _decode(model, latents, options), request)


def denoise(model: ImageModel, request: DenoiseRequest, options: Any) -> ImageAnswer:
    clean = model.passes.apply(("denoise",), model.family.denoise, read_images(model, request.images, "images"))
    return _drawn(model, clean, request)


def interpolate(model: ImageModel, request: InterpolateRequest, options: Any) -> ImageAnswer:
    start, end = (_end(model, value, name, options) for value, name in ((request.start, "start"), (request.end, "end")))
    latents = model.family.interpolate(start, end, request.steps, request.method)
    return _drawn(model, _decode(model, latents, options), request, columns=request.steps)


def read_images(model: ImageModel, values: Sequence[Any], param: str) -> Tensor:
    """Images of a request: base64 of a PNG (or JPEG, WebP) file, or nested lists of numbers in [0, 1].

    Returns:
        float32 (n, C, H, W); H and W have to be the model's.

    Raises:
        RequestError: one cannot be read or is of another size.
    """
    _check_pixels(model, len(values), param)
    return torch.stack([_image(model, value, f"{param}[{i}]") for i, value in enumerate(values)])


def _image(model: ImageModel, value: Any, param: str) -> Tensor:
    if isinstance(value, str):
        return torch.from_numpy(_picture(model, value, param))
    channels, height, width = model.family.data.shape
    shape = f"{height} x {width}" if channels == 1 else f"{channels} x {height} x {width}"
    expected = f"base64 of a PNG file, or {shape} numbers from 0 to 1 in nested lists"
    if channels == 1 and len(_outline(value)[0]) == 2:
        value = [value]
    pixels = _numbers(value, param, (channels, height, width), expected, f"this model takes {shape}")
    if pixels.min() < 0 or pixels.max() > 1:
        raise _wrong(param, "has numbers outside 0 to 1; divide pixels by 255")
    return torch.from_numpy(pixels)


def _picture(model: ImageModel, value: str, param: str) -> np.ndarray:
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        encoded = "".join(value.split())  # mail and the command base64 break lines
        return decode_image(base64.b64decode(encoded, validate=True), model.family.data)
    except (binascii.Error, ValueError):
        raise _wrong(param, "is not base64 of a PNG file") from None
    except RequestError as error:
        raise RequestError(
            f"{param}: {error.message}", param=param, status=error.status, code="invalid_value"
        ) from None


def _end(model: ImageModel, value: Any, param: str, options: Any) -> Tensor:
    """A latent (latent_dim,) from a seed, a latent, or an image."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 2**63:
            raise _wrong(param, f"got {show(value)}, a seed is from 0 to 2^63 - 1")
        return model.family.sample_latents(1, value, options)[0]
    if isinstance(value, list) and value and not isinstance(value[0], list):
        return _latent(model, value, param)
    if isinstance(value, str | list):
        if "encode" not in model.family.verbs:
            raise _wrong(param, f"{model.name} has no encoder; send a seed or a latent instead of an image")
        return _finite(_encode(model, _image(model, value, param)[None])[0], param)
    raise _wrong(param, "send a seed (a whole number), a latent (a list of numbers) or an image")


def _latent(model: ImageModel, value: Sequence[Any], param: str) -> Tensor:
    size = model.family.latent_dim
    return torch.from_numpy(_numbers(value, param, (size,), f"{size} numbers", f"this model's latents have {size}"))


def _outline(value: Any) -> tuple[tuple[int, ...], Any]:
    """Return the lengths of nested lists, as the first list at each depth tells them, and the first thing in them."""
    lengths = []
    while isinstance(value, list):
        lengths.append(len(value))
        value = value[0] if value else None
    return tuple(lengths), value


def _numbers(value: Any, param: str, shape: tuple[int, ...], expected: str, takes: str) -> np.ndarray:
    """Return nested lists as float32 of a shape; every number is finite, no list is shorter than its neighbour.

    Lists of another shape are refused unread: converting millions of numbers holds up every other request.
    """
    lengths, first = _outline(value)
    if lengths != shape:
        if not lengths or not isinstance(first, int | float):
            raise _wrong(param, f"expected {expected}")
        told = lengths[1:] if len(lengths) == len(shape) == 3 and shape[0] == 1 else lengths[:8]
        raise _wrong(param, f"has {' x '.join(map(str, told))} numbers, {takes}")
    try:
        numbers = np.asarray(value)
    except (ValueError, OverflowError):
        numbers = np.empty(0, dtype=object)
    if numbers.dtype.kind not in "fiu" or not numbers.size:
        raise _wrong(param, f"expected {expected}")
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise _wrong(param, "has numbers that are not finite as float32")
    return numbers


def _encode(model: ImageModel, images: Tensor) -> Tensor:
    return model.passes.apply(("encode",), model.family.encode, images)


def _decode(model: ImageModel, latents: Tensor, options: Any) -> Tensor:
    _check_pixels(model, len(latents), "latents")
    return model.passes.apply(("decode", options), lambda rows: model.family.decode(rows, options), latents)


def _check_pixels(model: ImageModel, n: int, param: str) -> None:
    """Before anything is computed."""
    pixels = n * math.prod(model.family.data.shape)
    if pixels > MAX_PIXELS:
        most = MAX_PIXELS // math.prod(model.family.data.shape)
        raise _wrong(param, f"{n} images of this model are more than one answer holds; ask for at most {most}")


def _wrong(param: str, text: str) -> RequestError:
    return RequestError(f"{param}: {text}", param=param, code="invalid_value")


def _finite(values: Tensor, param: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise RequestError(
            f"{param}: the model's answer to this is not finite; send something nearer to its data",
            param=param,
            code="not_finite",
        )
    return values


def _drawn(
    model: ImageModel,
    images: Tensor,
    request: DrawnRequest,
    *,
    columns: int | None = None,
    seed: int | list[int] | None = None,
) -> ImageAnswer:
    pixels = _finite(images, "latents").cpu().numpy()
    if request.output_format == "npy":
        files = tuple(map(_npy, pixels))
    else:
        files = (png(grid(pixels, columns)),) if request.grid else tuple(map(png, pixels_of(pixels)))
    return ImageAnswer(model.name, model.family.family_name(), files, seed=seed)


def _npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image.astype(np.float32), allow_pickle=False)
    return file.getvalue()


_VERBS: dict[str, Callable[[ImageModel, Any, Any], ImageAnswer]] = {
    "generate": generate,
    "encode": encode,
    "decode": decode,
    "reconstruct": reconstruct,
    "denoise": denoise,
    "interpolate": interpolate,
}
