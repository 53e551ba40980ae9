"""A client of the job API. Each error is one line that names the remedy.

Requests are retried for a while if the service restarts or the network fails. A retry is safe: a submission carries an
idempotency key, and every other request has the same effect when it is repeated.
"""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

from genmodels.checkpoint import sha256_of
from genmodels.errors import CheckpointError, GenmodelsError, ModelNotFound
from genmodels.registry.versions import Version
from genmodels.runs.records import ENDED
from genmodels.storage.base import check_key
from services.client.http import Json, Transport, Unreachable
from services.jobs.schemas import JobView, Page

RECONNECT_SECONDS = 1.0  # before an interrupted log is requested again
WORK_SECONDS = 600.0  # that the service may take to check a dataset, or to find garbage


class Client:
    """A client for one thread. As a context manager, it closes its connections at the end.

    Args:
        url: of the job service, `http://host:port`.
        key: a bearer key; None for a service without keys.

    Every method raises Unreachable, Unauthorized, or GenmodelsError with the service's message.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.key = key
        self._http = Transport(url, key)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    # Jobs

    def submit(self, spec: bytes, source: str = "spec") -> JobView:
        """Submit a spec in YAML or JSON, and return the new job.

        Args:
            source: name of the spec's file, for the messages of a SpecError.

        Raises:
            SpecError: the service refuses the spec; one line for each problem.
        """
        headers = {**_typed(source), "idempotency-key": secrets.token_hex(16)}
        return self._http.parsed(JobView, "POST", "/v1/jobs", content=spec, headers=headers, source=source)

    def dry_run(self, spec: bytes, source: str = "spec") -> Json:
        """Report what a spec would run. Raises SpecError, as `submit` does."""
        query = {"dry_run": "true"}
        return self._http.json("POST", "/v1/jobs", content=spec, headers=_typed(source), params=query, source=source)

    def jobs(self, state: str = "all", limit: int = 20, after: str | None = None) -> Page:
        """Return one page of jobs: open jobs, then ended jobs, newest first."""
        query: Json = {"state": state, "limit": limit} | ({"after": after} if after else {})
        return self._http.parsed(Page, "GET", "/v1/jobs", params=query)

    def job(self, job: str) -> JobView:
        return self._http.parsed(JobView, "GET", f"/v1/jobs/{_name(job)}")

    def cancel(self, job: str, models: list[str], *, now: bool = False) -> JobView:
        """Ask runs of a job to save and end, or, with `now`, to end at once. An empty list of models means all."""
        return self._http.parsed(JobView, "POST", f"/v1/jobs/{_name(job)}/cancel", json={"now": now} | _some(models))

    def resume(self, job: str, models: list[str]) -> JobView:
        """Queue failed and cancelled runs again. An empty list of models means all."""
        return self._http.parsed(JobView, "POST", f"/v1/jobs/{_name(job)}/resume", json=_some(models))

    def delete_job(self, job: str) -> None:
        self._http.json("DELETE", f"/v1/jobs/{_name(job)}")

    def logs(
        self,
        job: str,
        models: list[str],
        source: str | None = None,
        *,
        follow: bool = False,
        waiting: Callable[[str], None] = lambda reason: None,
    ) -> Iterator[str]:
        """Yield the lines of a job's logs; with `follow`, until the job has ended, across reconnections.

        Args:
            models: only the logs of these models; empty: all.
            source: only the log of the "driver" or of one rank.
            waiting: called with the reason, once for each interruption.
        """
        query: list[tuple[str, Any]] = [("model", model) for model in models]
        query += [("source", source)] if source else []
        query += [("follow", "true")] if follow else []
        yielded: Counter[int] = Counter()  # hashes of the lines yielded so far: a new stream repeats those lines
        away = False
        while True:
            repeated = Counter(yielded)
            try:
                for line in self._http.lines(f"/v1/jobs/{_name(job)}/logs", query, follow):
                    away, mark = False, hash(line)
                    if repeated[mark]:
                        repeated[mark] -= 1
                        continue
                    yielded[mark] += 1
                    yield line
                if not follow or self.job(job).state in (*ENDED, "damaged"):
                    return
            except Unreachable as error:
                if not follow or not self._http.reached:
                    raise
                if not away:
                    waiting(str(error))
                away = True
            time.sleep(RECONNECT_SECONDS)

    # Models

    def models(self) -> list[Json]:
        """List the published models: `name`, `family`, `versions`, `aliases` and the newest version's `metrics`."""
        query: Json = {}
        models: list[Json] = []
        while True:
            page = self._http.json("GET", "/v1/models", params=query)
            models += page["data"]
            if not page["has_more"]:
                return models
            query = {"after": page["last_id"]}

    def resolve(self, name: str) -> tuple[str, int]:
        """Return the model and version number that a name means: `m` (alias production), `m@alias`, `m@3`, `m@latest`.

        Raises:
            ModelNotFound: there is no such model or alias. A version number is not checked.
        """
        model, _, reference = name.partition("@")
        if reference.isdecimal():
            return model, int(reference)
        shown = self._http.json("GET", f"/v1/models/{_name(model)}")
        versions, aliases = shown["versions"], shown["aliases"]
        number = versions[-1] if reference == "latest" else aliases.get(reference or "production")
        if number is None:
            there = f"aliases: {', '.join(aliases) or 'none'}; versions: {', '.join(map(str, versions))}"
            raise ModelNotFound(f"model {model!r} has no alias {reference or 'production'!r}; {there}")
        return model, number

    def version(self, model: str, number: int) -> Version:
        return self._http.parsed(Version, "GET", f"/v1/models/{_name(model)}/versions/{number}")

    def promote(self, model: str, alias: str, number: int) -> None:
        self._http.json("PUT", f"/v1/models/{_name(model)}/aliases/{_name(alias)}", json={"version": number})

    def delete_model(self, model: str, *, with_runs: bool = False, dry_run: bool = False) -> Json:
        """Delete a whole model, and return its contents; with `dry_run`, only return them."""
        query = {"with_runs": str(with_runs).lower(), "dry_run": str(dry_run).lower()}
        return self._http.json("DELETE", f"/v1/models/{_name(model)}", params=query, seconds=WORK_SECONDS)

    def delete_alias(self, model: str, alias: str) -> None:
        self._http.json("DELETE", f"/v1/models/{_name(model)}/aliases/{_name(alias)}")

    def delete_version(self, model: str, number: int) -> None:
        self._http.json("DELETE", f"/v1/models/{_name(model)}/versions/{number}")

    def fetch(self, version: Version, folder: Path) -> None:
        """Download a version's files into an empty folder and verify every byte.

        Raises:
            CheckpointError: a file arrived damaged.
        """
        for name, expected in version.files.items():
            path = folder / check_key(name)  # a checked name cannot lead out of the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            self._http.download(f"{_route(version)}/files/{quote(name)}", path)
            if path.stat().st_size != expected.size or sha256_of(path) != expected.sha256:
                raise CheckpointError(f"{version.name}: {name} arrived damaged (its size or sha256 differs)")

    def example_prompt(self, model: str, number: int) -> str:
        """Return a prompt whose characters a version of a text model knows."""
        from genmodels.data.text import load_tokenizer

        with tempfile.TemporaryDirectory(prefix="genmodels-") as folder:
            path = Path(folder) / "tokenizer.json"
            self._http.download(f"/v1/models/{_name(model)}/versions/{number}/files/assets/{path.name}", path)
            return load_tokenizer(path.read_bytes()).example_prompt

    def gc(self, *, dry_run: bool, everything: bool = False) -> Json:
        params = {"dry_run": str(dry_run).lower(), "all": str(everything).lower()}
        return self._http.json("POST", "/v1/gc", params=params, seconds=WORK_SECONDS)

    # Datasets

    def datasets(self) -> list[Json]:
        return list(self._http.json("GET", "/v1/datasets")["data"])

    def add_dataset(self, name: str, file: IO[bytes], *, replace: bool = False, **options: int | None) -> Json:
        """Add a text file or a zip of pictures.

        Args:
            replace: replace another content of this name.
            options: `image_size` and `channels` of pictures.

        Raises:
            DatasetExists: the name means another content, and `replace` is false.
        """

        def parts() -> Iterator[bytes]:
            file.seek(0)
            while part := file.read(2**20):
                yield part

        query: Json = {option: value for option, value in options.items() if value is not None}
        query |= {"replace": "true"} if replace else {}
        headers = {"content-type": "application/octet-stream"}
        route = f"/v1/datasets/{_name(name)}"
        return self._http.json("PUT", route, content=parts, headers=headers, params=query, seconds=WORK_SECONDS)

    def delete_dataset(self, name: str, *, dry_run: bool = False) -> Json:
        """Delete a dataset; return its contents and what was trained on it. With `dry_run`, only return them."""
        query = {"dry_run": str(dry_run).lower()}
        return self._http.json("DELETE", f"/v1/datasets/{_name(name)}", params=query, seconds=WORK_SECONDS)


def _name(name: str) -> str:
    """Check a name that becomes one part of a URL's path."""
    if re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        return name
    raise GenmodelsError(
        f"got {name[:100]!r}: jobs, models, aliases and datasets have names of lower-case letters, digits and '-'"
    )


def _some(models: list[str]) -> Json:
    return {"models": models} if models else {}


def _route(version: Version) -> str:
    return f"/v1/models/{_name(version.model)}/versions/{version.version}"


def _typed(source: str) -> dict[str, str]:
    return {"content-type": "application/json" if source.endswith(".json") else "application/yaml"}
