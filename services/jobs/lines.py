"""Log lines and metric rows as parts of an answer, packed so that few of them are in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from genmodels.runs.log_lines import Cursor, log_lines
from genmodels.runs.store import Run

LINES_AT_ONCE = 1000


def shown_lines(run: Run, source: str | None, cursor: Cursor) -> Iterator[tuple[str, str]]:
    """Yield (time, line as it is shown) of each new line; control characters are replaced by "?".

    Args:
        source: "driver" or a rank; None: all.
        cursor: how far each source was read; updated.
    """
    for line in log_lines(run, source, cursor):
        text = re.sub(r"[^\t\x20-\x7e\xa0-\U0010ffff]", "?", line.line)
        yield line.time, f"{line.time} {run.model}/{line.source} {text}\n"


def pack(lines: Iterator[str]) -> Iterator[bytes]:
    """Join lines into parts of LINES_AT_ONCE lines, in UTF-8."""
    while part := "".join(islice(lines, LINES_AT_ONCE)):
        yield part.encode(errors="replace")


def json_document(model: str, rows: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the parts of a JSON document whose rows are JSON already."""
    rows, head = iter(rows), f'{{"model":{json.dumps(model)},"data":['.encode()
    packed = list(islice(rows, LINES_AT_ONCE))
    while following := list(islice(rows, LINES_AT_ONCE)):
        yield head + b",".join(packed)
        head, packed = b",", following
    yield head + b",".join(packed) + b"]}"
