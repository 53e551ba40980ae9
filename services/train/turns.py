"""Driver that takes attempts in turn: the driver of one attempt, again and again in one process.

    python -m services.train.turns SOCKET

It reads a line of JSON for each attempt from a socket, whose number it is given, and prints to the log that the line
names. If the attempt has ended well, it answers with a line, and waits for the next attempt with a worker group that
need not be started. Otherwise it ends, and with it the worker group. It also ends when the other end of the socket is
closed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from genmodels.runs.records import Result
from services.cluster.logs import log_to_stderr
from services.train.driver import drive
from services.train.warm_group import WarmGroup


def take_turns(channel: socket.socket, train: Callable[..., None]) -> None:
    """Drive the attempts that arrive, until one does not end well or no other arrives."""
    for line in channel.makefile("rb"):
        turn: dict[str, Any] = json.loads(line)
        _print_to(turn.pop("log"))
        result = drive(**turn, train=train)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not ended_well(result):
            return
        channel.sendall(json.dumps({"attempt": turn["attempt"]}).encode() + b"\n")


def ended_well(result: Result) -> bool:
    """Tell whether an attempt leaves no doubt about its processes: it has trained to its last step."""
    return result.outcome == "succeeded" or result.cause == "gate"


def _print_to(log: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    number = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(number, descriptor)
    os.close(number)


def main() -> None:
    log_to_stderr()
    with socket.socket(fileno=int(sys.argv[1])) as channel, WarmGroup() as group:
        take_turns(channel, group.train)
    os._exit(0)  # what is left of Ray in this process could wait for other processes; they end with this one


if __name__ == "__main__":
    main()
