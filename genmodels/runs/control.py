"""Obey the commands to an attempt in its processes, while the main thread trains, waits or hangs.

One process of an attempt reads commands in storage: looks of all ranks would cost as much as the group is large. The
other ranks learn of a stop in a collective of the training loop, and of a kill from rank 0, without storage.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from genmodels.errors import StorageUnavailable
from genmodels.runs.logs import LogShipper
from genmodels.runs.store import Run
from genmodels.threads import Rounds

log = logging.getLogger("genmodels")

LOOK_SECONDS = 1.0  # between two looks; with each look that finds nothing a little more
MAX_LOOK_SECONDS = 2.0  # within which a command is read
BACK_OFF = 1.1
KILL_SECONDS = 3.0  # from the command to the end of a process: other ranks have to learn of it and ship their stacks
MAX_FRAMES = 50  # of each thread
KILLED = 75  # exit code of a process that was killed by a command


class Watcher(ABC):
    """Look for what this process has to obey, in a thread of its own. Use as a context manager.

    A killed process writes the stacks of all its threads into its log, ships the log, and ends after `kill_seconds` at
    the latest, whatever its main thread does.

    Attributes:
        should_stop: set when the attempt is to save and end.
    """

    def __init__(
        self,
        logs: LogShipper,
        kill_seconds: float = KILL_SECONDS,
        pass_on: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Args:
        pass_on: tell other processes why this one is killed.
        """
        self.logs, self.kill_seconds, self.pass_on = logs, kill_seconds, pass_on
        self.should_stop, self.killed, self.closing = threading.Event(), threading.Event(), threading.Event()
        self._rounds = Rounds("commands", log)
        self.thread = threading.Thread(target=self._watch, name="commands", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # do not join the thread: it may wait for a store that is away

    @abstractmethod
    def look(self) -> bool:
        """Look once and obey; return True if there was something new."""

    def kill(self, reason: str) -> None:
        """End this process with its stacks in its log."""
        self.killed.set()
        last = threading.Timer(self.kill_seconds, self._end)
        last.daemon = True
        last.start()
        os.write(2, f"Killed: {reason}. The stacks of all threads:\n{thread_stacks()}\n".encode())
        self.pass_on(reason)
        self.logs.flush(self.kill_seconds)

    def _watch(self) -> None:
        pause = LOOK_SECONDS
        while not self.closing.wait(pause) and not self.killed.is_set():
            pause = min(pause * BACK_OFF, MAX_LOOK_SECONDS)
            with self._rounds.round(), contextlib.suppress(StorageUnavailable):  # the next look reads it
                if self.look():
                    pause = LOOK_SECONDS

    def _end(self) -> None:
        if not self.closing.is_set():
            os._exit(KILLED)  # does not wait for threads that hang


class CommandWatcher(Watcher):
    """Read the commands to an attempt: on rank 0, and in the driver while there is no rank 0.

    Commands are numbered without gaps, so that a look costs one small read, not a listing.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper, **options: Any) -> None:
        super().__init__(logs, **options)
        self.run, self.attempt = run, attempt
        self.last_seq: int | None = None  # number of the last command that was read; None before the first look

    def look(self) -> bool:
        """Read the new commands once."""
        if self.last_seq is not None and not self.run.has_command(self.last_seq + 1):
            return False
        commands = self.run.commands(after=self.last_seq or 0)
        self.last_seq = self.last_seq or 0
        for command in commands:
            self.last_seq = command.seq
            if command.attempt != self.attempt:
                continue
            if command.action == "kill":
                self.kill(command.reason)
            elif command.action == "stop":
                self.should_stop.set()
        return bool(commands)


class KillListener(Watcher):
    """Learn from rank 0 that the attempt is killed: on the other ranks.

    Args:
        killed_for: return why rank 0 was killed, None if it was not.
    """

    def __init__(self, killed_for: Callable[[], str | None], logs: LogShipper) -> None:
        super().__init__(logs)
        self.killed_for = killed_for

    def look(self) -> bool:
        reason = self.killed_for()
        if reason is not None:
            self.kill(reason)
        return reason is not None


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
