"""Every exception of the library.

GenmodelsError                  one clear line for the person who sees it
├── SpecError                   a job spec or an option is wrong; names the field path
├── DataError                   a dataset is missing, damaged or too small
│   └── DatasetExists           the name is taken by another content, which may be replaced
├── StorageError
│   ├── KeyNotFound             no object under that key
│   ├── Conflict                a conditional put lost: somebody else wrote first
│   └── StorageUnavailable      the store does not answer or refuses for now; trying again may help
├── DamagedObject               a stored object is not what its key says; names the key and the remedy
├── UnexpectedFailure           an exception of another kind, contained where it is in no other's way
├── CheckpointError             a checkpoint or version is incomplete or damaged
├── TrainingDiverged            a loss or gradient is no longer finite
├── JobNotFound                 no job has that id
├── IdempotencyConflict         an idempotency key was used before, with another spec
├── LeaseLost                   another dispatcher has taken over: stop writing states
├── Superseded                  a newer attempt of this run has started: stop writing
└── RequestError                a request to an endpoint is wrong; has an HTTP status
    └── ModelNotFound           no such model, version or alias
"""

from __future__ import annotations


class GenmodelsError(Exception):
    """Base of all errors whose message is meant for the user as it stands."""


class SpecError(GenmodelsError):
    """A job spec is wrong. `problems` holds one line per wrong field: `path: what is wrong; remedy`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(GenmodelsError):
    """A dataset is missing, damaged, or does not fit; the message says what to do."""


class DatasetExists(DataError):
    """A dataset's name means another content now; it is replaced where that is said to be meant."""


class StorageError(GenmodelsError):
    """An operation on the object store failed."""


class KeyNotFound(StorageError):
    """No object is stored under the key."""


class Conflict(StorageError):
    """A conditional put found another object than expected; nothing was written."""


class StorageUnavailable(StorageError):
    """An outage: of the object store, or of the disk of this machine. Whoever meets it waits and tries again.

    Args:
        reason: a clause for people, shown while a run waits: no key, host or path.
    """

    def __init__(self, message: str, reason: str = "the storage does not answer") -> None:
        super().__init__(message)
        self.reason = reason


class DamagedObject(GenmodelsError):
    """A stored object is empty, cut off, not JSON, or lacks what its kind has. The store itself works.

    Args:
        key: of the object.
        what: is wrong with it.
        remedy: what a person can do.
        etag: of the damaged object, for a writer who replaces it.
    """

    def __init__(self, key: str, what: str, remedy: str, etag: str = "") -> None:
        super().__init__(f"{key}: damaged ({what}); {remedy}")
        self.key, self.what, self.remedy, self.etag = key, what, remedy, etag

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.key, self.what, self.remedy, self.etag)  # crosses process borders under Ray


class UnexpectedFailure(GenmodelsError):
    """An exception of any kind where one model, job or round failed and the others go on; see `contained`."""


class CheckpointError(GenmodelsError):
    """A checkpoint or a published version is incomplete, damaged, or of another shape."""


class TrainingDiverged(GenmodelsError):
    """A loss or gradient became NaN or infinite; the weights are as they were before that step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what} is not finite; the weights before this step are kept. "
            "Lower train.learning_rate, set train.clip_norm, or add train.warmup_steps"
        )
        self.step = step
        self.what = what

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.step, self.what)  # crosses process borders under Ray


class Superseded(GenmodelsError):
    """A newer attempt of the run has started; this one must not write any more."""


class JobNotFound(GenmodelsError):
    """There is no job of that id."""


class IdempotencyConflict(GenmodelsError):
    """An idempotency key came a second time, with another body."""


class LeaseLost(GenmodelsError):
    """Another dispatcher has taken over; this one must not write states any more.

    Args:
        lease_term: of that dispatcher, where it is known.
    """

    def __init__(self, message: str, lease_term: int = 0) -> None:
        super().__init__(message)
        self.lease_term = lease_term


class RequestError(GenmodelsError):
    """A request cannot be answered.

    Args:
        param: the field at fault.
        status: of HTTP.
        retry_after: seconds, where another try makes sense only then.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.retry_after = retry_after
        self.refused_by: tuple[str, str] | None = None  # name and family of the version, where one was found

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (type(self), self.message, self.param, self.status, self.code)
        return _request_error, arguments, {"retry_after": self.retry_after, "refused_by": self.refused_by}


class ModelNotFound(RequestError):
    """No such model, version or alias, or it does not offer what was asked."""

    def __init__(
        self, message: str, *, param: str | None = "model", status: int = 404, code: str | None = "model_not_found"
    ) -> None:
        super().__init__(message, param=param, status=status, code=code)


def contained(error: Exception) -> GenmodelsError:
    """Make one of our errors of any exception, for a place where one object's failure must not stop the others.

    The message is safe to show: of the system's errors their text without paths, of others the kind and first line.
    """
    match error:
        case GenmodelsError():
            return error
        case MemoryError():
            return UnexpectedFailure("out of memory")
        case RecursionError():
            return UnexpectedFailure("nested too deeply")
        case OSError() if error.strerror:
            return UnexpectedFailure(f"{error.strerror} ({type(error).__name__})")
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return UnexpectedFailure(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def _request_error(
    kind: type[RequestError], message: str, param: str | None, status: int, code: str | None
) -> RequestError:
    return kind(message, param=param, status=status, code=code)
