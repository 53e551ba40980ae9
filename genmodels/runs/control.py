"""What a process of an attempt hears of wishes, while its main thread trains, waits or hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
from typing import Self

from genmodels.errors import StorageUnavailable
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Wish
from genmodels.runs.store import Run
from genmodels.threads import Rounds

log = logging.getLogger("genmodels")

LOOK_SECONDS = 1.0
KILL_SECONDS = 3.0  # from the wish to the end of a process: the others want to find it and to ship their stacks too
KILLED = 75  # exit code of a process that was killed by a wish


class WishWatch:
    """Looks for wishes in a thread of its own. Use as a context manager.

    `leave` is set by a wish to leave. By a wish to kill, the process writes the stacks of all its threads into its log,
    ships that, and ends after `kill_seconds` if it has not by then: nothing that hangs can keep it.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper, kill_seconds: float = KILL_SECONDS) -> None:
        self.run, self.attempt, self.logs, self.kill_seconds = run, attempt, logs, kill_seconds
        self.leave = threading.Event()
        self.killed: Wish | None = None
        self.seen = 0  # number of the last wish that was read
        self.closing = threading.Event()
        self._rounds = Rounds("wishes", log)
        self.thread = threading.Thread(target=self._watch, name="wishes", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # not waited for: a store that is away may hold it

    def look(self) -> None:
        """One look at the store."""
        for wish in self.run.wishes(after=self.seen):
            self.seen = wish.number
            if wish.attempt != self.attempt:
                continue
            if wish.wish == "kill":
                self._kill(wish)
            elif wish.wish == "leave":
                self.leave.set()

    def _watch(self) -> None:
        while not self.closing.wait(LOOK_SECONDS):
            with self._rounds.round(), contextlib.suppress(StorageUnavailable):  # the next look may find it
                self.look()

    def _kill(self, wish: Wish) -> None:
        self.killed = wish
        last = threading.Timer(self.kill_seconds, self._end)
        last.daemon = True
        last.start()
        os.write(2, f"Killed: {wish.reason}. The stacks of all threads:\n".encode())
        faulthandler.dump_traceback(2)
        self.logs.flush(self.kill_seconds)

    def _end(self) -> None:
        if not self.closing.is_set():
            os._exit(KILLED)  # waits for nothing, not even for threads that hang
