"""Save the parts of checkpoints that a rank other than 0 holds, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Snapshot
from genmodels.errors import TrainingDiverged
from genmodels.runs.store import Run
from genmodels.storage.retry import retry_until_available
from genmodels.training.group import SideGroup


class PartRecorder:
    """Save one part at a time in the background. Use as a context manager: its exit waits for the last one.

    The next save, or the exit, raises an error of the thread.
    """

    def __init__(self, run: Run, attempt: int, group: SideGroup) -> None:
        self.run, self.attempt, self.group = run, attempt, group
        self.error: BaseException | None = None
        self.snapshots: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self.saved = threading.Event()  # the memory of the latest snapshot may be filled again
        self.saved.set()
        self.thread = threading.Thread(target=self._upload, name="upload", daemon=True)

    def __enter__(self) -> PartRecorder:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, TrainingDiverged):  # else the other ranks may be gone
            self.snapshots.put(None)
            self.thread.join()
        if kind is None and self.error:
            raise self.error

    def save(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Save a part. Its snapshot is taken as soon as the one before is in storage."""
        self.saved.wait()
        if self.error:
            raise self.error
        self.saved.clear()
        self.snapshots.put(take())

    def _upload(self) -> None:
        try:
            while snapshot := self.snapshots.get():
                self._upload_one(snapshot)
                self.saved.set()
        except BaseException as error:  # handed to the training thread, which raises it
            self.error = error
            self.saved.set()

    def _upload_one(self, snapshot: Snapshot) -> None:
        assert snapshot.layout
        prefix = self.run.checkpoint_prefix(CheckpointRef(attempt=self.attempt, step=snapshot.step))
        name = snapshot.layout.name
        content = snapshot.files[name]
        entry = b""  # tells rank 0 of a failure
        try:
            upload = partial(checkpoint.upload_file, self.run.storage, f"{prefix}/{name}", content.data)
            file = retry_until_available(upload)
            entry = snapshot.layout.described(content, file).model_dump_json().encode()
        finally:
            self.group.gather(entry)
