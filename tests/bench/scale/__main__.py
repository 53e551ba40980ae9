"""Measure what the control plane costs when there is much of it, on a real S3 server: `make bench-scale`.

Each figure is printed for N = 10, 100, 1,000 and 10,000 things, with its bound. A number of requests does not depend on
the machine. The bounds of seconds are for 2 quiet cores that also run the S3 server (SeaweedFS). What a checkpoint of
1 GiB costs is measured by `make bench-checkpoint`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator

import pytest
from rich.console import Console

from tests.bench.rounds import machine
from tests.bench.scale import dispatch, history, registry
from tests.bench.scale.rows import Row, table
from tests.support.s3_server import S3Server

SIZES = (10, 100, 1_000, 10_000)
# The figures, each with the sizes that it is measured at
FIGURES: dict[str, tuple[Callable[[S3Server, int], Iterator[Row]], tuple[int, ...]]] = {
    "catalogue": (registry.measure_catalogue, SIZES),
    "dispatch": (dispatch.measure, (10, 100, 1_000)),
    "curve": (history.measure_curve, (100, 1_000, history.DAY)),
    "lists": (history.measure_lists, SIZES),
    "gc": (history.measure_gc, (10, 100, 1_000)),
    "publish": (registry.measure_publish, (10, 100, 1_000)),
}


def main() -> int:
    """Print all figures; return 1 if one is over its bound."""
    parser = argparse.ArgumentParser(description="Measure what the control plane costs, on a real S3 server.")
    parser.add_argument("--max", type=int, default=max(*SIZES, history.DAY), help="the largest N; default: %(default)s")
    parser.add_argument("--only", choices=FIGURES, nargs="+", default=list(FIGURES), help="these figures only")
    options = parser.parse_args()
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        rows = measure(server, options.only, options.max)
    return int(any(row.verdict == "over" for row in rows))


def measure(server: S3Server, names: Iterable[str], most: int) -> list[Row]:
    """Print figures and return them; `most` is the largest N."""
    console, rows = Console(width=120), list[Row]()
    console.print(machine())
    for name in names:
        measure_one, sizes = FIGURES[name]
        measured = [row for n in sizes if n <= most for row in measure_one(server, n)]
        console.print(table(measured))
        rows += measured
    return rows


if __name__ == "__main__":
    sys.exit(main())
