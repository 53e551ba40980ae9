"""Read the commands to an attempt in each of its processes, while the main thread trains, waits or hangs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import traceback
from typing import Self

from genmodels.errors import StorageUnavailable
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Command
from genmodels.runs.store import Run
from genmodels.threads import Rounds

log = logging.getLogger("genmodels")

LOOK_SECONDS = 1.0
KILL_SECONDS = 3.0  # from the command to the end of a process: the other ranks have to read it and ship their stacks
MAX_FRAMES = 50  # of each thread
KILLED = 75  # exit code of a process that was killed by a command


class CommandWatcher:
    """Look for commands in a thread of its own. Use as a context manager.

    `should_stop` is set by a stop command. After a kill command the process writes the stacks of all its threads into
    its log, ships the log, and ends after `kill_seconds` at the latest, whatever its main thread does.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper, kill_seconds: float = KILL_SECONDS) -> None:
        self.run, self.attempt, self.logs, self.kill_seconds = run, attempt, logs, kill_seconds
        self.should_stop = threading.Event()
        self.killed: Command | None = None
        self.last_seq = 0  # number of the last command that was read
        self.closing = threading.Event()
        self._rounds = Rounds("commands", log)
        self.thread = threading.Thread(target=self._watch, name="commands", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # do not join the thread: it may wait for a store that is away

    def look(self) -> None:
        """Read the new commands once."""
        for command in self.run.commands(after=self.last_seq):
            self.last_seq = command.seq
            if command.attempt != self.attempt:
                continue
            if command.action == "kill":
                self._kill(command)
            elif command.action == "stop":
                self.should_stop.set()

    def _watch(self) -> None:
        while not self.closing.wait(LOOK_SECONDS):
            with self._rounds.round(), contextlib.suppress(StorageUnavailable):  # the next look reads them
                self.look()

    def _kill(self, command: Command) -> None:
        self.killed = command
        last = threading.Timer(self.kill_seconds, self._end)
        last.daemon = True
        last.start()
        os.write(2, f"Killed: {command.reason}. The stacks of all threads:\n{thread_stacks()}\n".encode())
        self.logs.flush(self.kill_seconds)

    def _end(self) -> None:
        if not self.closing.is_set():
            os._exit(KILLED)  # does not wait for threads that hang


def thread_stacks() -> str:
    """Return the stacks of all threads as text: the main thread first, and of each thread the innermost frame first.

    `faulthandler` would leave out the main thread in a process with more than 100 threads.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, frames, lines = threading.main_thread().ident, sys._current_frames(), list[str]()
    for ident in sorted(frames, key=lambda ident: ident != main):
        lines.append(f"Thread {names.get(ident, ident)}:")
        for frame, line in itertools.islice(traceback.walk_stack(frames[ident]), MAX_FRAMES):
            lines.append(f"  in {frame.f_code.co_name} ({frame.f_code.co_filename}:{line})")
    return "\n".join(lines)
