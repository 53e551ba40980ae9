"""HTTP requests to the job service, with retries; each error is one line that names the remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from genmodels.errors import DatasetExists, GenmodelsError, JobNotFound, ModelNotFound, SpecError

PATIENCE_SECONDS = 10.0  # how long to retry a service that does not answer
FIRST_PATIENCE_SECONDS = 2.0  # the same before the first answer: the address may be wrong
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 60.0  # without a line, after which a followed log is requested again

Json = dict[str, Any]
T = TypeVar("T")
ViewT = TypeVar("ViewT", bound=BaseModel)


class Unreachable(GenmodelsError):
    """No job service answers at the address, or it is not ready; a retry may help."""


class Unauthorized(GenmodelsError):
    """The key is missing, unknown, or lacks the scope that the request needs."""


class Transport:
    """Send requests, and retry them while the service does not answer: so each must be safe to repeat.

    Every method raises Unreachable, Unauthorized, or GenmodelsError with the service's message.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url, self.key = _checked(url), key
        self.reached = False  # the service has answered once
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {_printable(key)}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not local,  # no proxy stands between this machine and itself
        )

    def close(self) -> None:
        self._http.close()

    def parsed(self, kind: type[ViewT], method: str, route: str, **options: Any) -> ViewT:
        """Send a request as `json` does, and parse the answer as this model."""
        try:
            return kind.model_validate(self.json(method, route, **options))
        except ValidationError:
            raise GenmodelsError(self._not_a_service(200)) from None

    def json(
        self, method: str, route: str, *, source: str | None = None, seconds: float = ANSWER_SECONDS, **options: Any
    ) -> Json:
        """Send a request and return the JSON object that the service answers.

        Args:
            source: name of the spec that is sent; its errors are then raised as a SpecError.
            seconds: how long to wait for an answer.
            options: httpx's `json`, `params`, `headers`, `content`; a callable `content` is called for each try.
        """
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        content = options.pop("content", None)

        def ask() -> Json:
            body = content() if callable(content) else content
            return self._answer(self._http.request(method, route, content=body, timeout=timeout, **options), source)

        return self._retry(ask)

    def download(self, route: str, path: Path) -> None:
        """Download into a file."""

        def fetch() -> None:
            with self._stream(route) as answer, path.open("wb") as file:
                for data in answer.iter_bytes():
                    file.write(data)

        self._retry(fetch)

    def lines(self, route: str, query: list[tuple[str, Any]], follow: bool) -> Iterator[str]:
        """Yield the lines of a text as they come, without retries.

        Args:
            follow: end, instead of raising, after SILENCE_SECONDS without a line.
        """
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self._translated(), self._stream(route, params=query, timeout=timeout) as answer:
            self.reached = True
            try:
                yield from answer.iter_lines()
            except httpx.ReadTimeout:  # nothing was printed for long, or the connection is dead
                if not follow:
                    raise

    @contextlib.contextmanager
    def _stream(self, route: str, **options: Any) -> Iterator[httpx.Response]:
        with self._http.stream("GET", route, **options) as response:
            if response.is_error:
                response.read()
                self._answer(response)
            yield response

    def _retry(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; retry it while the service does not answer."""

        def translated() -> T:
            with self._translated():
                result = work()
            self.reached = True
            return result

        retrying = Retrying(
            retry=retry_if_exception_type(Unreachable),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            stop=stop_after_delay(PATIENCE_SECONDS if self.reached else FIRST_PATIENCE_SECONDS),
            reraise=True,
        )
        return retrying(translated)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise httpx's errors as errors of this package."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            remedy = "start one with `genmodels up`, or name another by --api or GENMODELS_API"
            raise Unreachable(f"no job service answers at {self.url}; {remedy}") from None
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise Unreachable(
                f"the job service at {self.url} closed the connection ({kind}); try again in a moment"
            ) from None

    def _answer(self, response: httpx.Response, source: str | None = None) -> Json:
        """Return the JSON object of an answer, or raise the error that it reports."""
        body, message = _parsed_error(response)
        status = response.status_code
        if status in (429, 502, 503, 504):
            raise Unreachable(
                message or f"the job service at {self.url} is not ready ({status}); try again in a moment"
            )
        if body is None:
            raise GenmodelsError(self._not_a_service(status))
        if not response.is_error:
            return body
        if status == 401:
            raise Unauthorized(self._key_error())
        if status == 403:
            raise Unauthorized(message)
        if status in (400, 413) and source is not None:
            raise SpecError(*(_of_file(line, source) for line in message.splitlines()))
        raise _BY_CODE.get(body["error"].get("code"), GenmodelsError)(message)

    def _not_a_service(self, status: int) -> str:
        return f"{self.url} answers ({status}), but is not a job service; check the address, see --api"

    def _key_error(self) -> str:
        remedy = "`genmodels keys create` creates one on a machine that can open the storage"
        if self.key:
            return f"{self.url} refuses the key in GENMODELS_KEY: it is unknown or was revoked; {remedy}"
        return f"{self.url} requires a key: set GENMODELS_KEY; {remedy}"


_BY_CODE: dict[str, type[GenmodelsError]] = {
    "job_not_found": JobNotFound,
    "model_not_found": ModelNotFound,
    "dataset_exists": DatasetExists,
}


def _parsed_error(response: httpx.Response) -> tuple[Json | None, str]:
    """Return the JSON object of an answer, and its error message; None if the answer is not from a job service."""
    try:
        body = response.json() if response.content else {}
        message = str(body["error"]["message"]) if response.is_error else ""
    except (ValueError, LookupError, TypeError):
        return None, ""
    return body if isinstance(body, dict) else None, message


def _of_file(line: str, source: str) -> str:
    """Replace the name `spec`, which the service uses in the errors of a spec, by the name of the file."""
    return f"{source}{line.removeprefix('spec')}" if line.startswith("spec:") else f"{source}: {line}"


def _checked(url: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        return url.rstrip("/")
    raise GenmodelsError(f"address of the job service: got {url[:100]!r}, expected e.g. http://127.0.0.1:8080")


def _printable(key: str) -> str:
    """Return a key without spaces at its ends, or raise: a key is ASCII, and other characters break the header."""
    if re.fullmatch("[!-~]+", key.strip()):
        return key.strip()
    raise Unauthorized("GENMODELS_KEY has characters that no key has; copy the key again")
