"""Test that a new family is one file: this file is enough to specify, train, publish and serve it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from genmodels import models
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.spec.json_schema import json_schema
from genmodels.spec.parse import parse_spec
from genmodels.storage import open_storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.local.platform import submit
from services.train.publish import publish_run
from tests.support.asgi_server import served
from tests.support.paths import ROOT
from tests.support.tiny_jobs import make_data

SPEC = """
name: try-flow
models:
- name: squares
  model: {family: flow, width: 64}
  data: {path: PATH, image_size: 16}
  train: {max_steps: 60, batch_size: 16, eval_every: 20, save_every: 20, learning_rate: 0.003, ema: 0.9}
"""


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the folder with the file `flow.py` behind `genmodels/models/`."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(ROOT / "tests/support/families")])


def test_a_family_is_one_file(flow: None, tmp_path: Path) -> None:
    assert "flow" in models.names()
    assert "flow" in str(json_schema())
    storage = open_storage((tmp_path / "storage").as_uri())
    data = make_data(tmp_path)
    spec = parse_spec(SPEC.replace("PATH", str(data / "pictures")).encode(), "flow.yaml")
    job = submit(storage, spec)
    run = Run(storage, job, "squares")

    assert run_attempt(storage, job, "squares", 1, Group())
    losses = [row["val_loss"] for row in metric_rows(run) if "val_loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert {key.rpartition("/")[2] for _, key in run.samples()} == {"samples.png"}

    result = publish_run(run, spec.models[0], 1)
    assert (result.outcome, result.version) == ("succeeded", 1)

    with served(create_app(ModelHost(storage.url))) as url, httpx.Client(base_url=url, timeout=60) as client:
        listed = client.get("/v1/models/squares").json()
        assert (listed["family"], listed["verbs"]) == ("flow", ["decode", "generate", "interpolate"])
        body = {"model": "squares", "n": 2, "seed": 7, "steps": 5}
        first, again = (client.post("/v1/images/generations", json=body).json()["data"] for _ in range(2))
        assert first == again
        assert [image.size for image in map(opened, first)] == [(16, 16), (16, 16)]
        assert first[0] != first[1]
        latents = {"latents": [[0.0] * 256], "steps": 2}
        assert client.post("/v1/models/squares/decode", json=latents).status_code == 200
        refusal = client.post("/v1/images/generations", json={**body, "steps": 0})
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "steps")


def opened(answer: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["b64_json"])))
