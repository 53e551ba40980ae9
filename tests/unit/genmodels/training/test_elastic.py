"""A run that changes from 1 worker to 2 and back loses no step and sees each sample once in each epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.data import batch_indices, open_dataset
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage, open_storage
from genmodels.training.loop import schedule
from services.local.platform import submit
from tests.support import plain_workers, recording_workers
from tests.support.plain_workers import WorkerGroup
from tests.support.tiny_jobs import job, make_data, model

STEPS, BATCH = 50, 48
BORDERS = [0, 13, 31, STEPS]  # where the attempts begin and end; an epoch is 9.4 steps


@pytest.mark.slow
def test_from_one_worker_to_two_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(plain_workers, "PROGRAM", recording_workers.__name__)
    storage = open_storage((tmp_path / "storage").as_uri())
    entry = model(
        make_data(tmp_path), "minigpt", max_steps=STEPS, batch_size=BATCH, accumulation_steps=2,
        eval_every=STEPS, save_every=STEPS, warmup_steps=5, ema=0.9,
    )  # fmt: skip
    entry["model"]["dropout"] = 0.0  # the one thing that depends on the number of workers by design
    entry["scaling"] = {"num_workers": {"min": 1, "max": 2}}
    elastic, calm, same = (submit(storage, spec := job(name, entry)) for name in ("elastic", "calm", "same"))
    assert spec.models[0].world_sizes == [1, 2]
    run = Run(storage, elastic, "minigpt")

    monkeypatch.setenv("LEAVE", json.dumps({f"{elastic}-1": BORDERS[1], f"{elastic}-2": BORDERS[2]}))
    with WorkerGroup(1, storage.url, [(elastic, "minigpt", 1), (calm, "minigpt", 1)]) as group:
        group.succeed()
    copy(storage, f"runs/{elastic}/minigpt/attempt-1/", f"runs/{same}/minigpt/attempt-1/")
    with WorkerGroup(2, storage.url, [(elastic, "minigpt", 2)]) as group:
        group.succeed()
    with WorkerGroup(1, storage.url, [(elastic, "minigpt", 3), (same, "minigpt", 2)]) as group:
        group.succeed()

    first, second, last = run.checkpoints()
    assert [first.step, second.step, last.step] == BORDERS[1:]
    assert [(link.attempt, link.until) for link in run.chain()] == [(1, first.step), (2, second.step), (3, None)]
    assert [run.manifest(ref).lineage.world_size for ref in (first, second, last)] == [1, 2, 1]
    assert [run.manifest(ref).samples for ref in (first, second, last)] == [
        ref.step * BATCH for ref in (first, second, last)
    ]

    assert_seen_once(spec.models[0], seen, elastic, sizes={1: 1, 2: 2, 3: 1})
    assert_rows_go_on(spec.models[0], run)

    undisturbed = Run(storage, calm, "minigpt")
    # Equal to the one that kept its size, but for the order in which gradients are added.
    final, expected = run.manifest(last).metrics["val_loss"], undisturbed.manifest(CheckpointRef(attempt=1, step=STEPS))
    assert final == pytest.approx(expected.metrics["val_loss"], rel=1e-4)
    losses, calm_losses = ([row["loss"] for row in metric_rows(each)] for each in (run, undisturbed))
    assert np.allclose(losses, calm_losses, rtol=1e-3)
    # And with an unchanged size it is equal to the bit.
    left = Run(storage, same, "minigpt").manifest(CheckpointRef(attempt=2, step=STEPS))
    assert left.lineage.parent == first
    assert left.files == expected.files


def assert_seen_once(spec: ModelSpec, seen: Path, name: str, sizes: dict[int, int]) -> None:
    """Check that the attempts follow each other, and together see the samples that a single attempt would see."""
    dataset = open_dataset(spec.data)
    n = len(dataset.split("train", 16))
    taken: list[tuple[int, int]] = []
    for attempt, size in sizes.items():
        parts = [json.loads(line) for rank in range(size) for line in lines(seen / f"{name}-{attempt}-{rank}.jsonl")]
        steps = [part[0] // BATCH for part in parts]
        assert sorted(set(steps)) == list(range(BORDERS[attempt - 1], BORDERS[attempt]))
        assert all(len(part[1]) == BATCH // 2 // size for part in parts)  # each rank its share of a micro-batch
        taken += [pair for _, index, epoch in parts for pair in zip(epoch, index, strict=True)]
    assert len(taken) == len(set(taken)) == STEPS * BATCH
    index, epoch = batch_indices(n, spec.train.seed, 0, STEPS * BATCH)
    assert set(taken) == set(zip(epoch.tolist(), index.tolist(), strict=True))
    whole = STEPS * BATCH // n
    assert whole >= 3
    for number in range(whole):
        assert {index for epoch, index in taken if epoch == number} == set(range(n))


def assert_rows_go_on(spec: ModelSpec, run: Run) -> None:
    rows, train = list(metric_rows(run)), spec.train
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in rows] == [step * BATCH for step in range(1, STEPS + 1)]
    rates = [schedule(train, step) * train.learning_rate for step in range(1, STEPS + 1)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def copy(storage: Storage, source: str, target: str) -> None:
    for key in storage.list(source):
        storage.put(target + key.removeprefix(source), storage.get(key)[0])
