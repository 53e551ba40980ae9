"""Measure the speed of the endpoints and of other implementations in one run on one machine: `make bench-serving`.

Text: the engine alone; the endpoint over HTTP; a bare FastAPI server over the same engine; transformers' `generate` on
a GPT-2 with the same weights, after a check that the logits are equal (with the extra `bench`); nanoGPT's method; the
uncached reference. Images: the engine and HTTP against the bare decoder. All take turns within a round, and a ratio is
the median of the rounds' ratios, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from genmodels.engine.image.model import ImageModel
from genmodels.engine.loader import load
from genmodels.engine.text.model import TextModel
from genmodels.models.minigpt import MiniGPT
from genmodels.registry.references import resolve_model
from genmodels.storage import Storage, open_storage
from tests.bench.rounds import interleaved, machine, ratio
from tests.bench.serving import clients, images, servers, text
from tests.bench.serving.sizes import Sizes
from tests.support.published_models import publish

CLIENTS = 8
ENGINE, HTTP, BARE, TRANSFORMERS = "engine", "HTTP, streamed", "bare FastAPI server", "transformers generate"
NANOGPT, REFERENCE = "nanoGPT's generate", "reference, one at a time"

KeyT = TypeVar("KeyT")
Server = Callable[[str], AbstractContextManager[str]]  # storage URL -> URL of a running server

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of serving.")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts only")
    measure(Sizes(), servers.endpoint, servers.bare_server, parser.parse_args().only)


def measure(sizes: Sizes, endpoint: Server, bare_server: Server, only: list[str]) -> None:
    """Print the tables of some parts."""
    torch.set_num_threads(servers.THREADS)
    console.print(f"{machine()}; {servers.THREADS} thread for each computation, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        storage = open_storage((Path(folder) / "storage").as_uri())
        publish(storage, "play", "minigpt", **text.GPT2)
        publish(storage, "shapes", "vae", **images.VAE)
        publish(storage, "shapes", "vae", step=2, alias=None, **images.VAE)
        url, bare_url = (stack.enter_context(server(storage.url)) for server in (endpoint, bare_server))
        for name in only:
            PARTS[name](sizes, storage, url, bare_url)
    console.print(f"at the end: {machine()}")


def measure_text(sizes: Sizes, storage: Storage, url: str, bare_url: str) -> None:
    model = load(storage, resolve_model(storage, "play"), text.OF_A_HOST)
    assert isinstance(model, TextModel)
    assert isinstance(model.family, MiniGPT)
    ways: dict[str, Callable[[int, int, int], float]] = {
        ENGINE: partial(text.engine, model),
        HTTP: lambda n, tokens, batches: asyncio.run(clients.text(url, n, tokens, batches)).rate,
        BARE: lambda n, tokens, batches: asyncio.run(clients.text(bare_url, n, tokens, batches)).rate,
    }
    family, others = model.family, list[str]()
    if gpt2 := text.equal_gpt2(family):
        ways[TRANSFORMERS] = lambda n, tokens, _: text.huggingface(gpt2, n, tokens)
    ways[NANOGPT] = lambda n, tokens, _: text.nanogpt(family, n, tokens)
    ways[REFERENCE] = lambda n, tokens, _: text.reference(family, tokens)
    cells = {
        (way, n): partial(do, n, sizes.tokens, sizes.batches(n)) for n in sizes.streams for way, do in ways.items()
    }
    long = {(way, 0): partial(ways[way], 16, sizes.long_tokens, 1) for way in (ENGINE, HTTP, BARE)}
    figures = _in_rounds("tokens per second", cells | long, sizes.rounds)
    titles = [f"{n} stream{'s' * (n > 1)}" for n in sizes.streams]
    table = Table(f"tokens/s, {text.PROMPT} + {sizes.tokens}, all streams together", *titles)
    for way in ways:
        table.add_row(way, *(_median(figures[way, n]) for n in sizes.streams))
    others = [way for way in ways if way not in (ENGINE, HTTP, BARE)]
    for ours, theirs in [(HTTP, ENGINE), (HTTP, BARE), (BARE, ENGINE), *((ENGINE, way) for way in others)]:
        ratios = (ratio(figures[ours, n], figures[theirs, n]) for n in sizes.streams)
        table.add_row(f"{ours} / {theirs}", *ratios)
    console.print(table)
    console.print(
        f"16 streams of {sizes.long_tokens} tokens: engine {_median(figures[ENGINE, 0])} tokens/s, HTTP "
        f"{_median(figures[HTTP, 0])}: {ratio(figures[HTTP, 0], figures[ENGINE, 0])} of the engine, "
        f"{ratio(figures[HTTP, 0], figures[BARE, 0])} of the bare server"
    )


def measure_latency(sizes: Sizes, storage: Storage, url: str, bare_url: str) -> None:
    rows: dict[str, list[float]] = {}
    for name, server in (("", url), (" of the bare server", bare_url)):
        stream = asyncio.run(clients.text(server, CLIENTS, sizes.tokens, sizes.first))
        rows[f"first character{name}, {CLIENTS} clients"] = stream.first
        rows[f"between parts{name}, {CLIENTS} clients"] = stream.gaps
        rows[f"an empty request{name} (GET /healthz), 1 client"] = asyncio.run(clients.empty(server, sizes.empty))
    if sizes.refusals:
        rows["429 while all places are taken"] = asyncio.run(clients.refusals(url, sizes.refusals))
    _print_milliseconds(rows)


def measure_swaps(sizes: Sizes, storage: Storage, url: str, bare_url: str) -> None:
    seconds = sizes.swap_seconds
    _print_milliseconds(
        {
            "8 pictures, 2 clients, no swap": asyncio.run(clients.swaps(url, storage, 0, seconds)),
            f"the same with {sizes.swaps} swaps": asyncio.run(clients.swaps(url, storage, sizes.swaps, seconds)),
        }
    )


def measure_images(sizes: Sizes, storage: Storage, url: str, bare_url: str) -> None:
    model = load(storage, resolve_model(storage, "shapes"))
    assert isinstance(model, ImageModel)
    count = sizes.pictures, sizes.picture_requests
    ways = {
        "bare decoder": lambda: images.bare(model, *count),
        "engine, PNG files": lambda: images.engine(model, *count),
        "HTTP": lambda: asyncio.run(clients.images(url, *count)),
    }
    figures = _in_rounds("images per second", ways, sizes.rounds)
    table = Table(f"images of 28 x 28, {sizes.pictures} a request", "images/s", "of the bare decoder")
    for name, rates in figures.items():
        table.add_row(name, _median(rates), ratio(rates, figures["bare decoder"]))
    console.print(table)


PARTS: dict[str, Callable[[Sizes, Storage, str, str], None]] = {
    "text": measure_text,
    "latency": measure_latency,
    "images": measure_images,
    "swaps": measure_swaps,
}


def _in_rounds(title: str, ways: Mapping[KeyT, Callable[[], float]], rounds: int) -> dict[KeyT, list[float]]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=(rounds + 1) * len(ways))
        return interleaved(ways, rounds, lambda: bar.advance(task))


def _median(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f}"


def _print_milliseconds(rows: dict[str, list[float]]) -> None:
    table = Table("milliseconds", "p50", "p99", "worst", "n")
    for name, seconds in rows.items():
        p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
        table.add_row(name, f"{p50:.1f}", f"{p99:.1f}", f"{max(seconds) * 1000:.1f}", str(len(seconds)))
    console.print(table)


if __name__ == "__main__":
    main()
