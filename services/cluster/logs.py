"""The log of a process: one line for each event, on standard error."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Log from level INFO on, with time, level and logger."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
