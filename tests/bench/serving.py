"""Measure the speed of the endpoints and of other implementations in one run on one machine: `make bench-serving`.

Text: the engine alone and over HTTP, against the uncached reference, nanoGPT's method (it reads the whole window again
for each token, https://github.com/karpathy/nanoGPT, model.py) and transformers' `generate` on a GPT-2 with the same
weights, after a check that the logits are equal. Images: the engine and HTTP against the bare decoder.
Each figure is the median of ROUNDS; all take turns within a round, so that a slow moment affects all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from genmodels.engine.image import answers
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import GenerateRequest
from genmodels.engine.loader import load
from genmodels.engine.text import completion
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.family import ImageInfo
from genmodels.models.minigpt import MiniGPT
from genmodels.registry.references import resolve_model
from genmodels.registry.store import Registry
from genmodels.sizing.memory import SERVED_ROWS
from genmodels.storage import Storage, open_storage
from services.cluster.ports import free_ports
from tests.support.published_models import publish
from tests.support.ray_cluster import ray_cluster  # sets up Ray's environment before Ray is imported

THREADS = 1
ROUNDS = 5
STREAMS = (1, 4, 16, 64)
PROMPT, TOKENS = 16, 100  # characters; transformers' GPT-2 cannot continue beyond block_size
LONG = 1500  # tokens: so many that the cost of the request itself is small
TEXT: dict[str, Any] = {  # GPT-2's architecture, as large as the model of jobs/quickstart.yaml
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "block_size": 128,
    "positions": "learned",
    "norm": "layer",
    "mlp": "gelu",
    "qk_norm": False,
    "tied_head": True,
    "bias": True,
}
IMAGES: dict[str, Any] = {"latent_dim": 32, "width": 32, "pictures": ImageInfo(channels=1, height=28, width=28)}
SIXTEEN = "O Romeo, Romeo! "
CLIENTS, PICTURES = 8, 64

console = Console(width=120)


def main() -> None:
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage((Path(folder) / "storage").as_uri())
        publish(storage, "play", "minigpt", **TEXT)
        publish(storage, "shapes", "vae", **IMAGES)
        publish(storage, "shapes", "vae", step=2, alias=None, **IMAGES)
        play, shapes = (load(storage, resolve_model(storage, name)) for name in ("play", "shapes"))
        assert isinstance(play, TextModel)
        assert isinstance(shapes, ImageModel)
        with endpoint(storage.url) as url:
            report(play, shapes, url, storage)


def report(play: TextModel, shapes: ImageModel, url: str, storage: Storage) -> None:
    assert isinstance(play.family, MiniGPT)
    gpt2 = equal_gpt2(play.family)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} thread for each computation, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"GPT-2 of {TEXT['n_embd']} x {TEXT['n_layer']}, {PROMPT} + {TOKENS} tokens, same weights, logits equal"
    )
    ways: dict[str, Callable[[int], float]] = {
        "genmodels engine": lambda n: engine(play, n),
        "genmodels HTTP, streamed": lambda n: asyncio.run(http_text(url, n))[0],
        "transformers generate": lambda n: huggingface(gpt2, n),
        "nanoGPT's generate": lambda n: nanogpt(play.family, n),
        "reference, one at a time": lambda n: reference(play.family, n),
    }
    cells: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in STREAMS}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("tokens per second", total=(ROUNDS + 1) * len(cells))
        for round in range(ROUNDS + 1):  # the first round is a warm-up
            for (way, n), samples in cells.items():
                rate = ways[way](n)
                if round:
                    samples.append(rate)
                bar.advance(task)
    table = Table("tokens/s, all streams together", *(f"{n} stream{'s' * (n > 1)}" for n in STREAMS))
    for way in ways:
        table.add_row(way, *(f"{statistics.median(cells[way, n]):,.0f}" for n in STREAMS))
    for way in list(ways)[2:]:
        ratios = [statistics.median(cells["genmodels engine", n]) / statistics.median(cells[way, n]) for n in STREAMS]
        table.add_row(f"engine / {way}", *(f"{ratio:.1f} x" for ratio in ratios))
    kept = [
        statistics.median(cells["genmodels HTTP, streamed", n]) / statistics.median(cells["genmodels engine", n])
        for n in STREAMS
    ]
    table.add_row("HTTP / engine", *(f"{ratio:.0%}" for ratio in kept))
    console.print(table)
    alone, served = (
        statistics.median(rates)
        for rates in zip(
            *((engine(play, 16, LONG), asyncio.run(http_text(url, 16, tokens=LONG))[0]) for _ in range(ROUNDS)),
            strict=True,
        )
    )
    console.print(
        f"16 streams of {LONG} tokens: engine {alone:,.0f}, HTTP {served:,.0f} tokens/s, {served / alone:.0%}"
    )

    table = Table("milliseconds", "p50", "p99", "worst", "n")
    _, first, gaps = asyncio.run(http_text(url, CLIENTS, repeat=10))
    empty, full = asyncio.run(http_empty(url)), asyncio.run(http_full(url))
    still, swapping = asyncio.run(http_swaps(url, storage, swaps=0)), asyncio.run(http_swaps(url, storage, swaps=20))
    for name, seconds in (
        (f"time to first character, {CLIENTS} clients", first),
        (f"between pieces, {CLIENTS} clients", gaps),
        ("an empty request (GET /healthz), 1 client", empty),
        ("429 while all slots and places to wait are taken", full),
        ("8 pictures, 2 clients, no swap", still),
        ("the same while its version is swapped 20 times", swapping),
    ):
        p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
        table.add_row(name, f"{p50:.1f}", f"{p99:.1f}", f"{max(seconds) * 1000:.1f}", str(len(seconds)))
    console.print(table)

    rates: dict[str, list[float]] = {"bare decoder": [], "engine": [], "HTTP": []}
    for round in range(ROUNDS + 1):
        results = bare(shapes), engine_images(shapes), asyncio.run(http_images(url))
        if round:
            for rate, measured in zip(results, rates.values(), strict=True):
                measured.append(rate)
    table = Table(f"images of 28 x 28, {PICTURES} a request", "images/s", "of the bare decoder")
    best = statistics.median(rates["bare decoder"])
    for name, measured in rates.items():
        table.add_row(name, f"{statistics.median(measured):,.0f}", f"{statistics.median(measured) / best:.0%}")
    console.print(table)


def equal_gpt2(family: MiniGPT) -> Any:
    """Build transformers' GPT-2 with this model's weights.

    Raises:
        AssertionError: the logits of the two models differ.
    """
    config = transformers.GPT2Config(
        vocab_size=family.data.vocab_size,
        n_positions=family.block_size,
        n_embd=TEXT["n_embd"],
        n_layer=TEXT["n_layer"],
        n_head=TEXT["n_head"],
        activation_function="gelu",
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    ours, body = family.network, gpt2.transformer
    with torch.no_grad():
        assert ours.position_embedding is not None
        body.wte.weight.copy_(ours.token_embedding.weight)
        body.wpe.weight.copy_(ours.position_embedding.weight)
        body.ln_f.load_state_dict(ours.norm.state_dict())
        for theirs, block in zip(body.h, ours.blocks, strict=True):
            theirs.ln_1.load_state_dict(block.attention_norm.state_dict())
            theirs.ln_2.load_state_dict(block.mlp_norm.state_dict())
            attention = block.attention
            parts = [attention.query.weight, attention.key.weight, attention.value.weight]
            theirs.attn.c_attn.weight.copy_(torch.cat(parts).T)  # GPT-2 has its matrices transposed
            theirs.attn.c_attn.bias.zero_()
            for target, source in (
                (theirs.attn.c_proj, attention.output),
                (theirs.mlp.c_fc, block.mlp.input),
                (theirs.mlp.c_proj, block.mlp.output),
            ):
                target.weight.copy_(source.weight.T)
                target.bias.copy_(source.bias)
        tokens = torch.arange(family.block_size).remainder(family.data.vocab_size)[None]
        torch.testing.assert_close(gpt2(tokens).logits, family.logits(tokens), atol=1e-4, rtol=1e-4)
    return gpt2


def engine(model: TextModel, n: int, tokens: int = TOKENS) -> float:
    request = CompletionRequest.model_validate({"prompt": SIXTEEN, "max_tokens": tokens, "seed": 1})
    unfinished = n

    def take(piece: TextDelta | Exception) -> None:
        nonlocal unfinished
        assert isinstance(piece, TextDelta), piece
        unfinished -= piece.finish_reason is not None

    started = time.perf_counter()
    for _ in range(n):
        completion.complete(model, request).start(take)
    while unfinished:
        model.batcher.step()
    return n * tokens / (time.perf_counter() - started)


def reference(family: MiniGPT, n: int) -> float:
    """Generate one sequence: one after the other is as fast for any n, so one is enough."""
    options = family.Request(max_tokens=TOKENS)
    started = time.perf_counter()
    assert len(list(family.generate(prompt_of(family), 1, options))) == TOKENS
    return TOKENS / (time.perf_counter() - started)


def nanogpt(family: MiniGPT, n: int) -> float:
    tokens = torch.tensor([prompt_of(family)] * n)
    started = time.perf_counter()
    for _ in range(TOKENS):
        logits = family.logits(tokens[:, -family.block_size :])[:, -1] / 0.8
        tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return n * TOKENS / (time.perf_counter() - started)


def huggingface(gpt2: Any, n: int) -> float:
    prompt: Tensor = torch.arange(PROMPT).repeat(n, 1)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": TOKENS, "pad_token_id": 0}
    started = time.perf_counter()
    generated = gpt2.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert generated.shape == (n, PROMPT + TOKENS)
    return n * TOKENS / (time.perf_counter() - started)


async def http_text(
    url: str, n: int, *, tokens: int = TOKENS, repeat: int = 1
) -> tuple[float, list[float], list[float]]:
    """Return tokens per second of n streaming clients, seconds to their first characters, and between later characters.

    The clients share the machine with the server that they measure, so they are simple: sockets, and no parsing.
    """
    body = {"model": "play", "prompt": SIXTEEN, "max_tokens": tokens, "seed": 1, "stream": True}
    first: list[float] = []
    gaps: list[float] = []

    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    sent = f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content

    async def one() -> None:
        before, received, is_first = time.perf_counter(), b"", True
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        while part := await reader.read(65536):
            received += part
            if b'"text":' in part:
                now = time.perf_counter()
                (first if is_first else gaps).append(now - before)
                before, is_first = now, False
        writer.close()
        assert b"[DONE]" in received, received[:500]

    started = time.perf_counter()
    for _ in range(repeat):
        await asyncio.gather(*(one() for _ in range(n)))
    return repeat * n * tokens / (time.perf_counter() - started), first, gaps


async def http_empty(url: str, times: int = 200) -> list[float]:
    seconds = []
    async with httpx.AsyncClient() as client:
        for _ in range(times):
            started = time.perf_counter()
            (await client.get(f"{url}/healthz")).raise_for_status()
            seconds.append(time.perf_counter() - started)
    return seconds


async def http_swaps(url: str, storage: Storage, *, swaps: int, seconds: float = 25.0) -> list[float]:
    """Measure the seconds of requests while their alias moves `swaps` times; none may fail."""
    body = {"model": "shapes", "prompt": "", "n": 8, "seed": 1}
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            (await client.post(f"{url}/v1/images/generations", json=body)).raise_for_status()
            taken.append(time.perf_counter() - started)

    async def move() -> None:
        for number in range(swaps):
            await asyncio.to_thread(Registry(storage).promote, "shapes", "production", 2 - number % 2, "a swap")
            await asyncio.sleep(seconds / swaps)

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(one(client), one(client), move())
    return taken


async def http_full(url: str) -> list[float]:
    """Measure the seconds to a refusal while all slots and all places in the queue are taken."""
    body = {"model": "play", "prompt": SIXTEEN, "max_tokens": 256, "n": 64, "seed": 1}
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=120) as client:
        taken = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for _ in range(4)]
        await asyncio.sleep(0.5)
        while not any(task.done() for task in taken):
            started = time.perf_counter()
            answer = await client.post(f"{url}/v1/completions", json=body)
            if answer.status_code == 429:
                seconds.append(time.perf_counter() - started)
        await asyncio.gather(*taken)
    return seconds


def bare(model: ImageModel, times: int = 10) -> float:
    family, options = model.family, model.family.Request()
    latents = family.sample_latents(PICTURES, 1, options)
    started = time.perf_counter()
    for _ in range(times):
        for rows in latents.split(SERVED_ROWS):
            family.decode(rows, options)
    return times * PICTURES / (time.perf_counter() - started)


def engine_images(model: ImageModel, times: int = 10) -> float:
    """Measure the engine, which also draws latents and makes PNG files."""
    request = GenerateRequest(n=PICTURES, seed=1)
    started = time.perf_counter()
    for _ in range(times):
        assert len(answers.answer(model, request).images) == PICTURES
    return times * PICTURES / (time.perf_counter() - started)


async def http_images(url: str, times: int = 10) -> float:
    body = {"model": "shapes", "prompt": "", "n": PICTURES, "seed": 1}
    async with httpx.AsyncClient(timeout=60) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(client.post(f"{url}/v1/images/generations", json=body) for _ in range(times)))
        seconds = time.perf_counter() - started
    assert all(len(answer.json()["data"]) == PICTURES for answer in answers)
    return times * PICTURES / seconds


def prompt_of(family: MiniGPT) -> Sequence[int]:
    return list(range(PROMPT))


@contextmanager
def endpoint(storage_url: str) -> Iterator[str]:
    """Serve the application on its own Ray cluster, without keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray import serve

        from services.cluster.ports import HOST
    from services.cluster.ray_start import serve_http_options
    from services.gateway.app import build
    from services.gateway.pool_config import Pool, Pools

    cluster = ray_cluster.__wrapped__()  # type: ignore[attr-defined]  # the fixture without pytest
    next(cluster)
    try:
        port = free_ports(1)
        serve.start(http_options=serve_http_options(HOST, port), logging_config={"log_level": "ERROR"})
        pools = Pools(pools=[Pool(name="default", torch_threads=THREADS)])
        serve.run(build(storage_url, auth=False, pools=pools), name="genmodels", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        next(cluster, None)


if __name__ == "__main__":
    sys.exit(main())
