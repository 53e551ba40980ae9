"""`make bench-training` starts, and its reference learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tests.bench.training.reference import GPT2, Trainer
from tests.support.paths import ROOT
from tests.support.tiny_jobs import make_data


def test_it_prints_ratios_of_every_recipe(tmp_path: Path) -> None:
    make_data(tmp_path)
    arguments = [
        "--rounds",
        "1",
        "--steps",
        "1",
        "--sizes",
        "1",
        "--only",
        "loop",
        "--data",
        str(tmp_path / "play.txt"),
    ]
    command = [sys.executable, "-m", "tests.bench.training", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=120)
    first, *rows = output.stdout.splitlines()
    assert "cores" in first
    assert "load" in first
    assert len([row for row in rows if re.search(r"\d ms +\d+\.\d\d x", row)]) == 5


def test_the_reference_learns() -> None:
    torch.manual_seed(0)
    text = np.arange(2000, dtype=np.uint16) % 11
    trainer = Trainer(text, GPT2(11, 16, 1, 2, 8), 8, 16)
    first = float(trainer.model(*trainer.batch).detach())
    trainer.steps(60)
    assert float(trainer.model(*trainer.batch).detach()) < 0.98 * first
