"""Run a job service in this process, and write the objects of runs as the dispatcher and drivers would."""

from __future__ import annotations

import json
from typing import Any

import httpx
import yaml

from genmodels.checkpoint import Metrics
from genmodels.keys import Keys
from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import Queue, QueuedRun, write_queue
from genmodels.runs.records import ENDED, Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.jobs.app import create_app
from tests.support.asgi_client import ask
from tests.support.run_parts import write_log

YAML = {"content-type": "application/yaml"}


def spec(name: str = "test", *models: str, **fields: Any) -> dict[str, Any]:
    """Return a valid spec of VAEs on the built-in digits."""
    entries = [
        {"name": model, "model": {"family": "vae"}, "data": {"dataset": "digits"}}
        for model in models or ("digits-vae",)
    ]
    return {"name": name, "models": entries, **fields}


class Service:
    def __init__(self, storage: Storage, keys: Keys | None = None, **options: Any) -> None:
        self.storage, self.jobs = storage, Jobs(storage)
        self.app = create_app(storage, keys=keys, hosts=None, **options)

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return ask(self.app, method, path, body, **options)

    def post(self, document: dict[str, Any] | bytes, query: str = "", **headers: str) -> httpx.Response:
        """Send POST /v1/jobs, in YAML."""
        body = document if isinstance(document, bytes) else yaml.safe_dump(document).encode()
        return self("POST", f"/v1/jobs{query}", content=body, headers={**YAML, **headers})

    def submit(self, *models: str, name: str = "test", **fields: Any) -> str:
        response = self.post(spec(name, *models, **fields))
        assert response.status_code == 201, response.text
        return str(response.json()["job"])

    def show(self, job: str) -> dict[str, Any]:
        response = self("GET", f"/v1/jobs/{job}")
        assert response.status_code == 200, response.text
        return response.json()

    # Objects that other processes write

    def move(self, job: str, model: str, state: State, reason: str = "test", **facts: int) -> Status:
        """Change a run's state as the dispatcher does; close the job when its last run has ended."""
        run = Run(self.storage, job, model)
        status, etag = run.status()
        run.write_status(status.to(state, reason, **facts), etag)
        names = [entry.name for entry in self.jobs.spec(job).models]
        statuses = {name: Run(self.storage, job, name).status()[0] for name in names}
        if all(status.state in ENDED for status in statuses.values()):
            ended = max(status.history[-1].time for status in statuses.values())
            self.jobs.close(job, ended, {name: status.state for name, status in statuses.items()})
        return statuses[model]

    def heartbeat(self, job: str, model: str, attempt: int, **facts: Any) -> None:
        Run(self.storage, job, model).write_heartbeat(attempt, Heartbeat(**facts))

    def end(self, job: str, model: str, attempt: int, metrics: Metrics | None = None, **facts: Any) -> None:
        Run(self.storage, job, model).write_result(attempt, Result(metrics=metrics or {}, **facts))

    def queue(self, capacity: dict[str, int] | None, *waiting: tuple[str, str, str]) -> None:
        entries = [QueuedRun(job=job, model=model, reason=reason) for job, model, reason in waiting]
        write_queue(self.jobs.storage, Queue(capacity=capacity, queue=entries))

    def log(self, job: str, model: str, attempt: int, source: str, number: int, *rows: tuple[str, str]) -> None:
        lines = [{"time": time, "line": line} for time, line in rows]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        run = Run(self.storage, job, model)
        write_log(run, attempt, source, number, data)
