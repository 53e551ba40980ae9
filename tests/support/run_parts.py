"""Write parts of metrics and logs without a recorder or a process that prints."""

from __future__ import annotations

import json
from typing import Any

from genmodels.runs.store import Run
from genmodels.storage import encode_floats


def write_metrics(run: Run, attempt: int, rows: list[dict[str, Any]]) -> None:
    """Store rows as one part, which is never merged."""
    name = f"{max(0, rows[0]['step'] - 1):08d}-{rows[-1]['step']:08d}.jsonl"
    data = "".join(json.dumps(encode_floats(row)) + "\n" for row in rows).encode()
    run.storage.put(f"{run.prefix}/attempt-{attempt}/metrics/{name}", data)


def write_log(run: Run, attempt: int, source: str, number: int, data: bytes) -> None:
    """Store lines as an earlier release stored them: in parts that are numbered, from 1 on."""
    run.storage.put(f"{run.prefix}/attempt-{attempt}/logs/{source}/{number:08d}.jsonl", data)
