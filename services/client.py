"""A client of the job API: one line for each error, with the remedy, and calls that are safe to repeat.

What goes wrong on the way (the service is starting again, the network breaks) is tried again for a while. That is safe:
submitting carries an idempotency key, and everything else sets something to what it shall be.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from genmodels.checkpoint import File, sha256_of
from genmodels.errors import CheckpointError, GenmodelsError, JobNotFound, SpecError
from genmodels.run import ENDED
from genmodels.storage.base import appears_whole
from services.views import JobView, Page

DEFAULT_URL = "http://127.0.0.1:8080"
PATIENCE_SECONDS = 10.0  # to go on trying a service that does not answer
FIRST_PATIENCE_SECONDS = 3.0  # the same, before it has answered once: the address may be wrong
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # without a word, after which a followed log is asked for anew
LOOK_AGAIN_SECONDS = 1.0  # before a log that ended is asked for anew, if its job has not

Json = dict[str, Any]
T = TypeVar("T")
ViewT = TypeVar("ViewT", bound=BaseModel)


class Unreachable(GenmodelsError):
    """No job service answers there, or it is not ready; trying again may help."""


class Unauthorized(GenmodelsError):
    """The key is missing, unknown, or not allowed to do this."""


class Client:
    """Safe to use from one thread. With `with`, connections are closed at the end.

    Args:
        url: of the job service, `http://host:port`.
        key: a bearer key; None where the service runs without keys.
        patience: seconds to go on trying while the service does not answer.

    Every method raises Unreachable, Unauthorized, or GenmodelsError with what the service said.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self.url, self.key, self.patience = _checked(url), key, patience
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self._reached = False
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {_printable(key)}"} if key else {},
            timeout=httpx.Timeout(30.0, connect=CONNECT_SECONDS),
            trust_env=not local,  # no proxy stands between this machine and itself
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    # Jobs

    def submit(self, spec: bytes, source: str = "spec") -> JobView:
        """Have a job made of a spec in YAML or JSON.

        Args:
            source: the spec's file, for the lines of a SpecError.

        Raises:
            SpecError: the service refuses it; one line for each problem.
        """
        headers = {**_typed(source), "idempotency-key": secrets.token_hex(16)}
        return self._parsed(JobView, "POST", "/v1/jobs", content=spec, headers=headers, source=source)

    def dry_run(self, spec: bytes, source: str = "spec") -> Json:
        """What would be made of a spec. Raises SpecError, as `submit`."""
        query = {"dry_run": "true"}
        return self._json("POST", "/v1/jobs", content=spec, headers=_typed(source), params=query, source=source)

    def jobs(self, state: str = "all", limit: int = 20, after: str | None = None) -> Page:
        """Some of the jobs: open ones, then ended ones, newest first."""
        query: Json = {"state": state, "limit": limit} | ({"after": after} if after else {})
        return self._parsed(Page, "GET", "/v1/jobs", params=query)

    def job(self, job: str) -> JobView:
        return self._parsed(JobView, "GET", f"/v1/jobs/{_name(job)}")

    def cancel(self, job: str, models: list[str], *, now: bool = False) -> Json:
        """Have runs of a job save and end; `now`: end at once. No models: all."""
        body = {"now": now} | ({"models": models} if models else {})
        return self._json("POST", f"/v1/jobs/{_name(job)}/cancel", json=body)

    def resume(self, job: str, models: list[str]) -> Json:
        return self._json("POST", f"/v1/jobs/{_name(job)}/resume", json={"models": models} if models else {})

    def delete_job(self, job: str) -> None:
        self._json("DELETE", f"/v1/jobs/{_name(job)}")

    def logs(
        self,
        job: str,
        models: list[str],
        source: str | None = None,
        *,
        follow: bool = False,
        waiting: Callable[[str], None] = lambda reason: None,
    ) -> Iterator[str]:
        """Lines of a job's logs; with `follow` until the job has ended, over broken connections and restarts.

        Args:
            models: only of these; none: all.
            source: only of the "driver" or of one rank.
            waiting: told, once for each break, why there is nothing for now.
        """
        query: list[tuple[str, Any]] = [("model", model) for model in models]
        query += [("source", source)] if source else []
        query += [("follow", "true")] if follow else []
        seen: Counter[int] = Counter()  # hashes of the lines given so far, which a stream that starts anew repeats
        while True:
            repeated = Counter(seen)
            try:
                for line in self._lines(f"/v1/jobs/{_name(job)}/logs", query):
                    mark = hash(line)
                    if repeated[mark]:
                        repeated[mark] -= 1
                        continue
                    seen[mark] += 1
                    yield line
                if not follow or self.job(job).state in ENDED:
                    return
            except Unreachable as error:
                if not follow:
                    raise
                waiting(str(error))
            time.sleep(LOOK_AGAIN_SECONDS)

    # Models

    def models(self) -> list[Json]:
        return list(self._json("GET", "/v1/models")["data"])

    def version(self, model: str, number: int) -> Json:
        return self._json("GET", f"/v1/models/{_name(model)}/versions/{number}")

    def promote(self, model: str, alias: str, number: int) -> Json:
        return self._json("PUT", f"/v1/models/{_name(model)}/aliases/{_name(alias)}", json={"version": number})

    def delete_version(self, model: str, number: int) -> None:
        self._json("DELETE", f"/v1/models/{_name(model)}/versions/{number}")

    def fetch(self, model: str, number: int, name: str, expected: File, path: Path) -> None:
        """Download a file of a version and prove it against its size and sha256; it appears only when whole."""
        route = f"/v1/models/{_name(model)}/versions/{number}/files/{quote(name)}"

        def download() -> None:
            with appears_whole(path) as part, part.open("wb") as file, self._stream("GET", route) as response:
                for data in response.iter_bytes():
                    file.write(data)
                file.flush()
                if part.stat().st_size != expected.size or sha256_of(part) != expected.sha256:
                    raise CheckpointError(f"{model}@{number}: {name} came damaged (its size or sha256 differs)")

        self._patiently(download)

    def gc(self, *, dry_run: bool) -> Json:
        return self._json("POST", "/v1/gc", params={"dry_run": str(dry_run).lower()}, timeout=600.0)

    # Datasets

    def datasets(self) -> list[Json]:
        return list(self._json("GET", "/v1/datasets")["data"])

    def add_dataset(self, name: str, file: IO[bytes], **options: int | None) -> Json:
        """Add a text file or a zip of pictures.

        Args:
            options: `image_size` and `channels` of pictures.
        """
        query = {option: value for option, value in options.items() if value is not None}
        headers = {"content-type": "application/octet-stream"}

        def parts() -> Iterator[bytes]:
            file.seek(0)
            while part := file.read(2**20):
                yield part

        def send() -> Json:
            route, timeout = f"/v1/datasets/{_name(name)}", httpx.Timeout(600.0, connect=CONNECT_SECONDS)
            response = self._http.put(route, content=parts(), headers=headers, params=query, timeout=timeout)
            return self._answer(response)

        return self._patiently(send)

    # HTTP

    def _parsed(self, kind: type[ViewT], method: str, route: str, **options: Any) -> ViewT:
        try:
            return kind.model_validate(self._json(method, route, **options))
        except ValidationError:
            raise GenmodelsError(self._strange(200)) from None

    def _json(self, method: str, route: str, source: str | None = None, **options: Any) -> Json:
        return self._patiently(lambda: self._answer(self._http.request(method, route, **options), source))

    def _lines(self, route: str, query: list[tuple[str, Any]]) -> Iterator[str]:
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self._translated(), self._stream("GET", route, params=query, timeout=timeout) as answer:
            yield from answer.iter_lines()

    @contextlib.contextmanager
    def _stream(self, method: str, route: str, **options: Any) -> Iterator[httpx.Response]:
        with self._http.stream(method, route, **options) as response:
            if response.is_error:
                response.read()
                self._answer(response)
            yield response

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` returns, tried again while the service does not answer; not for long if it never did."""

        def translated() -> T:
            with self._translated():
                result = work()
            self._reached = True
            return result

        patience = self.patience if self._reached else min(self.patience, FIRST_PATIENCE_SECONDS)
        retrying = Retrying(
            retry=retry_if_exception_type(Unreachable),
            wait=wait_random_exponential(multiplier=0.1, max=2.0),
            stop=stop_after_delay(patience),
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
        status = response.status_code
        try:
            body = response.json() if response.content else {}
            error = body["error"] if response.is_error else {}
            message, code = str(error.get("message", "")), error.get("code")
            understood = isinstance(body, dict) and (message or not response.is_error)
        except (ValueError, LookupError, TypeError, AttributeError):
            understood = False
        if not understood:
            if status in (502, 503, 504):  # a proxy, whose service is away
                raise Unreachable(f"the job service at {self.url} is not ready ({status}); try again")
            raise GenmodelsError(self._strange(status))
        if not response.is_error:
            return body
        if status in (429, 502, 503, 504):
            raise Unreachable(message)
        if status == 401:
            raise Unauthorized(self._asks_for_a_key())
        if status == 403:
            raise Unauthorized(message)
        if source is not None and status in (400, 413, 415):
            raise SpecError(*(re.sub(r"^spec(?=:)", lambda _: source, line) for line in message.splitlines()))
        if code == "job_not_found":
            raise JobNotFound(f"{message.rstrip('.')}; `genmodels jobs` lists them")
        raise GenmodelsError(message)

    def _strange(self, status: int) -> str:
        return f"{self.url} answers ({status}), but not as a job service does; is its address right? See --api"

    def _asks_for_a_key(self) -> str:
        remedy = "`genmodels keys create` makes one where the storage is"
        if self.key:
            return f"{self.url} does not take this key: it is not known there, or it was revoked; {remedy}"
        return f"{self.url} asks for a key: set GENMODELS_KEY, or give --key; {remedy}"


def _checked(url: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        return url.rstrip("/")
    raise GenmodelsError(f"address of the job service: got {url[:100]!r}; write http://host:port, e.g. {DEFAULT_URL}")


def _printable(key: str) -> str:
    """A key is ASCII; anything else was pasted wrongly, and would break the header."""
    if re.fullmatch("[!-~]+", key.strip()):
        return key.strip()
    raise Unauthorized("the key holds characters that no key has; was it copied whole?")


def _name(name: str) -> str:
    """A part of a path, which may not leave it."""
    if re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        return name
    raise GenmodelsError(
        f"got {name[:100]!r}; jobs, models, aliases and datasets have lower-case letters, digits and -"
    )


def _typed(source: str) -> dict[str, str]:
    return {"content-type": "application/json" if source.endswith(".json") else "application/yaml"}
