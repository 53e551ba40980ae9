"""Test that no response to a key that is limited to some models names other models."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml
from fastapi.routing import APIRoute

from genmodels.data import DATASETS, added
from genmodels.keys import Keys
from genmodels.runs.jobs import Jobs
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage, open_storage
from services.dispatch.backends.base import Capacity
from services.dispatch.scheduler import Queued, Running, plan
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app as create_gateway
from services.jobs.app import create_app as create_job_app
from tests.support.asgi_client import PICTURE, ask
from tests.support.job_service import YAML, Service, spec
from tests.support.published_models import publish

CANARY = "canary"
METHODS = ("GET", "POST", "PUT", "DELETE")


@dataclass(frozen=True)
class Shared:
    """Hold a store with models, jobs and versions of two owners, and keys of one of them."""

    apps: dict[str, Any]
    tokens: list[str]
    jobs: list[str]  # of the key's own models, of other models, and of both


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    storage = open_storage(tmp_path_factory.mktemp("names").as_uri())
    for name in ("mine-vae", f"{CANARY}-vae"):
        publish(storage, name, "vae")
        publish(storage, name, "vae", step=2, alias=CANARY if name.startswith(CANARY) else "next")
    service, jobs = Service(storage), []
    for models in (["mine-a"], [f"{CANARY}-a"], ["mine-b", f"{CANARY}-b"]):
        for state in ("queued", "cancelled"):
            jobs.append(service.submit(*models, name="work"))
            for model in models if state == "cancelled" else ():
                service.move(jobs[-1], model, "cancelled")
    service.queue(
        {"cpus": 1, "gpus": 0}, *((job, model, "full") for job in jobs[::2] for model in ("mine-a", "mine-b"))
    )
    keys = Keys(storage)
    tokens = [keys.create("a", ("generate", "submit"), ("mine-",))[1], keys.create("b", ("admin",), ("mine-",))[1]]
    apps = {
        "jobs": create_job_app(storage, keys=Keys(storage), hosts=None),
        "gateway": create_gateway(ModelHost(storage.url), hosts=None, keys=Keys(storage)),
    }
    return Shared(apps, tokens, jobs)


def without_canary(response: httpx.Response) -> bool:
    return CANARY not in response.text and CANARY not in str(response.headers)


def paths(app: Any, jobs: list[str]) -> list[tuple[str, str]]:
    """Return every route with each kind of name in each of its parameters; none of these names is a canary."""
    models = ["mine-vae", "mine-vae@9", "mine-vae@gone", "mine-gone", "mine-a@live", "mine-b@step-7", "vae"]
    names = {
        "model": models,
        "job": [*jobs, "work-00000000"],
        "number": ["1", "9"],
        "alias": ["production", "gone"],
        "name": ["config.json", "gone", "samples.png"],
        "step": ["1"],
        "path": ["gone"],
    }
    pairs = []
    for route in app.routes:
        if not isinstance(route, APIRoute):
            continue
        fields = [field.split(":")[0] for field in route.path.replace("}", "{").split("{")[1::2]]
        template = route.path.replace(":path}", "}")
        for values in itertools.product(*(names[field] for field in fields)):
            path = template.format(**dict(zip(fields, values, strict=True)))
            pairs += [(method, path) for method in route.methods & set(METHODS)]
    return pairs


def bodies(path: str) -> list[Any]:
    named = [{"model": model} for model in ("mine-vae", "mine-gone", "mine-vae@9", "gone")]
    return [
        None,
        {"version": 1},
        {"version": 9},
        {"models": ["mine-gone"]},
        {"images": [PICTURE]},
        *({**body, "prompt": "a"} for body in named),
    ]


@pytest.mark.parametrize("app", ["jobs", "gateway"])
@pytest.mark.parametrize("key", [0, 1], ids=["submit", "admin"])
def test_no_answer_names_what_is_not_the_keys(shared: Shared, app: str, key: int) -> None:
    headers = {"authorization": f"Bearer {shared.tokens[key]}"}
    requests = paths(shared.apps[app], shared.jobs)
    assert len(requests) > 30
    for method, path in sorted(requests, key=lambda one: one[0] == "DELETE"):
        for body in bodies(path) if method in ("POST", "PUT") else [None]:
            response = ask(shared.apps[app], method, path, body, headers=headers)
            assert without_canary(response), f"{method} {path} {body}: {response.text}"


@pytest.mark.parametrize("dry", ["", "?dry_run=true"])
@pytest.mark.parametrize(
    "reference",
    ["mine-gone", "mine-gone@1", "mine-vae@9", "mine-vae@no", "mine-a@live", "mine-b@step-1", "gone@1"],
)
def test_no_refused_spec_names_what_is_not_the_keys(shared: Shared, reference: str, dry: str) -> None:
    document = spec("work", "mine-c")
    document["models"][0]["train"] = {"init_from": reference}
    headers = {**YAML, "authorization": f"Bearer {shared.tokens[0]}"}
    response = ask(shared.apps["jobs"], "POST", f"/v1/jobs{dry}", content=yaml.safe_dump(document), headers=headers)
    assert response.status_code in (400, 403)
    assert without_canary(response)


def test_a_key_sees_uses_and_is_advised_only_its_own_and_built_in_datasets(file_storage: Storage) -> None:
    keys = Keys(file_storage)
    everyone = {"authorization": f"Bearer {keys.create('all', ('submit',))[1]}"}
    limited = {"authorization": f"Bearer {keys.create('a', ('submit',), ('mine-',))[1]}"}
    app = create_job_app(file_storage, keys=keys, hosts=None)
    for name in ("mine-text", f"{CANARY}-text"):
        put = ask(app, "PUT", f"/v1/datasets/{name}", content=b"All that is known.\n" * 500, headers=everyone)
        assert put.status_code == 201, put.text

    def names(headers: dict[str, str]) -> set[str]:
        return {view["name"] for view in ask(app, "GET", "/v1/datasets", headers=headers).json()["data"]}

    assert names(everyone) == {*DATASETS, "mine-text", f"{CANARY}-text"}
    assert names(limited) == {*DATASETS, "mine-text"}

    def submit(dataset: str, family: str = "minigpt", query: str = "") -> httpx.Response:
        document = spec("work", "mine-a")
        document["models"][0] |= {"model": {"family": family}, "data": {"dataset": dataset}}
        content = yaml.safe_dump(document)
        return ask(app, "POST", f"/v1/jobs{query}", content=content, headers={**YAML, **limited})

    assert submit("mine-text").status_code == 201
    others, missing = submit(f"{CANARY}-text"), submit("absent-text")
    assert others.text == missing.text.replace("absent-text", f"{CANARY}-text")
    for query in ("", "?dry_run=true"):
        for response in (submit(f"{CANARY[1:]}-texts", query=query), submit("mine-text", "vae", query)):
            assert response.status_code == 400
            assert without_canary(response), response.text


def test_of_a_job_that_also_trains_others_only_the_id_is_shown(file_storage: Storage) -> None:
    service = Service(file_storage)
    job = service.submit("mine-a", f"{CANARY}-a", name="work")
    for model in ("mine-a", f"{CANARY}-a"):
        service.move(job, model, "cancelled")
    keys = Keys(file_storage)
    headers = {"authorization": f"Bearer {keys.create('a', ('admin',), ('mine-',))[1]}"}
    app = create_job_app(file_storage, keys=keys, hosts=None)
    document = spec("more", "mine-b")
    document["models"][0]["train"] = {"init_from": "mine-a@live"}
    error = ask(app, "POST", "/v1/jobs", content=yaml.safe_dump(document), headers={**YAML, **headers})
    assert f"steps of mine-a in job {job} with one: none yet" in error.text
    contents = ask(app, "DELETE", "/v1/models/mine-a?dry_run=true", headers=headers)
    assert contents.json()["jobs"] == [job]
    assert ask(app, "GET", "/v1/jobs", headers=headers).json()["data"] == []
    view = ask(app, "GET", f"/v1/jobs/{job}", headers=headers)
    assert view.status_code == 403
    assert all(map(without_canary, (error, contents, view)))


def test_a_deletion_that_is_refused_names_no_others_job(file_storage: Storage) -> None:
    publish(file_storage, "mine-vae", "vae")
    service = Service(file_storage)
    put = ask(service.app, "PUT", "/v1/datasets/mine-text", content=b"All that is mine.\n" * 500)
    assert put.status_code == 201, put.text
    document = spec(CANARY, f"{CANARY}-text", f"{CANARY}-vae")
    text, pictures = document["models"]
    text |= {"model": {"family": "minigpt"}, "data": {"dataset": "mine-text"}}
    pictures["train"] = {"init_from": "mine-vae@1"}
    kinds = added.Kinds(file_storage)
    Jobs(file_storage).submit(parse_spec(yaml.safe_dump(document).encode(), "spec", datasets=kinds))
    keys = Keys(file_storage)
    headers = {"authorization": f"Bearer {keys.create('a', ('admin',), ('mine-',))[1]}"}
    app = create_job_app(file_storage, keys=keys, hosts=None)
    for path in ("/v1/models/mine-vae", "/v1/models/mine-vae?with_runs=true", "/v1/datasets/mine-text"):
        response = ask(app, "DELETE", path, headers=headers)
        assert response.status_code == 409, response.text
        assert "has not ended" in response.text
        assert without_canary(response), response.text


def test_a_wrong_name_is_in_no_other_answer(file_storage: Storage) -> None:
    """The error that the library raises does not name other models either."""
    publish(file_storage, f"{CANARY}-vae", "vae")
    app = create_gateway(ModelHost(file_storage.url))
    for path in ("/v1/models/gone", "/v1/models/gone@1", "/v1/models/gone/history"):
        response = ask(app, "GET", path)
        assert response.status_code == 404
        assert without_canary(response)
        assert "GET /v1/models" in response.json()["error"]["message"]


def test_cursors_lead_past_others_jobs_without_naming_them(file_storage: Storage) -> None:
    """Many of these jobs ended in the same millisecond."""
    service = Service(file_storage)
    mine = []
    for number in range(12):
        for model in (f"{CANARY}-{number}", f"mine-{number}"):
            job = service.submit(model, name=model)
            if number % 3:
                service.move(job, model, "cancelled")
            mine += [job] if model.startswith("mine") else []
    for job in [entry.job for _, entry in service.jobs.ended(limit=100)][:8]:
        service.jobs.reopen(job)
        models = service.jobs.spec(job).models
        service.jobs.close(job, "2026-01-01T00:00:00.000+00:00", {model.name: "cancelled" for model in models})
    keys = Keys(file_storage)
    headers = {"authorization": f"Bearer {keys.create('a', ('submit',), ('mine-',))[1]}"}
    app = create_job_app(file_storage, keys=keys, hosts=None)
    for limit in (1, 2, 5, 100):
        listed, after = [], ""
        while True:
            page = ask(app, "GET", "/v1/jobs", params={"limit": limit, "after": after}, headers=headers)
            assert without_canary(page), page.text
            listed += [job["job"] for job in page.json()["data"]]
            after = page.json()["next"]
            if not after:
                break
        assert sorted(listed) == sorted(mine)


def test_why_a_run_makes_room_names_no_other() -> None:
    waiting = Queued(f"{CANARY}/a", 5, ("1", 0), [2], False, 0, "", False)
    running = Running("mine/b", 0, "1", [1, 2], 2, False, stopping=False, growable=False, placed=True)
    for priority in (0, 5):
        result = plan([waiting], [Running(**{**vars(running), "priority": priority})], Capacity(2, 0))
        assert CANARY not in json.dumps([reason for _, reason in result.preemptions])
