"""Test the commands that use the job API, as a user types them, against the application of the service.

The runs' states and heartbeats, which a dispatcher and drivers would leave in storage, are written by the tests.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from genmodels.keys import Keys
from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import Queue, QueuedRun, write_queue
from genmodels.runs.records import Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.documents import now
from services.cli import wait
from services.client import http
from services.http.middleware import LOOPBACK
from services.jobs.app import create_app
from tests.support.asgi_server import served
from tests.support.cli_runner import type_in
from tests.support.cli_service import SPEC, Command, submitted
from tests.support.run_parts import write_log


def to(run: Run, state: State, reason: str, **facts: int) -> None:
    """Set the state of a run, as the dispatcher does."""
    status, etag = run.status()
    run.write_status(status.to(state, reason, **facts), etag)


def in_steps(*steps: Callable[[], Any]) -> SimpleNamespace:
    """Return a `time` for `follow`: one step at each pause, then none."""
    waiting = list(steps)

    def sleep(seconds: float) -> None:
        if waiting:
            waiting.pop(0)()

    return SimpleNamespace(sleep=sleep)


def test_submit_prints_the_id_alone(api: str, command: Command, store: Storage) -> None:
    code, out, err = command("submit", "shapes.yaml")
    assert code == 0
    assert re.fullmatch(r"shapes-[0-9a-f]{8}\n", out)
    assert err.startswith(f"`genmodels status {out.strip()}` shows its progress")
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
    write_queue(store, Queue(time=now(), capacity={"cpus": 2, "gpus": 0}))
    code, out, _ = command("submit", "shapes.yaml", "--dry-run")
    assert code == 0
    vae, gan = (line.split("│") for line in out.splitlines() if "digits" in line)
    assert [cell.strip() for cell in vae[1:5]] == ["vae-digits", "vae", "digits", "100"]
    assert vae[-2].strip() == gan[-2].strip() == "yes"
    code, out, _ = command("submit", "shapes.yaml", "--dry-run", "--json")
    assert json.loads(out)["models"][1]["parameters"] > 1000
    assert Jobs(store).open() == []


def test_errors_of_a_refused_spec_name_their_lines(api: str, command: Command, tmp_path: Path) -> None:
    invalid = SPEC.replace("max_steps: 100", "max_stps: 100").replace("dataset: digits", "path: /etc/passwd", 1)
    (tmp_path / "invalid.yaml").write_text(invalid)
    code, out, err = command("submit", "invalid.yaml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: invalid.yaml:5: models[0].data.path: ")
    assert "genmodels data add" in lines[0]
    assert lines[1].startswith("error: invalid.yaml:6: models[0].train.max_stps: ")
    code, out, err = command("submit", "nowhere.yaml")
    assert (code, err) == (
        2,
        "error: nowhere.yaml: no such file; write the path of a job spec, e.g. jobs/quickstart.yaml\n",
    )


def test_wait_follows_to_the_end_and_says_how_to_use_it(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Follow two models: queued, a lost attempt, training, publishing; then the curl lines of the endpoint."""

    def runs() -> tuple[Run, Run]:
        (job,) = Jobs(store).open()
        return Run(store, job, "vae-digits"), Run(store, job, "gan-digits")

    def queue() -> None:
        vae, gan = runs()
        to(vae, "starting", "attempt 1 with 1 worker", attempt=1, workers=1)
        to(gan, "queued", "submitted")
        waiting = QueuedRun(job=gan.job, model=gan.model, reason="needs 1 CPU, free: 0 CPUs")
        write_queue(store, Queue(time=now(), queue=[waiting]))

    def lose() -> None:  # two changes between two looks
        vae, _ = runs()
        to(vae, "queued", "a worker died; continues from step 0")
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
        "vae-digits: queued (a worker died; continues from step 0)",
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
    assert f"`genmodels logs {job}` shows why; `genmodels resume {job}` continues from the last checkpoint" in out
    assert out.count("curl") == 1


def test_ctrl_c_leaves_the_job_alone(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait, "time", in_steps(lambda: signal.raise_signal(signal.SIGINT)))
    code, out, err = command("submit", "shapes.yaml", "--wait")
    job = out.splitlines()[0]
    assert code == 130
    assert err == (
        f"{job} continues; `genmodels status {job} --wait` follows it again, `genmodels cancel {job}` ends it\n"
    )
    assert Run(store, job, "vae-digits").commands() == []


def test_wait_outlives_the_service(
    command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The service is down longer than the retries of a request, and returns at the same address."""
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
    assert (code, out, err) == (0, "no jobs; `genmodels submit SPEC` submits one\n", "")
    assert command("status")[1] == "no open jobs; `genmodels jobs` lists the jobs that have ended\n"
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
    assert err == "there are more jobs: --limit 4 shows more\n"
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
    assert command("cancel", job)[1] == f"{job}: nothing to cancel, the runs have ended\n"
    to(gan, "succeeded", "published")
    code, out, _ = command("resume", job)
    assert (code, out) == (0, f"{job}: vae-digits will continue from the last checkpoint\n")
    assert vae.commands()[-1].action == "resume"
    code, _, err = command("resume", job, "--model", "gan-digits")
    assert code == 1
    assert err.startswith(f"error: nothing to resume in {job}: gan-digits is succeeded")


def put_log(run: Run, attempt: int, source: str, part: int, *lines: str) -> None:
    rows = "".join(json.dumps({"time": now(), "line": line}) + "\n" for line in lines)
    write_log(run, attempt, source, part, rows.encode())


def test_logs(api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(command)
    assert command("logs", job) == (0, "", f"the logs are empty; `genmodels status {job}` shows the job's state\n")
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
    assert err == "error: no job 'x-01234567'; `genmodels jobs` lists all jobs\n"


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
    """A key from creation to revocation: the service accepts it only in between, and only for its scopes."""
    (tmp_path / "shapes.yaml").write_text(SPEC)
    storage = ("--storage", store.url)
    assert command("keys", "list", *storage)[1] == "no keys yet; `genmodels keys create NAME` creates one\n"
    code, token, err = command("keys", "create", "alice", "--scope", "submit", "--prefix", "vae-", *storage)
    assert code == 0
    assert re.fullmatch(r"gm_[0-9a-f]{8}_\S{43}\n", token)
    key = Keys(store).list()[0]
    assert (key.name, key.scopes, key.prefixes) == ("alice", ("submit",), ("vae-",))
    assert err.startswith(f"key {key.id} of alice: submit; models named vae-.... The key is shown only this once:")
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
        remedy = "`genmodels keys create` creates one on a machine that can open the storage"
        assert err == f"error: {url} requires a key: set GENMODELS_KEY; {remedy}\n"
        monkeypatch.setenv("GENMODELS_KEY", token)
        assert command("jobs")[0] == 0
        code, _, err = command("submit", "shapes.yaml")
        assert code == 1
        assert "limited to models named vae-..., and 'gan-digits' is not among them" in err
        monkeypatch.setenv("GENMODELS_KEY", token.strip()[:-1] + "!")
        assert "refuses the key in GENMODELS_KEY" in command("jobs")[2]
    assert command("keys", "revoke", key.id, *storage)[1] == f"key {key.id} of alice is revoked\n"
    assert Keys(store).check(token.strip()) is None
    assert command("keys", "revoke", "00000000", *storage)[0] == 2


def test_bars_on_a_terminal(api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models at once; the reason of a lost attempt stays above the bars."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    job = submitted(command)
    vae, gan = Run(store, job, "vae-digits"), Run(store, job, "gan-digits")
    to(vae, "starting", "attempt 1 with 1 worker", attempt=1, workers=1)
    to(vae, "running", "the workers train")
    vae.write_heartbeat(1, Heartbeat(phase="training", step=50, max_steps=100, loss=1.25, seconds_left=65))

    def lose() -> None:
        to(vae, "queued", "a worker died; continues from step 50")
        to(vae, "starting", "attempt 2 with 1 worker", attempt=2)

    def end() -> None:
        for run in (vae, gan):
            to(run, "cancelled", "cancelled by hand")

    monkeypatch.setattr(wait, "time", in_steps(lose, end))
    code, out, _ = command("status", job, "--wait")
    assert code == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "vae-digits: queued (a worker died; continues from step 50)\n" in shown
    assert re.search(r"vae-digits +cancelled +cancelled by hand", shown)
    assert re.search(r"gan-digits +cancelled +cancelled by hand", shown)


@pytest.mark.parametrize("has_endpoint", [True, False])
def test_the_key_goes_to_the_job_service_alone(
    has_endpoint: bool, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The curl line names the endpoint that the service knows; no other port gets a request."""
    _, key = Keys(store).create("ann", ("submit",))
    monkeypatch.setenv("GENMODELS_KEY", key)
    (tmp_path / "shapes.yaml").write_text(SPEC)
    addresses: list[str] = []
    send = httpx.Client.send

    def recorded(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        addresses.append(f"{request.url.host}:{request.url.port}")
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", recorded)
    endpoint = "http://127.0.0.1:18000" if has_endpoint else None
    with served(create_app(store, keys=Keys(store), hosts=None, endpoint=endpoint)) as url:
        monkeypatch.setenv("GENMODELS_API", url)
        job = submitted(command)
        for model in ("vae-digits", "gan-digits"):
            to(Run(store, job, model), "succeeded", "published")
        code, out, err = command("status", job, "--wait")
    assert code == 0, err
    assert {f"http://{address}" for address in addresses} == {url}
    assert out.count(f"curl -s {endpoint or '$GENMODELS_GATEWAY'}/v1/images/generations") == 2
    assert key not in out
    assert ("where GENMODELS_GATEWAY is the URL" in out) == (not has_endpoint)


def test_statuses_of_many_jobs_come_page_by_page(
    api: str, command: Command, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.jobs.MAX_PAGE", 2)
    jobs = [submitted(command) for _ in range(5)]
    assert {job["job"] for job in json.loads(command("status", "--json")[1])} == set(jobs)
    assert Status(state="queued").reason == ""
