"""Runs a command and leaves nothing of it behind, however it or whoever started it ends.

    python -m services.guard COMMAND ...

Ray's processes outlive their parents for up to minutes, and hold ports. So a guard leads a session of its own; when the
command ends, or the guard's standard input does (whoever held the other end is gone), it kills the whole session.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


def sweep(session: int) -> None:
    """Kill every process of a session but this one."""
    while pids := [pid for pid in _pids() if pid != os.getpid() and _is_of(pid, session)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main() -> None:
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    threading.Thread(target=_end_with_input, daemon=True).start()
    code = command.wait()
    sweep(os.getpid())
    os._exit(code if code >= 0 else 128 - code)  # as a shell tells of a signal


def _end_with_input() -> None:
    with contextlib.suppress(OSError):  # an input that cannot be read is one whose other end is gone
        while os.read(0, 1024):
            pass
    sweep(os.getpid())
    os._exit(1)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_of(pid: int, session: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state, _, _, of = status.rpartition(")")[2].split()[:4]
    return int(of) == session and state != "Z"


if __name__ == "__main__":
    main()
