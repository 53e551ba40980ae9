"""The routes of models and their versions, of datasets, and of clean-up."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from genmodels.checkpoint import scratch_folder
from genmodels.data import DATASETS
from genmodels.data import uploads as stored
from genmodels.errors import DataError, DatasetExists, ModelNotFound, RequestError
from genmodels.registry import gc, removal
from genmodels.registry.evaluations import evaluations
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.spec.names import LABEL
from genmodels.storage import Storage, encode_floats
from services.http.app import documented, read_body
from services.http.auth import Caller, KeyAuth
from services.http.bodies import BodyLimit
from services.http.listing import Listing, ModelsQuery
from services.http.middleware import StreamedRoute
from services.http.rate_limits import Slots
from services.http.responses import Json
from services.jobs.fresh_catalogue import FreshCatalogue
from services.jobs.model_views import dataset_views, model_view
from services.jobs.schemas import AliasBody, DatasetQuery, DeleteModelQuery, DryRunQuery, GcQuery
from services.jobs.upload_slots import UploadSlots

UPLOADS = StreamedRoute("PUT", "/v1/datasets/", BodyLimit(stored.MAX_STREAM_BYTES, seconds=30.0, rate=64 * 2**10))
DOWNLOADS = (8, 4)


def add_model_routes(app: FastAPI, guard: KeyAuth, storage: Storage) -> None:
    registry, admin, submit = Registry(storage), guard("admin"), guard("submit")
    reader = guard("submit", "generate")
    catalogue, listing = FreshCatalogue(storage), Listing(model_view, lambda entry: entry.model)
    downloads, uploads = Slots("downloads", *DOWNLOADS), UploadSlots()
    one_conversion = asyncio.Lock()  # each may take gibibytes of memory

    @app.get("/v1/models")
    def list_models(query: Annotated[ModelsQuery, Query()], caller: Caller = reader) -> Response:
        """List published models, sorted by name: their versions and aliases, and the newest version's metrics.

        The page after one with `has_more` has `after` equal to its `last_id`.
        """
        page = listing.page(catalogue.read(), query, partial(_may_use, caller))
        return Response(page, media_type="application/json")

    @app.get("/v1/models/{model}")
    def show_model(model: str, caller: Caller = reader) -> Response:
        """Show a model as the list does: its versions and aliases, and the newest version's metrics."""
        _need(caller, model)
        if (entry := catalogue.read().get(model)) is None:
            raise ModelNotFound(f"no model {model!r}; `genmodels models` or GET /v1/models lists all models")
        return Json(model_view(entry))

    @app.get("/v1/models/{model}/versions/{number}")
    def show_version(model: str, number: Number, caller: Caller = submit) -> Response:
        """Show a version: its lineage, metrics, evaluations, and files with size and sha256."""
        version = _version(registry, model, number, caller).model_dump(mode="json")
        made = [evaluation.model_dump(mode="json") for evaluation in evaluations(registry, model, number)]
        return Json(encode_floats({**version, "evaluations": made}))

    @app.get("/v1/models/{model}/versions/{number}/files/{name:path}", response_class=Response)
    def pull_file(model: str, number: Number, name: str, caller: Caller = submit) -> Response:
        """Fetch a file of a version."""
        version = _version(registry, model, number, caller)
        file = version.files.get(name)
        if file is None:
            message = f"{version.name} has no file {name[:100]!r}; it has: {', '.join(sorted(version.files))}"
            raise RequestError(message, status=404, param="name", code="file_not_found")
        with contextlib.ExitStack() as held:
            held.enter_context(downloads.take(caller.id))
            folder = FilePath(held.enter_context(scratch_folder()))
            registry.fetch(version.model_copy(update={"files": {name: file}}), folder)
            return _Pulled(folder / name, file.sha256, held.pop_all().close)

    @app.delete("/v1/models/{model}/versions/{number}", status_code=204, response_class=Response)
    def delete_version(model: str, number: Number, caller: Caller = admin) -> Response:
        """Delete a version that no alias names."""
        _version(registry, model, number, caller)
        removal.delete_version(registry, model, number)
        return Response(status_code=204)

    @app.put("/v1/models/{model}/aliases/{alias}", openapi_extra=documented(AliasBody))
    async def promote(model: str, alias: str, request: Request, caller: Caller = submit) -> Response:
        """Point an alias at a version, also at an older one."""
        body = await read_body(AliasBody, request)

        def work() -> dict[str, Any]:
            _version(registry, model, body.version, caller)
            return registry.promote(model, alias, body.version, caller.reason).model_dump(mode="json")

        return Json({"model": model, "alias": alias, **await run_in_threadpool(work)})

    @app.delete("/v1/models/{model}/aliases/{alias}", status_code=204, response_class=Response)
    def delete_alias(model: str, alias: str, caller: Caller = admin) -> Response:
        """Delete an alias with its history. The version that it points at stays."""
        _need(caller, model)
        registry.remove_alias(model, alias)
        return Response(status_code=204)

    @app.delete("/v1/models/{model}")
    def delete_model(model: str, query: Annotated[DeleteModelQuery, Query()], caller: Caller = admin) -> Response:
        """Delete a whole model: aliases, versions, evaluations, files. 409 while a run of it is open.

        The answer lists what was deleted. Checkpoints, samples and logs of its runs stay, unless `with_runs` is true.
        """
        _need(caller, model)
        if query.dry_run:
            return Json(asdict(removal.model_contents(storage, model)))
        may_name = partial(_may_use, caller)
        return Json(asdict(removal.delete_model(storage, model, with_runs=query.with_runs, may_name=may_name)))

    @app.post("/v1/gc")
    def collect_garbage(query: Annotated[GcQuery, Query()], caller: Caller = admin) -> Response:
        """Remove unreferenced objects: blobs of deleted versions, and remains of interrupted uploads."""
        caller.require_all_models()
        plan = gc.gc(storage, everything=query.all)
        if not query.dry_run:
            plan.carry_out()
        items = [{"key": item.key, "bytes": item.bytes, "why": item.why} for item in plan.items]
        return Json({"removed": not query.dry_run, "bytes": sum(item.bytes for item in plan.items), "items": items})

    @app.get("/v1/datasets")
    def list_datasets(caller: Caller = submit) -> Response:
        """List the datasets that a spec's `data.dataset` may name."""
        views = dataset_views(storage)
        return Json({"object": "list", "data": [view for view in views if caller.may_use_dataset(view["name"])]})

    @app.put("/v1/datasets/{name}", openapi_extra=_DATASET_BODY, status_code=201)
    async def add_dataset(
        name: Annotated[str, Path(pattern=stored.NAME)],
        request: Request,
        query: Annotated[DatasetQuery, Query()],
        caller: Caller = submit,
    ) -> Response:
        """Add a dataset: a text in UTF-8, or a zip of pictures whose folders are the classes.

        The same content again returns 200 and changes nothing. Another content under an existing name is 409, unless
        `replace` is true. Submitted jobs keep the content they had.
        """
        caller.require([name])  # else a key limited to some models could change the meaning of other specs
        _refuse_built_in(name, "choose another name")
        with uploads.take(caller.id) as upload, scratch_folder() as folder:
            path = FilePath(folder) / name
            with path.open("wb") as file:
                await upload.receive(request.stream(), file)
            async with one_conversion:
                dataset, new = await run_in_threadpool(_add, storage, name, path, query)
        return Json(dataset.model_dump(mode="json"), 201 if new else 200)

    @app.delete("/v1/datasets/{name}")
    def delete_dataset(
        name: Annotated[str, Path(pattern=stored.NAME)],
        query: Annotated[DryRunQuery, Query()],
        caller: Caller = admin,
    ) -> Response:
        """Delete a dataset with all its contents. 409 while an open job needs it.

        The answer lists what was deleted, and the runs and versions that were trained on it; these stay.
        """
        _refuse_built_in(name, "only added datasets can be deleted")
        caller.require([name])
        try:
            if query.dry_run:
                contents = removal.dataset_contents(storage, name)
            else:
                contents = removal.delete_dataset(storage, name, may_name=partial(_may_use, caller))
        except DataError as error:
            raise RequestError(str(error), status=404, param="name", code="dataset_not_found") from None
        shown = asdict(contents)
        shown["runs"] = [run for run in contents.runs if caller.may_see_run(run)]
        shown["versions"] = [version for version in contents.versions if caller.may_use([version])]
        return Json(shown)


class _Pulled(FileResponse):
    """A file that is removed once it is sent, or once the client has disconnected."""

    def __init__(self, path: FilePath, digest: str, done: Callable[[], None]) -> None:
        super().__init__(path, media_type="application/octet-stream", headers={"etag": f'"{digest}"'})
        self.done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


def _add(storage: Storage, name: str, path: FilePath, query: DatasetQuery) -> tuple[stored.StoredDataset, bool]:
    channels: Any = int(query.channels) if query.channels else None
    try:
        return stored.add(storage, name, path, query.image_size, channels, replace=query.replace)
    except DatasetExists as error:
        message = f"{error}; add ?replace=true to replace it"
        raise RequestError(message, status=409, param="name", code="dataset_exists") from None
    except DataError as error:
        raise RequestError(str(error).replace(str(path), "FILE"), code="invalid_data") from None


def _refuse_built_in(name: str, remedy: str) -> None:
    if name in DATASETS:
        raise RequestError(f"{name!r} is a built-in dataset; {remedy}", status=409, param="name", code="built_in")


def _version(registry: Registry, model: str, number: int, caller: Caller) -> Version:
    _need(caller, model)
    return registry.version(model, number)


def _may_use(caller: Caller, model: str) -> bool:
    return caller.may_use([model])


def _need(caller: Caller, model: str) -> None:
    """Raise RequestError unless this is a valid name of a model that the caller may use."""
    if not re.fullmatch(LABEL, model):
        raise ModelNotFound(f"no model {model[:100]!r}: a name has lower-case letters, digits and dashes")
    caller.require([model])


_DATASET_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


Number = Annotated[int, Path(ge=1, le=99_999_999)]
