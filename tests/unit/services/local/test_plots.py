"""Test the plots of a run."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from genmodels.spec.sections import ModelSpec
from services.local import plots
from tests.support.tiny_jobs import job


def spec(family: str) -> ModelSpec:
    data = "shakespeare" if family == "minigpt" else "digits"
    entry = {"name": "one", "model": {"family": family}, "data": {"dataset": data}, "train": {"max_steps": 9}}
    return job("tiny", entry).models[0]


def drawn(monkeypatch: pytest.MonkeyPatch, family: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the data of each panel: title -> name of a line -> steps and values."""
    panels = {}
    draw_panel = plots._draw_panel

    def watch(axis: Axes, title: str, lines: Any) -> None:
        panels[title] = dict(lines)
        draw_panel(axis, title, lines)

    monkeypatch.setattr(plots, "_draw_panel", watch)
    picture = plots.draw(spec(family), rows)
    if picture:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
        assert min(pixels.shape) > 200
        assert len(np.unique(pixels)) > 20  # something is on it
    return panels


def test_a_gan_shows_its_game(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "discriminator_loss": 0.7, "generator_loss": 0.7, "discriminator_accuracy_real": 0.5 + 1 / step}
        for step in range(1, 9)
    ]
    rows[3] |= {"val_frechet": 90.0, "val_frechet_floor": 0.1}
    rows[7] |= {"val_frechet": 0.5, "val_frechet_floor": 0.1}
    panels = drawn(monkeypatch, "gan", rows)
    assert set(panels["loss"]) == {"discriminator_loss", "generator_loss"}
    assert panels["tracked"] == {"discriminator_accuracy_real": (list(range(1, 9)), [0.5 + 1 / s for s in range(1, 9)])}
    assert panels["val_frechet"] == {"val_frechet": ([4, 8], [90.0, 0.5]), "val_frechet_floor": ([4, 8], [0.1, 0.1])}
    assert set(panels) == {"loss", "tracked", "val_frechet"}


def test_a_text_model_shows_both_losses_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 3 / step} for step in range(1, 9)]
    for row in rows[1::2]:
        row |= {"val_loss": 3.1 / row["step"], "val_bits_per_char": 4.5 / row["step"]}
    panels = drawn(monkeypatch, "minigpt", rows)
    assert set(panels["loss"]) == {"loss", "val_loss"}
    assert set(panels) == {"loss", "val_bits_per_char"}


def test_what_is_not_finite_stops_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    assert list(drawn(monkeypatch, "vae", rows)) == ["loss"]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}]])
def test_one_point_is_no_curve(rows: list[dict[str, Any]]) -> None:
    assert plots.draw(spec("vae"), rows) is None
