"""Write heartbeats, metrics, previews and checkpoints on rank 0 while it trains, in threads of their own.

Two threads, so that a slow or absent store delays no step. One writes heartbeats, metrics and previews. The other
uploads the snapshot, manifest last, from the memory into which it was copied. There is one such memory: a save waits
until the one before is in storage. Rows and previews wait if too many wait already: memory stays bounded. During an
outage of the store a write is retried until the outage ends; meanwhile the heartbeat gives the reason for the wait.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any, TypeVar

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, File, Lineage, Manifest, Snapshot
from genmodels.checkpoint.parts import INDEX, Layout, joined
from genmodels.errors import StorageUnavailable, TrainingDiverged
from genmodels.family import Batch, Family
from genmodels.metrics import CHECKPOINT_BYTES, CHECKPOINT_FAILURES, CHECKPOINT_SECONDS, CHECKPOINT_STALL_SECONDS
from genmodels.registry import gate, references
from genmodels.runs.metric_rows import MetricWriter
from genmodels.runs.records import Heartbeat, Phase
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage.retry import retry_until_available
from genmodels.training.flops import StepFlops
from genmodels.training.gauges import TrainingGauges
from genmodels.training.group import SideGroup

HEARTBEAT_SECONDS = 1.0
MAX_HEARTBEAT_SECONDS = 5.0  # of an attempt that has gone on for AGE_RATIO times as long; a new phase is told at once
AGE_RATIO = 60
METRICS_SECONDS, MAX_METRICS_SECONDS = 5.0, 10.0  # likewise
MEDIAN_OF = 101  # steps
MAX_ROWS, MAX_PICTURES = 10_000, 64  # that wait for the store

T = TypeVar("T")


class RunRecorder:
    """A `Recorder` for one attempt. Use as a context manager: its exit waits for the last checkpoint.

    The next call raises an error of a background thread (e.g. a newer attempt has taken over).
    """

    def __init__(
        self,
        run: Run,
        attempt: int,
        spec: ModelSpec,
        scratch: Family[Any, Any],
        assets: dict[str, bytes],
        fit_batches: Callable[[], Iterable[Batch]],
        lineage: Lineage,
        stop_event: threading.Event | None = None,
        step_flops: StepFlops | None = None,
        side_group: SideGroup | None = None,
    ) -> None:
        """Args:
        scratch: another instance of the model, which the upload thread fits with a snapshot's weights.
        assets: the dataset's files for serving (the tokenizer).
        fit_batches: training batches for `Family.fit`, the same each time.
        stop_event: set to make the attempt save and end.
        step_flops: operations of a step, for the gauges; None if they are not known.
        side_group: the ranks that each save a part of a checkpoint; None if this rank saves all of it.
        """
        self.run, self.attempt, self.spec, self.lineage = run, attempt, spec, lineage
        self.scratch, self.assets, self.fit_batches = scratch, assets, fit_batches
        self.side_group = side_group
        self.heartbeat = Heartbeat(phase="starting", max_steps=spec.train.max_steps)
        tokens = scratch.sequence_length
        self.gauges = TrainingGauges(run, spec, lineage.world_size, tokens, step_flops)
        self.metrics = MetricWriter(run, attempt, lineage.parent.step if lineage.parent else 0)
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[tuple[int, str, bytes]] = []
        self.flushing = threading.Lock()
        self.stop_event = stop_event or threading.Event()
        self.error: BaseException | None = None
        self.reasons: dict[str, str] = {}  # why a thread waits, by its name
        self.closing = threading.Event()
        self.snapshots: queue.Queue[tuple[Snapshot, float] | None] = queue.Queue()  # and when it was begun
        self.saved = threading.Event()  # the latest snapshot is in storage: its memory may be filled again
        self.saved.set()
        self.pace: tuple[float, int] | None = None  # when this attempt's first step ended, and its number
        self.progressed_at: float | None = None
        self.durations: deque[float] = deque(maxlen=MEDIAN_OF)  # of the latest steps
        self.heartbeat_writer = threading.Thread(
            target=self._guard, args=(self._write_heartbeats,), name="heartbeat", daemon=True
        )
        self.uploader = threading.Thread(target=self._guard, args=(self._upload,), name="upload", daemon=True)

    def __enter__(self) -> RunRecorder:
        self.gauges.show_heartbeat(self.heartbeat)
        self.heartbeat_writer.start()
        self.uploader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A part of a checkpoint is complete with those of the other ranks. All of them stop at a divergence; after
        # another error they may be gone.
        if kind is None or issubclass(kind, Exception if self.side_group is None else TrainingDiverged):
            self._drain()
        self.closing.set()
        self.heartbeat_writer.join()
        if kind is None and self.error:
            raise self.error

    @property
    def waiting(self) -> str:
        """Return the reason why one of the two threads waits, or ""."""
        return next(filter(None, list(self.reasons.values())), "")

    def report_progress(self, phase: Phase, step: int, loss: float | None = None) -> None:
        if self.error:
            raise self.error
        now = time.monotonic()
        if phase == "training":
            self.pace = self.pace or (now, step)
            if self.progressed_at is not None:  # all work before the step has reported its own end
                self.durations.append(now - self.progressed_at)
        self.progressed_at = now
        seconds_left = None
        if self.pace and step > self.pace[1] and phase != "waiting for storage":  # an outage tells nothing of the pace
            seconds_left = (now - self.pace[0]) / (step - self.pace[1]) * (self.spec.train.max_steps - step)
        self._show(
            phase=phase,
            step=step,
            loss=self.heartbeat.loss if loss is None else loss,
            seconds_left=seconds_left,
        )

    def log(self, row: dict[str, Any]) -> None:
        self.gauges.row(row)
        self.rows.append(row)
        self._wait_for_room(self.rows, MAX_ROWS, row["step"])

    def sample(self, step: int, name: str, data: bytes) -> None:
        self.pictures.append((step, name, data))
        self._wait_for_room(self.pictures, MAX_PICTURES, step)

    def save(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Upload a snapshot in the background. It is taken as soon as the one before is in storage."""
        began = self.progressed_at or time.monotonic()
        while not self.saved.wait(0.5):
            self.report_progress("waiting for storage", step)
        snapshot = take()
        self.saved.clear()
        self.snapshots.put((snapshot, began))
        CHECKPOINT_STALL_SECONDS.labels(self.spec.family).observe(time.monotonic() - began)

    def should_stop(self) -> bool:
        return self.stop_event.is_set()

    def _show(self, **facts: Any) -> None:
        """Change the heartbeat, which counts as progress: at once in the gauges, with the next heartbeat in storage."""
        self.heartbeat = self.heartbeat.model_copy(
            update={**facts, "progress_count": self.heartbeat.progress_count + 1}
        )
        self.gauges.show_heartbeat(self.heartbeat)

    def _wait_for_room(self, unwritten: Sized, most: int, step: int) -> None:
        while len(unwritten) > most:
            self.report_progress("waiting for storage", step)
            time.sleep(0.1)

    def _drain(self) -> None:
        """Wait for the upload of saved snapshots, also after a failure: the weights before a NaN are worth keeping."""
        self.snapshots.put(None)
        while self.uploader.is_alive():
            self.uploader.join(HEARTBEAT_SECONDS)
            self._show()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the training thread, which raises it
            self.error = self.error or error

    def _write_heartbeats(self) -> None:
        """Write heartbeats that changed, and every few seconds metrics and previews."""
        written, flushed = None, time.monotonic()
        began = due = flushed
        while not self.closing.wait(HEARTBEAT_SECONDS):
            try:
                latest, now = self.heartbeat, time.monotonic()
                is_news = written is None or latest.phase != written.phase
                if latest is not written and (is_news or now >= due):
                    written = self._write_heartbeat()
                    due = now + min(MAX_HEARTBEAT_SECONDS, (now - began) / AGE_RATIO)
                if time.monotonic() - flushed >= max(
                    METRICS_SECONDS, min(MAX_METRICS_SECONDS, (now - began) / AGE_RATIO)
                ):
                    self._flush()
                    flushed = time.monotonic()
                    self._waits("heartbeat")
            except StorageUnavailable as outage:  # the next round retries
                self._waits("heartbeat", outage.reason)
        self._persist(self._flush)
        self._persist(self._write_heartbeat)

    def _write_heartbeat(self) -> Heartbeat:
        latest, durations = self.heartbeat, list(self.durations)
        step_seconds = statistics.median(durations) if durations else None
        facts = {"step_seconds": step_seconds, "waiting": self.waiting}
        self.run.write_heartbeat(self.attempt, latest.model_copy(update=facts))
        return latest

    def _flush(self) -> None:
        with self.flushing:
            while self.pictures:
                self.run.write_sample(self.attempt, *self.pictures[0])
                del self.pictures[0]
            del self.rows[: self.metrics.write(self.rows[:])]
            self.metrics.merge()

    def _upload(self) -> None:
        while (waiting := self.snapshots.get()) is not None:
            snapshot, began = waiting
            size = self._upload_one(snapshot)
            self.saved.set()
            self.gauges.saved(snapshot.step)
            CHECKPOINT_SECONDS.labels(self.spec.family).observe(time.monotonic() - began)
            CHECKPOINT_BYTES.labels(self.spec.family).inc(size)
            for key in self._persist(partial(self._unneeded, snapshot.step)):
                self._persist(partial(self._delete, key))

    def _upload_one(self, snapshot: Snapshot) -> int:
        """Upload one checkpoint; return its size in bytes."""
        prefix = self.run.checkpoint_prefix(CheckpointRef(attempt=self.attempt, step=snapshot.step))
        failures = CHECKPOINT_FAILURES.labels(self.spec.family)
        files = {}
        for name, data in self._contents(snapshot).items():
            upload = partial(checkpoint.upload_file, self.run.storage, f"{prefix}/{name}", data)
            files[name] = self._persist(upload, failures.inc)
        if self.side_group and snapshot.layout:
            files |= self._join_parts(self.side_group, snapshot, snapshot.layout, files)
        manifest = Manifest(
            step=snapshot.step, samples=snapshot.samples, metrics=snapshot.metrics, lineage=self.lineage, files=files
        )
        self._persist(self._flush)  # a run that resumes from this checkpoint has the metrics up to it
        complete = partial(checkpoint.complete, self.run.storage, prefix, manifest, self._fence)
        self._persist(complete, failures.inc)
        return sum(file.size for file in files.values())

    def _join_parts(
        self, group: SideGroup, snapshot: Snapshot, layout: Layout, files: Mapping[str, File]
    ) -> dict[str, File]:
        """Wait for the parts of the other ranks, and upload the index; return these files."""
        prefix = self.run.checkpoint_prefix(CheckpointRef(attempt=self.attempt, step=snapshot.step))
        mine = layout.described(snapshot.files[layout.name], files[layout.name])
        index = joined(group.gather(mine.model_dump_json().encode()))
        data = memoryview(index.model_dump_json().encode())
        file = self._persist(partial(checkpoint.upload_file, self.run.storage, f"{prefix}/{INDEX}", data))
        return {part.name: part.file for part in index.parts} | {INDEX: file}

    def _contents(self, snapshot: Snapshot) -> dict[str, memoryview]:
        """Return the bytes of each file of a checkpoint, without a copy of its tensors."""
        network = self.scratch.network
        network.load_state_dict(snapshot.files[checkpoint.WEIGHTS].tensors, assign=True)  # the memory of the snapshot
        self.scratch.fit(self.fit_batches(), self.spec.train.seed)
        assets = {f"assets/{name}": data for name, data in (self.scratch.assets() | self.assets).items()}
        small = {checkpoint.CONFIG: checkpoint.config_bytes(self.scratch), **assets}
        tensors = {name: file.data for name, file in snapshot.files.items()}
        return tensors | {name: memoryview(data) for name, data in small.items()}

    def _fence(self) -> None:
        self.run.fence(self.attempt)

    def _unneeded(self, step: int) -> list[str]:
        """Return the keys of objects that are no longer needed, in the order to delete them.

        First the files of checkpoints whose manifest was deleted at an earlier save, then the manifests of all
        checkpoints except the newest, the best, and those that other runs start from. So a reader of a checkpoint has
        the time between two saves to finish.
        """
        leftovers = self.run.leftovers(before_step=step)
        whole = list(self.run.manifests())
        keep = [ref for ref, _ in whole[-self.spec.checkpoints.num_to_keep :]] + references.pinned_checkpoints(self.run)
        if self.spec.serve.gate and whole:
            keep.append(gate.best(self.spec.serve.gate, whole)[0])
        doomed = [ref for ref, _ in whole if ref not in keep]
        return leftovers + [f"{self.run.checkpoint_prefix(ref)}/{checkpoint.MANIFEST}" for ref in doomed]

    def _delete(self, key: str) -> None:
        self._fence()
        self.run.storage.delete(key)

    def _persist(self, work: Callable[[], T], refused: Callable[[], None] = lambda: None) -> T:
        """Write to the store, and retry until an outage ends.

        Args:
            refused: called after each failed try.
        """

        thread = threading.current_thread().name

        def waiting(outage: StorageUnavailable) -> None:
            refused()
            if self.error:
                raise self.error
            self._waits(thread, outage.reason)

        result = retry_until_available(work, waiting)
        self._waits(thread)
        return result

    def _waits(self, thread: str, reason: str = "") -> None:
        """Put the reason why a thread waits into the next heartbeat; without a reason, remove it."""
        if reason or self.reasons.get(thread):
            self.reasons[thread] = reason
            self._show()
