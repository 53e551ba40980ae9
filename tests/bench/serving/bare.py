"""A bare FastAPI server over the same engine, with the same events: what HTTP itself costs, without keys or Serve.

python -m tests.bench.serving.bare STORAGE_URL PORT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from genmodels.engine.loader import load
from genmodels.engine.text.completion import Completion, complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.registry.references import resolve_model
from genmodels.storage import open_storage
from services.gateway.deltas import DeltaQueue
from services.gateway.model_host import COLLECT_SECONDS
from tests.bench.serving.text import OF_A_HOST

THREADS = 1
NICENESS = 15  # as Ray gives its workers


def create_app(model: TextModel) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        fields = {name: body[name] for name in ("prompt", "max_tokens", "seed")}
        completion = complete(model, CompletionRequest.model_validate(fields))
        return StreamingResponse(_events(completion), media_type="text/event-stream")

    return app


async def _events(completion: Completion) -> AsyncIterator[str]:
    queue, ended = DeltaQueue(), False
    completion.start(queue.put)
    while not ended:
        for delta in await queue.get():
            ended = delta.finish_reason is not None
            choice = {"index": 0, "text": delta.text, "logprobs": None, "finish_reason": delta.finish_reason}
            event = {"id": "cmpl-0", "object": "text_completion", "model": completion.model, "choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n"
        if not ended:
            await queue.collect(COLLECT_SECONDS)
    yield "data: [DONE]\n\n"


def main() -> None:
    os.nice(NICENESS)
    torch.set_num_threads(THREADS)
    storage_url, port = sys.argv[1:]
    storage = open_storage(storage_url)
    model = load(storage, resolve_model(storage, "play"), OF_A_HOST)
    assert isinstance(model, TextModel)
    model.start(THREADS)
    uvicorn.run(create_app(model), host="127.0.0.1", port=int(port), log_level="critical")


if __name__ == "__main__":
    main()
