"""Make a process and all that it starts independent of the user's shell, folder, proxies and terminal.

`settle` is called once, where a process tree begins. Everything that it starts inherits the result, Ray's own processes
too, so no other place has to think of proxies, locales or import paths.
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
ANYWHERE = "localhost,0.0.0.0/0,::/0"  # gRPC connects Ray's processes with each other and nothing else
INTERPRETER = ("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONIOENCODING", "PYTHONWARNINGS")  # meant for a person's session
FOLDERS = (  # variables that name a file or folder, which children have to find from a folder of their own
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
RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray makes


def settle() -> None:
    """Make this process and what it starts independent of the user's shell. Call it before any output.

    A process with a locale other than UTF-8 starts anew in Python's UTF-8 mode: else names of files would have one
    form here and another one in children. What it prints keeps the terminal's own encoding.
    """
    _open_standard_streams()
    if sys.getfilesystemencoding() != "utf-8":
        output = sys.stdout.encoding or "ascii"
        os.environ["PYTHONIOENCODING"] = f"{output}:replace"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    os.environ |= settled(os.environ)


class _Lasting:
    """A stream that this process outlives: what can no longer be written (a closed pipe, a full disk) is dropped."""

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


def outlive_output() -> None:
    """Go on when nobody can read the output any more. For commands whose work counts, not what they print."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def settled(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that differ from a user's environment. Empty ones count as not set."""
    changes = {name: "" for name in INTERPRETER if environment.get(name)}
    changes |= {name: os.path.abspath(path) for name in FOLDERS if (path := environment.get(name))}
    search = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    if (ROOT / "pyproject.toml").exists():  # a checkout: children run its code, installed or not
        search = [str(ROOT), *(path for path in search if path != str(ROOT))]
    no_proxy = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in environment.get(name, "").split(",")]
    direct = ",".join(dict.fromkeys(filter(None, [*no_proxy, *LOOPBACK])))
    return changes | {
        "PYTHONUTF8": "1",
        "PYTHONSAFEPATH": "1",  # no module of the folder that a process is started in
        "PYTHONPATH": os.pathsep.join(search),
        "no_proxy": direct,
        "NO_PROXY": direct,
        "no_grpc_proxy": ANYWHERE,
    }


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `services.<module>`. It imports nothing from the folder it is started in."""
    return [sys.executable, "-P", "-m", f"services.{module}", *arguments]


def ray_command(*arguments: str) -> list[str]:
    """Return a command of Ray's own command line."""
    return [str(Path(sysconfig.get_path("scripts")) / "ray"), *arguments]


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder that only this user reads, short enough for the sockets that Ray makes in it; it goes at the end.

    Ray's processes and drivers work in it: Ray adds a driver's working directory to the import path of its workers.
    """
    with _made() as folder:
        yield Path(folder)


def _made() -> tempfile.TemporaryDirectory[str]:
    """Make it in the first temporary folder that is short enough and can be written to."""
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
    """Open what is closed of standard input, output and errors: else the next file or socket takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
