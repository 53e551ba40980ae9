"""Routes to the records of the training run behind a model: metrics, sample images, sample texts."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from pydantic import Field

from genmodels.engine.history import MAX_ROWS, MIN_ROWS, SAMPLE
from genmodels.storage import encode_floats
from services.gateway.pool import Pool, unwrap
from services.http.app import cancel_on_disconnect
from services.http.auth import Caller
from services.http.query import Strict
from services.http.rate_limits import Slots
from services.http.request_metrics import tag_version
from services.http.responses import Json

TYPES = {".png": "image/png", ".txt": "text/plain; charset=utf-8"}

HISTORIES = (16, 8)  # read at the same time: of all keys, of one key; a model host answers 32 requests at once

Step = Annotated[int, Path(ge=0, le=99_999_999)]
File = Annotated[str, Path(pattern=SAMPLE)]


class HistoryQuery(Strict):
    points: int = Field(
        MAX_ROWS, ge=MIN_ROWS, le=MAX_ROWS, description="maximum number of rows, evenly spaced over the run"
    )


def add_history_routes(app: FastAPI, pool: Pool, generate: Any) -> None:
    """Add the routes.

    Args:
        generate: the dependency that returns a Caller.
    """

    histories = Slots("histories", *HISTORIES)

    @app.get("/v1/models/{model}/history", summary="Read a training history")
    async def read_history(
        model: str, request: Request, query: Annotated[HistoryQuery, Query()], caller: Caller = generate
    ) -> Response:
        """Read the logged metrics of the run that trained a version, and the names of its samples."""
        caller.require([model])
        with histories.take(caller.id):
            history = unwrap(await cancel_on_disconnect(request, pool.history(model, query.points)))
        tag_version(request, history.version, history.family)
        return Json(
            {
                "object": "history",
                "model": history.version,
                "job": history.job,
                "step": history.step,
                "data": encode_floats(history.rows),
                "samples": [{"step": step, "files": files} for step, files in history.samples.items()],
            }
        )

    @app.get(
        "/v1/models/{model}/samples/{step}/{name}",
        summary="Read a training sample",
        response_class=Response,
        responses={200: {"content": {kind.partition(";")[0]: {} for kind in TYPES.values()}}},
    )
    async def read_sample(model: str, step: Step, name: File, caller: Caller = generate) -> Response:
        """Read a sample image or sample text of the training of a version."""
        caller.require([model])
        data = unwrap(await pool.sample(model, step, name))
        headers = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}
        return Response(data, media_type=TYPES[PurePosixPath(name).suffix], headers=headers)
