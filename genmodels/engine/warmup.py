"""A first small request of each kind, so that nobody has to wait for what only the first one does, or get an error."""

from __future__ import annotations

import time

from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import DecodeRequest, GenerateRequest, answer
from genmodels.engine.model import Loaded
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import CheckpointError, RequestError

SLOWEST = 30.0  # seconds that the small requests may take


def warm(loaded: Loaded, slowest: float = SLOWEST) -> None:
    """Ask a model that nobody else asks yet.

    Raises:
        CheckpointError: it cannot answer, or only slowly.
    """
    started = time.monotonic()
    try:
        _ask(loaded)
    except RequestError as error:
        raise CheckpointError(f"it cannot answer a small request: {error}") from error
    seconds = time.monotonic() - started
    if seconds > slowest:
        raise CheckpointError(f"it is too slow: a small request took {seconds:.1f} s, the most is {slowest:g} s")


def _ask(loaded: Loaded) -> None:
    if isinstance(loaded, TextModel):
        prompt = loaded.tokenizer.decode([0])
        list(complete(loaded, CompletionRequest.model_validate({"prompt": prompt, "max_tokens": 2, "seed": 0})))
    elif isinstance(loaded, ImageModel):
        answer(loaded, GenerateRequest(seed=0))
        answer(loaded, DecodeRequest(latents=[[0.0] * loaded.family.latent_dim]))
