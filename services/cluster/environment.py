"""Make a process and all that it starts independent of the user's shell, folder, proxies and terminal.

`isolate_process` is called once, where a process tree begins. All processes of the tree inherit the result, Ray's own
processes too, so no other place has to handle proxies, locales or import paths.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from genmodels.errors import GenmodelsError

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANYWHERE = "localhost,0.0.0.0/0,::/0"  # no proxy for gRPC at all: it connects Ray's processes with each other only
INTERPRETER = ("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONIOENCODING", "PYTHONWARNINGS")  # for an interactive session
FOLDERS = (  # variables whose relative paths are made absolute, because children run in other folders
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "GENMODELS_DATA",
    "HOME",
    "PROMETHEUS_MULTIPROC_DIR",
    "SSL_CERT_FILE",
    "XDG_CACHE_HOME",
)
SOCKET_BYTES = 107  # the longest path of a Unix socket
PYTHON_SOCKET = "/pymp-00000000/listener-00000000"  # of multiprocessing, in TMPDIR: Ray's dashboard uses it
RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray makes


def isolate_process() -> None:
    """Make this process and what it starts independent of the user's shell. Call it before any output.

    A process with a locale other than UTF-8 starts again in Python's UTF-8 mode; otherwise file names would have one
    form here and another one in children. The output keeps the terminal's own encoding.
    """
    _open_standard_streams()
    if sys.getfilesystemencoding() != "utf-8":
        output = sys.stdout.encoding or "ascii"
        os.environ["PYTHONIOENCODING"] = f"{output}:replace"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    os.environ |= isolated_environment(os.environ)


class _LossyStream:
    """A stream whose write errors are ignored: output that cannot be written (closed pipe, full disk) is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self._drop()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> int:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        return 0


def ignore_output_errors() -> None:
    """Continue when the output can no longer be written. For commands whose work matters more than their output."""
    sys.stdout, sys.stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)


def isolated_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to change in a user's environment. Empty variables count as not set."""
    changes = {name: "" for name in INTERPRETER if environment.get(name)}
    changes |= {name: os.path.abspath(path) for name in FOLDERS if (path := environment.get(name))}
    search = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    if (ROOT / "pyproject.toml").exists():  # a checkout: children import its code, also if it is not installed
        search = [str(ROOT), *(path for path in search if path != str(ROOT))]
    no_proxy = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in environment.get(name, "").split(",")]
    direct = ",".join(dict.fromkeys(filter(None, [*no_proxy, *LOOPBACK])))
    return changes | {
        "PYTHONUTF8": "1",
        "PYTHONSAFEPATH": "1",  # import nothing from the folder in which a process starts
        "PYTHONPATH": os.pathsep.join(search),
        "no_proxy": direct,
        "NO_PROXY": direct,
        "no_grpc_proxy": ANYWHERE,
    }


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `services.<module>`. It imports nothing from its working folder."""
    return [sys.executable, "-P", "-m", f"services.{module}", *arguments]


def ray_command(*arguments: str) -> list[str]:
    """Return a command that calls Ray's own command line."""
    return [str(Path(sysconfig.get_path("scripts")) / "ray"), *arguments]


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Create a folder that only this user can read, and delete it at the end.

    Its path is short enough for the sockets that Ray creates in it. Ray's processes and drivers use it as working
    directory, because Ray adds a driver's working directory to the import path of its workers.

    Raises:
        GenmodelsError: no temporary folder is short enough and writable.
    """
    with _temporary_folder() as folder:
        yield Path(folder)


def short_tmpdir(folder: Path) -> dict[str, str]:
    """Return a TMPDIR for child processes if the user's is too long for their sockets: a link to it, in `folder`.

    The data stays where the user wants it, which may be the only disk with enough space.
    """
    if len(os.fsencode(tempfile.gettempdir())) + len(PYTHON_SOCKET) <= SOCKET_BYTES:
        return {}
    link = folder / "tmp"
    link.symlink_to(tempfile.gettempdir())
    return {"TMPDIR": str(link)}


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder in the first of RAY_TMPDIR, TMPDIR and /tmp that is short enough and writable."""
    longest = SOCKET_BYTES - len(f"/gm-00000000/{RAY_SOCKET}")
    candidates = [os.environ.get("RAY_TMPDIR") or "", os.environ.get("TMPDIR") or "", "/tmp"]
    for folder in candidates:
        if os.path.isabs(folder) and len(os.fsencode(folder)) <= longest:
            with contextlib.suppress(OSError):
                return tempfile.TemporaryDirectory(prefix="gm-", dir=folder, ignore_cleanup_errors=True)
    raise GenmodelsError(
        f"no folder for Ray's sockets: /tmp cannot be written to; set RAY_TMPDIR to a folder of at most {longest} bytes"
    )


def _open_standard_streams() -> None:
    """Open standard input, output and error where they are closed; otherwise the next file would take their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
