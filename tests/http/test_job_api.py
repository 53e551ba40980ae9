"""Test the job API over storage; the tests write what the dispatcher and the drivers would write."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from genmodels.keys import Keys
from genmodels.runs.queue import Queue, notifications, write_queue
from genmodels.runs.records import State
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage
from services.jobs import operations
from services.jobs.views import job_state
from tests.support.asgi_client import refused
from tests.support.asgi_server import served
from tests.support.job_service import YAML, Service, spec
from tests.support.run_parts import write_metrics
from tests.support.storages import FailingStorage, MemoryStorage, in_threads


@pytest.fixture
def service(file_storage: Storage) -> Service:
    return Service(file_storage)


# Submitting


def test_a_job_from_submission_to_its_end(storage: Storage) -> None:
    service = Service(storage)
    response = service.post(spec("play", "a", "b", priority=7))
    assert response.status_code == 201
    view = response.json()
    job = view["job"]
    assert response.headers["location"] == f"/v1/jobs/{job}"
    assert (view["name"], view["priority"], view["state"], view["ended"]) == ("play", 7, "queued", None)
    assert [(run["model"], run["state"], run["max_steps"]) for run in view["models"]] == [
        ("a", "queued", 1000),
        ("b", "queued", 1000),
    ]
    assert service.show(job) == view

    service.queue({"cpus": 2, "gpus": 0}, (job, "b", "needs 1 CPU, 0 are free"))
    service.move(job, "a", "starting", "there is room", attempt=1, workers=2)
    service.move(job, "a", "running")
    service.heartbeat(job, "a", 1, phase="training", step=40, max_steps=1000, loss=1.25, seconds_left=61.5)
    a, b = service.show(job)["models"]
    assert (a["state"], a["attempt"], a["workers"], a["phase"], a["step"]) == ("running", 1, 2, "training", 40)
    assert (a["loss"], a["seconds_left"], a["reason"], len(a["history"])) == (1.25, 61.5, "test", 2)
    assert [change["state"] for change in a["history"]] == ["starting", "running"]
    assert (b["position"], b["wait"]) == (1, "needs 1 CPU, 0 are free")
    assert (a["position"], a["wait"]) == (None, None)
    assert service.show(job)["state"] == "running"

    service.end(job, "a", 1, {"val_loss": 0.5, "odd": math.nan}, outcome="succeeded", step=1000, version=3)
    service.move(job, "a", "succeeded", "published as a@3")
    service.move(job, "b", "failed", "model.latent_dim: too large")
    view = service.show(job)
    assert (view["state"], view["ended"]) == ("failed", view["models"][1]["history"][-1]["time"])
    a, b = view["models"]
    assert (a["step"], a["version"], a["alias"], a["metrics"]) == (
        1000,
        3,
        "production",
        {"val_loss": 0.5, "odd": None},
    )
    assert (a["phase"], a["seconds_left"]) == (None, None)
    assert (b["reason"], b["step"]) == ("model.latent_dim: too large", None)
    (listed,) = service("GET", "/v1/jobs").json()["data"]
    assert (listed["job"], listed["state"], listed["ended"]) == (job, "failed", view["ended"])
    assert service("DELETE", f"/v1/jobs/{job}").status_code == 204
    assert refused(service("GET", f"/v1/jobs/{job}"), 404)["code"] == "job_not_found"
    assert [key for key in storage.list("") if job in key and not key.startswith("gc/")] == []


def test_json_is_as_good_as_yaml(service: Service) -> None:
    response = service("POST", "/v1/jobs", spec("tests", "a"))
    assert response.status_code == 201
    stored = service.jobs.spec(response.json()["job"])
    assert (stored.name, stored.models[0].name, stored.models[0].family) == ("tests", "a", "vae")


def test_the_same_key_is_the_same_job(file_storage: Storage) -> None:
    keys = Keys(file_storage)
    one, other = ({"authorization": f"Bearer {keys.create(name, ('submit',))[1]}"} for name in ("one", "other"))
    service = Service(file_storage, keys)
    first = service.post(spec(), **{"idempotency-key": "k 1"}, **one)
    again = service.post(spec(), **{"idempotency-key": "k 1"}, **one)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    error = refused(service.post(spec("else"), **{"idempotency-key": "k 1"}, **one), 409)
    assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_conflict")
    stranger = service.post(spec(), **{"idempotency-key": "k 1"}, **other)
    assert (stranger.status_code, stranger.json()["job"] == first.json()["job"]) == (201, False)
    assert service.jobs.entry(first.json()["job"]).caller == keys.list()[0].id
    assert len(service.jobs.open()) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9".encode("latin-1"), "a\tb"])
def test_an_idempotency_key_is_short_and_printable(service: Service, key: Any) -> None:
    error = refused(service.post(spec(), **{"idempotency-key": key}), 400)
    assert error["param"] == "idempotency-key"
    assert service.jobs.open() == []


def test_a_hundred_submissions_with_one_key_are_one_job(file_storage: Storage) -> None:
    service = Service(file_storage)
    with served(service.app) as url:
        body = yaml.safe_dump(spec()).encode()

        def submit(_: int) -> tuple[int, str]:
            response = httpx.post(
                f"{url}/v1/jobs", content=body, headers={**YAML, "idempotency-key": "one"}, timeout=60
            )
            return response.status_code, response.json()["job"]

        answers = in_threads(100, submit)
    assert sorted({status for status, _ in answers}) == [200, 201]
    assert len({job for _, job in answers}) == 1
    assert service.jobs.open() == [answers[0][1]]


def test_a_pool_that_does_not_exist_is_refused(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect that a changed file of the pools counts at once, and that a dry run says the same."""
    (tmp_path / "pools.yaml").write_text("pools: [{name: default}]")
    monkeypatch.setenv("GENMODELS_POOLS", str(tmp_path / "pools.yaml"))
    body = spec()
    body["models"][0]["serve"] = {"pool": "gpu"}
    for query in ("", "?dry_run=true"):
        error = refused(service.post(body, query), 400)
        assert (error["param"], error["code"]) == ("models[0].serve.pool", "invalid_spec")
        assert error["message"] == "models[0].serve.pool: got 'gpu', expected one of default"
    assert service.jobs.open() == []
    (tmp_path / "pools.yaml").write_text("pools: [{name: default}, {name: gpu, gpus: 1}]")
    assert service.post(body).status_code == 201


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"name": "Not A Label"}, "name", "lower-case"),
        ({"priority": "high"}, "priority", "a whole number"),
        ({"prio": 1}, "prio", "did you mean 'priority'"),
        ({"models": []}, "models", "at least 1"),
        ({"models": [{"name": "a"}]}, "models[0].data", "missing"),
    ],
)
def test_a_wrong_field_is_named(service: Service, change: dict[str, Any], param: str, says: str) -> None:
    error = refused(service.post({**spec(), **change}), 400)
    assert (error["param"], error["code"]) == (param, "invalid_spec")
    assert error["message"].startswith("spec:")
    assert says in error["message"]
    assert service.storage.list("") == []


def test_deep_in_a_model_too(service: Service) -> None:
    document = spec("x", "a", "b")
    document["models"][1]["train"] = {"max_step": 5}
    error = refused(service.post(document), 400)
    assert error["param"] == "models[1].train.max_step"
    document["models"][1] = {**spec()["models"][0], "model": {"family": "vae", "latent_dim": 0}}
    assert refused(service.post(document), 400)["param"] == "models[1].model.latent_dim"


def test_a_path_is_refused_and_never_looked_at(service: Service, tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("x" * 5000)
    messages = set()
    for path in (tmp_path, tmp_path / "play.txt", tmp_path / "nothing", "relative", "~"):
        document = spec()
        document["models"][0]["data"] = {"path": str(path), "image_size": 16}
        error = refused(service.post(document), 400)
        assert error["param"] == "models[0].data.path"
        assert "genmodels data add" in error["message"]
        messages.add(error["message"])
    assert len(messages) == 1


def test_what_training_starts_from_has_to_be_there(service: Service) -> None:
    document = spec()
    document["models"][0]["train"] = {"init_from": "digits-vae@3"}
    error = refused(service.post(document), 400)
    assert error["param"] == "models[0].train.init_from"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/yaml", 201),
        ("application/x-yaml", 201),
        ("text/yaml; charset=utf-8", 201),
        ("application/json", 201),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
    ],
)
def test_no_type_that_a_form_sends_is_taken(service: Service, content_type: str, status: int) -> None:
    body = json.dumps(spec()).encode()
    response = service("POST", "/v1/jobs", content=body, headers={"content-type": content_type})
    assert response.status_code == status
    if status == 415:
        assert "application/yaml" in refused(response, 415)["message"]


def test_a_body_is_at_most_64_kib(service: Service) -> None:
    text = yaml.safe_dump(spec()).encode()
    padded = text + b"#" * (65_536 - len(text))
    assert service.post(padded).status_code == 201
    assert refused(service.post(padded + b"#"), 413)["code"] == "body_too_large"
    for path in ("cancel", "resume"):
        assert refused(service("POST", f"/v1/jobs/x/{path}", b"{" + b" " * 65_536 + b"}"), 413)


def test_a_misspelt_parameter_is_no_submission(service: Service) -> None:
    error = refused(service.post(spec(), "?dry-run=true"), 400)
    assert (error["param"], service.storage.list("")) == ("dry-run", [])
    assert refused(service.post(spec(), "?dry_run=maybe"), 400)["param"] == "dry_run"


def test_nothing_of_a_spec_is_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service.post(spec("canary"))
    service.post({**spec("canary"), "canary": "canary"})
    service.post(b"\xff canary")
    mine = [record.getMessage() for record in caplog.records if not record.name.startswith(("asyncio", "httpx"))]
    assert "canary" not in "".join(mine)


# Dry runs


def test_a_dry_run_says_what_would_be_and_does_nothing(service: Service) -> None:
    document = spec("x", "a", "b", priority=3)
    document["models"][0]["scaling"] = {"num_workers": {"min": 1, "max": 4}}
    document["models"][0]["train"] = {"max_steps": 300, "batch_size": 64, "ema": 0.9}
    document["models"][1]["scaling"] = {"num_workers": 4}
    service.queue({"cpus": 2, "gpus": 0})
    before = service.storage.list("")
    response = service.post(document, "?dry_run=true")
    assert (response.status_code, response.headers.get("location")) == (200, None)
    assert service.storage.list("") == before
    report = response.json()
    assert (report["name"], report["priority"]) == ("x", 3)
    a, b = report["models"]
    assert (a["model"], a["family"], a["dataset"], a["max_steps"]) == ("a", "vae", "digits", 300)
    assert (a["workers"], a["fits"], a["notes"]) == ([1, 4], True, [])
    assert (a["samples"], a["epochs"]) == (4500, round(300 * 64 / 4500, 2))
    assert b["workers"] == [4, 4]
    assert b["fits"] is False
    assert "needs 4 CPUs" in b["notes"][0]


def test_the_size_of_a_cluster_may_be_unknown(service: Service) -> None:
    (report,) = service.post(spec(), "?dry_run=true").json()["models"]
    assert report["fits"] is None
    assert "not known yet" in report["notes"][0]


@pytest.mark.parametrize("family", ["autoencoder", "vae", "gan", "minigpt"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimated_size_of_a_checkpoint_is_right(
    service: Service, tmp_path: Path, family: str, optimizer: str
) -> None:
    import torch

    from genmodels import models
    from genmodels.checkpoint import TensorFile, optimizer_tensors
    from genmodels.data import DataConfig, open_dataset

    document = spec()
    dataset = "shakespeare" if family == "minigpt" else "digits"
    document["models"][0] |= {
        "model": {"family": family},
        "data": {"dataset": dataset},
        "train": {"optimizer": optimizer},
    }
    (report,) = service.post(document, "?dry_run=true").json()["models"]

    cls = models.load(family)
    built = cls(cls.Config(), open_dataset(DataConfig(dataset=dataset)).info)
    roles = built.roles(parse_spec(yaml.safe_dump(document).encode(), "x").models[0].train)
    for role in roles:
        for parameter in role.loss.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for one in role.optimizers:
            one.step()
    parts = [built.network.state_dict(), *(role.loss.state_dict() for role in roles)]
    parts += [optimizer_tensors(one.state_dict()) for role in roles for one in role.optimizers]
    size = sum(len(TensorFile.like(part).data) for part in parts)
    assert report["checkpoint_bytes"] == pytest.approx(size, rel=0.05)
    assert report["parameters"] == sum(p.numel() for role in roles for p in role.loss.parameters())


def test_a_giant_is_counted_without_being_built(service: Service) -> None:
    document = spec()
    document["models"][0] |= {
        "model": {"family": "minigpt", "n_layer": 128, "n_embd": 16384, "n_head": 128, "block_size": 65536},
        "data": {"dataset": "shakespeare"},
    }
    (report,) = service.post(document, "?dry_run=true").json()["models"]
    assert report["parameters"] > 4e11
    assert report["checkpoint_bytes"] > 4 * 4e11
    assert report["serving_bytes"] > 8 * 4e11
    assert report["servable"] is False
    assert "a model host has 2.0 GiB; lower it, and" in report["notes"][-1]


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ({"family": "minigpt", "block_size": 65536}, "block_size"),
        ({"family": "minigpt", "block_size": 16384, "n_layer": 12}, "block_size"),
        ({"family": "minigpt", "n_layer": 128, "n_embd": 16384, "n_head": 128, "block_size": 65536}, "block_size"),
    ],
)
def test_what_no_host_can_serve_is_not_submitted(service: Service, model: dict[str, Any], setting: str) -> None:
    document = spec("x", "fine", "large")
    document["models"][1] |= {"model": model, "data": {"dataset": "shakespeare"}}
    path = f"models[1].model.{setting}"
    answer = service.post(document)
    error = refused(answer, 400)
    assert (error["param"], error["code"]) == (path, "invalid_spec")
    assert re.match(rf"{re.escape(path)}: got \d+: it takes [\d,.]+ GiB of memory to serve, and a", error["message"])
    assert service.storage.list("jobs") == []
    assert service.post(spec("x", "fine")).status_code == 201


def test_what_no_worker_can_train_is_not_submitted(service: Service) -> None:
    """The workers' memory is known from the dispatcher; without it the attempt itself refuses the model."""
    document = spec("x", "fine", "large")
    document["models"][1] |= {"model": {"family": "minigpt", "n_embd": 1024}, "data": {"dataset": "shakespeare"}}
    write_queue(service.storage, Queue(worker_memory={"cpus": 2**29}))
    error = refused(service.post(document), 400)
    assert (error["param"], error["code"]) == ("models[1].model.n_embd", "invalid_spec")
    assert re.search(
        r"it takes 1\.\d GiB of memory to train .*, and a worker has 0\.5 GiB; write at most", error["message"]
    )
    assert service.storage.list("jobs") == []
    fine, large = service.post(document, "?dry_run=true").json()["models"]
    assert (fine["fits"], large["fits"]) == (None, False)
    assert error["message"].removeprefix("models[1].") in large["notes"]
    write_queue(service.storage, Queue())
    assert service.post(document).status_code == 201


# Lists


def test_states_of_runs_make_the_state_of_their_job() -> None:
    cases: list[tuple[list[State], State]] = [
        (["succeeded", "succeeded"], "succeeded"),
        (["failed", "publishing"], "running"),
        (["failed", "starting"], "running"),
        (["failed", "queued"], "queued"),
        (["cancelled", "failed", "succeeded"], "failed"),
        (["cancelled", "succeeded"], "cancelled"),
    ]
    assert [job_state(states) for states, _ in cases] == [state for _, state in cases]


def test_pages_lead_through_all_jobs_newest_first() -> None:
    service = Service(MemoryStorage())
    ended = {service.submit("m", name=f"e{i}") for i in range(5)}
    for job in ended:
        service.move(job, "m", "cancelled")
    opened = {service.submit("m", name=f"o{i}") for i in range(4)}

    def walk(limit: int, state: str) -> list[str]:
        collected: list[Any] = []
        query = {"limit": str(limit), "state": state}
        while True:
            page = service("GET", "/v1/jobs", params=query).json()
            assert len(page["data"]) <= limit
            collected += page["data"]
            assert len(collected) <= 9
            if not page["next"]:
                break
            query["after"] = page["next"]
        times = [view["ended"] or "z" + view["submitted"] for view in collected]
        assert times == sorted(times, reverse=True)
        return [view["job"] for view in collected]

    whole = walk(100, "all")
    assert (set(whole[:4]), set(whole[4:])) == (opened, ended)
    for limit in (1, 2, 3, 4, 5, 8, 9):
        assert walk(limit, "all") == whole
        assert walk(limit, "open") == whole[:4]
        assert walk(limit, "ended") == whole[4:]
    last = service("GET", "/v1/jobs?state=ended&limit=1").json()["data"][0]
    assert (last["state"], last["models"][0]["state"]) == ("cancelled", "cancelled")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("state=running", "state"),
        ("after=../..", "after"),
        ("after=ended!../../keys", "after"),
        ("page=2", "page"),
    ],
)
def test_a_wrong_query_is_named(service: Service, query: str, param: str) -> None:
    assert refused(service("GET", f"/v1/jobs?{query}"), 400)["param"] == param


@pytest.mark.parametrize("job", ["nothing-00000000", "NO", "..", "%2e%2e%2fkeys", "a%00b", "x" * 300, "\u00fc", "-a"])
def test_an_unknown_job_is_404(service: Service, job: str) -> None:
    for method, rest in (("GET", ""), ("GET", "/logs"), ("GET", "/metrics"), ("POST", "/cancel"), ("POST", "/resume")):
        refused(service(method, f"/v1/jobs/{job}{rest}"), 404)
    refused(service("DELETE", f"/v1/jobs/{job}"), 404)


# Commands


def test_cancelling_leaves_one_command_for_each_run(service: Service) -> None:
    job = service.submit("a", "b", "c")
    service.move(job, "a", "running", attempt=2)
    service.move(job, "c", "succeeded", attempt=1)
    for _ in range(3):
        response = service("POST", f"/v1/jobs/{job}/cancel")
        assert (response.status_code, response.json()["job"]) == (200, job)
    commands_of = {model: Run(service.storage, job, model).commands() for model in "abc"}
    assert [[(w.action, w.attempt, w.then, w.reason) for w in commands] for commands in commands_of.values()] == [
        [("stop", 2, "cancelled", "cancelled by hand")],
        [("stop", 0, "cancelled", "cancelled by hand")],
        [],
    ]
    assert {notification[:2] for notification in notifications(service.jobs.storage)} == {(job, "a"), (job, "b")}

    service("POST", f"/v1/jobs/{job}/cancel", {"now": True, "models": ["a"]})
    assert [command.action for command in Run(service.storage, job, "a").commands()] == ["stop", "kill"]
    assert [command.action for command in Run(service.storage, job, "b").commands()] == ["stop"]


class CountingStorage(MemoryStorage):
    def __init__(self) -> None:
        super().__init__()
        self.gets: Counter[str] = Counter()

    def get(self, key: str) -> tuple[bytes, str]:
        self.gets[key] += 1
        return super().get(key)


@pytest.mark.parametrize("action", ["cancel", "resume"])
def test_a_command_reads_each_object_once(action: str) -> None:
    storage = CountingStorage()
    service = Service(storage)
    job = service.submit("a", "b")
    for model in "ab":
        service.move(job, model, "running", attempt=1)
    service.move(job, "a", "failed")
    storage.gets.clear()
    assert service("POST", f"/v1/jobs/{job}/{action}").status_code == 200
    read = [f"jobs/{job}/spec.json", f"open/{job}", *(f"runs/{job}/{model}/status.json" for model in "ab")]
    assert {key: storage.gets[key] for key in read} == dict.fromkeys(read, 1) | {
        f"open/{job}": 2 if action == "resume" else 1  # `reopen` reads again before it writes
    }


def test_a_command_says_whose_it_is(file_storage: Storage) -> None:
    keys = Keys(file_storage)
    headers = {"authorization": f"Bearer {keys.create('ann', ('submit',))[1]}"}
    service = Service(file_storage, keys)
    job = service.post(spec("x", "a"), **headers).json()["job"]
    service("POST", f"/v1/jobs/{job}/cancel", headers=headers)
    (command,) = Run(file_storage, job, "a").commands()
    assert command.reason == "cancelled by key 'ann'"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"now": 1}, 400, "now"),
        ({"models": "a"}, 400, "models"),
        ({"models": ["z"]}, 404, "model"),
        ({"modles": ["a"]}, 400, "modles"),
        ([], 400, None),
    ],
)
def test_a_wrong_command_is_refused(service: Service, body: Any, status: int, param: str | None) -> None:
    job = service.submit("a")
    assert refused(service("POST", f"/v1/jobs/{job}/cancel", body), status)["param"] == param
    assert Run(service.storage, job, "a").commands() == []


def test_resuming_reopens_what_failed_or_was_cancelled(service: Service) -> None:
    job = service.submit("a", "b", "c")
    assert refused(service("POST", f"/v1/jobs/{job}/resume"), 409)["code"] == "nothing_to_resume"
    service.move(job, "a", "failed", attempt=3)
    service.move(job, "b", "cancelled", attempt=1)
    service.move(job, "c", "succeeded", attempt=1)
    assert service.jobs.open() == []
    assert refused(service("POST", f"/v1/jobs/{job}/resume", {"models": ["c"]}), 409)
    for _ in range(2):
        assert service("POST", f"/v1/jobs/{job}/resume").status_code == 200
    assert service.jobs.open() == [job]
    commands_of = {model: Run(service.storage, job, model).commands() for model in "abc"}
    assert {model: [(w.action, w.attempt) for w in commands] for model, commands in commands_of.items()} == {
        "a": [("resume", 3)],
        "b": [("resume", 1)],
        "c": [],
    }
    assert {notification[:2] for notification in notifications(service.jobs.storage)} == {(job, "a"), (job, "b")}


def test_an_open_job_is_not_deleted(service: Service) -> None:
    job = service.submit("a")
    assert "cancel it first" in refused(service("DELETE", f"/v1/jobs/{job}"), 409)["message"]
    assert service.show(job)["job"] == job


# Metrics of a run


@pytest.mark.parametrize("source", ["7", "2", "9999"])
def test_logs_of_a_worker_that_cannot_be_are_404(service: Service, source: str) -> None:
    document = spec("test", "a")
    document["models"][0]["scaling"] = {"num_workers": 2}
    job = service.post(document).json()["job"]
    error = refused(service("GET", f"/v1/jobs/{job}/logs?source={source}"), 404)
    assert error["param"] == "source"
    assert error["message"] == f"source: got '{source}'; expected driver, or the workers 0 to 1"
    for there in ("driver", "0", "1"):
        assert service("GET", f"/v1/jobs/{job}/logs?source={there}").status_code == 200


def test_metrics_are_rows_of_the_chain(service: Service) -> None:
    job = service.submit("a", "b")
    run = Run(service.storage, job, "a")
    run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": 10, "loss": 2.0}, {"step": 20, "loss": math.nan}])
    body = service("GET", f"/v1/jobs/{job}/metrics?model=a").json()
    assert body == {"model": "a", "data": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": "nan"}]}
    later = service("GET", f"/v1/jobs/{job}/metrics?model=a&after=10").json()
    assert [row["step"] for row in later["data"]] == [20]
    assert service("GET", f"/v1/jobs/{job}/metrics?model=b").json()["data"] == []
    error = refused(service("GET", f"/v1/jobs/{job}/metrics"), 400)
    assert (error["param"], "a, b" in error["message"]) == ("model", True)
    assert refused(service("GET", f"/v1/jobs/{job}/metrics?model=z"), 404)


# When the store is away


def test_an_outage_is_503_and_tells_nothing_of_the_store(caplog: pytest.LogCaptureFixture) -> None:
    storage = FailingStorage()
    service = Service(storage)
    job = service.submit("a")
    storage.away = True
    requests = [
        ("GET", "/v1/jobs"),
        ("GET", f"/v1/jobs/{job}"),
        ("POST", f"/v1/jobs/{job}/cancel"),
        ("GET", "/v1/models"),
    ]
    for method, path in [*requests, ("GET", f"/v1/jobs/{job}/logs"), ("GET", "/v1/datasets")]:
        response = service(method, path)
        error = refused(response, 503)
        assert (error["code"], response.headers["retry-after"]) == ("storage_away", "1")
        assert "memory" not in error["message"]
    assert refused(service.post(spec()), 503)
    assert "Traceback" not in caplog.text
    assert service("GET", "/healthz").status_code == 200
    storage.away = False
    assert service.show(job)["state"] == "queued"


def test_what_breaks_is_500_and_neither_log_nor_answer_quotes_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(operations, "parse_spec", broken)
    error = refused(service.post(spec()), 500)
    assert "canary" not in error["message"]
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text
