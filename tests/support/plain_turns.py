"""Run the real driver that takes attempts in turn, with a worker group of plain processes for each attempt.

python -m tests.support.plain_turns SOCKET
"""

from __future__ import annotations

import socket
import sys

from services.train.turns import take_turns
from tests.support.plain_driver import with_plain_workers

if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        take_turns(channel, with_plain_workers)
