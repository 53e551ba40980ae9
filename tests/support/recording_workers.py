"""Run plain_workers whose workers record the samples that they take, and stop at a given step.

$SEEN names a folder; in it `<job>-<attempt>-<rank>.jsonl`, for each micro-batch a line `[first sample of the step,
indices, epochs]`. $LEAVE is a JSON object: after which step an attempt (`<job>-<attempt>`) stops.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genmodels.training import attempt, loop
from tests.support import plain_workers


class Recorded:
    """Record the samples that are taken from a split."""

    def __init__(self, split: Any, first: int) -> None:
        self.split, self.first = split, first

    def __len__(self) -> int:
        return len(self.split)

    def take(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        with file.open("a") as out:
            out.write(json.dumps([self.first, index.tolist(), epoch.tolist()]) + "\n")
        taken: dict[str, np.ndarray] = self.split.take(index, epoch)
        return taken


def micro_batches(split: Any, config: Any, samples: int, group: Any) -> Iterator[Any]:
    if samples // config.batch_size + 1 == last:
        leave.set()
    return healthy(Recorded(split, samples), config, samples, group)


def run_attempt(storage: Any, job: str, model: str, number: int, group: Any, event: threading.Event) -> bool:
    global file, last, leave
    file = Path(os.environ["SEEN"], f"{job}-{number}-{group.rank}.jsonl")
    last, leave = json.loads(os.environ["LEAVE"]).get(f"{job}-{number}"), event
    return carry_out(storage, job, model, number, group, event)


if __name__ == "__main__":
    file, last, leave = Path(), None, threading.Event()
    healthy, carry_out = loop.micro_batches, attempt.run_attempt
    loop.micro_batches, attempt.run_attempt = micro_batches, run_attempt
    plain_workers.main()
