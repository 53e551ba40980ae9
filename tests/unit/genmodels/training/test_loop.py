"""The loop: each family, in one process and in several plain processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels import models
from genmodels.checkpoint import CheckpointRef, load_family
from genmodels.data import open_dataset
from genmodels.errors import DataError, SpecError, TrainingDiverged
from genmodels.family import ImageFamily, TextFamily
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.records import Phase
from genmodels.runs.store import Run
from genmodels.spec.sections import TrainConfig
from genmodels.storage import Storage, open_storage
from genmodels.training import loop
from genmodels.training.attempt import build, fit_batches, run_attempt
from genmodels.training.group import Group
from genmodels.training.loop import evaluate, schedule
from genmodels.training.recorder import RunRecorder
from services.local.platform import submit
from tests.support.plain_workers import WorkerGroup
from tests.support.tiny_jobs import job, make_data, model

FAMILIES = models.names()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return open_storage(f"file://{tmp_path}/storage")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_leaves_a_checkpoint_that_answers(
    family: str, data: Path, folder: Storage, tmp_path: Path
) -> None:
    settings = {"max_steps": 60, "eval_every": 20, "save_every": 60, "learning_rate": 3e-3, "schedule": "constant"}
    name = submit(folder, job("learn", model(data, family, **settings)))
    assert run_attempt(folder, name, family, 1, Group())
    run = Run(folder, name, family)
    (ref,) = run.checkpoints()
    rows = list(metric_rows(run))
    assert ref.step == 60
    assert [row["step"] for row in rows] == list(range(1, 61))
    metric = models.load(family).metric_names[0]
    measured = [row[metric] for row in rows if metric in row]
    assert len(measured) == 3
    assert all(map(math.isfinite, measured))
    if family != "gan":  # a game has no loss that falls
        assert measured[-1] < measured[0]
    assert run.manifest(ref).metrics[metric] == measured[-1]
    names = {key.rpartition("/")[2] for _, key in run.samples()}
    assert names & {"samples.png", "reconstructions.png", "sample.txt"}

    fetched = tmp_path / "fetched"
    fetched.mkdir()
    from genmodels import checkpoint

    checkpoint.fetch(folder, run.checkpoint_prefix(ref), fetched)
    answering = load_family(fetched)
    if isinstance(answering, ImageFamily):
        request = answering.Request()
        pictures = answering.decode(answering.sample_latents(3, 0, request), request)
        assert pictures.shape == (3, *answering.data.shape)
        assert 0 <= pictures.min() <= pictures.max() <= 1
    else:
        assert isinstance(answering, TextFamily)
        first, again = (
            list(answering.generate([0], 7, answering.Request.model_validate({"max_tokens": 30}))) for _ in range(2)
        )
        assert first == again
        assert len(first) == 30


def test_an_attempt_on_either_storage(data: Path, storage: Storage) -> None:
    """Local folder and S3: three saves with clean-up, then a second attempt continues from the newest."""
    name = submit(storage, job("stored", model(data, "minigpt", max_steps=9, save_every=3, eval_every=3)))
    assert run_attempt(storage, name, "minigpt", 1, Group())
    run = Run(storage, name, "minigpt")
    assert [ref.step for ref in run.checkpoints()] == [3, 6, 9]
    assert run_attempt(storage, name, "minigpt", 2, Group())
    assert [(link.attempt, link.until) for link in run.chain()] == [(1, 9), (2, None)]
    assert [row["step"] for row in metric_rows(run)] == list(range(1, 10))
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert heartbeat.step == 9


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_number_of_workers(data: Path, tmp_path: Path) -> None:
    """The sums cover the whole validation set, each example once, with any number of workers."""
    result: dict[int, list[dict[str, float]]] = {}
    for world_size in (1, 3):
        storage = open_storage(f"file://{tmp_path}/{world_size}")
        settings = {"max_steps": 1, "learning_rate": 1e-12, "schedule": "constant"}
        spec = job("same", *(model(data, family, **settings) for family in FAMILIES))
        name = submit(storage, spec)
        with WorkerGroup(world_size, storage.url, [(name, family, 1) for family in FAMILIES]) as group:
            group.succeed()
        runs = [Run(storage, name, family) for family in FAMILIES]
        result[world_size] = [run.manifest(run.checkpoints()[0]).metrics for run in runs]
    for family, one, three in zip(FAMILIES, result[1], result[3], strict=True):
        assert one == pytest.approx(three, rel=1e-4), family


def test_evaluation_covers_a_last_batch_that_is_not_full(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job("x", model(data, "autoencoder")).models[0]
    dataset = open_dataset(spec.data)
    torch.manual_seed(0)
    family = build(spec, dataset)
    split = dataset.split("val")
    whole = evaluate(family, split, Group())
    monkeypatch.setattr(loop, "EVALUATION_ROWS", 3)
    assert len(split) % 3 != 0
    assert evaluate(family, split, Group()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_spoiled(
    family: str, data: Path, folder: Storage
) -> None:
    name = submit(
        folder, job("nan", model(data, family, max_steps=50, save_every=2, learning_rate=1e30, schedule="constant"))
    )
    with pytest.raises(TrainingDiverged, match=r"step \d+: .* is not finite; .*train\.learning_rate"):
        run_attempt(folder, name, family, 1, Group())
    run = Run(folder, name, family)
    for ref in run.checkpoints():
        from genmodels import checkpoint

        with checkpoint.scratch_folder() as scratch:
            checkpoint.fetch(folder, run.checkpoint_prefix(ref), Path(scratch))
            weights = checkpoint.load_tensors(Path(scratch) / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_schedules() -> None:
    linear = TrainConfig(max_steps=10, warmup_steps=2, schedule="linear")
    assert [schedule(linear, step) for step in (1, 2, 3, 7, 10)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0.125])
    cosine = TrainConfig(max_steps=10, schedule="cosine")
    assert [schedule(cosine, step) for step in (1, 6, 10)] == pytest.approx(
        [1, 0.5, 0.5 * (1 + math.cos(0.9 * math.pi))]
    )
    assert schedule(TrainConfig(max_steps=10, schedule="constant"), 10) == 1


def test_accumulation_takes_the_same_step(data: Path, folder: Storage) -> None:
    """Four forward passes of a quarter each are one optimizer step on the whole batch."""
    losses = {}
    for passes in (1, 4):
        entry = model(
            data, "minigpt", f"passes-{passes}", max_steps=5, accumulation_steps=passes, ema=None, clip_norm=1.0
        )
        entry["model"]["dropout"] = 0.0
        name = submit(folder, job("accumulate", entry))
        run_attempt(folder, name, entry["name"], 1, Group())
        losses[passes] = [row["loss"] for row in metric_rows(Run(folder, name, entry["name"]))]
    assert losses[1] == pytest.approx(losses[4], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_trains(family: str, data: Path, folder: Storage) -> None:
    name = submit(folder, job("bf16", model(data, family, precision="bf16", max_steps=3, save_every=3)))
    assert run_attempt(folder, name, family, 1, Group())
    (ref,) = Run(folder, name, family).checkpoints()
    with_weights = Run(folder, name, family).manifest(ref)
    assert all(map(math.isfinite, with_weights.metrics.values()))


def test_compile_without_a_compiler_warns_once_and_trains(
    data: Path, folder: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    name = submit(folder, job("compile", model(data, "vae", compile=True, max_steps=2, save_every=2)))
    with caplog.at_level(logging.WARNING):
        assert run_attempt(folder, name, "vae", 1, Group())
    assert [record.message for record in caplog.records if "compile" in record.message] == [
        "train.compile: no C++ compiler on this machine; role model stays uncompiled"
    ]


def test_compiling_is_a_phase_of_its_own(data: Path, folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take minutes, and must not count as a hang; also in a run that resumes."""
    reports: list[tuple[str, int]] = []
    report_progress = RunRecorder.report_progress

    def noted(self: RunRecorder, phase: Phase, step: int, loss: float | None = None) -> None:
        reports.append((phase, step))
        report_progress(self, phase, step, loss)

    monkeypatch.setattr(RunRecorder, "report_progress", noted)
    monkeypatch.setattr("shutil.which", lambda name: None)  # what compiles is not tried here
    settings = {"compile": True, "max_steps": 10, "save_every": 5, "eval_every": 10}
    name = submit(folder, job("compile", model(data, "minigpt", **settings)))
    assert run_attempt(folder, name, "minigpt", 1, Group())
    assert [report for report in reports if report[0] in ("compiling", "training")] == [
        ("compiling", 0),
        ("training", 1),
        ("compiling", 1),
        ("training", 2),
        ("compiling", 2),
        *(("training", step) for step in range(3, 11)),
    ]
    folder.delete(f"{Run(folder, name, 'minigpt').checkpoint_prefix(CheckpointRef(attempt=1, step=10))}/manifest.json")
    reports.clear()
    assert run_attempt(folder, name, "minigpt", 2, Group())
    assert [step for phase, step in reports if phase == "compiling"] == [5, 6, 7]


def test_the_log_says_how_it_goes(data: Path, folder: Storage, caplog: pytest.LogCaptureFixture) -> None:
    name = submit(folder, job("said", model(data, "minigpt", max_steps=6, save_every=3, eval_every=6)))
    with caplog.at_level(logging.INFO):
        assert run_attempt(folder, name, "minigpt", 1, Group())
        assert run_attempt(folder, name, "minigpt", 2, Group())
    output = [record.message for record in caplog.records if record.name.startswith("genmodels")]
    (three, six) = (row for row in metric_rows(Run(folder, name, "minigpt")) if row["step"] in (3, 6))
    assert output[0] == "attempt 1, rank 0 of 1: begins"
    for line, row in zip(output[1:3], (three, six), strict=True):
        shown = (f"{name} {row[name]:.4g}" for name in ("val_loss", "val_bits_per_char", "loss"))
        assert line == f"step {row['step']} of 6: {', '.join(shown)}"
    assert output[3:] == ["attempt 2, rank 0 of 1: continues from step 6 of attempt 1"]


def test_data_that_does_not_fit_is_said(data: Path, folder: Storage, tmp_path: Path) -> None:
    def fails(kind: type[Exception], text: str, **changes: Any) -> None:
        entry = model(data, "vae") | changes
        name = submit(folder, job("wrong", entry))
        with pytest.raises(kind, match=text):
            run_attempt(folder, name, "vae", 1, Group())

    fails(DataError, r"train\.batch_size: 4096 is more than", train={"batch_size": 4096})
    fails(DataError, r"data\.path: .* does not exist", data={"path": str(tmp_path / "nowhere.d")})
    fails(SpecError, "vae learns from images, but this dataset has texts", data={"path": str(data / "play.txt")})


def test_what_a_density_is_fitted_to_is_bounded_and_fixed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genmodels.training.attempt.FIT_EXAMPLES", 10)
    spec = job("x", model(data, "vae")).models[0]
    dataset = open_dataset(spec.data)
    family = build(spec, dataset)
    take: Callable[[], torch.Tensor] = lambda: torch.cat([batch["images"] for batch in fit_batches(dataset, family)])  # noqa: E731
    assert len(take()) == 10
    assert torch.equal(take(), take())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: NCCL needs 2 GPUs or more, this machine has fewer")
def test_nccl_on_two_gpus(data: Path, tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}")
    name = submit(storage, job("nccl", model(data, "minigpt", max_steps=20)))
    with WorkerGroup(2, storage.url, [(name, "minigpt", 1)], device="cuda") as group:
        group.succeed()
    assert Run(storage, name, "minigpt").checkpoints()[-1].step == 20
