"""TODO"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


LOG_WIDTH = 132  # a log file has room for a table


def console(*, stderr: bool = False) -> Console:
    """Make the console of a command. It prints names and paths as they are: none of their characters is markup."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = LOG_WIDTH
    return made


def tell(line: str) -> None:
    """A line for the person, beside what the command prints for others to use."""
    print(line, file=sys.stderr)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
