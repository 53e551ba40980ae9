"""Define all exceptions of the library.

GenmodelsError                  one clear line for the user
├── SpecError                   a job spec or an option is wrong; names the field path
├── DataError                   a dataset is missing, damaged or too small
│   └── DatasetExists           the name is taken by another content, which may be replaced
├── StorageError
│   ├── KeyNotFound             no object under that key
│   ├── Conflict                a conditional put failed: another process wrote first
│   └── StorageUnavailable      the store does not answer or refuses for now; a retry may help
├── DamagedObject               a stored object is not what its key says; the message has the key and the remedy
├── UnexpectedFailure           an exception of any other type, contained so that the rest continues
├── CheckpointError             a checkpoint or version is incomplete or damaged
├── TrainingDiverged            a loss or gradient is no longer finite
├── JobNotFound                 no job has that id
├── IdempotencyConflict         an idempotency key was used before with another spec
├── LeaseLost                   another dispatcher has taken over: stop writing states
├── Superseded                  a newer attempt of this run has started: stop writing
└── RequestError                a request to an endpoint is wrong; has an HTTP status
    └── ModelNotFound           no such model, version or alias
"""

from __future__ import annotations


class GenmodelsError(Exception):
    """Be the base of all errors whose message is shown to the user unchanged."""


class SpecError(GenmodelsError):
    """Report a wrong job spec. `problems` has one line for each wrong field: `path: what is wrong; remedy`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(GenmodelsError):
    """Report a dataset that is missing, damaged or unsuitable; the message says what to do."""


class DatasetExists(DataError):
    """Report that a dataset name has another content now; the caller may ask to replace it."""


class StorageError(GenmodelsError):
    """Report a failed operation on the object store."""


class KeyNotFound(StorageError):
    """Report that no object has this key."""


class Conflict(StorageError):
    """Report a conditional put that met another object than expected; nothing was written."""


class StorageUnavailable(StorageError):
    """Report an outage of the object store or of the disk of this machine; callers wait and try again.

    Args:
        reason: a clause for users, shown while a run waits; it has no key, host or path.
    """

    def __init__(self, message: str, reason: str = "the storage does not answer") -> None:
        super().__init__(message)
        self.reason = reason


class DamagedObject(GenmodelsError):
    """Report a stored object that is empty, cut off, not JSON, or incomplete. The store itself works.

    Args:
        key: key of the object.
        what: what is wrong with the object.
        remedy: what the user can do.
        etag: etag of the damaged object, for a writer that replaces it.
    """

    def __init__(self, key: str, what: str, remedy: str, etag: str = "") -> None:
        super().__init__(f"{key}: damaged ({what}); {remedy}")
        self.key, self.what, self.remedy, self.etag = key, what, remedy, etag

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.key, self.what, self.remedy, self.etag)  # Ray pickles it between processes


class UnexpectedFailure(GenmodelsError):
    """Report an unexpected exception of one model, job or round while the others continue; see `contained`."""


class CheckpointError(GenmodelsError):
    """Report a checkpoint or version that is incomplete, damaged, or of another shape."""


class TrainingDiverged(GenmodelsError):
    """Report a loss or gradient that is NaN or infinite; the weights are those before that step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what} is not finite; the weights before this step are kept. "
            "Lower train.learning_rate, set train.clip_norm, or add train.warmup_steps"
        )
        self.step = step
        self.what = what

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.step, self.what)  # Ray pickles it between processes


class Superseded(GenmodelsError):
    """Report that a newer attempt of the run has started; this attempt must stop writing."""


class JobNotFound(GenmodelsError):
    """Report that no job has this id."""


class IdempotencyConflict(GenmodelsError):
    """Report an idempotency key that was used before with another body."""


class LeaseLost(GenmodelsError):
    """Report that another dispatcher has taken over; this one must stop writing states.

    Args:
        lease_term: lease term of the other dispatcher, if it is known.
    """

    def __init__(self, message: str, lease_term: int = 0) -> None:
        super().__init__(message)
        self.lease_term = lease_term


class RequestError(GenmodelsError):
    """Report a request that cannot be answered.

    Args:
        param: the wrong field.
        status: HTTP status.
        retry_after: seconds after which a retry makes sense.
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
        self.refused_by: tuple[str, str] | None = None  # name and family of the version, if the request named one

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (type(self), self.message, self.param, self.status, self.code)
        return _request_error, arguments, {"retry_after": self.retry_after, "refused_by": self.refused_by}


class ModelNotFound(RequestError):
    """Report that a model, version or alias does not exist, or does not offer what the request asks for."""

    def __init__(
        self, message: str, *, param: str | None = "model", status: int = 404, code: str | None = "model_not_found"
    ) -> None:
        super().__init__(message, param=param, status=status, code=code)


def contained(error: Exception) -> GenmodelsError:
    """Convert any exception to a GenmodelsError, where the failure of one object must not stop the others.

    The message is safe to show: for errors of the system the text without paths, for others the type and first line.
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
