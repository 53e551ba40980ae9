"""Measure where requests find their models: 1,000 models on 4 replicas that hold 100 each. `make bench-placement`.

    python -m tests.bench.placement [--serve] [--requests 3000]

The popularity of models follows Zipf's law. Each replica is a process with a real model host, which downloads, verifies
and warms up what requests name. The gateway's placement is compared with Serve's default (the less busy one of two
random replicas), and with the best that is possible: each replica has its share of the most popular models, always.
With `--serve` the replicas and both routers are those of Ray Serve.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from rich.console import Console
from rich.progress import track
from rich.table import Table

from genmodels.engine.image.requests import GenerateRequest
from genmodels.errors import RequestError
from genmodels.metrics import DIRECTORY, LOAD_SECONDS
from genmodels.registry.catalogue import CatalogueReader
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.replica_order import replicas_in_order
from tests.bench.rounds import machine
from tests.support.published_models import publish_copies

EXPONENT = 1.0  # of Zipf's law: the model of rank r gets a share proportional to r ** -EXPONENT
CLIENTS = 8
REQUEST = GenerateRequest(seed=1)

Choose = Callable[[str, dict[str, int]], str]  # a replica, by the model and the requests in progress
Ask = Callable[[str], Awaitable[Any]]

console = Console(width=120)


@dataclass
class Figures:
    seconds: list[float] = field(default_factory=list)  # of each request
    loads: float = 0.0
    duration: float = 0.0

    def row(self) -> tuple[str, ...]:
        p50, p99 = np.quantile(self.seconds, (0.5, 0.99)) * 1000
        hits = 1 - self.loads / len(self.seconds)
        rates = (len(self.seconds) / self.duration, self.loads / self.duration)
        return f"{hits:.1%}", f"{p50:.0f} ms", f"{p99:.0f} ms", *(f"{rate:.1f}" for rate in rates)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true", help="run the replicas and the routers in Ray Serve")
    parser.add_argument("--requests", type=int, default=3000, help="as many come before, and are not measured")
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--holds", type=int, default=100, help="models that fit into the memory of a replica")
    options = parser.parse_args(arguments)
    ways, requests = serve_ways if options.serve else plain_ways, options.requests
    popularity = np.arange(1, options.models + 1) ** -EXPONENT
    popularity /= popularity.sum()
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage((Path(folder) / "storage").as_uri())
        names = publish_copies(storage, options.models)
        os.environ[DIRECTORY] = folder
        table = Table("placement", "hit rate", "p50", "p99", "requests/s", "loads/s")
        for title, way in ways(storage.url, memory_for(storage, options.holds), options.replicas).items():
            order = iter(random.Random(1).choices(names, popularity, k=2 * requests))
            with way() as ask:
                table.add_row(title, *asyncio.run(measure(ask, order, requests, title)).row())
    best = popularity[: options.replicas * options.holds].sum()
    table.add_row("the best possible", f"{best:.1%}", "", "", "", "")
    console.print(
        f"{machine()}; {options.models} models, {options.replicas} replicas that hold {options.holds} each, {requests} "
        f" requests of {CLIENTS} clients, Zipf's law with exponent {EXPONENT}"
    )
    console.print(table)


async def measure(ask: Ask, order: Iterator[str], requests: int, title: str) -> Figures:
    await work(ask, list(islice(order, requests)), title, Figures())
    figures, loads, started = Figures(), loads_so_far(), time.monotonic()
    await work(ask, list(islice(order, requests)), title, figures)
    figures.duration, figures.loads = time.monotonic() - started, loads_so_far() - loads
    return figures


async def work(ask: Ask, names: list[str], title: str, figures: Figures) -> None:
    """Send requests of CLIENTS clients, which each wait for an answer before the next request."""
    requests = iter(track(names, title, console=console, transient=True))

    async def client() -> None:
        for name in requests:
            started = time.monotonic()
            answer = await ask(name)
            assert not isinstance(answer, RequestError), answer
            figures.seconds.append(time.monotonic() - started)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def loads_so_far() -> float:
    """Return how many models all processes have loaded."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, os.environ[DIRECTORY])
    (name,) = {f"{family.name}_count" for family in LOAD_SECONDS.collect()}
    return sum(sample.value for family in registry.collect() for sample in family.samples if sample.name == name)


def memory_for(storage: Storage, models: int) -> int:
    """Return the budget in which so many models fit while another one is read."""
    catalogue = CatalogueReader(storage)
    catalogue.refresh()
    summary = next(iter(catalogue.get(catalogue.models()[0]).versions.values()))
    return models * summary.serving.memory + summary.bytes


# Plain processes


def plain_ways(url: str, memory: int, replicas: int) -> dict[str, Callable[[], Any]]:
    chooses: dict[str, Choose] = {
        "random": lambda _, in_progress: min(
            random.sample(list(in_progress), min(2, len(in_progress))), key=in_progress.__getitem__
        ),
        "placed": lambda model, in_progress: replicas_in_order(model, in_progress)[0],
    }
    return {title: partial(plain, url, memory, replicas, choose) for title, choose in chooses.items()}


@contextmanager
def plain(url: str, memory: int, count: int, choose: Choose) -> Iterator[Ask]:
    with ExitStack() as stack:
        replicas = {f"replica-{i}": stack.enter_context(Replica(url, memory)) for i in range(count)}
        in_progress = dict.fromkeys(replicas, 0)

        async def ask(model: str) -> Any:
            name = choose(model, in_progress)
            in_progress[name] += 1
            try:
                return await replicas[name].ask(model)
            finally:
                in_progress[name] -= 1

        yield ask


class Replica:
    """A model host in a process of its own."""

    def __init__(self, url: str, memory: int) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._process = multiprocessing.get_context("spawn").Process(target=answer_all, args=(other, url, memory))
        self._process.start()

    def __enter__(self) -> Replica:
        assert self._pipe.recv() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    async def ask(self, model: str) -> Any:
        if not self._answers:
            asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)
        number = random.getrandbits(62)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._pipe.send((number, model))
        return await answer

    def _receive(self) -> None:
        number, answer = self._pipe.recv()
        self._answers.pop(number).set_result(answer)


def answer_all(pipe: Connection, url: str, memory: int) -> None:
    host = ModelHost(url, memory=memory)
    pipe.send("ready")

    async def answer(number: int, model: str) -> None:
        pipe.send((number, await host.answer(model, REQUEST)))

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(answer(*await asyncio.to_thread(pipe.recv)))

    asyncio.run(run())


# Ray Serve


def serve_ways(url: str, memory: int, replicas: int) -> dict[str, Callable[[], Any]]:
    from services.cluster.ray_start import local_environment

    os.environ |= local_environment()  # once, before Ray is imported: Ray keeps the first token
    routers = {
        "Serve's default": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
        "placed": "services.gateway.router:ModelRouter",
    }
    return {title: partial(served, url, memory, replicas, router) for title, router in routers.items()}


@contextmanager
def served(url: str, memory: int, count: int, router: str) -> Iterator[Ask]:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from services.gateway.app import HandlePool, Host

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        config = RequestRouterConfig(request_router_class=router)
        host = Host.options(num_replicas=count, request_router_config=config)  # type: ignore[attr-defined]
        handle = serve.run(host.bind(url, memory=memory), name="bench", route_prefix=None)
        pools: list[HandlePool] = []

        async def ask(model: str) -> Any:
            if not pools:
                pools.append(HandlePool(handle))  # in the loop of its requests
            return await pools[0].answer(model, REQUEST)

        yield ask
    finally:
        ray.shutdown()  # with Serve: its own shutdown would use the loop of the requests, which is closed


if __name__ == "__main__":
    main()
