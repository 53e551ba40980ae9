"""Provide tiny models and data, one for each family, that train in a second, with specs as users write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from genmodels import models
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec

SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"latent_dim": 4, "noise_std": 0.2, "density_components": 2},
    "vae": {"latent_dim": 4, "density_components": 2},
    "gan": {"latent_dim": 8},
    "minigpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "block_size": 16, "dropout": 0.1},
}


def model(folder: Path, family: str, name: str | None = None, **train: Any) -> dict[str, Any]:
    """Return one entry of a job's `models`, on data that `make_data` wrote to `folder`."""
    kind = models.load(family).kind
    data = (
        {"path": str(folder / "play.txt")} if kind == "text" else {"path": str(folder / "pictures"), "image_size": 16}
    )
    settings = {
        "max_steps": 6,
        "batch_size": 12,
        "eval_every": 3,
        "save_every": 3,
        "log_every": 1,
        "ema": 0.9,
        "schedule": "linear",
    }
    return {
        "name": name or family,
        "model": {"family": family, **SETTINGS[family]},
        "data": data,
        "train": settings | train,
    }


def job(name: str, *entries: dict[str, Any]) -> JobSpec:
    return parse_spec(yaml.safe_dump({"name": name, "models": list(entries)}).encode(), "tiny.yaml")


def make_data(folder: Path) -> Path:
    """Write a short play, and a folder of small grey pictures with something to learn in them."""
    lines = [
        f"SPEAKER {i % 7}:\nWhat light {'soft ' * (i % 5)}through yonder window {i % 11} breaks?\n\n"
        for i in range(120)
    ]
    (folder / "play.txt").write_text("".join(lines))
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(80):
        picture = np.zeros((16, 16), np.uint8)
        row, column = random.integers(2, 9, 2)
        picture[row : row + 5, column : column + 5] = 255
        Image.fromarray(picture).save(folder / "pictures" / f"{i:03}.png")
    return folder
