"""Obey the commands to an attempt in its processes, while the main thread trains, waits or hangs.

Rank 0 reads the commands: looks of all ranks would cost as much as the group is large. The other ranks learn of a stop
in a collective of the training loop. They read a kill themselves, once training stands still.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Self

from genmodels.errors import StorageUnavailable
from genmodels.runs.logs import LogShipper
from genmodels.runs.store import Run
from genmodels.threads import Rounds

log = logging.getLogger("genmodels")

LOOK_SECONDS = 1.0  # between two looks; with each look that finds nothing a little more
MAX_LOOK_SECONDS = 2.0  # within which a command is read
BACK_OFF = 1.1
STILL_SECONDS = 5.0  # without an exchange between ranks; shorter than each time limit of a hang
LOOKS_A_SECOND = 16  # of all ranks that stand still
KILL_SECONDS = 3.0  # from the command to the end of a process: the other ranks have to read it and ship their stacks
MAX_FRAMES = 50  # of each thread
KILLED = 75  # exit code of a process that was killed by a command


class CommandWatcher:
    """Read the commands to an attempt in a thread of its own: on rank 0, and in the driver while there is no rank 0.

    `should_stop` is set by a stop command. After a kill command the process writes the stacks of all its threads into
    its log, ships the log, and ends after `kill_seconds` at the latest, whatever its main thread does. Use as a context
    manager. Commands are numbered without gaps, so that a look costs one small read, not a listing.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper, kill_seconds: float = KILL_SECONDS) -> None:
        self.run, self.attempt, self.logs, self.kill_seconds = run, attempt, logs, kill_seconds
        self.should_stop, self.killed, self.closing = threading.Event(), threading.Event(), threading.Event()
        self.last_seq: int | None = None  # number of the last command that was read; None before the first look
        self._rounds = Rounds("commands", log)
        self.thread = threading.Thread(target=self._watch, name="commands", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # do not join the thread: it may wait for a store that is away

    def look(self) -> bool:
        """Read the new commands once and obey them; return True if there were any."""
        if self.last_seq is not None and not self.run.has_command(self.last_seq + 1):
            return False
        commands = self.run.commands(after=self.last_seq or 0)
        self.last_seq = self.last_seq or 0
        for command in commands:
            self.last_seq = command.seq
            if command.attempt != self.attempt:
                continue
            if command.action == "kill":
                self._kill(command.reason)
            elif command.action == "stop":
                self.should_stop.set()
        return bool(commands)

    def _watch(self) -> None:
        pause = LOOK_SECONDS
        while not self.closing.wait(pause) and not self.killed.is_set():
            pause = min(pause * BACK_OFF, MAX_LOOK_SECONDS)
            with self._rounds.round(), contextlib.suppress(StorageUnavailable):  # the next look reads it
                if self.look():
                    pause = LOOK_SECONDS

    def _kill(self, reason: str) -> None:
        self.killed.set()
        last = threading.Timer(self.kill_seconds, self._end)
        last.daemon = True
        last.start()
        os.write(2, f"Killed: {reason}. The stacks of all threads:\n{thread_stacks()}\n".encode())
        self.logs.flush(self.kill_seconds)

    def _end(self) -> None:
        if not self.closing.is_set():
            os._exit(KILLED)  # does not wait for threads that hang


class HangWatcher(CommandWatcher):
    """Read the commands on a rank other than 0, but only while the group stands still: rank 0 may be what hangs.

    While training goes on, rank 0 obeys for all, and a look of this class costs nothing. `world_size` ranks that stand
    still look at most `LOOKS_A_SECOND` times a second together.
    """

    def __init__(
        self, run: Run, attempt: int, logs: LogShipper, still_seconds: Callable[[], float], world_size: int
    ) -> None:
        """Args:
        still_seconds: return for how long the ranks have exchanged nothing, beyond what is usual.
        """
        super().__init__(run, attempt, logs)
        self.still_seconds, self.pause = still_seconds, world_size / LOOKS_A_SECOND
        self._next_look = 0.0

    def look(self) -> bool:
        now = time.monotonic()
        if self.still_seconds() < STILL_SECONDS or now < self._next_look:
            return False
        self._next_look = now + self.pause
        return super().look()


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
