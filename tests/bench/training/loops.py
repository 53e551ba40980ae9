"""Our training loop against the reference: seconds of a step, in turns, one thread each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml

from genmodels.checkpoint import Snapshot
from genmodels.data import Dataset
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.training.attempt import build
from genmodels.training.group import Group
from genmodels.training.loop import train
from tests.bench.rounds import interleaved, ratio
from tests.bench.training.reference import GPT2, Trainer

SKIPPED = 5  # first steps of a round: memory is new to them


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    block_size: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.width} x {self.layers} / {self.block_size} x {self.batch_size}"


SIZES = [Size(64, 4, 4, 32, 16), Size(128, 6, 4, 64, 32), Size(96, 3, 6, 128, 24)]
PLAIN = {"positions": "learned", "norm": "layer", "mlp": "gelu", "qk_norm": False, "tied_head": True}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain settings": (PLAIN, {}),
    "modern, AdamW": ({}, {}),
    "modern, Muon": ({}, {"optimizer": "muon"}),
    "modern, Muon, EMA": ({}, {"optimizer": "muon", "ema": 0.99}),
}
COMPILED = {"modern, Muon, compiled": ({}, {"optimizer": "muon", "compile": True})}


class Stopwatch:
    """A recorder that notes the time after each step, and asks for the end after some steps."""

    def __init__(self, count: int) -> None:
        self.count, self.times = count, [time.perf_counter()]

    def report_progress(self, phase: str, step: int, loss: float | None = None) -> None:
        if phase == "training":
            self.times.append(time.perf_counter())

    def should_stop(self) -> bool:
        return len(self.times) >= self.count

    def log(self, row: dict[str, Any]) -> None: ...
    def sample(self, step: int, name: str, data: bytes) -> None: ...
    def save(self, step: int, take: Callable[[], Snapshot]) -> None: ...

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def job_spec(size: Size, recipe: str, data: dict[str, Any], name: str = "bench", **settings: Any) -> JobSpec:
    """Return a job of one model, `bench`.

    Args:
        settings: of the `train` section; `scaling` is its own section.
    """
    model, train_settings = (RECIPES | COMPILED)[recipe]
    model = model | {"family": "minigpt", "n_embd": size.width, "n_layer": size.layers, "n_head": size.heads}
    far = 10**6
    numbers = {"max_steps": far, "eval_every": far, "save_every": far, "clip_norm": 1.0, "weight_decay": 0.1}
    entry = {
        "name": "bench",
        "model": model | {"block_size": size.block_size},
        "data": data,
        "scaling": settings.pop("scaling", {}),
        "train": numbers | {"batch_size": size.batch_size} | train_settings | settings,
    }
    return parse_spec(yaml.safe_dump({"name": name, "models": [entry]}).encode(), "bench")


def model_spec(size: Size, recipe: str, data: dict[str, Any]) -> ModelSpec:
    """Return a spec whose run does not end, evaluate or save by itself."""
    return job_spec(size, recipe, data).models[0]


def our_steps(spec: ModelSpec, dataset: Dataset, count: int) -> list[float]:
    """Train for some steps; return the seconds of each."""
    torch.manual_seed(0)
    family, averaged = build(spec, dataset), build(spec, dataset)
    stopwatch = Stopwatch(count)
    train(spec, family, averaged, dataset, Group(), stopwatch)
    return stopwatch.seconds()


def candidates(size: Size, dataset: Dataset, data: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """Return, by name, what takes a number of steps and returns the seconds of each; the reference is the first."""
    tokens = _tokens(dataset)
    network = GPT2(dataset.info.vocab_size, size.width, size.layers, size.heads, size.block_size)
    specs = {name: model_spec(size, name, data) for name in RECIPES | (COMPILED if compiled else {})}

    def ours(spec: ModelSpec) -> Callable[[int], list[float]]:
        return lambda count: our_steps(spec, dataset, count)

    reference = Trainer(tokens, network, size.block_size, size.batch_size).steps
    return {"reference (nanoGPT's loop)": reference} | {name: ours(spec) for name, spec in specs.items()}


def compare(
    size: Size, dataset: Dataset, data: dict[str, Any], rounds: int, steps: int, compiled: bool
) -> Iterator[str]:
    """Yield one row for each candidate: milliseconds of a step, and speed over the reference's with its spread."""
    takers = candidates(size, dataset, data, compiled)
    reference = next(iter(takers))

    def median_step(take: Callable[[int], list[float]]) -> float:
        return statistics.median(take(steps + SKIPPED)[SKIPPED:])

    times = interleaved({name: partial(median_step, take) for name, take in takers.items()}, rounds)
    for name, seconds in times.items():
        speed = ratio(times[reference], seconds)
        yield f"{size!s:20} {name:28} {1000 * min(seconds):8.1f} ms   {speed}"


def _tokens(dataset: Dataset) -> np.ndarray:
    """Return the tokens of the training split, consecutive."""
    split = dataset.split("train", 64)
    windows = split.take(np.arange(len(split)), np.zeros(len(split), np.int64))["tokens"]
    return windows.reshape(-1).astype(np.uint16)
