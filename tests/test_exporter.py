"""A node's metrics: what its processes wrote, each once, and nothing of a run that has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray_node import until

from services.local import free_ports

WRITER = """
import sys
from genmodels.metrics import TrainingMetrics
job, loss = sys.argv[1:]
metrics = TrainingMetrics(job, "digits", "vae")
metrics.step(7, None)
metrics.step(8, float(loss))
metrics.evaluation({"step": 8, "loss": 1.0, "val_loss": 0.25})
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    port = free_ports(1)
    with subprocess.Popen([sys.executable, "-m", "services.exporter", "--port", str(port)]) as process:
        url = f"http://127.0.0.1:{port}/metrics"
        try:
            until(lambda: scrape(url) is not None, "the exporter answers")
            yield url
        finally:
            process.terminate()
    assert process.returncode == 0


def scrape(url: str) -> dict[tuple[str, str], float] | None:
    """(name, job) -> value"""
    try:
        text = httpx.get(url, trust_env=False).text
    except httpx.HTTPError:
        return None
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels.keys() == {"job", "model", "family"} for sample in samples)
    assert len(samples) == len({(sample.name, sample.labels["job"]) for sample in samples}), "each once"
    return {(sample.name, sample.labels["job"]): sample.value for sample in samples}


def test_series_come_and_go_with_their_run(url: str) -> None:
    assert scrape(url) == {}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, job, loss], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for job, loss in (("a-1", "0.5"), ("b-2", "nan"))
    ]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "written\n"
    found = scrape(url)
    assert found is not None
    assert found.pop(("genmodels_training_loss", "b-2")) != 0.5
    assert found == {
        ("genmodels_training_step", "a-1"): 8,
        ("genmodels_training_loss", "a-1"): 0.5,
        ("genmodels_training_val_loss", "a-1"): 0.25,
        ("genmodels_training_step", "b-2"): 8,
        ("genmodels_training_val_loss", "b-2"): 0.25,
    }
    writers[0].kill()
    writers[1].communicate("")
    writers[0].communicate()
    assert scrape(url) == {}


def test_without_an_exporter_nothing_is_written(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITER, "a-1", "0.5"],
        cwd=tmp_path, env=environment, input="", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("written\n", "", [])
