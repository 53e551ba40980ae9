"""Ship what a process prints to storage while it runs: the logs outlive the process and its cluster.

Standard output and error go to a file in memory. One thread copies this file to the former output, another thread puts
it into storage in parts. So a thread that prints never waits for the store, and a thread that hangs holds no line back.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from genmodels.errors import StorageError
from genmodels.runs.log_lines import new_log_folder
from genmodels.runs.parts import PartWriter
from genmodels.runs.store import Run
from genmodels.storage.documents import now
from genmodels.threads import Rounds

COPY_SECONDS = 0.2  # between two looks for new output
SHIP_SECONDS = 2.0  # between two parts: what is lost when the process is killed
CLOSE_SECONDS = 10.0  # that the end of a process may wait for the store
MAX_BYTES = 8 << 20  # that wait for the store; the oldest lines go first
PART_BYTES = 1 << 20
FILE_BYTES = 8 << 20  # after which a new local file is begun
MAX_LINE = 8192  # a longer one is cut into several

logger = logging.getLogger("genmodels")


class Spool:
    """Output on its way to storage, as lines with their times. Bounded and thread-safe."""

    def __init__(self, run: Run, attempt: int, source: str) -> None:
        self.rows: deque[bytes] = deque()
        self.size = self.dropped = 0
        self.rest = b""  # a line that has not ended
        self.part = b""  # that is being stored: the same bytes under the same key until the store has them
        self.parts = PartWriter(run.storage, new_log_folder(run, attempt, source))
        self.stored = 0  # bytes
        self.filling, self.shipping = threading.Lock(), threading.Lock()

    def add(self, data: bytes, ended: bool = False) -> None:
        """Take over output; `ended`: no more follows, so the last line is complete."""
        with self.filling:
            *lines, self.rest = (self.rest + data).split(b"\n")
            if self.rest and (ended or len(self.rest) >= MAX_LINE):
                lines, self.rest = [*lines, self.rest], b""
            for line in lines:
                for first in range(0, max(1, len(line)), MAX_LINE):
                    self._append(line[first : first + MAX_LINE].decode(errors="replace").rstrip("\r"))
            while self.size > MAX_BYTES:
                self.size -= len(self.rows.popleft())
                self.dropped += 1

    def ship(self) -> bool:
        """Store what was added; return True if everything is stored."""
        with self.shipping, contextlib.suppress(StorageError):  # the next round tries again
            while self._next_part():
                self.parts.write(self.stored + len(self.part), self.part)
                self.stored, self.part = self.stored + len(self.part), b""
            with contextlib.suppress(StorageError):  # a later round merges them
                self.parts.merge()
            return True
        return False

    def _append(self, line: str) -> None:
        row = json.dumps({"time": now(), "line": line}).encode() + b"\n"
        self.rows.append(row)
        self.size += len(row)

    def _next_part(self) -> bytes:
        if not self.part:
            with self.filling:
                if self.dropped:
                    notice = f"[{self.dropped} lines are missing here: storage did not take them in time]"
                    time_of_loss = json.loads(self.rows[0])["time"] if self.rows else now()
                    self.part = json.dumps({"time": time_of_loss, "line": notice}).encode() + b"\n"
                    self.dropped = 0
                rows = []
                size = 0
                while self.rows and size < PART_BYTES:
                    rows.append(self.rows.popleft())
                    size += len(rows[-1])
                self.size -= size
                self.part += b"".join(rows)
        return self.part


class LogShipper:
    """Ship what this process prints, from any thread, library or language. Use as a context manager, once a process.

    An exception in the block is written to the log. The end of the block waits for the store `CLOSE_SECONDS` at most.
    """

    def __init__(self, run: Run, attempt: int, source: str) -> None:
        """Args:
        source: "driver", or this process's rank.
        """
        self.spool = Spool(run, attempt, source)
        self.files: list[_LocalFile] = []  # output goes to the last one; the one before may still get a line
        self.copying = threading.Lock()
        self.closing = threading.Event()
        self.threads = [
            threading.Thread(target=self._every, args=(seconds, work, name), name=name, daemon=True)
            for seconds, work, name in (
                (COPY_SECONDS, self._copy, "copy-log"),
                (SHIP_SECONDS, self.spool.ship, "ship-log"),
            )
        ]

    def __enter__(self) -> Self:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
        self.before = os.dup(1), os.dup(2)
        self._begin_file()
        faulthandler.enable(self.before[1])  # after a crash no thread here could copy the stacks
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            traceback.print_exception(kind, error, trace)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, old in zip((1, 2), self.before, strict=True):
            os.dup2(old, descriptor)
        faulthandler.enable(2)
        self.closing.set()
        self.flush(CLOSE_SECONDS, ended=True)

    def flush(self, seconds: float, ended: bool = False) -> bool:
        """Store everything that was printed; return False if it takes longer than `seconds`.

        Args:
            ended: nothing more is printed after this.
        """
        deadline, done = time.monotonic() + seconds, threading.Event()

        def work() -> None:
            self._copy()
            self.spool.add(b"", ended)
            if ended:
                self._close()
            while not (shipped := self.spool.ship()) and time.monotonic() < deadline:
                time.sleep(COPY_SECONDS)
            if shipped:
                done.set()

        # in a thread of its own: the store may take long to refuse
        threading.Thread(target=work, name="flush-log", daemon=True).start()
        return done.wait(seconds)

    def _every(self, seconds: float, work: Callable[[], object], name: str) -> None:
        rounds = Rounds(name, logger)
        while not self.closing.wait(seconds):
            with rounds.round():
                work()

    def _begin_file(self) -> None:
        self.files.append(_LocalFile())
        for descriptor in (1, 2):
            os.dup2(self.files[-1].descriptor, descriptor)

    def _copy(self) -> None:
        with self.copying:
            for file in self.files:
                for data in file.new():
                    self._pass_on(data)
                    self.spool.add(data)
            for file in self.files[:-1]:  # a line that was being written at the change has arrived by now
                file.close()
            del self.files[:-1]
            if not self.closing.is_set() and self.files[-1].position > FILE_BYTES:
                self._begin_file()

    def _close(self) -> None:
        with self.copying:
            for file in self.files:
                file.close()
            self.files.clear()
            for descriptor in self.before:
                os.close(descriptor)

    def _pass_on(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # its reader is gone
            while data:
                data = data[os.write(self.before[0], data) :]


class _LocalFile:
    """A file without a name, which ends with the process; written to by file descriptors, read from the front.

    The file is in memory, because a full disk would make every print fail.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("genmodels-log")
        else:  # not Linux
            self.descriptor, name = tempfile.mkstemp(prefix="genmodels-log-")
            os.unlink(name)
        self.position = 0

    def new(self) -> Iterator[bytes]:
        while data := os.pread(self.descriptor, 1 << 20, self.position):
            self.position += len(data)
            yield data

    def close(self) -> None:
        os.close(self.descriptor)
