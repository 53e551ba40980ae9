"""The playground at `/`, and commands that ask a model the same in a terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from genmodels.errors import RequestError

FOLDER = Path(__file__).parent / "playground"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, but sent only if it changed
}

_KEY = '-H "Authorization: Bearer $GENMODELS_KEY"'
_JSON = "-H 'content-type: application/json'"
_SAVE = (
    'python3 -c "import base64, json, sys; '
    "sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
)


def add_playground(app: FastAPI) -> None:
    """Add the page and its files. They are read now and tell nothing of models, so that they need no key."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}

    def answer(name: str, request: Request) -> Response:
        data = files.get(name)
        if data is None:
            raise RequestError(f"the playground has no file {name[:100]!r}", status=404, param="name", code="not_found")
        headers = {**HEADERS, "etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return answer("index.html", request)

    @app.get("/playground/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return answer(name, request)


def curl(model: Mapping[str, Any], base_url: str, *, key: bool = False) -> list[str]:
    """Commands that show what a model does.

    Args:
        model: as in `GET /v1/models`.
        key: whether a key is asked for, which then stands in the environment.
    """
    name, verbs, lines = model["id"], model["verbs"], []

    def command(path: str, body: Mapping[str, Any], flags: str = "-s") -> str:
        headers = f"{_KEY} {_JSON}" if key else _JSON
        return f"curl {flags} {base_url}{path} {headers} -d '{json.dumps(body)}'"

    if "complete" in verbs:
        body = {"model": name, "prompt": "The ", "max_tokens": 200, "stream": True}
        lines.append(command("/v1/completions", body, "-sN"))
    if "generate" in verbs:
        body = {"model": name, "prompt": "", "n": 16, "grid": True}
        lines.append(f"{command('/v1/images/generations', body)} | {_SAVE} > {name}.png")
    if "interpolate" in verbs:
        body = {"start": 1, "end": 2, "steps": 8, "grid": True}
        lines.append(f"{command(f'/v1/models/{name}/interpolate', body)} | {_SAVE} > {name}-way.png")
    return lines
