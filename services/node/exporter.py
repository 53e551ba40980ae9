"""/metrics of one node: the sum of all its processes' metrics in PROMETHEUS_MULTIPROC_DIR.

python -m services.node.exporter [--host 127.0.0.1] [--port 9400]

    counter_<pid>-<start>.db, histogram_..., gauge_<mode>_...     of one process, written by `genmodels.metrics`
    folded/<generation>/counter_0.db, histogram_0.db              the sums of processes that have ended
    folded/<generation>/names                                     files that are in the sums, and are deleted

A generation is written under another name and renamed. In that one step, the files of dead processes stop counting and
their sums begin to count. So an exporter may be killed at any moment; the next one deletes the summed files.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from genmodels.metrics import DIRECTORY, identity
from genmodels.threads import Rounds
from services.cluster.logs import log_to_stderr

PORT = 9400
FOLD_SECONDS = 30.0  # also without scrapes, so that files of dead processes do not accumulate
SUMMED = ("counter", "histogram")  # kinds that are kept after their process ends; gauges are not

log = logging.getLogger("genmodels.exporter")


class NodeCollector:
    """Collect the node's series; thread-safe. Only one exporter works on a folder at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sums = folder, folder / "folded"
        self._threads, self._processes = threading.Lock(), FileLock(folder / "lock")

    def collect(self) -> Iterator[Metric]:
        # Files are deleted only under the lock, so a process that dies now is still counted by its own files.
        with self._threads, self._processes:
            sums = self._fold()
            metrics = _merge([*self._folder.glob("*.db"), *sums])
        yield from metrics

    def fold(self) -> None:
        """Add dead processes' counts to the sums, and delete their files."""
        with self._threads, self._processes:
            self._fold()

    def _fold(self) -> list[Path]:
        """Add dead processes' counts to the sums, and return the files of the sums."""
        generation = self._settle()
        sums = [*(self._sums / str(generation)).glob("*.db")]
        dead = [path for path in self._folder.glob("*.db") if not _is_alive(path)]
        summed = [path for path in dead if path.name.startswith(SUMMED)]
        if summed:
            self._write(generation + 1, [*sums, *summed], summed)
            self._settle()
            sums = [*(self._sums / str(generation + 1)).glob("*.db")]
        for path in dead:
            path.unlink(missing_ok=True)
        return sums

    def _settle(self) -> int:
        """Delete the files that the newest generation replaces, and return its number; 0 if there is none yet."""
        self._sums.mkdir(exist_ok=True)
        generations = [path.name for path in self._sums.iterdir()]
        newest = max((int(name) for name in generations if name.isdecimal()), default=0)
        names = self._sums / str(newest) / "names"
        for name in names.read_text().splitlines() if newest else []:
            (self._folder / name).unlink(missing_ok=True)
        for name in generations:
            if name != str(newest):
                shutil.rmtree(self._sums / name)
        return newest

    def _write(self, generation: int, sources: list[Path], included: list[Path]) -> None:
        aside = self._sums / "new"
        aside.mkdir()
        (aside / "names").write_text("".join(f"{path.name}\n" for path in included))
        files = {kind: MmapedDict(str(aside / f"{kind}_0.db")) for kind in SUMMED}
        for metric in _merge(sources, accumulate=False):
            for sample in metric.samples:
                key = mmap_key(
                    metric.name, sample.name, list(sample.labels), list(sample.labels.values()), metric.documentation
                )
                files[metric.type].write_value(key, sample.value, 0.0)
        for file in files.values():
            file.close()
        aside.rename(self._sums / str(generation))


def _is_alive(path: Path) -> bool:
    """Return whether the process that a file is named after still runs."""
    match = re.search(r"_(\d+)(-\d+)?\.db$", path.name)
    now = identity(int(match[1])) if match else None
    return bool(
        match and now and now.endswith(match[2] or "")
    )  # a file without a start time was written by another library


def _merge(paths: Iterable[Path], accumulate: bool = True) -> list[Metric]:
    merged = MultiProcessCollector.merge([str(path) for path in paths if _is_readable(path)], accumulate)
    return [
        metric for metric in merged if metric.name.startswith("genmodels_")
    ]  # Ray's processes write to this folder too


def _is_readable(path: Path) -> bool:
    """Return whether a file has counts: one that has just been opened, or that a machine's crash damaged, has none."""
    try:
        return bool(list(MmapedDict.read_all_values_from_file(str(path))))
    except (struct.error, ValueError, RuntimeError) as error:
        log.debug("%s is skipped: %s", path.name, error)
        return False


def main() -> None:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Export the metrics of this node's processes.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    registry, collector = CollectorRegistry(), NodeCollector(Path(os.environ[DIRECTORY]))
    registry.register(collector)
    server, thread = start_http_server(options.port, options.host, registry)
    rounds = Rounds("export", log)
    while not stop.wait(FOLD_SECONDS):
        with rounds.round():  # on a full disk the files stay, and no count is lost
            collector.fold()
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main()
