"""Runs a command and leaves nothing of it behind, however it or whoever started it ends.

    python -m services.cluster.reaper [--remove=FOLDER] COMMAND ...

Ray's processes outlive their parents for up to minutes, and hold ports. So a guard leads a session of its own; when the
command ends, or the guard's standard input does (whoever held the other end is gone), it kills the whole session. In
the second case it removes the folder, too: the process that would have done so was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

REMOVE = "--remove="
REMOVE_SECONDS = 5.0  # for other guards to end what still writes to the folder


def sweep(session: int) -> None:
    """Kill every process of a session but this one."""
    while pids := [pid for pid in _pids() if pid != os.getpid() and _is_of(pid, session)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main() -> None:
    arguments = sys.argv[1:]
    folder = arguments.pop(0).removeprefix(REMOVE) if arguments[0].startswith(REMOVE) else None
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    ending = threading.Event()
    end = threading.Thread(target=_end_with_input, args=[ending, folder], daemon=True)
    end.start()
    code = command.wait()
    if ending.is_set():
        end.join()  # which ends this process
    sweep(os.getpid())
    os._exit(code if code >= 0 else 128 - code)  # as a shell tells of a signal


def _end_with_input(ending: threading.Event, folder: str | None) -> None:
    with contextlib.suppress(OSError):  # an input that cannot be read is one whose other end is gone
        while os.read(0, 1024):
            pass
    ending.set()
    sweep(os.getpid())
    deadline = time.monotonic() + REMOVE_SECONDS
    while folder and os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
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
