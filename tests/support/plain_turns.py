"""Run the real driver that takes attempts in turn, without Ray: `python -m tests.support.plain_turns SOCKET [--here]`.

The worker group of each attempt is of plain processes; with `--here` the driver is the only worker.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from genmodels.storage import open_storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from services.cluster.logs import log_to_stderr
from services.train.turns import take_turns
from tests.support.plain_driver import with_plain_workers


def train_here(storage: str, job: str, spec: Any, attempt: int, workers: int, watch: Any) -> None:
    run_attempt(open_storage(storage), job, spec.name, attempt, Group())


if __name__ == "__main__":
    log_to_stderr()
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        take_turns(channel, train_here if "--here" in sys.argv else with_plain_workers)
