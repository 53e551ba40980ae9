"""Measure training against nanoGPT's loop, Ray Train's cost, a second worker and a save: `make bench-training`.

All candidates take turns on one machine, with one thread each; what counts are the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels.data import open_dataset
from genmodels.storage import open_storage
from tests.bench.rounds import machine
from tests.bench.training import workers
from tests.bench.training.loops import RECIPES, SIZES, compare, model_spec

DATA = {"dataset": "tiny-shakespeare"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of training, in ratios.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of each turn; default: %(default)s")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many, from the smallest; default: all")
    parser.add_argument("--compile", action="store_true", help="with torch.compile too, which takes minutes")
    parser.add_argument("--data", type=Path, help="a text file; default: the dataset tiny-shakespeare")
    parser.add_argument("--without-ray", action="store_true", help="do not start a Ray cluster")
    parser.add_argument("--only", choices=("loop", "workers"), help="one half of the measurements")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data: dict[str, Any] = {"path": str(options.data.resolve())} if options.data else DATA
    print(f"{datetime.now(UTC).date()}: {machine()}")
    if options.only != "workers":
        compare_loops(data, options)
    if options.only != "loop":
        compare_workers(data, options)


def compare_loops(data: dict[str, Any], options: argparse.Namespace) -> None:
    dataset = open_dataset(model_spec(SIZES[0], next(iter(RECIPES)), data).data, None)
    print("width x layers / block x batch                 a step        speed (spread of the rounds)")
    for size in SIZES[: options.sizes]:
        for row in compare(size, dataset, data, options.rounds, options.steps, compiled=options.compile):
            print(row, flush=True)


def compare_workers(data: dict[str, Any], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        if not options.without_ray:
            _start_ray(environment)
        storage = open_storage(Path(folder).as_uri())
        rounds = max(1, options.rounds // 2)
        for row in workers.measure(storage, data, rounds, 5 * options.steps, with_ray=not options.without_ray):
            print(row, flush=True)


def _start_ray(environment: pytest.MonkeyPatch) -> None:
    """Start a cluster, and let the drivers find it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    environment.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


if __name__ == "__main__":
    main()
