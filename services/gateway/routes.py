"""The routes of the endpoint, in the format of OpenAI's API, so that its clients work unchanged.

Without keys, the endpoint is for this machine only: it listens on 127.0.0.1, accepts loopback host names only, and
ignores the Authorization header.
Bodies must be application/json: a browser sends this type to another site only after a preflight request, which is
never granted.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Query, Request, Response
from pydantic import Field, field_validator

from genmodels.engine.alias_watcher import Refused
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.requests import VERB_REQUESTS, GenerateRequest, ImageRequest
from genmodels.keys import Keys
from genmodels.registry.evaluations import Evaluation
from genmodels.schema.field_errors import field_error
from services.gateway.catalog import CatalogEntry
from services.gateway.completions import add_completions
from services.gateway.contracts import Contracts
from services.gateway.history import add_history_routes
from services.gateway.model_views import model_view, shown_name
from services.gateway.playground import add_playground
from services.gateway.pool import VERSION, Pool, unwrap
from services.http.app import documented, new_app, read_body
from services.http.auth import Caller, KeyAuth
from services.http.listing import Listing, ModelsQuery
from services.http.middleware import LOOPBACK
from services.http.rate_limits import Limits
from services.http.request_metrics import RequestMetrics, tag_version
from services.http.responses import Json, finite


class GenerationBody(GenerateRequest):
    """The body of `POST /v1/images/generations`. `prompt` has no effect: these models do not read text."""

    neutral: ClassVar = {
        "background": ("auto", "opaque"),
        "moderation": (),
        "quality": ("auto", "standard"),
        "safety_identifier": (),
        "stream": (False,),
        "user": (),
    }

    model: str = Field(max_length=256, description="name of the model, e.g. vae-digits or vae-digits@3")
    prompt: str = Field("", max_length=65_536, description="accepted, and has no effect")
    response_format: Literal["b64_json"] = Field("b64_json", description="the only format")

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_url(cls, value: Any) -> Any:
        if value == "url":
            raise field_error("got 'url', but images are not stored; send 'b64_json' or leave it out")
        return value


_ABOUT = "Generate text and images with trained models, in the format of OpenAI's API: its clients work unchanged."


def create_app(pool: Pool, *, hosts: Collection[str] | None = LOOPBACK, keys: Keys | None = None) -> FastAPI:
    """Create the HTTP application in front of a pool.

    Args:
        hosts: accepted names in the Host header; None: any, for use with keys.
        keys: the accepted keys; None: requests need no key.
    """
    app = new_app("genmodels", _ABOUT, hosts=hosts, health=lambda: pool.health())
    app.add_middleware(RequestMetrics)
    generate = KeyAuth(keys, Limits())("generate")

    listing = Listing(model_view, shown_name)

    @app.get("/v1/models", summary="List models")
    async def models(query: Annotated[ModelsQuery, Query()], caller: Caller = generate) -> Response:
        """List the models with family, verbs, version, aliases and metrics, sorted by name.

        The page after one with `has_more` has `after` equal to its `last_id`. No model is loaded for this.
        """
        page = listing.page(pool.catalogue, query, lambda name: caller.may_use([name]))
        return Response(page, media_type="application/json")

    @app.get("/v1/models/{model}", summary="Show a model")
    async def model(model: str, request: Request, caller: Caller = generate) -> Response:
        """Show a model, the newest evaluation of its version, and the versions that the host refuses.

        Each alias of a refused version is listed under `refused` with the reason: an older version answers to it.
        A pool without a running host is not woken for this; `refused` is left out then, or if no host answers in 2 s.
        """
        caller.require([model])
        entry = unwrap(await pool.model(model))
        tag_version(request, entry.resolved.name, entry.resolved.family)
        return Json(_model(entry), headers={VERSION: entry.resolved.name})

    contracts = Contracts(pool)
    add_completions(app, pool, contracts, generate)

    @app.post("/v1/images/generations", summary="Generate images", openapi_extra=documented(GenerationBody))
    async def generations(request: Request, caller: Caller = generate) -> Response:
        """Generate images from seeds."""
        body = await read_body(GenerationBody, request)
        caller.require([body.model])
        await contracts.check(body.model, body)
        return _images(request, unwrap(await pool.answer(body.model, body)))

    for kind in VERB_REQUESTS:
        _add_verb(app, pool, contracts, kind, generate)
    add_history_routes(app, pool, generate)
    add_playground(app)
    return app


def _add_verb(app: FastAPI, pool: Pool, contracts: Contracts, kind: type[ImageRequest], generate: Any) -> None:
    async def verb(model: str, request: Request, caller: Caller = generate) -> Response:
        caller.require([model])
        body = await read_body(kind, request)
        await contracts.check(model, body)
        return _images(request, unwrap(await pool.answer(model, body)))

    path, summary = f"/v1/models/{{model}}/{kind.verb}", kind.verb.capitalize()
    app.post(path, name=kind.verb, summary=summary, description=kind.__doc__, openapi_extra=documented(kind))(verb)


def _images(request: Request, answer: ImageAnswer) -> Response:
    tag_version(request, answer.model, answer.family)
    content: dict[str, Any] = {"created": int(time.time()), "model": answer.model}
    if answer.seed is not None:
        content["seed"] = answer.seed
    if answer.latents:
        content["latents"] = answer.latents
    if answer.images:
        content["data"] = [{"b64_json": base64.b64encode(file).decode()} for file in answer.images]
    return Json(content, headers={VERSION: answer.model})


def _model(entry: CatalogEntry) -> dict[str, Any]:
    resolved = entry.resolved
    return {
        "id": entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": "genmodels",
        "family": resolved.family,
        "kind": entry.kind,
        "verbs": entry.verbs,
        "version": resolved.version,
        "aliases": entry.aliases,
        "metrics": {name: finite(value) for name, value in resolved.metrics.items()},
        **(entry.sizes or {}),
        **({"evaluation": _evaluation(entry.evaluation)} if entry.evaluation else {}),
        **({"problem": entry.problem} if entry.problem else {}),
        **({"refused": _refused(entry.refused)} if entry.refused else {}),
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    metrics = {
        name: {
            "value": finite(metric.value),
            "unit": metric.unit,
            "baselines": {baseline: finite(value) for baseline, value in metric.baselines.items()},
        }
        for name, metric in evaluation.metrics.items()
    }
    about = evaluation.model_dump(mode="json", include={"id", "created", "thorough", "notes"})
    return {**about, "metrics": metrics}


def _refused(refused: Mapping[str, Refused]) -> list[dict[str, Any]]:
    """List the aliases whose version is refused, so that an older version still serves them."""
    return [
        {"alias": alias, "version": entry.version, "reason": entry.reason} for alias, entry in sorted(refused.items())
    ]
