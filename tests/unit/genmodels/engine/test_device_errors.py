"""Test errors of a device: a model without room is refused, a batch ends with 503, a lost device ends the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels.engine import model_cache
from genmodels.engine.image import answers
from genmodels.engine.image.requests import GenerateRequest
from genmodels.engine.loader import load
from genmodels.engine.text.completion import complete
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.sizing.placement import Placement
from genmodels.storage import open_storage
from services.gateway import model_host
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_client import ask
from tests.support.published_models import loaded, publish

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
CODES = {"out_of_memory": NO_MEMORY, "device_failed": LOST}


class Failing:
    """Raise an error at the first `times` calls, and then call a function."""

    def __init__(self, function: Any, error: Exception, times: int) -> None:
        self.function, self.error, self.times = function, error, times

    def __call__(self, *args: Any) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return self.function(*args)


@pytest.mark.parametrize("code", CODES)
def test_an_error_at_a_step_ends_the_texts_of_the_batch_and_no_others(tmp_path: Path, code: str) -> None:
    model: Any = loaded("minigpt", tmp_path)
    request = CompletionRequest.model_validate({"prompt": "ABC", "n": 3, "max_tokens": 4, "seed": 1})
    texts = list(complete(model, request))
    decoder = model.batcher._decoder
    decoder.step = Failing(decoder.step, CODES[code], times=4)  # the batch, and then each of its texts alone
    with pytest.raises(RequestError) as ended:
        list(complete(model, request))
    assert (ended.value.status, ended.value.code, ended.value.retry_after) == (503, code, 1)
    while model.batcher.step():
        pass
    assert list(complete(model, request)) == texts


@pytest.mark.parametrize("code", CODES)
def test_an_error_of_a_batch_of_images_ends_its_requests_and_no_others(tmp_path: Path, code: str) -> None:
    model: Any = loaded("vae", tmp_path)
    request = GenerateRequest(n=2, seed=1)
    images = answers.answer(model, request)
    model.family.decode = Failing(model.family.decode, CODES[code], times=1)
    with pytest.raises(RequestError) as ended:
        answers.answer(model, request)
    assert (ended.value.status, ended.value.code) == (503, code)
    assert answers.answer(model, request) == images


def test_a_model_without_room_on_its_device_is_refused_and_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path.as_uri())
    for name in ("large", "small"):
        publish(storage, name, "minigpt")

    def full(storage: Any, resolved: Any, *rest: Any) -> Any:
        if resolved.name.startswith("large"):
            raise NO_MEMORY
        return load(storage, resolved, *rest)

    monkeypatch.setattr(model_cache, "load", full)
    app = create_app(ModelHost(storage.url))
    body = {"prompt": "x", "max_tokens": 2}
    refused = ask(app, "POST", "/v1/completions", {"model": "large@1", **body})
    assert refused.status_code == 503
    assert "out of memory on cpu: unload a model, or give this host less `memory` to fill" in refused.text
    assert ask(app, "POST", "/v1/completions", {"model": "small@1", **body}).status_code == 200


def test_a_lost_device_fails_the_health_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After such an error each call of CUDA fails, so the check computes."""
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    host = ModelHost(open_storage(tmp_path.as_uri()).url)
    host.check_health()
    host._placement = Placement("cuda")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Failing(None, LOST, times=1)())
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access"):
        host.check_health()
