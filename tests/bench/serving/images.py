"""Images without HTTP: the bare decoder, and the engine, which also draws latents and makes files."""

from __future__ import annotations

import time
from typing import Any

from genmodels.engine.image import answers
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import GenerateRequest
from genmodels.family import ImageInfo
from genmodels.sizing.memory import SERVED_ROWS

VAE: dict[str, Any] = {"latent_dim": 32, "width": 32, "pictures": ImageInfo(channels=1, height=28, width=28)}


def bare(model: ImageModel, pictures: int, requests: int) -> float:
    """Return the images per second of the decoder alone."""
    family, options = model.family, model.family.Request()
    latents = family.sample_latents(pictures, 1, options)
    started = time.perf_counter()
    for _ in range(requests):
        for rows in latents.split(SERVED_ROWS):
            family.decode(rows, options)
    return requests * pictures / (time.perf_counter() - started)


def engine(model: ImageModel, pictures: int, requests: int) -> float:
    """Return the images per second of the engine, as PNG files."""
    request = GenerateRequest(n=pictures, seed=1)
    started = time.perf_counter()
    for _ in range(requests):
        assert len(answers.answer(model, request).images) == pictures
    return requests * pictures / (time.perf_counter() - started)
