"""/metrics of one node: what all its processes wrote to PROMETHEUS_MULTIPROC_DIR, each counted once.

python -m services.exporter [--host 127.0.0.1] [--port 9400]
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

PORT = 9400
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


class NodeCollector:
    """The node's series without those of processes that have ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = MultiProcessCollector(None, str(folder))

    def collect(self) -> Iterator[Metric]:
        for pid in self._writers():
            if not _is_alive(pid):
                mark_process_dead(pid, str(self.folder))
        yield from self._files.collect()

    def _writers(self) -> set[int]:
        found = (re.search(r"_(\d+)\.db$", path.name) for path in self.folder.glob("*.db"))
        return {int(match[1]) for match in found if match}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the metrics of this node's processes.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    registry = CollectorRegistry()
    registry.register(NodeCollector(Path(os.environ[DIRECTORY])))
    server, thread = start_http_server(options.port, options.host, registry)
    stop.wait()
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
