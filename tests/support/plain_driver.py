"""Run the real driver, `services.train`, with a worker group of plain processes in place of Ray Train's."""

from __future__ import annotations

from typing import Any

from services.train import driver
from tests.support.plain_workers import WorkerGroup


def with_plain_workers(storage: str, job: str, spec: Any, attempt: int, workers: int, watch: Any) -> None:
    with WorkerGroup(workers, storage, [(job, spec.name, attempt)]) as group:
        group.succeed()


if __name__ == "__main__":
    driver._train = with_plain_workers
    driver.main()
