"""Pictures above the memory budget stay in their files: the same bits, and few of them in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genmodels.data import DataConfig, ImageData, images, open_dataset, uploads
from genmodels.data.stored_images import StoredImages
from genmodels.errors import DataError
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from services.local.platform import submit
from tests.support.tiny_jobs import job, model

COUNT, SIDE = 60, 48


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "photos" / f"class-{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (50, 60, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (images, uploads):
        monkeypatch.setattr(module, "IN_MEMORY", 0)


def assert_equal(now: ImageData, later: ImageData) -> None:
    assert (now.digest, now.info, now.notes) == (later.digest, later.info, later.notes)
    random = np.random.default_rng(1)
    for name in ("train", "val"):
        n = len(now.split(name))
        assert len(later.split(name)) == n
        index = random.integers(n, size=9)
        mine, theirs = (data.split(name).take(index, np.zeros_like(index)) for data in (now, later))
        assert np.array_equal(mine["images"], theirs["images"])
        assert np.array_equal(mine["labels"], theirs["labels"])
        whole, stored = (data.arrays(name)["images"] for data in (now, later))
        assert isinstance(stored, StoredImages)
        assert stored.shape == whole.shape
        assert np.array_equal(stored[3], whole[3])
        assert np.array_equal(stored[1:4], whole[1:4])
        assert np.array_equal(stored.astype(np.float32), whole.astype(np.float32))


def test_pictures_of_a_folder_are_decoded_when_they_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(folder), image_size=SIDE)
    now = open_dataset(config)
    without_memory(monkeypatch)
    later = open_dataset(config)
    assert isinstance(now, ImageData)
    assert isinstance(later, ImageData)
    assert_equal(now, later)

    decoded: list[Path] = []
    fill = images._fill
    monkeypatch.setattr(images, "_fill", lambda path, target: (decoded.append(path), fill(path, target))[1])
    later.split("train").take(np.array([5, 2, 5]), np.zeros(3, np.int64))
    assert len(decoded) == 3
    decoded[0].write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 3 pictures cannot be read"):
        later.split("train").take(np.array([5, 2, 7]), np.zeros(3, np.int64))


def test_added_pictures_are_mapped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = open_storage(f"file://{tmp_path}/storage")
    uploads.add(storage, "photos", folder, SIDE)
    config = DataConfig.model_validate({"dataset": "photos"}, context={"datasets": {"photos": "image"}})
    now = open_dataset(config, storage)
    without_memory(monkeypatch)
    tracemalloc.start()
    later = open_dataset(config, storage)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < COUNT * 3 * SIDE**2 / 2  # no picture
    assert isinstance(now, ImageData)
    assert isinstance(later, ImageData)
    assert_equal(now, later)


@pytest.mark.slow
def test_training_has_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"file://{tmp_path}/storage")
    entry = model(tmp_path, "autoencoder", max_steps=2, save_every=2, eval_every=2)
    entry["data"] = {"path": str(folder), "image_size": 16}
    files = []
    for name in ("now", "later"):
        run_attempt(storage, submit(storage, job(name, entry)), "autoencoder", 1, Group())
        run = Run(storage, submit(storage, job(name, entry)), "autoencoder")
        files.append(run.manifest(run.checkpoints()[-1]).files)
        without_memory(monkeypatch)
    assert files[0] == files[1]
