"""The logs of processes: one line for each event, on standard error, and the folder for the output of children."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path

from genmodels.data.sources import cache_folder
from genmodels.errors import GenmodelsError


def log_to_stderr() -> None:
    """Log from level INFO on, with time, level and logger."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def log_folder(chosen: Path | None = None) -> Path:
    """Create the folder for the output of child processes, and return it.

    Args:
        chosen: the user's choice; default: `.genmodels/logs`, or a folder in the cache if that cannot be written.

    Raises:
        GenmodelsError: no folder can be written.
    """
    folders = [chosen] if chosen else [Path(".genmodels") / "logs", cache_folder() / "logs"]
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    raise GenmodelsError(f"no folder for logs can be written: {' or '.join(map(str, folders))}; choose another folder")
