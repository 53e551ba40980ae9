"""What `genmodels doctor` looks at: one line for each thing that can be wrong, with what to do about it.

No check raises: what goes wrong within one is its finding. The library knows nothing of Ray, so that a broken
installation of it can be told.
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
SKEW_WARNING, SKEW_PROBLEM = 30.0, 300.0  # seconds; S3 refuses requests that are 15 minutes off
FREE_WARNING, FREE_PROBLEM = 5 * 2**30, 512 * 2**20  # bytes
INODES_WARNING, INODES_PROBLEM = 50_000, 1_000
NAMED_STRAYS = 3


@dataclass(frozen=True)
class Check:
    """One line. `remedy` says what to do; it is empty where all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(storage_url: str) -> Iterator[Check]:
    """All checks, each as soon as it is made."""
    yield from _contained("versions", _versions)
    try:
        store = open_storage(storage_url)
        store.list("keys/", limit=1)
        read_marker(store)
    except Exception as error:
        yield Check("storage", "problem", str(contained(error)), "mend that first; what is stored was not looked at")
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
        yield Check("python", "problem", f"{python}, expected {wanted}", "make the environment with another Python")
    for requirement in map(Requirement, metadata.requires("genmodels") or ()):
        if requirement.name in PINNED and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            yield _version(requirement)


def _version(requirement: Requirement) -> Check:
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "problem", "is not installed", remedy)
    if requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "ok", found)
    return Check(requirement.name, "problem", f"{found}, expected {requirement.specifier}", remedy)


# The storage


def _conditional_puts(store: Storage) -> Iterator[Check]:
    """Two dispatchers would hold one lease where the store does not honour them."""
    probe = getattr(storage, "probe_conditional_puts", None)
    if probe is None:
        return
    try:
        probe(store)
    except StorageError as error:
        remedy = "mend that first: nothing can be written there"
        if CONDITIONS_NEEDED in str(error):
            remedy = (
                "use a store that honours If-Match and If-None-Match: two dispatchers would run every job twice here"
            )
        yield Check("conditional puts", "problem", str(error), remedy)
    else:
        yield Check("conditional puts", "ok", "are honoured")


def _objects(store: Storage) -> Iterator[Check]:
    found = take_inventory(store)
    if not found.damages:
        yield Check("stored objects", "ok", f"{found.documents:,} documents, none damaged")
    for damage in found.damages:
        yield Check("damaged object", "problem", f"{damage.key}: {damage.what}", damage.remedy)
    if found.strays:
        named = ", ".join(found.strays[:NAMED_STRAYS])
        more = f" and {len(found.strays) - NAMED_STRAYS} more" if len(found.strays) > NAMED_STRAYS else ""
        remedy = "they are passed over; remove them where another program left them"
        yield Check("files not ours", "warning", f"{named}{more}", remedy)


def _clock(store: Storage) -> Iterator[Check]:
    before = time.time()
    told = store.clock()
    if told is None:
        return
    skew = (before + time.time()) / 2 - told
    found = f"this machine's is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the store's"
    remedy = "set this machine's clock (NTP): requests to S3 are refused when it is 15 minutes off"
    if abs(skew) < SKEW_WARNING:
        yield Check("clock", "ok", f"within {SKEW_WARNING:.0f} s of the store's")
    else:
        yield Check("clock", "problem" if abs(skew) >= SKEW_PROBLEM else "warning", found, remedy)


# This machine


def _disks(storage_url: str) -> Iterator[Check]:
    places = {"scratch": (Path(tempfile.gettempdir()), "TMPDIR names another folder")}
    url = urlsplit(storage_url)
    if url.scheme == "file":
        places["storage folder"] = (Path(unquote(url.path)), "remove what is not needed: genmodels gc")
    if folder := os.environ.get(DIRECTORY):
        places["metrics"] = (Path(folder), f"{DIRECTORY} names another folder")
    for name, (place, remedy) in places.items():
        yield _disk(name, place, remedy)


def _disk(name: str, place: Path, remedy: str) -> Check:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "problem", f"{there} is not writable", f"change its owner or mode; {remedy}")
    free, files = shutil.disk_usage(there).free, os.statvfs(there)
    inodes = files.f_favail if files.f_files else INODES_WARNING
    found = f"{place}: {free / 2**30:.1f} GiB free" + (f", {inodes:,} inodes" if files.f_files else "")
    if free < FREE_PROBLEM or inodes < INODES_PROBLEM:
        return Check(name, "problem", found, f"free some; {remedy}")
    if free < FREE_WARNING or inodes < INODES_WARNING:
        return Check(name, "warning", found, f"free some; {remedy}")
    return Check(name, "ok", found)


def _port(port: int, what: str) -> Iterator[Check]:
    name = f"port {port}"
    try:
        socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        yield Check(name, "ok", f"free ({what})")
        return
    except OSError as error:
        yield Check(name, "warning", f"does not answer ({error})", f"see what listens there: ss -ltnp sport = :{port}")
        return
    if problem := _health(port):
        yield Check(name, "problem", problem, "look into the log of that service")
    elif _is_ours(port):
        yield Check(name, "ok", f"genmodels answers ({what})")
    else:
        remedy = f"where genmodels is to run here, choose another port (see `genmodels up --help`) or end that: {what}"
        yield Check(name, "warning", "another program listens", remedy)


def _health(port: int) -> str | None:
    """Why a service of ours that listens there says that it is not well."""
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
    """Files that hold secrets; keys of our own are stored as hashes alone."""
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
        yield Check("secrets", "ok", f"{len(there)} files, each readable by its owner alone" if there else "no files")
