"""Answer small requests before the first client: they find errors and do one-time work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from genmodels.engine.image import answers
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import DecodeRequest, GenerateRequest
from genmodels.engine.model import LoadedModel
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import CheckpointError, RequestError
from genmodels.family import ImageFamily, TextFamily

MAX_SECONDS = 30.0  # that the small requests may take


def warm_up(model: LoadedModel, max_seconds: float = MAX_SECONDS) -> str:
    """Let a model answer small requests; return its answer in words. No other request may use the model yet.

    Raises:
        CheckpointError: the model cannot answer, or is too slow.
    """
    started = time.monotonic()
    try:
        answer = _SMALL_REQUESTS[model.family.kind](model)
    except RequestError as error:
        raise CheckpointError(f"it cannot answer a small request: {error}") from error
    seconds = time.monotonic() - started
    if seconds > max_seconds:
        raise CheckpointError(f"it is too slow: a small request took {seconds:.1f} s, the maximum is {max_seconds:g} s")
    return answer


def _generate(model: ImageModel) -> str:
    (image,) = answers.answer(model, GenerateRequest(seed=0)).images
    answers.answer(model, DecodeRequest(latents=[[0.0] * model.family.latent_dim]))
    _, height, width = model.family.data.shape
    return f"made a PNG of {width}x{height}, {len(image)} bytes"


def _complete(model: TextModel) -> str:
    prompt = model.tokenizer.decode([0])
    deltas = complete(model, CompletionRequest.model_validate({"prompt": prompt, "max_tokens": 2, "seed": 0}))
    return f"continued {prompt!r} with {''.join(delta.text for delta in deltas)!r}"


_SMALL_REQUESTS: dict[str, Callable[[Any], str]] = {ImageFamily.kind: _generate, TextFamily.kind: _complete}
