"""A run's objects in storage: which process writes each, and which of them count.

    runs/<job>/<model>/status.json                  the dispatcher alone, compare-and-swap
    runs/<job>/<model>/commands/<seq>.json           any process, put-if-absent
    runs/<job>/<model>/attempt-<n>/start.json       rank 0, put-if-absent; names the checkpoint it continues from
                                  /heartbeat.json   the driver until rank 0 runs, then rank 0, then the driver again
                                  /result.json      the driver, at the end
                                  /checkpoints/step-00000500/...   rank 0
                                  /metrics/<parts>                 rank 0; merged while it grows (`parts.py`)
                                  /samples/00000500/...            rank 0
                                  /logs/<source>/<process>/<parts> the driver and each rank, likewise

A run's history is a chain: the highest attempt that has a `start.json`, and through each one's parent checkpoint the
attempts before it. A process that was paused and wakes may still write, but outside the chain, where it is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from genmodels.checkpoint import CheckpointRef, Metrics
from genmodels.storage import (
    Document,
    Time,
)
from genmodels.storage.documents import now
from genmodels.storage.lease import LeaseTerm

Action = Literal["stop", "kill", "resume"]
State = Literal["queued", "starting", "running", "publishing", "succeeded", "failed", "cancelled"]
Phase = Literal["starting", "compiling", "training", "evaluating", "saving", "waiting for storage", "publishing"]
Cause = Literal[
    "user",  # the spec or the data is at fault, and another attempt would fail too; also the next three
    "diverged",
    "gate",
    "template",  # the cluster refuses what its operator configured for all runs
    "out of memory",
    "infrastructure",
    "no workers",  # the group was never placed
    "storage",  # the store was away for longer than the attempt could wait
    "superseded",
]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
ACTIVE: tuple[State, ...] = ("starting", "running", "publishing")


class Change(Document):
    state: State
    time: Time
    reason: str


class Status(Document):
    """A run's state and its history. Only the dispatcher writes it."""

    object_kind = "status"
    remedy = "the run is left alone until it is restored from a backup; without one, delete the job and submit it again"

    state: State
    attempt: int = Field(0, ge=0)  # number of the newest attempt
    workers: int = Field(0, ge=0)  # of that attempt
    lease_term: LeaseTerm = 0  # of the dispatcher's lease under which this was written
    last_command: int = 0  # seq of the last command that was applied
    no_progress_attempts: int = 0  # attempts in a row without a new checkpoint, as far as they count
    out_of_memory_attempts: int = 0  # attempts that ended out of memory
    history: list[Change] = Field(default_factory=list)

    def to(self, state: State, reason: str, **facts: int) -> Status:
        """Return the status after a change of state.

        Args:
            facts: other fields that change with it, e.g. `attempt=2`.
        """
        change = Change(state=state, time=now(), reason=reason)
        return self.model_copy(update={**facts, "state": state, "history": [*self.history, change]})

    @property
    def reason(self) -> str:
        return self.history[-1].reason if self.history else ""


class Heartbeat(Document):
    """The progress of an attempt; `progress_count` changes with each sign of progress."""

    object_kind = "heartbeat"
    remedy = "a living driver writes it again within seconds; delete it otherwise"

    phase: Phase
    step: int = 0
    max_steps: int = 0
    progress_count: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    step_seconds: float | None = None  # median of the latest steps
    waiting: str = ""  # reason of the StorageUnavailable for which its writes wait, also while the steps continue


class GateResult(Document):
    metric: str
    value: float | None = None
    passed: bool
    reason: str  # one line for people: `val_loss 98.2 <= 120.0`


class Result(Document):
    """The end of an attempt. `cause` is the class of the failure, from which the dispatcher decides what to do."""

    object_kind = "result"
    remedy = "the next attempt continues from the last checkpoint; delete it"

    outcome: Literal["succeeded", "stopped", "failed"]
    cause: Cause | None = None
    message: str = ""
    step: int = 0
    metrics: Metrics = Field(default_factory=dict)
    gate: GateResult | None = None
    version: int | None = None
    training_seconds: float = 0.0  # from the first step to the last checkpoint, over all attempts of the chain
    startup_seconds: float = 0.0  # what Ray needed until the workers ran, this attempt


class AttemptStart(Document):
    object_kind = "start"
    remedy = "the run's history cannot be followed; restore it from a backup, or submit the job again"

    attempt: int
    parent: CheckpointRef | None
    world_size: int
    time: Time


class Command(Document):
    """A command to a run.

    `stop`: its attempt saves at the next step boundary and ends. `kill`: each rank writes its stacks to the log and
    ends at once. Both are for one attempt; `then` is the run's state after it. `resume`: an ended run is queued again.
    """

    object_kind = "command"
    remedy = "it is ignored; send it again (genmodels cancel or resume) and delete it"

    action: Action
    attempt: int  # the newest one when the command was sent
    then: Literal["queued", "cancelled"]
    reason: str
    time: str
    seq: int = 0  # its number; the dispatcher applies commands in this order


@dataclass(frozen=True)
class ChainLink:
    """An attempt of the chain, and the step at which the next one took over (None: it is the last)."""

    attempt: int
    until: int | None
    parent: CheckpointRef | None

    def holds(self, step: int) -> bool:
        return self.until is None or step <= self.until

    def goes_beyond(self, step: int) -> bool:
        return self.until is None or step < self.until


@dataclass(frozen=True)
class LogLine:
    """A line that a process printed."""

    attempt: int
    source: str  # "driver", or a rank
    time: str
    line: str
