"""Run the checks of `genmodels doctor`: one line for each check, with a remedy for each problem.

No check raises: an error inside a check is reported as its problem. The library does not import Ray, so a broken
installation of Ray can be reported.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from genmodels import __version__, storage
from genmodels.doctor.inventory import take_inventory
from genmodels.errors import GenmodelsError, StorageError, contained
from genmodels.metrics import DIRECTORY
from genmodels.storage import Storage, open_storage, read_marker
from genmodels.storage.base import CONDITIONS_NEEDED

State = Literal["ok", "warning", "problem"]

PINNED = ("torch", "ray", "pydantic", "boto3", "numpy", "fastapi", "safetensors")
PORTS = {8000: "gateway", 8080: "job service", 9400: "metrics of this node", 6379: "Ray", 8265: "Ray's dashboard"}
ANSWER_SECONDS = 2.0
SKEW_WARNING, SKEW_PROBLEM = 30.0, 300.0  # seconds; S3 refuses requests if clocks differ by 15 minutes
FREE_WARNING, FREE_PROBLEM = 5 * 2**30, 512 * 2**20  # bytes
INODES_WARNING, INODES_PROBLEM = 50_000, 1_000
NAMED_STRAYS = 3


@dataclass(frozen=True)
class Check:
    """Hold one line of the report. `remedy` says what to do; it is empty if there is no problem."""

    name: str
    state: State
    text: str
    remedy: str = ""


def examine(storage_url: str) -> Iterator[Check]:
    """Yield the result of each check as soon as it is known."""
    yield from _contained("versions", _versions)
    try:
        store = open_storage(storage_url)
        store.list("keys/", limit=1)
        read_marker(store)
    except Exception as error:
        yield Check("storage", "problem", str(contained(error)), "correct this first; stored objects were not checked")
    else:
        yield Check("storage", "ok", f"{store.url} answers")
        yield from _contained("conditional puts", lambda: _conditional_puts(store))
        yield from _contained("stored objects", lambda: _objects(store))
        yield from _contained("clock", lambda: _clock(store))
    yield from _contained("disk", lambda: _disks(storage_url))
    for port, what in PORTS.items():
        yield from _contained(f"port {port}", lambda port=port, what=what: _port(port, what))  # type: ignore[misc]
    yield from _contained("secrets", _secrets)


def _contained(name: str, work: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from work()
    except Exception as error:
        remedy = "" if isinstance(error, GenmodelsError) else "this check itself failed; please report it"
        yield Check(name, "problem", str(contained(error)), remedy)


# The installation


def _versions() -> Iterator[Check]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("genmodels", "ok", f"{__version__}, Python {python}")
    try:
        about = metadata.metadata("genmodels")
    except metadata.PackageNotFoundError:
        yield Check("versions", "warning", "genmodels is not installed here", "install it: pip install -e .")
        return
    wanted = about["Requires-Python"] or ""
    if python not in SpecifierSet(wanted):
        yield Check("python", "problem", f"{python}, expected {wanted}", "create the environment with another Python")
    for requirement in map(Requirement, metadata.requires("genmodels") or ()):
        if requirement.name in PINNED and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            yield _version(requirement)


def _version(requirement: Requirement) -> Check:
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "problem", "is not installed", remedy)
    if requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "ok", version)
    return Check(requirement.name, "problem", f"{version}, expected {requirement.specifier}", remedy)


# The storage


def _conditional_puts(store: Storage) -> Iterator[Check]:
    """Check conditional puts: without them two dispatchers could hold one lease."""
    probe = getattr(storage, "probe_conditional_puts", None)
    if probe is None:
        return
    try:
        probe(store)
    except StorageError as error:
        remedy = "correct this first: nothing can be written to the storage"
        if CONDITIONS_NEEDED in str(error):
            remedy = (
                "use a store that supports If-Match and If-None-Match: here two dispatchers would run each job twice"
            )
        yield Check("conditional puts", "problem", str(error), remedy)
    else:
        yield Check("conditional puts", "ok", "supported")


def _objects(store: Storage) -> Iterator[Check]:
    inventory = take_inventory(store)
    if not inventory.damages:
        yield Check("stored objects", "ok", f"{inventory.documents:,} documents, none damaged")
    for damage in inventory.damages:
        yield Check("damaged object", "problem", f"{damage.key}: {damage.what}", damage.remedy)
    if inventory.strays:
        named = ", ".join(inventory.strays[:NAMED_STRAYS])
        more = f" and {len(inventory.strays) - NAMED_STRAYS} more" if len(inventory.strays) > NAMED_STRAYS else ""
        remedy = "genmodels ignores them; remove them if another program left them"
        yield Check("unknown files", "warning", f"{named}{more}", remedy)


def _clock(store: Storage) -> Iterator[Check]:
    before = time.time()
    store_time = store.clock()
    if store_time is None:
        return
    skew = (before + time.time()) / 2 - store_time
    difference = (
        f"the clock of this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the clock of the store"
    )
    remedy = "set the clock of this machine (NTP): S3 refuses requests if clocks differ by 15 minutes"
    if abs(skew) < SKEW_WARNING:
        yield Check("clock", "ok", f"within {SKEW_WARNING:.0f} s of the clock of the store")
    else:
        yield Check("clock", "problem" if abs(skew) >= SKEW_PROBLEM else "warning", difference, remedy)


# This machine


def _disks(storage_url: str) -> Iterator[Check]:
    places = {"scratch": (Path(tempfile.gettempdir()), "or set TMPDIR to another folder")}
    url = urlsplit(storage_url)
    if url.scheme == "file":
        places["storage folder"] = (Path(unquote(url.path)), "remove objects that are not needed: genmodels gc")
    if folder := os.environ.get(DIRECTORY):
        places["metrics"] = (Path(folder), f"or set {DIRECTORY} to another folder")
    for name, (place, remedy) in places.items():
        yield _disk(name, place, remedy)


def _disk(name: str, place: Path, remedy: str) -> Check:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "problem", f"{there} is not writable", f"change its owner or mode; {remedy}")
    free, files = shutil.disk_usage(there).free, os.statvfs(there)
    inodes = files.f_favail if files.f_files else INODES_WARNING
    space = f"{place}: {free / 2**30:.1f} GiB free" + (f", {inodes:,} inodes" if files.f_files else "")
    if free < FREE_PROBLEM or inodes < INODES_PROBLEM:
        return Check(name, "problem", space, f"free some space; {remedy}")
    if free < FREE_WARNING or inodes < INODES_WARNING:
        return Check(name, "warning", space, f"free some space; {remedy}")
    return Check(name, "ok", space)


def _port(port: int, what: str) -> Iterator[Check]:
    name = f"port {port}"
    try:
        socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        yield Check(name, "ok", f"free ({what})")
        return
    except OSError as error:
        yield Check(
            name, "warning", f"does not answer ({error})", f"show the program that listens: ss -ltnp sport = :{port}"
        )
        return
    if problem := _health(port):
        yield Check(name, "problem", problem, "read the log of that service")
    elif _is_ours(port):
        yield Check(name, "ok", f"genmodels answers ({what})")
    else:
        remedy = f"choose another port for the {what} (see `genmodels up --help`), or stop that program"
        yield Check(name, "warning", "another program listens", remedy)


def _health(port: int) -> str | None:
    """Return the problem that a service of genmodels on this port reports; None if it reports none."""
    answer = _get(port, "/healthz")
    if answer is None or answer.status_code != 503:
        return None
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_ours(port: int) -> bool:
    for path, sign in (("/healthz", '"status":"ok"'), ("/metrics", "genmodels_"), ("/api/version", '"ray_')):
        answer = _get(port, path)
        if answer is not None and sign in answer.text.replace('": "', '":"'):
            return True
    return False


def _get(port: int, path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError:
        return None


def _secrets() -> Iterator[Check]:
    """Check the permissions of files with secrets; API keys are stored only as hashes."""
    named = [os.environ.get(name) for name in ("AWS_SHARED_CREDENTIALS_FILE", "RAY_AUTH_TOKEN_PATH")]
    paths = [Path(name) for name in named if name]
    paths += [Path.home() / ".aws" / "credentials", Path.home() / ".ray" / "auth_token"]
    if folder := os.environ.get("GENMODELS_SECRETS"):
        paths += sorted(Path(folder).glob("*"))
    there = sorted({path for path in paths if path.is_file()})
    open_ones = [path for path in there if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    for path in open_ones:
        mode = f"{stat.S_IMODE(path.stat().st_mode):04o}"
        yield Check("secrets", "warning", f"{path} can be read by others (mode {mode})", f"chmod 600 {path}")
    if not open_ones:
        yield Check("secrets", "ok", f"{len(there)} files, each readable only by its owner" if there else "no files")
