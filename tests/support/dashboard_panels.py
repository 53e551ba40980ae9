"""List every query of the dashboards, and send each to a running Prometheus.

After a demo job: which panels show nothing?

    python -m tests.support.dashboard_panels http://127.0.0.1:9090 [--gpu] [--pools]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import httpx

from tests.support.paths import ROOT

DASHBOARDS = sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))
RATE_INTERVAL = "20s"  # Grafana's, for a scrape interval of 5 s


@dataclass(frozen=True)
class Query:
    dashboard: str
    panel: str
    expr: str  # as Prometheus receives it: each variable is replaced by all its values

    @property
    def needs_gpu(self) -> bool:
        return "GPU" in self.panel

    @property
    def needs_empty_pool(self) -> bool:
        """Return whether only a pool that was scaled to zero gives values."""
        return "for a pool" in self.panel

    def __str__(self) -> str:
        return f"{self.dashboard}, {self.panel}: {self.expr}"


def queries(rate_interval: str = RATE_INTERVAL) -> list[Query]:
    """Return the queries of all panels, in their order."""
    collected = []
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        variables = {f"${variable['name']}": ".*" for variable in dashboard["templating"]["list"]}
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                expr = target["expr"]
                for name, value in {"$__rate_interval": rate_interval, **variables}.items():
                    expr = expr.replace(name, value)
                collected.append(Query(dashboard["title"], panel["title"], expr))
    return collected


def answers(prometheus: httpx.Client, query: Query, seconds: float) -> bool:
    """Return True if Prometheus, the client's base URL, has a finite value for the query in the last `seconds`.

    Raises:
        ValueError: Prometheus does not understand the query.
    """
    now = time.time()
    parameters = {"query": query.expr, "start": now - seconds, "end": now, "step": max(1.0, seconds / 500)}
    answer = prometheus.post("/api/v1/query_range", data=parameters).json()
    if answer["status"] != "success":
        raise ValueError(f"{query}: {answer['error']}")
    return any(math.isfinite(float(value)) for series in answer["data"]["result"] for _, value in series["values"])


def silent(url: str, expected: Iterable[Query], *, history: float, patience: float) -> list[Query]:
    """Return the queries that have no value in the last `history` seconds, after at most `patience` seconds.

    The queries are repeated: a counter that was scraped once has no rate.
    """
    unanswered = list(expected)
    end = time.monotonic() + patience
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as prometheus:
        while True:
            unanswered = [query for query in unanswered if not answers(prometheus, query, history)]
            if not unanswered or time.monotonic() > end:
                return unanswered
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a Prometheus for every panel of the dashboards.")
    parser.add_argument("url")
    parser.add_argument("--gpu", action="store_true", help="also for what only GPUs have")
    parser.add_argument("--pools", action="store_true", help="also for what only pools that scale to zero have")
    parser.add_argument("--history", type=float, default=1800.0, help="seconds that the job may be ago")
    parser.add_argument("--patience", type=float, default=60.0)
    options = parser.parse_args()
    selected = [query for query in queries() if options.gpu or not query.needs_gpu]
    selected = [query for query in selected if options.pools or not query.needs_empty_pool]
    empty = silent(options.url, selected, history=options.history, patience=options.patience)
    for query in empty:
        print(f"shows nothing: {query}")
    print(f"{len(selected) - len(empty)} of {len(selected)} queries are answered")
    sys.exit(bool(empty))


if __name__ == "__main__":
    main()
