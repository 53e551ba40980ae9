"""Enter every benchmark of `tests/bench` with tiny sizes: what only people start does not rot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from genmodels.engine.loader import load
from genmodels.metrics import DIRECTORY
from genmodels.registry.references import resolve_model
from genmodels.storage import open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from tests.bench import checkpoint, placement, rounds
from tests.bench.scale import __main__ as scale
from tests.bench.serving import __main__ as serving
from tests.bench.serving import bare
from tests.bench.serving.sizes import Sizes
from tests.bench.training import __main__ as training
from tests.bench.training import loops
from tests.bench.training.reference import GPT2, Trainer
from tests.support.asgi_server import served
from tests.support.paths import ROOT
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import make_data

TINY = Sizes(
    rounds=1,
    streams=(1, 2),
    tokens=3,
    texts=2,
    long_tokens=4,
    empty=2,
    first=1,
    pictures=2,
    picture_requests=1,
    refusals=0,
    swaps=1,
    swap_seconds=0.1,
)
ENTERED = {"checkpoint", "placement", "scale", "serving", "training"}


@contextmanager
def endpoint(url: str) -> Iterator[str]:
    """Serve the gateway's application over a model host in this process."""
    with served(create_app(ModelHost(url))) as address:
        yield address


@contextmanager
def bare_server(url: str) -> Iterator[str]:
    storage = open_storage(url)
    model: Any = load(storage, resolve_model(storage, "play"))
    model.start(1)
    with served(bare.create_app(model)) as address:
        yield address
    model.close()


@pytest.mark.slow
def test_the_bench_of_serving_prints_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=150, record=True)
    monkeypatch.setattr(serving, "console", console)
    serving.measure(TINY, endpoint, bare_server, list(serving.PARTS))
    text = console.export_text()
    for row in ("HTTP, streamed / engine", "HTTP, streamed / bare FastAPI server", "engine / nanoGPT's generate"):
        assert row in text
    for row in ("first character, 8 clients", "an empty request (GET", "engine, PNG files", "the same with 1 swaps"):
        assert row in text
    assert text.startswith(rounds.machine().partition(", load")[0])


@pytest.mark.slow
def test_the_bench_of_placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))  # the benchmark sets another one: here it is taken back
    placement.main(["--models", "4", "--replicas", "1", "--holds", "2", "--requests", "4"])


@pytest.fixture
def server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Return the S3 server of all tests, as a benchmark finds its own."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.mark.slow
def test_the_bench_of_a_checkpoint(server: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.measure(server, 1, layer=2**12, quiet_seconds=0.05)
    assert "share of bare boto3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "figure", [pytest.param(name, marks=[pytest.mark.long] * (name == "dispatch")) for name in scale.FIGURES]
)
def test_the_bench_of_scale(server: S3Server, figure: str) -> None:
    sizes = scale.FIGURES[figure][1]
    assert scale.measure(server, [figure], min(sizes))


@pytest.mark.slow
def test_the_bench_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(make_data(tmp_path) / "play.txt")]
    training.main(["--rounds", "1", "--steps", "1", "--sizes", "1", "--only", "loop", *data])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row for row in rows if not re.search(r"\d ms +\d+\.\d\d \(", row)] == []
    assert len(rows) == 1 + len(loops.RECIPES)


def test_the_reference_of_training_learns() -> None:
    torch.manual_seed(0)
    text = np.arange(2000, dtype=np.uint16) % 11
    trainer = Trainer(text, GPT2(11, 16, 1, 2, 8), 8, 16)
    first = trainer.model(*trainer.batch).item()
    trainer.steps(60)
    assert trainer.model(*trainer.batch).item() < 0.98 * first


def test_every_bench_is_entered_here() -> None:
    folder = ROOT / "tests" / "bench"
    own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__main__.py")}
    assert own == ENTERED | {"rounds"}


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    asked: list[str] = []

    def way(name: str) -> float:
        asked.append(name)
        return float(len(asked))

    figures = rounds.interleaved({name: lambda name=name: way(name) for name in "ab"}, 2)
    assert asked == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert rounds.ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == "1.00 (0.50 to 3.00)"
