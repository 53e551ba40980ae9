"""Send requests to an application in this process, and check its responses."""

from __future__ import annotations

import asyncio
import base64
import uuid
from typing import Any

import httpx
import numpy as np

from genmodels.data.images import png

JSON = {"content-type": "application/json"}
PICTURE = base64.b64encode(png(np.random.default_rng(0).random((1, 16, 16)))).decode()


def ask(
    app: Any, method: str, path: str, body: Any = None, *, base: str = "http://127.0.0.1:8000", **options: Any
) -> httpx.Response:
    """Send one request to an application in this process; a body of bytes is sent unchanged."""
    if isinstance(body, bytes):
        options = {"content": body, "headers": {**JSON, **options.pop("headers", {})}, **options}
    elif body is not None:
        options["json"] = body

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check the status of a response, and return its error in OpenAI's format."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert uuid.UUID(response.headers["x-request-id"])
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
