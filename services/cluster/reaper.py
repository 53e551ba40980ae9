"""Run a command and leave none of its processes behind, however the command or its parent ends.

    python -m services.cluster.reaper [--remove=FOLDER] [--pass=NUMBER] COMMAND ...

Ray's processes outlive their parents for up to minutes, and hold ports. So the reaper leads a session of its own, and
kills the whole session in two cases: the command ends, or the reaper's standard input ends because the parent, which
held the other end, was killed. In the second case the reaper also removes the folder that its parent can no longer
remove. NUMBER is a file descriptor that the command inherits.
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

REMOVE, PASS = "--remove=", "--pass="
REMOVE_SECONDS = 5.0  # for other reapers to end processes that still write to the folder


def kill_session(session: int) -> None:
    """Kill every process of a session except this one."""
    while pids := [pid for pid in _pids() if pid != os.getpid() and _is_of(pid, session)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main() -> None:
    arguments = sys.argv[1:]
    folder = arguments.pop(0).removeprefix(REMOVE) if arguments[0].startswith(REMOVE) else None
    passed = [int(arguments.pop(0).removeprefix(PASS))] if arguments[0].startswith(PASS) else []
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=passed)
    for number in passed:
        os.close(number)  # so that the other end of a socket learns of the end of the command
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    input_ended = threading.Event()
    watcher = threading.Thread(target=_end_with_input, args=[input_ended, folder], daemon=True)
    watcher.start()
    code = command.wait()
    if input_ended.is_set():
        watcher.join()  # the watcher ends this process
    kill_session(os.getpid())
    os._exit(code if code >= 0 else 128 - code)  # as a shell reports a signal


def _end_with_input(input_ended: threading.Event, folder: str | None) -> None:
    """Wait for the end of standard input, then kill the session, remove the folder and end this process."""
    with contextlib.suppress(OSError):  # an input that cannot be read has lost its other end
        while os.read(0, 1024):
            pass
    input_ended.set()
    kill_session(os.getpid())
    deadline = time.monotonic() + REMOVE_SECONDS
    while folder and os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
    os._exit(1)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_of(pid: int, session: int) -> bool:
    """Return whether a process belongs to a session; a zombie belongs to none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state, _, _, of = status.rpartition(")")[2].split()[:4]
    return int(of) == session and state != "Z"


if __name__ == "__main__":
    main()
