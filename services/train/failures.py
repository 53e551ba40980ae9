"""Classify the failure of an attempt: whose fault it is, and whether another attempt can help."""

from __future__ import annotations

from genmodels.errors import (
    CheckpointError,
    DamagedObject,
    GenmodelsError,
    StorageError,
    Superseded,
    TrainingDiverged,
)
from genmodels.runs.records import Result
from genmodels.storage.disk import outage_of_disk

NEVER_PLACED = (
    "WorkerGroupStartupTimeoutError",
    "InsufficientClusterResourcesError",
)  # private classes of Ray, so by name


# Errors of the other ranks when one rank is killed; they are not the user's fault.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connect timeout",
    "Timed out waiting",
    "Connection was likely closed",  # DistNetworkError, of the store of the process group
    "remote process exit",  # NCCL
)


def classify_failure(error: BaseException) -> Result:
    """Return the result of a failed attempt. The error of the rank that failed comes before the errors of its peers."""
    error = _original(error)
    causes = [_original(cause) for cause in getattr(error, "worker_failures", {}).values()] or [error]
    for cause in causes:
        match cause:
            case TrainingDiverged():
                return Result(outcome="failed", cause="diverged", message=str(cause), step=cause.step)
            case Superseded():
                return Result(outcome="failed", cause="superseded", message=str(cause))
        if outage := outage_of_disk(cause):
            return Result(outcome="failed", cause="storage", message=str(outage))
        match cause:
            # The next attempt skips a damaged checkpoint; another damaged object may be repaired by then.
            case CheckpointError() | DamagedObject() | StorageError():
                return Result(outcome="failed", cause="infrastructure", message=str(cause))
            case GenmodelsError():
                return Result(outcome="failed", cause="user", message=str(cause))
    if any(map(_is_out_of_memory, causes)):
        message = "out of memory; lower train.batch_size or the size of the model"
        return Result(outcome="failed", cause="out of memory", message=message)
    if type(error).__name__ in NEVER_PLACED:
        reason = _one_line(error).partition(". ")[0]
        return Result(outcome="failed", cause="no workers", message=f"the workers were not placed ({reason})")
    bug = next((cause for cause in causes if not _is_loss(cause)), None)
    if bug is None:
        return Result(outcome="failed", cause="infrastructure", message=f"a worker was lost ({_one_line(causes[0])})")
    return Result(outcome="failed", cause="user", message=_one_line(bug))


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError on a GPU, ray.exceptions.OutOfMemoryError; on the CPU torch raises a plain RuntimeError
    named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return named or "can't allocate memory" in str(error)


def _is_loss(error: BaseException) -> bool:
    """Return True if a process, or the connection to it, was lost."""
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("ray."):
        return True
    return any(sign in str(error) for sign in LOST_PEER)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _original(error: BaseException) -> BaseException:
    """Return the error that Ray wrapped."""
    inner = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None)
    return _original(inner) if isinstance(inner, BaseException) else error
