"""Classify the failure of an attempt: whose fault it is, and whether another attempt can help."""

from __future__ import annotations

import re

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

# Ray's own errors, by name: most are of private modules, and this module does not import Ray.
NEVER_PLACED = {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}
LOST_PROCESS = {
    "WorkerCrashedError",
    "RayActorError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "RaySystemError",
    "RpcError",
    "GetTimeoutError",
    "TaskCancelledError",
    "TaskPlacementGroupRemoved",
    "ActorPlacementGroupRemoved",
    "ObjectStoreFullError",
    "OutOfDiskError",
    "RuntimeEnvSetupError",
    "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupFailedError",
    "CollectiveTimeoutError",
    "NCCLHangError",
    "PreemptionError",
}

# Messages of gloo, NCCL and the store of the process group about the network, and their meaning. The error is of the
# ranks that live: it is not the user's fault.
NETWORK = {
    "connection closed by peer": "a worker was lost",
    "connection reset by peer": "a worker was lost",
    "connection was likely closed": "a worker was lost",
    "socket closed": "a worker was lost",
    "broken pipe": "a worker was lost",
    "remote process exit": "a worker was lost",  # NCCL
    "connection refused": "a worker refused the connection of another worker",
    "failed to connect": "a worker could not be reached by another worker",
    "no route to host": "a worker could not be reached by another worker",
    "network is unreachable": "a worker could not be reached by another worker",
    "address already in use": "a port of a worker was taken",
    "timed out": "a connection between workers timed out",
    "connect timeout": "a connection between workers timed out",
    "wait timeout": "a connection between workers timed out",  # the store of the process group
    "operation timeout": "a connection between workers timed out",  # NCCL
}
WRAPPERS = ("cause", "health_check_failure", "controller_failure", "_base_exc")  # attributes of Ray's errors
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")  # also halves of surrogate pairs
LENGTH = 2000  # characters of a message
SOURCE_LINE = re.compile(r"\[/\S+:\d+\] ?")  # of PyTorch, before the message


def classify_failure(error: BaseException) -> Result:
    """Return the result of a failed attempt. The error of the rank that failed comes before the errors of its peers."""
    result = _classify(error)
    return result.model_copy(update={"message": _readable(result.message)})


def _classify(error: BaseException) -> Result:
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
    if _is_rays(error, NEVER_PLACED):
        reason = _one_line(error).partition(". ")[0]
        return Result(outcome="failed", cause="no workers", message=f"the workers were not placed ({reason})")
    losses = [(cause, _loss(cause)) for cause in causes]
    bug = next((cause for cause, loss in losses if not loss), None)
    if bug is not None:
        return Result(outcome="failed", cause="user", message=_one_line(bug))
    # what Ray knows of a process that died comes before what its peers saw
    cause, loss = min(losses, key=lambda each: not _is_rays(each[0], LOST_PROCESS))
    return Result(outcome="failed", cause="infrastructure", message=f"{loss} ({_one_line(cause)})")


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError on a GPU, ray.exceptions.OutOfMemoryError; on the CPU torch raises a plain RuntimeError
    named = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return named or "can't allocate memory" in str(error)


def _loss(error: BaseException) -> str:
    """Return what was lost if a process, or the connection to it, was lost; "" otherwise."""
    if isinstance(error, RuntimeError | OSError):  # `DistError` of PyTorch is a RuntimeError
        text = str(error).casefold()
        for sign, meaning in NETWORK.items():
            if sign in text:
                return meaning
    if isinstance(error, ConnectionError | TimeoutError) or _is_rays(error, LOST_PROCESS):
        return "a worker was lost"
    return ""


def _is_rays(error: BaseException, names: set[str]) -> bool:
    """Tell whether the error is of one of these classes of Ray, or of a class derived from it."""
    classes = type(error).__mro__
    return any(cls.__name__ in names for cls in classes if cls.__module__.partition(".")[0] == "ray")


def _one_line(error: BaseException) -> str:
    message = SOURCE_LINE.sub("", COLOUR.sub("", str(error))).strip()
    return f"{type(error).__name__}: {message}".splitlines()[0]


def _readable(message: str) -> str:
    """Return the message as a terminal, a JSON document and a reader can take it."""
    printable = UNPRINTABLE.sub("?", COLOUR.sub("", message))
    return printable if len(printable) <= LENGTH else f"{printable[:LENGTH]}..."


def _original(error: BaseException) -> BaseException:
    """Return the error that Ray wrapped, maybe several times."""
    seen = {id(error)}
    while type(error).__module__.partition(".")[0] == "ray":
        inner = (getattr(error, name, None) for name in WRAPPERS)
        wrapped = next((each for each in inner if isinstance(each, BaseException) and id(each) not in seen), None)
        if wrapped is None:
            break
        error = wrapped
        seen.add(id(error))
    return error
