"""Answer image requests: images from seeds, latents and other images."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genmodels.data.images import decode_image, grid, png
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import (
    DecodeRequest,
    DenoiseRequest,
    DrawnRequest,
    EncodeRequest,
    GenerateRequest,
    ImageRequest,
    InterpolateRequest,
    ReconstructRequest,
)
from genmodels.engine.model import LoadedModel
from genmodels.engine.requests import seed_or_random
from genmodels.errors import RequestError
from genmodels.schema.field_errors import show

MAX_PIXELS = 2**24  # of all images of one answer: 64 images of 256 x 256 in three colours


@dataclass(frozen=True)
class ImageAnswer:
    """`images` are PNG or .npy files; with `grid`, one PNG file."""

    model: str
    family: str
    images: tuple[bytes, ...] = ()
    latents: tuple[list[float], ...] = ()
    seed: int | list[int] | None = None


def answer(model: LoadedModel, request: ImageRequest) -> ImageAnswer:
    """Answer an image request.

    Raises:
        ModelNotFound: the model does not support this verb.
        RequestError: the request does not fit the model; names the field.
    """
    options = model.contract.parse_options(request.verb, request)
    assert isinstance(model, ImageModel)
    result = _ANSWERS[request.verb](model, request, options)
    if metrics := model.batcher.metrics:
        metrics.add_outputs(request.verb, len(result.images) + len(result.latents))
    return result


def generate(model: ImageModel, request: GenerateRequest, options: Any) -> ImageAnswer:
    info = model.family.data
    native = f"{info.width}x{info.height}"
    if request.size not in ("auto", native):
        raise _field_error("size", f"got {request.size!r}, this model makes {native}; send {native!r} or 'auto'")
    _check_pixels(model, request.n, "n")
    if isinstance(request.seed, list):
        if "n" in request.model_fields_set and request.n != len(request.seed):
            raise _field_error(
                "n", f"got {request.n}, and {len(request.seed)} seeds; leave out n, or send as many seeds"
            )
        rows = [model.family.sample_latents(1, seed, options) for seed in request.seed]
        return _image_answer(model, _decode(model, torch.cat(rows), options), request, seed=request.seed)
    seed = seed_or_random(request.seed)
    latents = model.family.sample_latents(request.n, seed, options)
    return _image_answer(model, _decode(model, latents, options), request, seed=seed)


def encode(model: ImageModel, request: EncodeRequest, options: Any) -> ImageAnswer:
    latents = _finite(_encode(model, read_images(model, request.images, "images")).cpu(), "images")
    return ImageAnswer(model.name, model.family.family_name(), latents=tuple(latents.tolist()))


def decode(model: ImageModel, request: DecodeRequest, options: Any) -> ImageAnswer:
    latents = torch.stack([_latent(model, row, f"latents[{i}]") for i, row in enumerate(request.latents)])
    return _image_answer(model, _decode(model, latents, options), request)


def reconstruct(model: ImageModel, request: ReconstructRequest, options: Any) -> ImageAnswer:
    latents = _encode(model, read_images(model, request.images, "images"))
    return _image_answer(model, _decode(model, latents, options), request)


def denoise(model: ImageModel, request: DenoiseRequest, options: Any) -> ImageAnswer:
    clean = model.batcher.apply(("denoise",), model.family.denoise, read_images(model, request.images, "images"))
    return _image_answer(model, clean, request)


def interpolate(model: ImageModel, request: InterpolateRequest, options: Any) -> ImageAnswer:
    start = _endpoint(model, request.start, "start", options)
    end = _endpoint(model, request.end, "end", options)
    latents = model.family.interpolate(start, end, request.steps, request.method)
    return _image_answer(model, _decode(model, latents, options), request, columns=request.steps)


def read_images(model: ImageModel, values: Sequence[Any], param: str) -> Tensor:
    """Read the images of a request: base64 of a PNG (or JPEG, WebP) file, or nested lists of numbers in [0, 1].

    Returns:
        float32 (n, C, H, W) in the model's size.

    Raises:
        RequestError: an image cannot be read or has another size.
    """
    _check_pixels(model, len(values), param)
    return torch.stack([_read_image(model, value, f"{param}[{i}]") for i, value in enumerate(values)])


def _read_image(model: ImageModel, value: Any, param: str) -> Tensor:
    if isinstance(value, str):
        return torch.from_numpy(_decode_base64(model, value, param))
    channels, height, width = model.family.data.shape
    shape = f"{height} x {width}" if channels == 1 else f"{channels} x {height} x {width}"
    expected = f"base64 of a PNG file, or {shape} numbers from 0 to 1 in nested lists"
    if channels == 1 and len(_outline(value)[0]) == 2:
        value = [value]
    pixels = _numbers(value, param, (channels, height, width), expected, f"this model takes {shape}")
    if pixels.min() < 0 or pixels.max() > 1:
        raise _field_error(param, "has numbers outside 0 to 1; divide pixels by 255")
    return torch.from_numpy(pixels)


def _decode_base64(model: ImageModel, value: str, param: str) -> np.ndarray:
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        encoded = "".join(value.split())  # mail programs and the command `base64` break lines
        return decode_image(base64.b64decode(encoded, validate=True), model.family.data)
    except (binascii.Error, ValueError):
        raise _field_error(param, "is not base64 of a PNG file") from None
    except RequestError as error:
        raise RequestError(
            f"{param}: {error.message}", param=param, status=error.status, code="invalid_value"
        ) from None


def _endpoint(model: ImageModel, value: Any, param: str, options: Any) -> Tensor:
    """Return the latent (latent_dim,) of a seed, a latent, or an image, on the host: it and its path are small."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 2**63:
            raise _field_error(param, f"got {show(value)}, a seed is from 0 to 2^63 - 1")
        return model.family.sample_latents(1, value, options)[0]
    if isinstance(value, list) and value and not isinstance(value[0], list):
        return _latent(model, value, param)
    if isinstance(value, str | list):
        if "encode" not in model.family.verbs:
            raise _field_error(param, f"{model.name} has no encoder; send a seed or a latent instead of an image")
        return _finite(_encode(model, _read_image(model, value, param)[None])[0].cpu(), param)
    raise _field_error(param, "send a seed (a whole number), a latent (a list of numbers) or an image")


def _latent(model: ImageModel, value: Sequence[Any], param: str) -> Tensor:
    size = model.family.latent_dim
    return torch.from_numpy(_numbers(value, param, (size,), f"{size} numbers", f"this model's latents have {size}"))


def _outline(value: Any) -> tuple[tuple[int, ...], Any]:
    """Return the lengths of nested lists, read from the first list at each depth, and the first item inside."""
    lengths = []
    while isinstance(value, list):
        lengths.append(len(value))
        value = value[0] if value else None
    return tuple(lengths), value


def _numbers(value: Any, param: str, shape: tuple[int, ...], expected: str, limit: str) -> np.ndarray:
    """Convert nested lists to float32 of a shape; every number must be finite, and lists at one depth equally long.

    Lists of another shape are refused before the conversion: millions of numbers would delay all other requests.
    """
    lengths, first = _outline(value)
    if lengths != shape:
        if not lengths or not isinstance(first, int | float):
            raise _field_error(param, f"expected {expected}")
        shown = lengths[1:] if len(lengths) == len(shape) == 3 and shape[0] == 1 else lengths[:8]
        raise _field_error(param, f"has {' x '.join(map(str, shown))} numbers, {limit}")
    try:
        numbers = np.asarray(value)
    except (ValueError, OverflowError):
        numbers = np.empty(0, dtype=object)
    if numbers.dtype.kind not in "fiu" or not numbers.size:
        raise _field_error(param, f"expected {expected}")
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise _field_error(param, "has numbers that are not finite as float32")
    return numbers


def _encode(model: ImageModel, images: Tensor) -> Tensor:
    return model.batcher.apply(("encode",), model.family.encode, images)


def _decode(model: ImageModel, latents: Tensor, options: Any) -> Tensor:
    _check_pixels(model, len(latents), "latents")
    return model.batcher.apply(("decode", options), lambda rows: model.family.decode(rows, options), latents)


def _check_pixels(model: ImageModel, n: int, param: str) -> None:
    """Raise RequestError for too many images, before anything is computed."""
    pixels = n * math.prod(model.family.data.shape)
    if pixels > MAX_PIXELS:
        limit = MAX_PIXELS // math.prod(model.family.data.shape)
        raise _field_error(param, f"got {n} images, expected at most {limit} of this model in one answer")


def _field_error(param: str, text: str) -> RequestError:
    return RequestError(f"{param}: {text}", param=param, code="invalid_value")


def _finite(values: Tensor, param: str) -> Tensor:
    """Return values on the host. Raise RequestError if one of them is not finite."""
    if not values.isfinite().all():
        raise _not_finite(param)
    return values


def _pixels(images: Tensor, param: str) -> np.ndarray:
    """Return the pixels of images, uint8. They are rounded on the device: a quarter of the bytes are copied.

    Raises:
        RequestError: a number is not finite.
    """
    sound = images.isfinite().flatten(1).all(1, keepdim=True)
    levels = images.clamp(0, 1).mul(255).round().byte()
    copied = torch.cat((levels.flatten(1), sound.byte()), dim=1).cpu().numpy()  # one copy, not two
    if not copied[:, -1].all():
        raise _not_finite(param)
    return copied[:, :-1].reshape(images.shape)


def _not_finite(param: str) -> RequestError:
    message = f"{param}: the model's output for this input is not finite; send values closer to its training data"
    return RequestError(message, param=param, code="not_finite")


def _image_answer(
    model: ImageModel,
    images: Tensor,
    request: DrawnRequest,
    *,
    columns: int | None = None,
    seed: int | list[int] | None = None,
) -> ImageAnswer:
    if request.output_format == "npy":
        files = tuple(map(_npy, _finite(images.cpu(), "latents").numpy()))
    else:
        pixels = _pixels(images, "latents")
        files = (png(grid(pixels, columns)),) if request.grid else tuple(map(png, pixels))
    return ImageAnswer(model.name, model.family.family_name(), files, seed=seed)


def _npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image.astype(np.float32), allow_pickle=False)
    return file.getvalue()


_ANSWERS: dict[str, Callable[[ImageModel, Any, Any], ImageAnswer]] = {
    GenerateRequest.verb: generate,
    EncodeRequest.verb: encode,
    DecodeRequest.verb: decode,
    ReconstructRequest.verb: reconstruct,
    DenoiseRequest.verb: denoise,
    InterpolateRequest.verb: interpolate,
}
