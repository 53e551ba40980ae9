"""Decide what a run does after an attempt: succeed, fail, be cancelled, or be tried again. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from genmodels.checkpoint import CheckpointRef
from genmodels.runs.records import Cause, Command, Result, State, Status

BACK_OFF_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0)
MAX_NO_PROGRESS_ATTEMPTS = 3  # attempts in a row without a new checkpoint that end a run
MAX_OUT_OF_MEMORY_ATTEMPTS = 2  # that end a run; another process may have caused the first
RETRIED: tuple[Cause, ...] = ("infrastructure", "superseded", "out of memory", "no workers", "storage")
UNCOUNTED: tuple[Cause, ...] = ("no workers", "storage")  # nothing was tried, or nothing could be saved


@dataclass(frozen=True)
class Decision:
    """The next state of a run.

    Attributes:
        facts: counters of the status that change with the state.
        failures: failures in a row without a new checkpoint; they set the back-off.
        back_off: seconds until the next attempt may start.
    """

    state: State
    reason: str
    facts: dict[str, int] = field(default_factory=dict)
    failures: int = 0
    back_off: float = 0.0


def decide(
    status: Status,
    result: Result,
    commands: Sequence[Command],
    checkpoints: Sequence[CheckpointRef],
    *,
    failures: int = 0,
    has_begun: bool = True,
    preempted: str = "",
) -> Decision:
    """Return what follows an attempt that has ended and did not succeed.

    Args:
        status: of the run, while the attempt is its newest one.
        commands: that were sent to this attempt, oldest first.
        checkpoints: complete ones of the run, by step.
        failures: `failures` of the previous decision.
        has_begun: False if the attempt was lost before a worker ran.
        preempted: by what its pods were preempted. It comes before the commands, which are of the pods' hooks.
    """
    progress = f"continues from step {max((ref.step for ref in checkpoints), default=0)}"
    commands = [command for command in commands if command.action != "resume"]
    cancel = next((command for command in commands if command.then == "cancelled"), None)
    if cancel:
        return Decision("cancelled", f"{cancel.reason}; a resume {progress}")
    stopped = result.outcome == "stopped"
    saved = any(ref.attempt == status.attempt for ref in checkpoints)
    counts = not stopped and has_begun and result.cause not in UNCOUNTED
    no_progress = 0 if saved else status.no_progress_attempts + counts
    out_of_memory = status.out_of_memory_attempts + (result.cause == "out of memory")
    facts = {"no_progress_attempts": no_progress, "out_of_memory_attempts": out_of_memory}
    # later commands repeat the first one's request
    reason = preempted or (commands[0].reason if commands else result.message)
    if not (stopped or result.cause in RETRIED) or out_of_memory >= MAX_OUT_OF_MEMORY_ATTEMPTS:
        return Decision("failed", result.message, facts)
    if counts and no_progress >= MAX_NO_PROGRESS_ATTEMPTS:
        return Decision("failed", f"{no_progress} attempts without a new checkpoint; the last: {reason}", facts)
    failures = 0 if saved or stopped else failures + 1
    back_off = 0.0 if stopped else BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
    return Decision("queued", f"{reason}; {progress}", facts, failures, back_off)
