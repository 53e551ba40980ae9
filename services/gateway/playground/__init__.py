"""The playground at `/`: plain HTML, CSS and JavaScript modules, served as files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

from genmodels.errors import RequestError

FOLDER = Path(__file__).parent
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
    "cache-control": "no-cache",  # the browser asks each time, and the file is sent only if it changed
}


def add_playground(app: FastAPI) -> None:
    """Add the page and its files. They are read once, and need no key because they contain nothing of models."""
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
