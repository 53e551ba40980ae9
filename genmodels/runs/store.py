"""Read and write the objects of one run: attempts, checkpoints, samples, commands and status.

Its metrics are in `metric_rows.py`, its logs in `log_lines.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.errors import CheckpointError, Conflict, DamagedObject, KeyNotFound, Superseded
from genmodels.runs.records import (
    Action,
    AttemptStart,
    ChainLink,
    Command,
    Heartbeat,
    Result,
    Status,
)
from genmodels.storage import (
    Document,
    Storage,
    list_names,
    load_document,
    write_document,
)
from genmodels.storage.documents import DocumentT, now


class Run:
    """The training of one model of a job, as it is in storage."""

    def __init__(self, storage: Storage, job: str, model: str) -> None:
        self.storage, self.job, self.model = storage, job, model
        self.name = f"{job}/{model}"
        self.prefix = f"runs/{self.name}"

    # Attempts and the chain

    def start_attempt(self, attempt: int, parent: CheckpointRef | None, world_size: int) -> AttemptStart:
        """Claim an attempt number for this process.

        Raises:
            Superseded: that attempt was started by another process, or a higher one exists.
        """
        start = AttemptStart(attempt=attempt, parent=parent, world_size=world_size, time=now())
        try:
            self._write(attempt, "start.json", start, if_absent=True)
        except Conflict:
            raise Superseded(f"attempt {attempt} of {self.job}/{self.model} was started by another process") from None
        self.fence(attempt)
        return start

    def fence(self, attempt: int) -> None:
        """Raise Superseded if a higher attempt has started. Call it before each save and each deletion."""
        highest = max(self.started(after=attempt), default=0)
        if highest > attempt:
            raise Superseded(f"attempt {highest} of {self.job}/{self.model} has taken over from attempt {attempt}")

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts that have stored anything, started or not, ascending."""
        names = self.storage.folders(
            f"{self.prefix}/attempt-"
        )  # no listing of objects: logs and metrics have many parts
        matches = (re.fullmatch(r"attempt-(\d+)", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def started(self, after: int = 0) -> list[int]:
        """Return the numbers of the attempts above `after` that have a `start.json`, ascending."""
        later = (attempt for attempt in self.attempts() if attempt > after)
        return [attempt for attempt in later if self.storage.exists(self._key(attempt, "start.json"))]

    def attempt_start(self, attempt: int) -> AttemptStart | None:
        """Return the start of an attempt, None if it has not started. Raises DamagedObject."""
        return self._read(attempt, "start.json", AttemptStart, attempt=attempt)

    def chain(self) -> list[ChainLink]:
        """Return the attempts that make up this run's history, oldest first."""
        started = self.started()
        links: list[ChainLink] = []
        attempt = started[-1] if started else None
        until: int | None = None
        while attempt is not None:
            start = self.attempt_start(attempt)
            if start is None:
                raise CheckpointError(f"{self.prefix}: the history names attempt {attempt}, which has no start.json")
            parent = start.parent
            if parent and parent.attempt >= attempt:
                raise CheckpointError(f"{self.prefix}: attempt {attempt} cannot continue from attempt {parent.attempt}")
            links.append(ChainLink(attempt, until, parent))
            attempt, until = (parent.attempt, parent.step) if parent else (None, None)
        return links[::-1]

    # Checkpoints

    def checkpoint_prefix(self, ref: CheckpointRef) -> str:
        return self._key(ref.attempt, f"checkpoints/step-{ref.step:08d}")

    def checkpoints(self) -> list[CheckpointRef]:
        """Return the complete checkpoints of the chain, by step; what a superseded attempt wrote later is left out."""
        return [
            CheckpointRef(attempt=link.attempt, step=step)
            for link in self.chain()
            for step in self._saved(link.attempt)
            if link.holds(step)
        ]

    def manifest(self, ref: CheckpointRef) -> Manifest:
        return checkpoint.read_manifest(self.storage, self.checkpoint_prefix(ref))

    def manifests(self) -> Iterator[tuple[CheckpointRef, Manifest]]:
        """Yield complete checkpoints with their manifests, except those deleted meanwhile or damaged."""
        for ref in self.checkpoints():
            try:
                yield ref, self.manifest(ref)
            except CheckpointError:
                continue

    def leftovers(self, before_step: int) -> list[str]:
        """Return the keys of checkpoint folders without a manifest: of incomplete uploads or begun deletions."""
        names = [name for attempt in self.attempts() for name in self._names(f"attempt-{attempt}/checkpoints/")]
        complete = {name.removesuffix(f"/{checkpoint.MANIFEST}") for name in names}
        keys = []
        for name in names:
            match = re.match(r"(attempt-\d+/checkpoints/step-(\d+))/", name)
            if match and match[1] not in complete and int(match[2]) < before_step:
                keys.append(f"{self.prefix}/{name}")
        return keys

    # Samples

    def write_sample(self, attempt: int, step: int, name: str, data: bytes) -> None:
        self.storage.put(self._key(attempt, f"samples/{step:08d}/{name}"), data)

    def samples(self) -> list[tuple[int, str]]:
        """Return (step, key) of each sampled picture and text of the chain, by step."""
        samples = []
        for link in self.chain():
            for name in self._names(f"attempt-{link.attempt}/samples/"):
                match = re.fullmatch(rf"attempt-{link.attempt}/samples/(\d+)/.+", name)
                if match and link.holds(int(match[1])):
                    samples.append((int(match[1]), f"{self.prefix}/{name}"))
        return samples

    # Heartbeats, results, commands, status

    def write_heartbeat(self, attempt: int, heartbeat: Heartbeat, if_match: str | None = None) -> str:
        """Write a heartbeat; return its etag.

        Args:
            if_match: replace only the heartbeat with this etag.

        Raises:
            Conflict: the stored heartbeat is another one.
        """
        return self._write(attempt, "heartbeat.json", heartbeat, if_match=if_match)

    def heartbeat(self, attempt: int) -> Heartbeat | None:
        """Return the latest heartbeat of an attempt; None also if it is damaged: the next one comes within a second."""
        with contextlib.suppress(DamagedObject):
            return self._read(attempt, "heartbeat.json", Heartbeat)
        return None

    def write_result(self, attempt: int, result: Result) -> None:
        self._write(attempt, "result.json", result)

    def result(self, attempt: int) -> Result | None:
        """Return the result of an attempt; None also if it is damaged: then the next attempt does what remains."""
        with contextlib.suppress(DamagedObject):
            return self._read(attempt, "result.json", Result)
        return None

    def send_command(
        self,
        action: Action,
        attempt: int,
        reason: str,
        then: Literal["queued", "cancelled"] = "queued",
    ) -> Command:
        """Send a command to a run under the next free number, so that numbers have no gaps.

        Args:
            then: state of the run after its attempt has ended.
        """
        seq = max(self._command_seqs(), default=0) + 1
        while True:
            body = Command(action=action, attempt=attempt, then=then, reason=reason, time=now(), seq=seq)
            try:
                write_document(self.storage, self._command_key(seq), body.model_dump(mode="json"), if_absent=True)
                return body
            except Conflict:
                seq += 1

    def commands(self, attempt: int | None = None, after: int = 0) -> list[Command]:
        """Return the commands that can be read, oldest first.

        Args:
            attempt: only of this attempt.
            after: only commands with a higher `seq`.
        """
        commands = []
        for seq in self._command_seqs(after):
            with contextlib.suppress(DamagedObject):  # also a command of a newer release
                command, _ = load_document(self.storage, self._command_key(seq), Command)
                commands.append(command.model_copy(update={"seq": seq}))
        return [command for command in commands if attempt in (None, command.attempt)]

    def has_command(self, seq: int) -> bool:
        """Return True if a command with this number was sent."""
        return self.storage.exists(self._command_key(seq))

    def status(self) -> tuple[Status, str | None]:
        """Return the status and the etag to swap it by; a new run is queued and has no etag.

        Raises:
            DamagedObject: the state of the run is not known and must not be guessed.
        """
        try:
            return load_document(self.storage, f"{self.prefix}/status.json", Status)
        except KeyNotFound:
            return Status(state="queued"), None

    def write_status(self, status: Status, etag: str | None, nonce: str | None = None) -> str:
        """Swap the status; return the etag of the new one.

        Args:
            nonce: see `write_document`; for a second try after StorageUnavailable.

        Raises:
            Conflict: another process has written it since `etag` was read.
        """
        key, body = f"{self.prefix}/status.json", status.model_dump(mode="json")
        return write_document(self.storage, key, body, if_absent=etag is None, if_match=etag, nonce=nonce)

    def _command_seqs(self, after: int = 0) -> list[int]:
        names = list_names(self.storage, f"{self.prefix}/commands/", r"\d{8}\.json", after=f"{after:08d}.json")
        return [int(Path(name).stem) for name in names]

    def _command_key(self, seq: int) -> str:
        return f"{self.prefix}/commands/{seq:08d}.json"

    def _saved(self, attempt: int) -> list[int]:
        """Return the steps of the checkpoints that have a manifest, ascending."""
        pattern = re.compile(rf"attempt-{attempt}/checkpoints/step-(\d+)/{re.escape(checkpoint.MANIFEST)}")
        matches = map(pattern.fullmatch, self._names(f"attempt-{attempt}/checkpoints/"))
        return sorted(int(match[1]) for match in matches if match)

    def _key(self, attempt: int, name: str) -> str:
        return f"{self.prefix}/attempt-{attempt}/{name}"

    def _names(self, prefix: str) -> list[str]:
        return [key.removeprefix(f"{self.prefix}/") for key in self.storage.list(f"{self.prefix}/{prefix}")]

    def _write(
        self,
        attempt: int,
        name: str,
        document: Document,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> str:
        body = document.model_dump(mode="json")
        return write_document(self.storage, self._key(attempt, name), body, if_absent=if_absent, if_match=if_match)

    def _read(self, attempt: int, name: str, kind: type[DocumentT], /, **identity: object) -> DocumentT | None:
        try:
            return load_document(self.storage, self._key(attempt, name), kind, **identity)[0]
        except KeyNotFound:
            return None
