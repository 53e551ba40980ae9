"""make test-compose: build the platform's containers, start them, break them, send requests, and stop them.

Prints each check, and at the end "N passed, M failed". Without a container engine it prints the reason and returns 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from services.client.jobs import Client
from services.cluster.ports import free_ports
from tests.compose import images
from tests.compose.engine import Failed, Skipped, compose_program, engine, run
from tests.support import dashboard_panels
from tests.support.proof import STEP_SECONDS, Check, TooLate, run_checks, until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".compose-test"
PROJECT = "genmodels-test"
UP_SECONDS = 420
COMPLETION = {"model": "proof-text", "prompt": "HAMLET:", "max_tokens": 40, "seed": 7}


class Stack:
    """Run compose.yaml with local images, on free ports, with new secrets."""

    def __init__(self, program: str, secrets: Path) -> None:
        first = free_ports(2)
        files = ["-f", "compose.yaml", "-f", "tests/compose/override.yaml"]
        self.command = [program, "-p", PROJECT, "--project-directory", str(ROOT), "--env-file", os.devnull, *files]
        self.edge, self.api = f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"
        self.settings = {
            "GENMODELS_SECRETS": str(secrets),
            "GENMODELS_IMAGE": images.APP,
            "GENMODELS_PORT": str(first),
            "GENMODELS_API_PORT": str(first + 1),
            "GENMODELS_WORKER_CPUS": "1",
        }
        self.secrets = secrets

    def __call__(self, *arguments: str, seconds: float = 900.0, **settings: str) -> str:
        return run(*self.command, *arguments, seconds=seconds, **{**self.settings, **settings})

    def up(self) -> str:
        wait = ["--wait", "--wait-timeout", str(UP_SECONDS)]
        return self("up", "-d", "--no-build", "--scale", "worker=2", *wait, seconds=UP_SECONDS + 60)

    def connect(self) -> None:
        """Connect to the running services: the edge, the job API, and Prometheus."""
        self.key = (self.secrets / "api_key").read_text().strip()
        headers = {"authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.edge, headers=headers, timeout=120, trust_env=False)
        self.jobs = Client(self.api, self.key)
        self.prometheus = "http://" + self("port", "prometheus", "9090").strip()

    def kill(self, service: str, index: int = 1) -> None:
        """Kill the first process of a container with SIGKILL, from outside: the container ends with it."""
        pid = int(run("docker", "inspect", "-f", "{{.State.Pid}}", self.container(service, index)))
        assert pid > 1, f"{service} is not running"
        os.kill(pid, signal.SIGKILL)

    def container(self, service: str, index: int = 1) -> str:
        labels = {"project": PROJECT, "service": service, "container-number": index}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return run("docker", "ps", "-q", *filters).strip()

    def sum(self, query: str) -> float:
        """Return a sum from Prometheus, 0 if it has no such series."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": f"sum({query})"}, trust_env=False).json()
        assert answer["status"] == "success", answer
        return float(answer["data"]["result"][0]["value"][1]) if answer["data"]["result"] else 0.0


class Counted:
    """Count the answers that this client received, to compare the numbers with Prometheus."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.completions = self.tokens = self.pictures = self.requests = 0

    def complete(self) -> str:
        """Request one text, which is the same for the same seed."""
        answer = self.stack.http.post("/v1/completions", json=COMPLETION).raise_for_status()
        self.completions += 1
        self.tokens += answer.json()["usage"]["completion_tokens"]
        text: str = answer.json()["choices"][0]["text"]
        return text

    def stream(self) -> tuple[str, int]:
        """Stream a text; return it, and the number of events."""
        body = COMPLETION | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
        texts: list[str] = []
        with self.stack.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1]
        for event in map(json.loads, lines[:-1]):
            assert "error" not in event, event
            texts += [choice["text"] for choice in event["choices"]]
            if event.get("usage"):
                self.tokens += event["usage"]["completion_tokens"]
        self.completions += 1
        return "".join(texts), len(texts)

    def picture(self, n: int) -> None:
        answer = self.stack.http.post("/v1/images/generations", json={"model": "proof-digits", "n": n, "seed": 3})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == n
        self.requests += 1
        self.pictures += n


class Proof:
    """Run the checks in order. Each needs those before it, so the first failure is the last check."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.counted = Counted(stack)
        self.first_job = ""

    def checks(self) -> list[tuple[str, Check]]:
        return [
            ("without secrets nothing starts, and one line says what to do", self.refuses_without_secrets),
            ("compose.yaml is clean", self.is_clean),
            ("images are built", lambda: images.build(WORK)),
            ("all is up, with two workers", self.comes_up),
            ("no way in without a key, a token, or on another address", self.no_way_in),
            ("containers have no root, and cannot write to their image", self.is_hardened),
            ("a job continues from its checkpoint after its worker's container was killed", self.survives_a_worker),
            ("text streams through the edge, pictures come, a seed repeats", self.generates),
            ("Prometheus has counted what this client has", self.counts_agree),
            ("every panel of the dashboards has data", self.panels_have_data),
            ("the edge refuses what is too large or too slow", self.edge_limits),
            ("the head's container killed: endpoints are back, the queue goes on", self.survives_the_head),
            ("a worker that is stopped loses no step", self.leaves_in_peace),
            ("down and up again: jobs, models, key and answers are still there", self.survives_down_and_up),
        ]

    # Before

    def refuses_without_secrets(self) -> None:
        refused(lambda: self.stack("config", "-q", GENMODELS_SECRETS=""), "make secrets")

    def is_clean(self) -> None:
        run("sh", "docker/secrets.sh", str(self.stack.secrets))
        modes = {path.name: path.stat().st_mode & 0o777 for path in (self.stack.secrets, *self.stack.secrets.iterdir())}
        assert modes.pop(self.stack.secrets.name) == 0o700
        warnings = self.stack("config", "-q") + self.stack("--profile", "gpu", "config", "-q")
        assert not warnings.strip(), warnings

    def comes_up(self) -> None:
        self.stack.up()
        self.stack.connect()
        until(lambda: self.stack.sum('up{job="genmodels-nodes"}') == 3, "three nodes are scraped")
        assert self.stack.http.get("/v1/models").json()["data"] == []

    def no_way_in(self) -> str:
        for headers in ({}, {"authorization": "Bearer gm_00000000_" + "x" * 43}):
            for url in (f"{self.stack.edge}/v1/models", f"{self.stack.api}/v1/jobs"):
                answer = httpx.get(url, headers=headers, trust_env=False)
                assert answer.status_code == 401, f"{url}: {answer.status_code}"
        ask = "import urllib.request as u; u.urlopen('http://ray-head:8265/api/jobs/')"
        refused(lambda: self.stack("exec", "-T", "jobs", "python", "-c", ask), "401")
        without = ["run", "--rm", "--no-deps", "-T", "-e", "RAY_AUTH_TOKEN_PATH=/nowhere"]
        refused(lambda: self.stack(*without, "worker"), "error: /nowhere: the cluster's token cannot be read")
        ids = self.stack("ps", "-q").split()
        ports = run("docker", "inspect", "-f", "{{json .HostConfig.PortBindings}}", *ids)
        bound = re.findall(r'"HostIp":"([^"]*)"', ports)
        assert len(bound) == 3, ports  # the third one is Prometheus' port, for this test
        assert set(bound) == {"127.0.0.1"}, ports
        return "edge and job API alone are published"

    def is_hardened(self) -> None:
        for service in ("head", "worker", "jobs", "gateway"):
            assert self.stack("exec", "-T", service, "id", "-u").strip() == "10001"
            refused(lambda name=service: self.stack("exec", "-T", name, "touch", "/genmodels/x"), "Read-only")
        ids = self.stack("ps", "-q").split()
        settings = run("docker", "inspect", "-f", "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}", *ids)
        assert set(settings.split("\n")) <= {"true [ALL]", ""}, settings

    # In use

    def survives_a_worker(self) -> str:
        job = self.stack.jobs.submit(spec("proof", text(600), digits(1200), gan(600))).job
        self.first_job = job
        until(lambda: (self.run_of(job).step or 0) > 120, "training has made steps")
        self.stack.kill("worker")
        view = self.ends(job)
        history = next(run.history for run in view.models if run.model == "proof-text")
        resumed = [re.search(r"continues from step (\d+)", change.reason) for change in history]
        steps = [int(match[1]) for match in resumed if match]
        assert steps, f"it was not killed during training: {history}"
        assert steps[0] > 0, "it started from step 0"
        return f"went on from step {steps[0]}"

    def generates(self) -> str:
        until(lambda: len(self.stack.http.get("/v1/models").json()["data"]) == 3, "the models are served")
        self.answer = self.counted.complete()
        assert self.counted.complete() == self.answer
        streamed, events = self.counted.stream()
        assert streamed.startswith(self.answer)
        assert events >= 3, f"{len(streamed)} characters came in {events} events: the edge keeps them back"
        for n in (1, 4):
            self.counted.picture(n)
        return f"{events} events"

    def counts_agree(self) -> str:
        mine = self.counted
        pairs = {
            'genmodels_requests_total{route="/v1/completions", code="200"}': mine.completions,
            'genmodels_requests_total{route="/v1/images/generations", code="200"}': mine.requests,
            'genmodels_tokens_total{kind="completion"}': mine.tokens,
            "genmodels_images_total": mine.pictures,
            'genmodels_runs_ended_total{state="succeeded"}': 3,
        }
        for query, expected in pairs.items():
            self.reaches(query, expected)
        return f"{mine.completions} texts of {mine.tokens} tokens, {mine.pictures} pictures"

    def panels_have_data(self) -> str:
        queries = dashboard_panels.queries()
        queries = [query for query in queries if not (query.needs_gpu or query.needs_empty_pool)]
        empty = dashboard_panels.silent(self.stack.prometheus, queries, history=3600, patience=120)
        assert not empty, "these show nothing:\n" + "\n".join(map(str, empty))
        return f"{len(queries)} queries"

    def edge_limits(self) -> None:
        body = b'{"prompt": "' + b"x" * (9 * 2**20) + b'"}'
        answer = self.stack.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413, answer.status_code
        assert answer.json()["error"]["code"], answer.text
        answer = self.stack.http.get("/v1/models", headers={"x-large": "x" * 40_000})
        assert answer.status_code in (400, 431), answer.status_code
        assert answer.json()["error"]["code"], answer.text
        with socket.create_connection(("127.0.0.1", int(self.stack.edge.rpartition(":")[2])), 10) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow:")
            slow.settimeout(120)
            with contextlib.suppress(ConnectionResetError):
                assert b"200" not in slow.recv(1000)[:20]  # the server closed it; the client sent no more

    def survives_the_head(self) -> str:
        running = self.stack.jobs.submit(spec("second", text(300, "second-text"))).job
        waiting = self.stack.jobs.submit(spec("third", digits(50, "third-digits"))).job
        until(lambda: (self.run_of(running).step or 0) > 60, "training has made steps")
        self.stack.kill("head")
        began = time.monotonic()
        until(lambda: self.stack.http.get("/healthz").status_code == 503, "it is gone")
        until(lambda: self.stack.http.get("/healthz").status_code == 200, "the endpoint is back")
        back = time.monotonic() - began
        until(lambda: self.counted.complete() == self.answer, "the same answer as before")
        view = self.ends(running)
        assert any("continues from step" in change.reason for change in view.models[0].history), view
        self.ends(waiting)
        return f"the endpoint was back after {back:.0f} s, all ended after {time.monotonic() - began:.0f} s"

    def leaves_in_peace(self) -> str:
        job = self.stack.jobs.submit(spec("fourth", text(400, "fourth-text"))).job
        until(lambda: (self.run_of(job).step or 0) > 60, "training has made steps")
        name = self.stack.container("worker", 2)
        run("docker", "stop", "-t", "90", name)
        until(lambda: self.run_of(job).state in ("queued", "starting"), "the attempt has left")
        reasons = [change.reason for change in self.run_of(job).history]
        left = [reason for reason in reasons if "worker was stopped" in reason or "and stopped" in reason]
        assert left, reasons
        run("docker", "start", name)
        self.ends(job)
        return left[-1]

    def survives_down_and_up(self) -> None:
        before = {job.job: job.state for job in self.stack.jobs.jobs().data}
        names = [model["id"] for model in self.stack.http.get("/v1/models").json()["data"]]
        self.stack("down")
        assert not self.stack("ps", "-a", "-q").strip()
        self.stack.up()
        self.stack.connect()
        assert {job.job: job.state for job in self.stack.jobs.jobs().data} == before
        assert [model["id"] for model in self.stack.http.get("/v1/models").json()["data"]] == names
        until(lambda: self.counted.complete() == self.answer, "the same answer as before")

    def reaches(self, query: str, expected: float) -> None:
        """Wait until a count is right: it lags its answer by a scrape or two, and must never exceed it."""
        counted = 0.0

        def look() -> bool:
            nonlocal counted
            counted = self.stack.sum(query)
            return counted >= expected

        with contextlib.suppress(TooLate):
            until(look, "all is counted", 120)
        assert counted == expected, f"{query}: Prometheus says {counted:g}, this client {expected:g}"

    def run_of(self, job: str) -> Any:
        """Return the job's first run."""
        view = self.stack.jobs.job(job).models[0]
        assert view.state not in ("failed", "cancelled"), view
        return view

    def ends(self, job: str) -> Any:
        """Wait until all runs of a job have succeeded; return the job."""

        def ended() -> Any:
            view = self.stack.jobs.job(job)
            assert view.state not in ("failed", "cancelled"), view
            return view if view.state == "succeeded" else None

        return until(ended, f"{job} succeeds", 2 * STEP_SECONDS)


def spec(name: str, *models: dict[str, Any]) -> bytes:
    return json.dumps({"name": name, "models": models}).encode()


def text(steps: int, name: str = "proof-text") -> dict[str, Any]:
    """Return a text model that trains on 2 workers of one CPU each, long enough to be killed on the way."""
    return {
        "name": name,
        "model": {"family": "minigpt", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32},
        "data": {"dataset": "shakespeare"},
        "train": {"max_steps": steps, "batch_size": 16, "learning_rate": 1e-2, "eval_every": steps, "save_every": 20},
        "scaling": {"num_workers": 2},
        "serve": {"gate": {"metric": "val_loss", "max": 10.0}},
    }


def digits(steps: int, name: str = "proof-digits") -> dict[str, Any]:
    """Return an image model that is evaluated often: its series end with the training and must be scraped before."""
    return {
        "name": name,
        "model": {"family": "vae", "latent_dim": 8, "width": 8},
        "data": {"dataset": "digits"},
        "train": {"max_steps": steps, "batch_size": 32, "learning_rate": 3e-3, "eval_every": 100, "save_every": 100},
        "scaling": {"num_workers": 2},
    }


def gan(steps: int) -> dict[str, Any]:
    return digits(steps, "proof-gan") | {"model": {"family": "gan", "latent_dim": 8, "width": 8}}


def refused(command: Check, why: str) -> None:
    try:
        command()
    except Failed as failed:
        output = str(failed)
    else:
        output = "nothing"
    assert why in output, f"expected a refusal ({why}), got {output}"


def state(stack: Stack) -> str:
    return stack("ps", "-a") + stack("logs", "--no-color", "--tail", "40")


@contextlib.contextmanager
def cleared(stack: Stack) -> Iterator[None]:
    """Remove all containers and volumes of the stack before and after."""
    settings = {"GENMODELS_SECRETS": str(stack.secrets)}
    stack("down", "-v", "--remove-orphans", "-t", "5", **settings)
    try:
        yield
    finally:
        stack("down", "-v", "--remove-orphans", "-t", "5", **settings)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    WORK.mkdir(exist_ok=True)
    try:
        with engine(WORK):
            stack = Stack(compose_program(WORK), WORK / "secrets")
            with cleared(stack):
                return 0 if run_checks(Proof(stack).checks(), lambda: state(stack)) else 1
    except Skipped as reason:
        print(f"skipped: {reason}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
