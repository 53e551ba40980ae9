"""The commands that go through the job API, as a person types them, against the service's own application.

The runs' states and heartbeats, which a dispatcher and drivers would leave in storage, are written by the tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from genmodels.keys import Keys
from genmodels.registry import gc
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs, Queue, QueuedRun
from genmodels.runs.records import Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage, open_storage
from genmodels.storage.documents import now
from services.cli import main, wait
from services.client import http
from services.client import jobs as client_module
from services.http.middleware import LOOPBACK
from services.jobs.app import create_app
from tests.support.asgi_server import served
from tests.support.cli_runner import type_in
from tests.support.published_models import publish

SPEC = """\
name: shapes
models:
  - name: vae-digits
    model: {family: vae}
    data: {dataset: digits}
    train: {max_steps: 100}
  - name: gan-digits
    model: {family: gan}
    data: {dataset: digits}
    train: {max_steps: 200}
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs the command line in a folder of its own, without a terminal: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wait, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "LOOK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(http, "FIRST_PATIENCE_SECONDS", 0.2)
    for name in [name for name in os.environ if name.startswith("GENMODELS_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["genmodels", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """What the service serves; not the folder that commands open by themselves."""
    return open_storage((tmp_path / "of-the-service").as_uri())


@pytest.fixture
def api(store: Storage, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A job service without keys, which GENMODELS_API names."""
    with served(create_app(store, keys=None, hosts=LOOPBACK)) as url:
        monkeypatch.setenv("GENMODELS_API", url)
        (tmp_path / "shapes.yaml").write_text(SPEC)
        yield url


def to(run: Run, state: State, reason: str, **facts: int) -> None:
    """What the dispatcher does."""
    status, etag = run.status()
    run.write_status(status.to(state, reason, **facts), etag)


def in_steps(*steps: Callable[[], Any]) -> SimpleNamespace:
    """A `time` for `follow`: one step at each pause, then none."""
    waiting = list(steps)

    def sleep(seconds: float) -> None:
        if waiting:
            waiting.pop(0)()

    return SimpleNamespace(sleep=sleep)


def submitted(command: Command) -> str:
    code, out, err = command("submit", "shapes.yaml")
    assert code == 0, err
    return out.strip()


def test_submit_prints_the_id_alone(api: str, command: Command, store: Storage) -> None:
    code, out, err = command("submit", "shapes.yaml")
    assert code == 0
    assert re.fullmatch(r"shapes-[0-9a-f]{8}\n", out)
    assert err.startswith(f"`genmodels status {out.strip()}` shows how it goes")
    assert Jobs(store).open() == [out.strip()]
    code, out, _ = command("submit", "shapes.yaml", "--json")
    assert [run["model"] for run in json.loads(out)["models"]] == ["vae-digits", "gan-digits"]
    assert len(Jobs(store).open()) == 2


def test_a_dash_submits_the_spec_on_standard_input(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, SPEC)
    code, out, err = command("submit", "-")
    assert code == 0, err
    assert Jobs(store).open() == [out.strip()]
    type_in(monkeypatch, SPEC.replace("max_steps: 100", "max_stps: 100"))
    code, _, err = command("submit", "-")
    assert code == 2
    assert err.startswith("error: standard input:6: models[0].train.max_stps: ")


def test_a_dry_run_submits_nothing(api: str, command: Command, store: Storage) -> None:
    Jobs(store).write_queue(Queue(time=now(), capacity={"cpus": 2, "gpus": 0}))
    code, out, _ = command("submit", "shapes.yaml", "--dry-run")
    assert code == 0
    vae, gan = (line.split("│") for line in out.splitlines() if "digits" in line)
    assert [cell.strip() for cell in vae[1:5]] == ["vae-digits", "vae", "digits", "100"]
    assert vae[-2].strip() == gan[-2].strip() == "yes"
    code, out, _ = command("submit", "shapes.yaml", "--dry-run", "--json")
    assert json.loads(out)["models"][1]["parameters"] > 1000
    assert Jobs(store).open() == []


def test_refused_specs_are_told_line_by_line(api: str, command: Command, tmp_path: Path) -> None:
    wrong = SPEC.replace("max_steps: 100", "max_stps: 100").replace("dataset: digits", "path: /etc/passwd", 1)
    (tmp_path / "wrong.yaml").write_text(wrong)
    code, out, err = command("submit", "wrong.yaml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: wrong.yaml:5: models[0].data.path: ")
    assert "genmodels data add" in lines[0]
    assert lines[1].startswith("error: wrong.yaml:6: models[0].train.max_stps: ")
    code, out, err = command("submit", "nowhere.yaml")
    assert (code, err) == (
        2,
        "error: nowhere.yaml: no such file; write the path of a job spec, e.g. jobs/quickstart.yaml\n",
    )


def test_wait_follows_to_the_end_and_says_how_to_use_it(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models at once: queued, an attempt that is lost, training, publishing; an end for the endpoint's users."""

    def runs() -> tuple[Run, Run]:
        (job,) = Jobs(store).open()
        return Run(store, job, "vae-digits"), Run(store, job, "gan-digits")

    def queue() -> None:
        vae, gan = runs()
        to(vae, "starting", "attempt 1 with 1 worker", attempt=1, workers=1)
        to(gan, "queued", "submitted")
        waiting = QueuedRun(job=gan.job, model=gan.model, reason="needs 1 CPU, free: 0 CPUs")
        Jobs(store).write_queue(Queue(time=now(), queue=[waiting]))

    def lose() -> None:  # two changes between two looks
        vae, _ = runs()
        to(vae, "queued", "a worker died; goes on from step 0")
        to(vae, "starting", "attempt 2 with 1 worker", attempt=2)

    def train() -> None:
        vae, _ = runs()
        to(vae, "running", "the workers train")
        vae.write_heartbeat(2, Heartbeat(phase="training", step=50, max_steps=100, loss=1.25, seconds_left=65))

    def end() -> None:
        vae, gan = runs()
        vae.write_result(2, Result(outcome="succeeded", step=100, version=1))
        to(vae, "publishing", "training has ended")
        to(vae, "succeeded", "published as version 1")
        to(gan, "succeeded", "published as version 1")

    monkeypatch.setattr(wait, "time", in_steps(queue, lose, train, end))
    monkeypatch.setattr("services.console.progress.LINE_SECONDS", 0.0)
    code, out, err = command("submit", "shapes.yaml", "--wait", "--gateway", "http://127.0.0.1:9")
    assert code == 0, err
    job, *lines = out.splitlines()
    assert [line for line in lines if line.startswith("vae")] == [
        "vae-digits: queued",
        "vae-digits: starting (attempt 1 with 1 worker)",
        "vae-digits: queued (a worker died; goes on from step 0)",
        "vae-digits: starting (attempt 2 with 1 worker)",
        "vae-digits: running, step 50/100, loss 1.25, 1:05 left (the workers train)",
        "vae-digits: publishing (training has ended)",
        "vae-digits: succeeded, step 100/100 (published as version 1)",
    ]
    assert "gan-digits: queued (number 1 in the queue: needs 1 CPU, free: 0 CPUs)" in lines
    *_, head, vae, gan = lines
    assert head == "Try:"
    assert vae.startswith("  curl -s http://127.0.0.1:9/v1/images/generations -H 'content-type: application/json' -d ")
    assert '"model": "gan-digits"' in gan
    code, again, err = command("status", job, "--wait", "--gateway", "http://127.0.0.1:9")
    assert (code, err) == (0, "")
    assert again.splitlines() == [
        "vae-digits: succeeded, step 100/100 (published as version 1)",
        "gan-digits: succeeded (published as version 1)",
        *lines[-3:],
    ]


def test_wait_ends_with_1_when_a_model_failed(api: str, command: Command, store: Storage) -> None:
    job = submitted(command)
    to(Run(store, job, "vae-digits"), "succeeded", "published as version 1")
    to(Run(store, job, "gan-digits"), "failed", "val_frechet 3 is not <= 0.04")
    code, out, _ = command("status", job, "--wait", "--json")
    assert code == 1
    assert json.loads(out)["state"] == "failed"
    code, out, _ = command("status", job, "--wait")
    assert code == 1
    assert "gan-digits: failed: val_frechet 3 is not <= 0.04\n" in out
    assert f"`genmodels logs {job}` shows why; `genmodels resume {job}` goes on from the last checkpoint" in out
    assert out.count("curl") == 1


def test_ctrl_c_leaves_the_job_alone(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait, "time", in_steps(lambda: signal.raise_signal(signal.SIGINT)))
    code, out, err = command("submit", "shapes.yaml", "--wait")
    job = out.splitlines()[0]
    assert code == 130
    assert err == (
        f"{job} goes on; `genmodels status {job} --wait` follows it again, `genmodels cancel {job}` ends it\n"
    )
    assert Run(store, job, "vae-digits").commands() == []


def test_wait_outlives_the_service(
    command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is away, longer than a request is tried for, and comes back at the same address."""
    monkeypatch.setattr(http, "PATIENCE_SECONDS", 0.1)
    (tmp_path / "shapes.yaml").write_text(SPEC)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(store, keys=None, hosts=LOOPBACK)
    server = served(app, port)
    monkeypatch.setenv("GENMODELS_API", server.__enter__())

    def die() -> None:
        server.__exit__(None, None, None)

    def come_back() -> None:
        nonlocal server
        server = served(app, port)
        server.__enter__()
        (job,) = Jobs(store).open()
        for model in ("vae-digits", "gan-digits"):
            to(Run(store, job, model), "cancelled", "by hand")

    try:
        monkeypatch.setattr(wait, "time", in_steps(die, lambda: None, come_back))
        code, out, _ = command("submit", "shapes.yaml", "--wait")
    finally:
        server.__exit__(None, None, None)
    assert code == 1
    assert out.count("waiting: no job service answers at") == 1
    assert "vae-digits: cancelled: by hand" in out


def test_lists_and_tables(api: str, command: Command, store: Storage) -> None:
    code, out, err = command("jobs")
    assert (code, out, err) == (0, "no jobs; `genmodels submit SPEC` makes one\n", "")
    assert command("status")[1] == "no open jobs; `genmodels jobs` lists those that have ended\n"
    first, second, third = (submitted(command) for _ in range(3))
    run = Run(store, second, "vae-digits")
    to(run, "starting", "attempt 1 with 1 worker", attempt=1, workers=1)
    to(run, "running", "the workers train")
    run.write_heartbeat(1, Heartbeat(phase="training", step=25, max_steps=100, loss=1.5, seconds_left=3725))
    Jobs(store).close(third, now(), {"vae-digits": "failed", "gan-digits": "succeeded"})

    _, out, _ = command("jobs")
    rows = [line for line in out.splitlines() if "shapes-" in line]
    assert [row.split("│")[1].strip() for row in rows] == [second, first, third]
    assert "vae-digits running 25%, gan-digits queued" in rows[0]
    assert "vae-digits failed" in rows[2]
    _, out, err = command("jobs", "--limit", "2")
    assert out.count("shapes-") == 2
    assert err == "there are more: --limit 4\n"
    assert len(json.loads(command("jobs", "--json", "--state", "ended")[1])) == 1

    _, out, _ = command("status", second, "--history")
    assert f"{second}: running, priority 0, submitted just now" in out
    (row,) = (line for line in out.splitlines() if "25/100" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("vae-digits", "running", "25/100", "1.5", "1:02:05", "1", "1", "-", "the workers train")
    ]
    assert "attempt 1 with 1 worker" in out
    _, out, _ = command("status")
    assert (first in out, second in out, third in out) == (True, True, False)
    assert json.loads(command("status", first, "--json")[1])["state"] == "queued"


def test_cancel_and_resume_leave_commands(api: str, command: Command, store: Storage) -> None:
    job = submitted(command)
    vae, gan = Run(store, job, "vae-digits"), Run(store, job, "gan-digits")
    to(vae, "starting", "attempt 1", attempt=1)
    code, out, _ = command("cancel", job, "--model", "vae-digits")
    assert (code, out) == (0, f"{job}: vae-digits will end at once\n")
    assert [(command.action, command.then) for command in vae.commands()] == [("stop", "cancelled")]
    assert gan.commands() == []
    code, out, _ = command("cancel", job, "--now")
    assert out == f"{job}: vae-digits will end at once\n{job}: gan-digits leaves the queue\n"
    assert vae.commands()[-1].action == "kill"
    for run in (vae, gan):
        to(run, "cancelled", "cancelled by hand", last_command=9)
    assert command("cancel", job)[1] == f"{job}: nothing to cancel, it had ended\n"
    to(gan, "succeeded", "published")
    code, out, _ = command("resume", job)
    assert (code, out) == (0, f"{job}: vae-digits will go on from the last checkpoint\n")
    assert vae.commands()[-1].action == "resume"
    code, _, err = command("resume", job, "--model", "gan-digits")
    assert code == 1
    assert err.startswith(f"error: nothing to resume in {job}: gan-digits is succeeded")


def put_log(run: Run, attempt: int, source: str, part: int, *lines: str) -> None:
    rows = "".join(json.dumps({"time": now(), "line": line}) + "\n" for line in lines)
    run.storage.put(run.log_key(attempt, source, part), rows.encode())


def test_logs(api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(command)
    assert command("logs", job) == (0, "", f"nothing has been printed; `genmodels status {job}` shows how it stands\n")
    run = Run(store, job, "vae-digits")
    put_log(run, 1, "driver", 1, "starting", "\x1b[31mred")
    put_log(run, 1, "0", 1, "step 1")
    _, out, _ = command("logs", job)
    assert [line.split(" ", 1)[1] for line in out.splitlines()] == [
        "vae-digits/driver starting",
        "vae-digits/driver ?[31mred",
        "vae-digits/0 step 1",
    ]
    assert command("logs", job, "--source", "0")[1].count("\n") == 1
    assert command("logs", job, "--model", "gan-digits")[1] == ""
    code, _, err = command("logs", job, "--model", "gn-digits")
    assert code == 1
    assert "this job has vae-digits, gan-digits" in err

    def go_on() -> None:
        put_log(run, 1, "0", 2, "step 2")
        for model in ("vae-digits", "gan-digits"):
            to(Run(store, job, model), "failed", "enough")

    monkeypatch.setattr("services.jobs.routes.FOLLOW_SECONDS", 0.05)
    ending = threading.Timer(0.3, go_on)
    ending.start()
    code, out, _ = command("logs", "-f", job)
    ending.join()
    assert code == 0
    assert [line.rsplit(" ", 1)[1] for line in out.splitlines()] == ["starting", "?[31mred", "1", "2"]


@pytest.mark.parametrize(
    "arguments", [("status", "x-01234567"), ("logs", "x-01234567"), ("cancel", "x-01234567"), ("resume", "x-01234567")]
)
def test_a_job_that_is_not_there(api: str, command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert err == "error: no job 'x-01234567'; `genmodels jobs` lists what there is\n"


def test_no_service_at_that_address(command: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = command("jobs", "--api", url)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: no job service answers at {url}; start one with `genmodels up`")
    assert err.count("\n") == 1
    assert command("jobs", "--api", "localhost")[0] == 1


def test_keys(store: Storage, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key's whole life; the service takes it while it lives, for what it is for."""
    (tmp_path / "shapes.yaml").write_text(SPEC)
    storage = ("--storage", store.url)
    assert command("keys", "list", *storage)[1] == "no keys yet; `genmodels keys create NAME` makes one\n"
    code, token, err = command("keys", "create", "alice", "--scope", "submit", "--prefix", "vae-", *storage)
    assert code == 0
    assert re.fullmatch(r"gm_[0-9a-f]{8}_\S{43}\n", token)
    key = Keys(store).list()[0]
    assert (key.name, key.scopes, key.prefixes) == ("alice", ("submit",), ("vae-",))
    assert err.startswith(f"key {key.id} of alice: submit; models named vae-.... It is shown this once:")
    assert token.strip() not in err
    row = command("keys", "list", *storage)[1]
    assert (key.id in row, "vae-..." in row, token.strip() in row) == (True, True, False)
    assert "sha256" not in json.loads(command("keys", "list", "--json", *storage)[1])[0]
    code, _, err = command("keys", "create", "bob", "--scope", "root", *storage)
    assert (code, err.count("\n")) == (2, 1)

    with served(create_app(store, keys=Keys(store), hosts=None)) as url:
        monkeypatch.setenv("GENMODELS_API", url)
        code, _, err = command("jobs")
        assert code == 1
        remedy = "`genmodels keys create` makes one where the storage is"
        assert err == f"error: {url} asks for a key: set GENMODELS_KEY; {remedy}\n"
        monkeypatch.setenv("GENMODELS_KEY", token)
        assert command("jobs")[0] == 0
        code, _, err = command("submit", "shapes.yaml")
        assert code == 1
        assert "limited to models named vae-..., and 'gan-digits' is not among them" in err
        monkeypatch.setenv("GENMODELS_KEY", token.strip()[:-1] + "!")
        assert "does not take the key in GENMODELS_KEY" in command("jobs")[2]
    assert command("keys", "revoke", key.id, *storage)[1] == f"key {key.id} of alice works no longer\n"
    assert Keys(store).check(token.strip()) is None
    assert command("keys", "revoke", "00000000", *storage)[0] == 2


def test_models_through_the_service(api: str, command: Command, store: Storage, tmp_path: Path) -> None:
    for step in (1, 2):
        publish(store, "vae", "vae", step=step, alias="production" if step == 1 else None)
    row = next(line for line in command("models")[1].splitlines() if "production: 1" in line)
    assert "1, 2" in row
    assert command("promote", "vae@latest", "staging")[1] == "vae@staging is version 2 now\n"
    assert Registry(store).resolve("vae@staging").version == 2
    code, out, _ = command("pull", "vae@2")
    assert code == 0
    assert re.fullmatch(r"vae@2: \d+ files, [\d.]+ KiB, in vae-2\n", out)
    assert (tmp_path / "vae-2" / "config.json").read_text().startswith("{")
    files = {path.relative_to(tmp_path / "vae-2").as_posix() for path in (tmp_path / "vae-2").rglob("*.*")}
    assert files == set(Registry(store).version("vae", 2).files)
    code, _, err = command("pull", "vae@2")
    assert (code, err) == (1, "error: vae-2 is there and not empty; name a new folder\n")
    assert command("pull", "vae@7", "new")[0] == 1
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".vae")]
    assert command("pull", "--storage", store.url, "vae", "direct")[1].startswith("vae@1: ")

    code, _, err = command("delete", "vae@2")
    assert code == 2
    assert err == "error: Delete version vae@2? There is no terminal to ask on: add --yes\n"
    assert command("delete", "vae@latest", "--yes")[0] == 2
    code, _, err = command("delete", "vae@2", "--yes")
    assert code == 1  # an alias names it
    command("promote", "vae@1", "staging")
    assert command("delete", "vae@2", "--yes")[1] == "version vae@2 is deleted\n"
    assert Registry(store).versions("vae") == [1]


def test_delete_a_job(api: str, command: Command, store: Storage) -> None:
    job = submitted(command)
    code, _, err = command("delete", job, "--yes")
    assert (code, err) == (1, f"error: job {job} has not ended; cancel it first\n")
    Jobs(store).close(job, now(), {"vae-digits": "cancelled", "gan-digits": "cancelled"})
    assert command("delete", job, "--yes")[1] == f"job {job} is deleted\n"
    assert not Jobs(store).exists(job)


def test_datasets(api: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    code, out, err = command("data", "add", "novel", "novel.txt")
    assert code == 0, err
    assert out.startswith("novel: 6,400 characters")
    assert err == "in a spec: data: {dataset: novel}\n"
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            picture = np.random.default_rng(i).integers(0, 255, (20, 20), np.uint8)
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("private")
    code, out, _ = command("data", "add", "pets", "photos", "--image-size", "16", "--channels", "1")
    assert code == 0
    assert out.startswith("pets: 40 pictures")
    listed = {dataset["name"]: dataset for dataset in json.loads(command("data", "list", "--json")[1])}
    assert (listed["pets"]["examples"], listed["digits"]["built_in"]) == (40, True)
    table = command("data", "list")[1]
    assert "6,400 characters" in table
    assert "built in" in table
    (tmp_path / "use.yaml").write_text(SPEC.replace("dataset: digits", "dataset: pets", 1))
    assert command("submit", "use.yaml")[0] == 0

    (tmp_path / "short.txt").write_text("too short")
    for arguments in (("novel", "short.txt"), ("novel", "nowhere"), ("digits", "novel.txt"), ("A b", "novel.txt")):
        code, _, err = command("data", "add", *arguments)
        assert (code, err.count("\n")) == (1, 1), err
    assert command("data", "add", "pets", "photos", "--channels", "2")[0] == 2
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.write(tmp_path / "photos" / "cats" / "0.png", "0.png")
    assert "too few pictures" in command("data", "add", "pets", "pets.zip")[2]


THROUGH = pytest.mark.parametrize("through", ["the service", "the storage"])


@pytest.fixture
def where(api: str, store: Storage, through: str) -> tuple[str, ...]:
    return () if through == "the service" else ("--storage", store.url)


@THROUGH
def test_what_is_deleted_is_looked_at_first(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    for what in ("nope", "nope@1", "nope@production", "vae@7", "no pe"):
        publish(store, "vae", "vae")
        code, _, err = command("delete", what, *where)
        assert (code, err.count("\n")) == (1, 1), err
        assert "no terminal" not in err
    code, _, err = command("data", "delete", "nope", *where)
    assert (code, err) == (1, "error: no dataset 'nope'; `genmodels data list` lists all datasets\n")
    assert command("delete", "vae@live", "--yes", *where)[0] == 2


@THROUGH
def test_delete_an_alias_and_a_whole_model(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    publish(store, "vae", "vae")
    job, _ = Jobs(store).submit(parse_spec(SPEC.replace("vae-digits", "vae").encode(), "spec"))
    code, _, err = command("delete", "vae@production", *where)
    assert (code, err.partition("?")[0]) == (2, "error: Delete alias vae@production, which names version 1")
    done = command("delete", "vae@production", "--yes", *where)
    assert done[:2] == (0, "alias vae@production is deleted; version 1 stays\n")
    assert Registry(store).aliases("vae") == {}
    code, _, err = command("delete", "vae", *where)
    assert code == 2
    assert re.match(
        r"error: Delete model vae \(1 version, no alias, [\d.]+ KiB\)\? The checkpoints, samples and logs", err
    )
    assert f"stay: {job}; --with-runs takes them too" in err
    code, _, err = command("delete", "vae", "--yes", *where)
    assert (code, err) == (1, f"error: model 'vae': job {job} trains it and has not ended; cancel it first\n")
    assert Registry(store).versions("vae") == [1]
    Jobs(store).close(job, now(), {"vae": "cancelled", "gan-digits": "cancelled"})
    code, out, _ = command("delete", "vae", "--with-runs", "--yes", *where)
    assert (code, out) == (
        0,
        f"model vae is deleted. The checkpoints, samples and logs of its runs go too: {job}.\n",
    )
    assert Registry(store).models() == []
    assert command("delete", "vae", "--yes", *where)[2].startswith("error: no job or model 'vae'; ")


@THROUGH
def test_a_job_and_a_model_of_one_name(command: Command, store: Storage, where: tuple[str, ...]) -> None:
    job = submitted(command) if not where else Jobs(store).submit(parse_spec(SPEC.encode(), "spec"))[0]
    publish(store, job, "vae")
    code, _, err = command("delete", job, "--yes", *where)
    assert (code, err) == (
        2,
        f"error: {job} is a job and a model: write `genmodels delete {job} --model` for the model\n",
    )
    assert command("delete", job, "--model", "--yes", *where)[1] == f"model {job} is deleted.\n"
    assert Jobs(store).exists(job)


@THROUGH
def test_a_dataset_is_replaced_and_deleted_only_when_that_is_meant(
    command: Command, store: Storage, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    (tmp_path / "other.txt").write_text("Call me Ishmael. " * 200)
    assert command("data", "add", "novel", "novel.txt", *where)[0] == 0
    assert command("data", "add", "novel", "novel.txt", *where)[0] == 0  # the same again
    code, _, err = command("data", "add", "novel", "other.txt", *where)
    assert code == 2
    assert re.match(r"error: dataset 'novel' exists with another content: 6,400 characters.* Replace it\? ", err)
    assert err.endswith("There is no terminal to ask on: add --replace\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code, size in ((False, 1, "6,400"), (True, 0, "3,400")):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer)
        assert command("data", "add", "novel", "other.txt", *where)[0] == code
        assert f"{size} characters" in command("data", "list", *where)[1]
    assert command("data", "add", "novel", "novel.txt", "--replace", *where)[0] == 0
    code, out, _ = command("data", "delete", "novel", "--yes", *where)
    assert code == 0
    assert out.startswith("dataset novel is deleted. Nothing was trained on it.\n")
    assert store.list("datasets/novel/") == ["datasets/novel/gc-lease.json"]
    assert "novel" not in command("data", "list", *where)[1]


@pytest.mark.parametrize("name", ["a b.txt", "caf\udce9.txt"])
def test_what_is_wrong_with_a_text_names_the_file(api: str, command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"caf\xe9 " * 1000)
    code, _, err = command("data", "add", "novel", name)
    assert (code, err.count("\n")) == (1, 1)
    assert "iconv -f WINDOWS-1252 -t UTF-8 'a b.txt' >" in err or "caf%E9.txt" in err


@dataclass
class Garbage:
    """What `genmodels.registry.gc.gc` gives, with two things to remove."""

    storage: Storage
    items: list[SimpleNamespace]

    def carry_out(self) -> None:
        for item in self.items:
            self.storage.delete(item.key)


def collect(storage: Storage) -> Garbage:
    whys = {"junk/a": "an upload that never ended", "junk/b": "an upload that never ended", "junk/c": "no version"}
    there = [SimpleNamespace(key=key, bytes=1024**2, why=why) for key, why in whys.items() if storage.exists(key)]
    return Garbage(storage, there)


@THROUGH
def test_gc_says_first_what_it_would_free(
    command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]
) -> None:
    monkeypatch.setattr(gc, "gc", collect)
    assert command("gc", *where)[1] == "there is nothing to remove\n"
    for name in "abc":
        store.put(f"junk/{name}", b"")
    code, out, err = command("gc", *where)
    assert code == 2
    assert err == "error: Remove 3 items, 3 MiB? There is no terminal to ask on: add --yes\n"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "MiB" in line]
    assert rows == [["2", "2 MiB", "an upload that never ended"], ["1", "1 MiB", "no version"]]
    code, out, err = command("gc", "--dry-run", *where)
    assert (code, out.splitlines()[-1], err) == (0, "3 items, 3 MiB would go", "")
    assert command("gc", "--dry-run", "--yes", *where)[0] == 0
    assert len(store.list("junk/")) == 3
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code, left in (("n\n", 0, 3), ("y\n", 0, 0)):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer == "y\n")
        assert command("gc", *where)[0] == code
        assert len(store.list("junk/")) == left


def test_bars_on_a_terminal(api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models at once; what an attempt was lost by stays above the bars."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    job = submitted(command)
    vae, gan = Run(store, job, "vae-digits"), Run(store, job, "gan-digits")
    to(vae, "starting", "attempt 1 with 1 worker", attempt=1, workers=1)
    to(vae, "running", "the workers train")
    vae.write_heartbeat(1, Heartbeat(phase="training", step=50, max_steps=100, loss=1.25, seconds_left=65))

    def lose() -> None:
        to(vae, "queued", "a worker died; goes on from step 50")
        to(vae, "starting", "attempt 2 with 1 worker", attempt=2)

    def end() -> None:
        for run in (vae, gan):
            to(run, "cancelled", "cancelled by hand")

    monkeypatch.setattr(wait, "time", in_steps(lose, end))
    code, out, _ = command("status", job, "--wait")
    assert code == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "vae-digits: queued (a worker died; goes on from step 50)\n" in shown
    assert re.search(r"vae-digits +cancelled +cancelled by hand", shown)
    assert re.search(r"gan-digits +cancelled +cancelled by hand", shown)


def test_the_same_without_a_service(command: Command, tmp_path: Path) -> None:
    """No --api: commands on what is stored open the storage, here the folder .genmodels."""
    store = open_storage((tmp_path / ".genmodels").as_uri())
    publish(store, "vae", "vae")
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 200)
    assert command("pull", "vae@latest", "here")[0] == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert command("data", "add", "novel", "novel.txt")[0] == 0
    assert "novel" in command("data", "list")[1]
    code, _, err = command("delete", "vae@1", "--yes")
    assert code == 1
    code, _, err = command("delete", "shapes-01234567", "--yes")
    listed = "`genmodels models` and `genmodels jobs` list what there is"
    assert err == f"error: no job or model 'shapes-01234567'; {listed}\n"


def test_a_storage_that_is_typed_outdoes_a_service_of_the_environment(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "vae", "vae")
    assert "vae" in command("models")[1]
    assert "vae" not in command("models", "--storage", "file:///nowhere-at-all")[1]
    monkeypatch.setenv("GENMODELS_STORAGE", "file:///nowhere-at-all")
    assert "vae" in command("models")[1]


@pytest.mark.parametrize("told", [True, False])
def test_the_key_goes_to_the_job_service_alone(
    told: bool, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The curl line names the endpoint that the service was told of; what listens at any other port hears nothing."""
    _, key = Keys(store).create("ann", ("submit",))
    monkeypatch.setenv("GENMODELS_KEY", key)
    (tmp_path / "shapes.yaml").write_text(SPEC)
    asked: list[str] = []
    send = httpx.Client.send

    def recorded(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        asked.append(f"{request.url.host}:{request.url.port}")
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", recorded)
    endpoint = "http://127.0.0.1:18000" if told else None
    with served(create_app(store, keys=Keys(store), hosts=None, endpoint=endpoint)) as url:
        monkeypatch.setenv("GENMODELS_API", url)
        job = submitted(command)
        for model in ("vae-digits", "gan-digits"):
            to(Run(store, job, model), "succeeded", "published")
        code, out, err = command("status", job, "--wait")
    assert code == 0, err
    assert {f"http://{address}" for address in asked} == {url}
    assert out.count(f"curl -s {endpoint or '$GENMODELS_GATEWAY'}/v1/images/generations") == 2
    assert key not in out
    assert ("where GENMODELS_GATEWAY is the URL" in out) == (not told)


def test_statuses_of_many_jobs_come_page_by_page(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.jobs.MAX_PAGE", 2)
    jobs = [submitted(command) for _ in range(5)]
    assert {job["job"] for job in json.loads(command("status", "--json")[1])} == set(jobs)
    assert Status(state="queued").reason == ""
