"""The output of commands: the console, notes for the reader on standard error, and JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


LOG_WIDTH = 132  # characters, where the output is no terminal: a log file has room for wide tables


def console(*, stderr: bool = False) -> Console:
    """Make the console of a command. It prints names and paths as they are: none of their characters is markup."""
    from rich.console import Console

    screen = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not screen.is_terminal:
        screen.width = LOG_WIDTH
    return screen


def tell(line: str) -> None:
    """Print a note for the reader to standard error, apart from the command's output."""
    print(line, file=sys.stderr)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
