"""Run the real driver, `services.train`, with a worker group of plain processes in place of Ray Train's."""

from __future__ import annotations

from typing import Any

from genmodels.runs.jobs import Jobs
from genmodels.runs.records import Result
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.train import driver, remote_publish
from services.train.publish import publish_when_available
from tests.support.plain_workers import WorkerGroup


def with_plain_workers(storage: str, job: str, spec: Any, attempt: int, workers: int, watch: Any) -> None:
    with WorkerGroup(workers, storage, [(job, spec.name, attempt)]) as group:
        group.succeed()


def publish_here(storage_url: str, job: str, model: str, attempt: int, *_: object) -> Result:
    storage = open_storage(storage_url)
    return publish_when_available(Run(storage, job, model), Jobs(storage).model_spec(job, model), attempt)


if __name__ == "__main__":
    driver._train = with_plain_workers
    remote_publish.publish_on_worker = publish_here
    driver.main()
