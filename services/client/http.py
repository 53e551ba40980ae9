"""HTTP to the job service, for a person at a command line: patient, and one line for each error, with the remedy."""

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

PATIENCE_SECONDS = 10.0  # to go on trying a service that does not answer
FIRST_PATIENCE_SECONDS = 2.0  # the same, before it has answered once: the address may be wrong
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 60.0  # without a word, after which a followed log is asked for anew

Json = dict[str, Any]
T = TypeVar("T")
ViewT = TypeVar("ViewT", bound=BaseModel)


class Unreachable(GenmodelsError):
    """No job service answers there, or it is not ready; trying again may help."""


class Unauthorized(GenmodelsError):
    """The key is missing, unknown, or not allowed to do this."""


class Transport:
    """Tries again for a while what goes wrong on the way, so whatever it is given must be safe to repeat.

    Every method raises Unreachable, Unauthorized, or GenmodelsError with what the service said.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url, self.key = _checked(url), key
        self.reached = False  # it has answered once
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
        """As `json`, of an answer that has this form."""
        try:
            return kind.model_validate(self.json(method, route, **options))
        except ValidationError:
            raise GenmodelsError(self._strange(200)) from None

    def json(
        self, method: str, route: str, *, source: str | None = None, seconds: float = ANSWER_SECONDS, **options: Any
    ) -> Json:
        """What the service answers.

        Args:
            source: the file that is sent, where it is a spec: what is wrong with it is then a SpecError.
            seconds: to wait for an answer.
            options: httpx's `content` (or a function that makes it anew for each try), `json`, `params`, `headers`.
        """
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        content = options.pop("content", None)

        def ask() -> Json:
            body = content() if callable(content) else content
            return self._answer(self._http.request(method, route, content=body, timeout=timeout, **options), source)

        return self._patiently(ask)

    def download(self, route: str, path: Path) -> None:
        """Fetch into a file."""

        def fetch() -> None:
            with self._stream(route) as answer, path.open("wb") as file:
                for data in answer.iter_bytes():
                    file.write(data)

        self._patiently(fetch)

    def lines(self, route: str, query: list[tuple[str, Any]], follow: bool) -> Iterator[str]:
        """Lines of a text as they come, once, without patience.

        Args:
            follow: a silence is no error, but ends it.
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

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns, tried again while the service does not answer; not for long if it never did."""

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
        """httpx's errors as ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            remedy = "start one with `genmodels up`, or name another by --api or GENMODELS_API"
            raise Unreachable(f"no job service answers at {self.url}; {remedy}") from None
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise Unreachable(f"the job service at {self.url} broke off ({kind}); try again in a moment") from None

    def _answer(self, response: httpx.Response, source: str | None = None) -> Json:
        """The JSON of an answer; an error that it tells is raised."""
        body, message = _understood(response)
        status = response.status_code
        if status in (429, 502, 503, 504):
            raise Unreachable(
                message or f"the job service at {self.url} is not ready ({status}); try again in a moment"
            )
        if body is None:
            raise GenmodelsError(self._strange(status))
        if not response.is_error:
            return body
        if status == 401:
            raise Unauthorized(self._asks_for_a_key())
        if status == 403:
            raise Unauthorized(message)
        if status in (400, 413) and source is not None:
            raise SpecError(*(_of_file(line, source) for line in message.splitlines()))
        raise _BY_CODE.get(body["error"].get("code"), GenmodelsError)(message)

    def _strange(self, status: int) -> str:
        return f"{self.url} answers ({status}), but not as a job service does; is its address right? See --api"

    def _asks_for_a_key(self) -> str:
        remedy = "`genmodels keys create` makes one where the storage is"
        if self.key:
            return f"{self.url} does not take the key in GENMODELS_KEY: it is unknown or was revoked; {remedy}"
        return f"{self.url} asks for a key: set GENMODELS_KEY; {remedy}"


_BY_CODE: dict[str, type[GenmodelsError]] = {
    "job_not_found": JobNotFound,
    "model_not_found": ModelNotFound,
    "dataset_exists": DatasetExists,
}


def _understood(response: httpx.Response) -> tuple[Json | None, str]:
    """The JSON object of an answer, and the message of an error; None where it is not from a job service."""
    try:
        body = response.json() if response.content else {}
        message = str(body["error"]["message"]) if response.is_error else ""
    except (ValueError, LookupError, TypeError):
        return None, ""
    return body if isinstance(body, dict) else None, message


def _of_file(line: str, source: str) -> str:
    """A problem in a spec, which the service calls `spec`, as one in a file."""
    return f"{source}{line.removeprefix('spec')}" if line.startswith("spec:") else f"{source}: {line}"


def _checked(url: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        return url.rstrip("/")
    raise GenmodelsError(f"address of the job service: got {url[:100]!r}, expected e.g. http://127.0.0.1:8080")


def _printable(key: str) -> str:
    """A key is ASCII; anything else was pasted wrongly, and would break the header."""
    if re.fullmatch("[!-~]+", key.strip()):
        return key.strip()
    raise Unauthorized("GENMODELS_KEY holds characters that no key has; was it copied whole?")
