"""Measure a save of a large model on a real S3 server: memory, speed against bare boto3, and the steps meanwhile.

    make bench-checkpoint ARGS="--gigabytes 1"

P are the bytes of the weights. A save holds 4 P: serving weights, raw weights, two moments of the optimizer. Ratios
come from measurements that alternate on the same machine, so that another load on the machine changes both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import boto3
import torch
from boto3.s3.transfer import TransferConfig
from torch import Tensor

from genmodels import checkpoint
from genmodels.checkpoint import SnapshotMemory
from genmodels.storage import Storage, multipart, open_storage
from tests.bench.rounds import machine
from tests.support.memory import reset_peak, resident
from tests.support.s3_server import S3Server

LAYER = 2**22  # numbers in one tensor: 16 MiB
ROUNDS = 3
FILES = {"model.safetensors": 1, "state/model.safetensors": 1, "state/model.optimizer-0.safetensors": 2}  # sizes in P


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="weights of the model")
    size = int(parser.parse_args().gigabytes * 2**30)
    with S3Server() as server:
        os.environ.update(server.environment)
        measure(server, size // (4 * LAYER))


def measure(server: S3Server, layers: int, layer: int = LAYER, quiet_seconds: float = 2.0) -> None:
    """Print the figures of a model of `layers` tensors with `layer` numbers each."""
    report("machine", machine())
    storage = open_storage(f"s3://{server.bucket}/bench")
    weights = {f"layers.{i}": torch.rand(layer) for i in range(max(1, layers))}
    unit = sum(tensor.nbytes for tensor in weights.values())
    memory = SnapshotMemory()
    report("weights P", f"{unit / 2**30:.2f} GiB")
    report("copy of 4 P, first save", f"{seconds(lambda: memory.fill(content(weights))):.2f} s")
    report("copy of 4 P, later saves", f"{seconds(lambda: memory.fill(content(weights))):.2f} s")
    files = memory.fill(content(weights))
    measure_save(storage, files, unit)
    measure_speed(storage, server, files["model.safetensors"].data)
    measure_steps(storage, files["model.safetensors"].data, quiet_seconds)
    measure_resume(storage, files["model.safetensors"].data, unit)


def content(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a checkpoint; the moments are as large as the weights."""
    return {
        name: {f"{i}.{key}": tensor for i in range(copies) for key, tensor in weights.items()}
        for name, copies in FILES.items()
    }


def measure_save(storage: Storage, files: dict[str, Any], unit: int) -> None:
    before = resident()
    reset_peak()
    took = seconds(lambda: [checkpoint.upload_file(storage, f"save/{name}", file.data) for name, file in files.items()])
    report("upload of 4 P, hashed", f"{took:.1f} s, {4 * unit / took / 2**20:.0f} MiB/s")
    report("peak over the snapshot", f"{(resident(peak=True) - before) / unit:.3f} P (bound: 1 P)")


def measure_speed(storage: Storage, server: S3Server, data: memoryview) -> None:
    client = boto3.session.Session().client("s3", endpoint_url=server.url)
    config = TransferConfig(max_concurrency=multipart.PARALLEL_PARTS, multipart_chunksize=multipart.PART_BYTES)

    def bare() -> None:
        body = multipart.Body(data)
        client.upload_fileobj(_Readable(body), server.bucket, "bare", Config=config)

    ours = lambda: checkpoint.upload_file(storage, "ours", data)  # noqa: E731
    pairs = [(seconds(bare), seconds(ours)) for _ in range(ROUNDS)]
    theirs, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    report("bare boto3 multipart, not hashed", f"{len(data) / theirs / 2**20:.0f} MiB/s")
    report("upload from memory, hashed", f"{len(data) / own / 2**20:.0f} MiB/s")
    ratios = [bare / mine for bare, mine in pairs]
    report("share of bare boto3", f"{statistics.median(ratios):.0%} (bound: 80%), rounds {_shown(ratios)}")


class _Readable:
    """Give boto the bytes that it asks for, as a file does."""

    def __init__(self, body: multipart.Body) -> None:
        self._body = body

    def read(self, size: int = -1) -> bytes:
        at = self._body.tell()
        block = bytes(self._body._data[at:] if size < 0 else self._body._data[at : at + size])
        self._body.seek(at + len(block))
        return block


def measure_steps(storage: Storage, data: memoryview, quiet_seconds: float) -> None:
    """Compare steps of about 16 ms without a save, during a save, and during as much work outside of Python."""
    quiet, during, outside = [], [], []
    for _ in range(ROUNDS):
        quiet += steps(lambda: time.sleep(quiet_seconds))
        during += steps(lambda: checkpoint.upload_file(storage, "steps", data))
        outside += steps(lambda: _hash_twice(data))
    base = statistics.median(quiet)
    for name, times in (("no save", quiet), ("a save", during), ("only hashing, which holds no lock", outside)):
        more = 1000 * (statistics.median(times) - base)
        slow = 1000 * (statistics.quantiles(times, n=20)[-1] - base)
        report(f"step during {name}", f"{1000 * base + more:.1f} ms ({more:+.1f}), 95% {slow:+.1f} ms")


def _hash_twice(data: memoryview) -> None:
    for _ in range(2):
        hashlib.sha256(data).digest()


def steps(work: Callable[[], object]) -> list[float]:
    """Return the durations of training steps while `work` runs in another thread."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(192, 192) for _ in range(24)))
    optimizer = torch.optim.AdamW(network.parameters())
    thread = threading.Thread(target=work)
    thread.start()
    times = []
    while thread.is_alive() or len(times) < 2:
        began = time.perf_counter()
        network(torch.ones(64, 192)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    thread.join()
    return times


def measure_resume(storage: Storage, data: memoryview, unit: int) -> None:
    expected = checkpoint.upload_file(storage, "resume", data)
    before = resident()
    reset_peak()
    took = seconds(lambda: checkpoint.read_tensors(storage, "resume", expected))
    report("read of 1 P, verified", f"{took:.1f} s, {unit / took / 2**20:.0f} MiB/s")
    report("peak of the read over its file", f"{(resident(peak=True) - before) / unit - 1:.3f} P")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def report(name: str, value: str) -> None:
    print(f"{name:40} {value}", flush=True)


def _shown(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.0%}" for ratio in ratios)


if __name__ == "__main__":
    main()
