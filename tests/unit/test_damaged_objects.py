"""Test that a damaged object affects no other: every kind of stored object, damaged in every way, among intact ones.

Results for the other objects must stay the same. The damaged object itself gives one clear error, or is shown
as damaged, is counted, and stands in `genmodels doctor`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.data import uploads
from genmodels.doctor.inventory import DOCUMENTS, kind_of, take_inventory
from genmodels.errors import DamagedObject, GenmodelsError, LeaseLost
from genmodels.family import EvaluationResult
from genmodels.keys import Keys
from genmodels.metrics import DAMAGED
from genmodels.registry import references
from genmodels.registry.catalogue import Catalogue, shard_of
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs, StoredSpec
from genmodels.runs.log_lines import log_lines
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.queue import read_queue
from genmodels.runs.records import Heartbeat, Result, State
from genmodels.runs.store import Run
from genmodels.storage import Storage, documents, load_document, open_storage
from genmodels.storage.lease import Lease
from services.dispatch.dispatcher import Dispatcher
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.http.auth import require_keys
from tests.support.job_service import Service
from tests.support.metric_values import series
from tests.support.published_models import publish, save_checkpoint
from tests.support.run_parts import write_log, write_metrics
from tests.support.scripted_cluster import Cluster
from tests.support.watched_hosts import watch

LIMIT = 40_000  # document size in these tests, in bytes, so that a huge one is written quickly


class World:
    """Hold a storage with two objects of each kind: the damaged one, and the other."""

    def __init__(self, folder: Path) -> None:
        self.storage: Storage = open_storage(folder.as_uri())
        self.service = Service(self.storage)

    def fill(self, data: Path) -> dict[str, str]:
        """Return the key of each kind's victim, by its document's class name, and the names of the others."""
        storage, service = self.storage, self.service
        victim, _ = Keys(storage).create("victim", ("submit",))
        _, self_token = Keys(storage).create("other", ("submit",))
        for name in ("bad", "good"):
            version = publish(storage, name, "vae", step=1)
            Registry(storage).catalogue.ensure()
            Registry(storage).record_evaluation(version, EvaluationResult(), thorough=False, seconds=1.0)
            (data / f"{name}.txt").write_text(f"the text of {name}\n" * 400)
            uploads.add(storage, f"{name}-text", data / f"{name}.txt")
        (evaluation,) = storage.list("models/bad/evaluations/")
        lease = Registry(storage).gc_lease("bad")
        lease.try_acquire()
        lease.release()
        jobs = {}
        for name in ("bad", "good"):
            ended = service.submit("m", name=f"{name}-ended")
            service.move(ended, "m", "failed")
            jobs[f"{name}-ended"] = ended
            from tests.support.job_service import spec

            header = {"idempotency-key": name}
            jobs[name] = service.post(spec(f"{name}-open", "m", "n"), **header).json()["job"]
        running = Run(storage, jobs["bad"], "m")
        service.move(jobs["bad"], "m", "starting", attempt=1)
        running.start_attempt(1, None, 1)
        running.write_heartbeat(1, Heartbeat(phase="training", step=3))
        running.write_result(1, Result(outcome="stopped", step=3))
        running.send_command("stop", 1, "asked")
        write_metrics(running, 1, [{"step": 1, "loss": 0.5, "seconds": 1.0}])
        save_checkpoint(storage, jobs["bad"], "m", "vae", step=3)
        references.resolve_reference(f"m@{jobs['bad']}:step-3", storage)
        service.queue({"cpus": 1, "gpus": 0}, (jobs["bad"], "n", "waits"))
        storage.put("dispatcher/lease.json", json.dumps({"term": 5, "holder": "someone"}).encode())
        (submission, _) = sorted(storage.list("idempotency/"))
        attempt = f"runs/{jobs['bad']}/m/attempt-1"
        sha256 = uploads.find(storage, "bad-text").sha256
        (ended_key,) = (key for key in storage.list("ended/") if key.endswith(jobs["bad-ended"]))
        keys = {
            "Key": f"keys/{victim.id}.json",
            "StoredSpec": f"jobs/{jobs['bad']}/spec.json",
            "Index": f"jobs/{jobs['bad-ended']}/index.json",
            "Entry": f"open/{jobs['bad']}",
            "EndedEntry": ended_key,
            "Submission": submission,
            "LeaseDocument": "dispatcher/lease.json",
            "Queue": "dispatcher/queue.json",
            "Status": f"runs/{jobs['bad']}/m/status.json",
            "Command": f"runs/{jobs['bad']}/m/commands/00000001.json",
            "Pin": f"runs/{jobs['bad']}/m/pins/step-00000003.json",
            "AttemptStart": f"{attempt}/start.json",
            "Heartbeat": f"{attempt}/heartbeat.json",
            "Result": f"{attempt}/result.json",
            "Manifest": f"{attempt}/checkpoints/step-00000003/manifest.json",
            "Version": "models/bad/versions/00000001.json",
            "Alias": "models/bad/aliases/production.json",
            "Published": "models/bad/published/test-00000000.attempt-1.step-1.json",
            "Shard": f"catalogue/{shard_of('bad')}.json",
            "Head": "catalogue/head.json",
            "Evaluation": evaluation,
            "Current": "datasets/bad-text/current.json",
            "StoredDataset": f"datasets/bad-text/{sha256}/dataset.json",
        }
        return {**keys, "job": jobs["good"], "ended": jobs["good-ended"], "token": self_token}

    def others(self, names: dict[str, str]) -> dict[str, Any]:
        """Return the results of all requests that do not concern the damaged object."""
        storage, service = self.storage, self.service
        listed = {job["job"]: job for job in self.get("/v1/jobs")["data"]}
        key = require_keys(storage).check(names["token"])
        pages = self.get("/v1/jobs?state=ended&limit=1"), self.get("/v1/jobs?limit=100")
        return {
            "jobs": {name: listed[names[name]] for name in ("job", "ended")},
            "job": service.show(names["job"]),
            "paged": names["ended"] in {job["job"] for page in pages for job in page["data"]} | set(listed),
            "model": next(model for model in self.get("/v1/models")["data"] if model["name"] == "good"),
            "dataset": next(one for one in self.get("/v1/datasets")["data"] if one["name"] == "good-text"),
            "key": key and key.name,
            "metrics": "genmodels_storage_up 1.0" in service("GET", "/metrics").text,
        }

    def get(self, path: str) -> Any:
        response = self.service("GET", path)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("template")
    world = World(folder / "storage")
    names = world.fill(folder)
    return folder / "storage", names, world.others(names)


@pytest.fixture
def world(template: tuple[Path, dict[str, str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", LIMIT)
    shutil.copytree(template[0], tmp_path / "storage")
    return World(tmp_path / "storage")


def wrong_types(sound: bytes) -> bytes:
    names = json.loads(sound) if sound[:1] == b"{" else ("models",)
    return json.dumps({name: {"x": [1]} for name in names}).encode()


def deep_within(sound: bytes) -> bytes:
    document = json.loads(sound) if sound[:1] == b"{" else {"name": "x"}
    return json.dumps({**document, "more": "here"}).replace('"here"', "[" * 500 + "]" * 500).encode()


SURE: dict[str, Callable[[bytes], bytes]] = {  # damage for every kind of object
    "empty": lambda sound: b"",
    "zeros": lambda sound: b"\0" * 200,
    "cut": lambda sound: sound[: len(sound) // 2].rpartition(b"\n")[0] or sound[: len(sound) // 2],
    "text": lambda sound: b"Dear diary",
    "not UTF-8": lambda sound: b"\xff\xfe\xfd" + sound[3:],
    "a list": lambda sound: b"[]",
    "a number": lambda sound: b"7",
    "null": lambda sound: b"null",
    "deep": lambda sound: b"[" * 200_000,
    "deep objects": lambda sound: b'{"a":' * 100_000,
    "wrong types": wrong_types,
    "deep within": deep_within,
    "huge": lambda sound: sound.rstrip() + b" " * LIMIT if sound[:1] == b"{" else b"#" * 2**24,
}
MAYBE: dict[str, Callable[[bytes], bytes]] = {  # damage only for some kinds
    "an empty object": lambda sound: b"{}",
    "an unknown word": lambda sound: sound.replace(b'"starting"', b'"dreaming"').replace(b'"submit"', b'"reign"'),
    "other numbers": lambda sound: sound.replace(b": 1", b": -1").replace(b": 3", b": 1e999"),
    "long numbers": lambda sound: sound.replace(b": 1", b": 1" + b"0" * 400),
    "half a character": lambda sound: sound.replace(b'": "', b'": "\\ud800'),
    "no times": lambda sound: sound.replace(b"+00:00", b""),
}


def some_long(all_of_them: list[str], *quick: str) -> list[Any]:
    """Return all ways; those not among the quick ones are marked as long."""
    return [how if how in quick else pytest.param(how, marks=pytest.mark.long) for how in all_of_them]


MENDED = ("Shard", "Head")  # a service that starts builds them again
DOCUMENTS_BY_NAME = {kind.__name__: kind for _, kind in DOCUMENTS}
KINDS = list(DOCUMENTS_BY_NAME)


def test_every_kind_of_document_is_tried(template: tuple[Path, dict[str, str], Any]) -> None:
    _, names, _ = template
    assert {name: type_of(names[name]) for name in KINDS} == {name: name for name in KINDS}


def type_of(key: str) -> str:
    kind = kind_of(key)
    return kind.__name__ if kind else ""


@pytest.mark.parametrize("how", some_long([*SURE, *MAYBE], "empty", "wrong types", "deep"))
@pytest.mark.parametrize("kind", KINDS)
def test_others_get_what_they_got(
    template: tuple[Path, dict[str, str], dict[str, Any]], world: World, kind: str, how: str
) -> None:
    _, names, expected = template
    key = names[kind]
    sound = world.storage.get(key)[0]
    spoiled = {**SURE, **MAYBE}[how](sound)
    world.storage.put(key, spoiled)
    before = sum(series(DAMAGED).values())
    assert world.others(names) == expected
    damages = take_inventory(world.storage).damages
    assert [damage.key for damage in damages] == [key] or ((how in MAYBE or kind in MENDED) and not damages)
    if damages:
        assert damages[0].what
        assert damages[0].remedy
        assert sum(series(DAMAGED).values()) > before or "missing" in damages[0].what
    read_alone(world, names, kind)


def read_alone(world: World, names: dict[str, str], kind: str) -> None:
    """Read the damaged object itself: the result is clear, and all errors are our own."""
    bad = names["StoredSpec"].split("/")[1]
    paths = {
        "StoredSpec": f"/v1/jobs/{bad}",
        "Entry": f"/v1/jobs/{bad}",
        "Status": f"/v1/jobs/{bad}",
        "AttemptStart": f"/v1/jobs/{bad}/metrics?model=m",
        "Version": "/v1/models/bad/versions/1",
        "Index": f"/v1/jobs/{names['Index'].split('/')[1]}",
    }
    if path := paths.get(kind):
        response = world.service("GET", path)
        if response.status_code != 200:
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "object_damaged"
            assert names[kind] in response.json()["error"]["message"]
            assert str(world.storage.url) not in response.text
    if kind == "Status":
        runs = {run["model"]: run["state"] for run in world.get(f"/v1/jobs/{bad}")["models"]}
        assert runs["m"] in ("damaged", "starting")
        assert runs["n"] == "queued"


@pytest.mark.parametrize("how", [*SURE, *MAYBE])
def test_reading_raises_one_kind_of_error(template: tuple[Path, dict[str, str], Any], world: World, how: str) -> None:
    _, names, _ = template
    for kind in {*DOCUMENTS_BY_NAME.values()} - {StoredSpec, Manifest}:
        key = names[kind.__name__]
        world.storage.put(key, {**SURE, **MAYBE}[how](world.storage.get(key)[0]))
        error = error_of(partial(load_document, world.storage, key, kind))
        assert error or how in MAYBE, kind
        if error:
            assert error.startswith(f"{key}: damaged (")
            assert kind.remedy in error
            assert len(error) < 700


def error_of(work: Callable[[], object]) -> str:
    """Return the message of a DamagedObject; let any other exception through."""
    try:
        work()
    except DamagedObject as error:
        return str(error)
    return ""


# One field of an object has a value of the right type that no writer of ours gives it.

ODD: list[Any] = ["", "../../x", "x" * 300, "0001-01-01T00:00:00+14:00", 2**62, -1, 0, [], {}]
QUICK = {("Entry", "models"), ("EndedEntry", "job"), ("LeaseDocument", "term"), ("Status", "lease_term")}


def odd_fields(sound: bytes) -> list[tuple[str, Any]]:
    """Return each field with each odd value of its type; lists and objects also with odd values inside."""
    odd: list[tuple[str, Any]] = []
    for name, value in json.loads(sound).items():
        odd += [(name, other) for other in ODD if type(other) is type(value) and name != "nonce"]
        if isinstance(value, list):
            odd += [(name, [other]) for other in ODD]
        if isinstance(value, dict):
            odd += [(name, {**value, "x": other}) for other in ODD]
    return odd


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in dict(QUICK) else pytest.mark.long) for kind in KINDS]
)
def test_an_odd_value_in_one_field_is_in_no_others_way(
    template: tuple[Path, dict[str, str], dict[str, Any]], world: World, kind: str
) -> None:
    _, names, expected = template
    sound = world.storage.get(names[kind])[0]
    for name, value in odd_fields(sound) if kind != "StoredSpec" else ():
        if kind in dict(QUICK) and (kind, name) not in QUICK:
            continue
        world.storage.put(names[kind], json.dumps({**json.loads(sound), name: value}).encode())
        afresh = World(Path(world.storage.url.removeprefix("file://")))
        assert afresh.others(names) == expected, (name, value)
        read_alone(afresh, names, kind)


@pytest.mark.parametrize("kind", ["LeaseDocument", "Status"])
@pytest.mark.parametrize("term", [2**62, 2**53 - 1, 2**40])
def test_a_lease_term_that_nothing_could_follow_is_damage(
    template: tuple[Path, dict[str, str], Any], world: World, kind: str, term: int
) -> None:
    _, names, _ = template
    field = {"LeaseDocument": "term", "Status": "lease_term"}[kind]
    sound = json.loads(world.storage.get(names[kind])[0])
    world.storage.put(names[kind], json.dumps({**sound, field: term}).encode())
    dispatcher = Dispatcher(world.storage, Cluster(world.storage), Lease(world.storage, 0.01))
    lease_term = acquired(dispatcher)
    assert lease_term < 100
    for _ in range(40):
        dispatcher.dispatch_once(lease_term)
    states = {model: Run(world.storage, names["job"], model).status()[0].state for model in ("m", "n")}
    assert states == {"m": "succeeded", "n": "succeeded"}


# ---- dispatching


OF_JOBS = [
    "StoredSpec", "Index", "Entry", "EndedEntry", "Submission", "LeaseDocument", "Queue", "Status", "Command", "Pin",
    "AttemptStart", "Heartbeat", "Result", "Manifest",
]  # fmt: skip


@pytest.mark.parametrize("how", some_long([*SURE, "an empty object"], "empty", "wrong types"))
@pytest.mark.parametrize("kind", OF_JOBS)
def test_dispatching_goes_on(template: tuple[Path, dict[str, str], Any], world: World, kind: str, how: str) -> None:
    _, names, _ = template
    sound = world.storage.get(names[kind])[0]
    world.storage.put(names[kind], {**SURE, **MAYBE}[how](sound))
    dispatcher = Dispatcher(world.storage, Cluster(world.storage), Lease(world.storage, 0.01))
    lease_term = acquired(dispatcher)
    for _ in range(40):
        dispatcher.dispatch_once(lease_term)
        if names["job"] not in Jobs(world.storage).open():
            break
    states = {model: Run(world.storage, names["job"], model).status()[0].state for model in ("m", "n")}
    assert states == {"m": "succeeded", "n": "succeeded"}
    assert read_queue(world.storage).capacity == {"cpus": 4, "gpus": 0}
    if kind == "Status" and how != "an empty object":
        bad = names["StoredSpec"].split("/")[1]
        assert Run(world.storage, bad, "n").status()[0].state == "succeeded", "the other model of the same job goes on"
        assert bad in Jobs(world.storage).open(), "the job stays open while a run of it cannot be read"
        with pytest.raises(DamagedObject):
            Run(world.storage, bad, "m").status()
        world.storage.put(names[kind], sound)  # restored from a backup
        dispatcher._unreadable[bad] = 0.0  # as after RETRY_SECONDS
        for _ in range(40):
            dispatcher.dispatch_once(lease_term)
        assert Run(world.storage, bad, "m").status()[0].lease_term == lease_term
        assert bad not in Jobs(world.storage).open()


@pytest.mark.parametrize("state", get_args(State))
def test_a_status_without_its_history_stops_no_other_run(
    template: tuple[Path, dict[str, str], Any], world: World, state: str
) -> None:
    _, names, _ = template
    world.storage.put(names["Status"], json.dumps({"state": state, "attempt": 1}).encode())
    dispatcher = Dispatcher(world.storage, Cluster(world.storage))
    for _ in range(40):
        dispatcher.dispatch_once(9)
    states = {model: Run(world.storage, names["job"], model).status()[0].state for model in ("m", "n")}
    assert states == {"m": "succeeded", "n": "succeeded"}
    assert names["job"] not in Jobs(world.storage).open()


@pytest.mark.parametrize("spoiled", [b"", b"{", b'{"term": -4, "holder": ""}', None])
def test_lease_terms_grow_beyond_what_a_lost_lease_had_given(
    template: tuple[Path, dict[str, str], Any], world: World, spoiled: bytes | None
) -> None:
    storage, (_, names, _) = world.storage, template
    jobs = Jobs(storage)
    for job, lease_term in ((names["job"], 7), (names["ended"], 12)):
        run = Run(storage, job, "m")
        status, etag = run.status()
        run.write_status(status.model_copy(update={"lease_term": lease_term}), etag)
    if spoiled is None:
        storage.delete("dispatcher/lease.json")
    else:
        storage.put("dispatcher/lease.json", spoiled)
    dispatcher = Dispatcher(storage, Cluster(storage), Lease(storage, 0.01))
    assert acquired(dispatcher) == 8, "one more than the highest that stands in an open run"
    jobs.reopen(names["ended"])
    with pytest.raises(LeaseLost) as lost:
        dispatcher.dispatch_once(8)
    dispatcher.lease.outgrow(lost.value.lease_term)  # as `Dispatcher.run` does
    assert acquired(dispatcher) == 13
    dispatcher.dispatch_once(13)
    assert Run(storage, names["ended"], "m").status()[0].lease_term == 13


def acquired(dispatcher: Dispatcher) -> int:
    return next(lease_term for _ in range(1000) if (lease_term := dispatcher._acquire()) is not None)


def test_a_live_holder_writes_a_damaged_lease_anew_and_keeps_it(file_storage: Storage) -> None:
    mine, other = Lease(file_storage, 60.0), Lease(file_storage, 60.0)
    assert mine.try_acquire() == 1
    file_storage.put("dispatcher/lease.json", b"")
    assert other.try_acquire() is None, "another process may hold it"
    mine.renew()
    assert mine.held()
    assert other.try_acquire() is None
    mine.release()
    assert other.try_acquire() == 2


def test_of_two_who_find_a_damaged_lease_one_takes_it(file_storage: Storage) -> None:
    file_storage.put("dispatcher/lease.json", b"\xff")
    leases = [Lease(file_storage, 0.01) for _ in range(2)]
    rounds = ([lease.try_acquire(lambda: 41) for lease in leases] for _ in range(1000))
    assert sorted(next(lease_terms for lease_terms in rounds if any(lease_terms)), key=str) == [42, None]


# ---- serving


@pytest.mark.parametrize("how", some_long([*SURE, "an empty object"], "wrong types", "deep"))
@pytest.mark.parametrize("kind", ["Version", "Alias", "Evaluation", "LeaseDocument"])
def test_a_new_replica_serves_the_others_and_tells_of_the_damaged(
    template: tuple[Path, dict[str, str], Any], world: World, kind: str, how: str
) -> None:
    _, names, _ = template
    key = {**names, "LeaseDocument": "models/bad/gc-lease.json"}[kind]
    sound = world.storage.get(key)[0]
    world.storage.put(key, {**SURE, **MAYBE}[how](sound))
    Catalogue(world.storage).update("bad")
    host = ModelHost(world.storage.url, pin=2)
    shown = entries(host)
    assert (shown["good"]["version"], shown["good"]["kind"], "problem" in shown["good"]) == (1, "image", False)
    if kind in ("Version", "Alias"):
        assert key in shown["bad"]["problem"]
    else:
        assert shown["bad"]["version"] == 1
    world.storage.put(key, sound)
    Catalogue(world.storage).update("bad")
    watch(host)
    assert entries(host)["bad"]["version"] == 1
    assert "problem" not in entries(host)["bad"]


def entries(host: ModelHost) -> dict[str, Any]:
    from tests.support.asgi_client import ask

    response = ask(create_app(host), "GET", "/v1/models")
    assert response.status_code == 200, response.text
    return {model["id"]: model for model in response.json()["data"]}


# ---- what is not ours


STRAYS = [".DS_Store", "backup.txt", "0000.json.swp", "Thumbs.db", "sub/x.json", "production.json~", "ünï.json"]


def test_files_of_other_programs_are_passed_over(
    template: tuple[Path, dict[str, str], dict[str, Any]], world: World
) -> None:
    _, names, expected = template
    folders = {str(Path(key).parent) for key in world.storage.list("") if not key.startswith("evaluation-cache/")}
    folders |= {"models", "runs", "jobs", "datasets", "models/bad", "models/new/aliases", "models/new/versions"}
    open_ones = [folder for folder in folders if "/samples" not in folder and "/checkpoints" not in folder]
    for folder in open_ones:
        for stray in STRAYS:
            world.storage.put(f"{folder}/{stray}", b"not ours")
    assert world.others(names) == expected
    inventory = take_inventory(world.storage)
    assert not inventory.damages
    assert {stray for stray in STRAYS if any(key.endswith(stray) for key in inventory.strays)} == set(STRAYS)
    assert set(entries(ModelHost(world.storage.url))) == {"bad", "good"}
    dispatcher = Dispatcher(world.storage, Cluster(world.storage))
    for _ in range(40):
        dispatcher.dispatch_once(9)
    assert Jobs(world.storage).open() == []
    publish(world.storage, "bad", "vae", step=2)
    assert Registry(world.storage).resolve("bad").version == 2


# ---- what is written next to or over the damaged


def test_a_damaged_version_keeps_its_number_and_its_files(template: tuple[Path, Any, Any], world: World) -> None:
    from genmodels.registry.gc import gc

    world.storage.put("models/bad/versions/00000001.json", b"")
    blobs = world.storage.list("models/bad/blobs/")
    assert publish(world.storage, "bad", "vae", step=1, alias=None).version == 2
    gc(world.storage).carry_out()
    assert set(blobs) <= set(world.storage.list("models/bad/blobs/"))


def test_a_person_sets_a_damaged_alias_anew_and_a_publisher_does_not(
    template: tuple[Path, Any, Any], world: World
) -> None:
    store = Registry(world.storage)
    version = publish(world.storage, "bad", "vae", step=2, alias=None).version
    world.storage.put("models/bad/aliases/production.json", b"{")
    with pytest.raises(DamagedObject, match="genmodels promote"):
        store.promote("bad", "production", version, "published", forward_only=True)
    assert store.promote("bad", "production", version, "by hand").version == version
    assert store.resolve("bad").version == version


def test_a_damaged_pin_keeps_the_checkpoints_of_its_step(
    template: tuple[Path, dict[str, str], Any], world: World
) -> None:
    _, names, _ = template
    world.storage.put(names["Pin"], b"")
    run = Run(world.storage, names["StoredSpec"].split("/")[1], "m")
    assert CheckpointRef(attempt=1, step=3) in references.pinned_checkpoints(run)


@pytest.mark.parametrize("kind", ["Version", "Alias"])
def test_nothing_is_deleted_that_a_damaged_object_may_name(
    template: tuple[Path, dict[str, str], Any], world: World, kind: str
) -> None:
    from genmodels.registry import removal

    _, names, _ = template
    world.storage.delete("models/bad/gc-lease.json")
    world.storage.put(names[kind], b"?")
    with pytest.raises(GenmodelsError):
        removal.delete_version(Registry(world.storage), "bad", 1)
    assert world.storage.exists("models/bad/versions/00000001.json")


def test_a_dataset_is_added_over_a_damaged_one(template: tuple[Path, Any, Any], world: World, tmp_path: Path) -> None:
    world.storage.put("datasets/bad-text/current.json", b"")
    (tmp_path / "new.txt").write_text("another text entirely\n" * 400)
    dataset, new = uploads.add(world.storage, "bad-text", tmp_path / "new.txt")
    assert new
    assert uploads.find(world.storage, "bad-text").sha256 == dataset.sha256


def test_spoiled_lines_of_logs_and_metrics_are_left_out(file_storage: Storage) -> None:
    run = Run(file_storage, "job-00000000", "m")
    run.start_attempt(1, None, 1)
    lines = [
        b'{"step": 1, "loss": 0.5}',
        b"",
        b"{",
        b"\xff",
        b"[" * 9999,
        b'{"step": "2"}',
        b'{"step": 3, "x": {}}',
        b"7",
    ]
    file_storage.put("runs/job-00000000/m/attempt-1/metrics/00000001.jsonl", b"\n".join([*lines, b'{"step": 4}']))
    assert [row["step"] for row in metric_rows(run)] == [1, 4]
    logged = b'{"time": "2026-01-01T10:00Z", "line": "hello"}'
    write_log(run, 1, "driver", 1, b"\n".join([*lines, logged]))
    assert [line.line for line in log_lines(run)] == ["hello"]


def test_the_error_of_a_damaged_object_is_pickled_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DamagedObject("k", "what", "remedy", "etag")))  # noqa: S301  our own
    assert (error.key, error.what, error.remedy, error.etag) == ("k", "what", "remedy", "etag")
