"""Test `train.init_from`: a name is resolved at submit, and the weights are those of the version or checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genmodels import checkpoint, models
from genmodels.checkpoint import CheckpointRef, load_tensors
from genmodels.data import added, uploads
from genmodels.errors import SpecError
from genmodels.preflight.check import check_job
from genmodels.registry import references
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.jobs import Jobs
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from services.local.platform import submit
from services.local.smoke import smoke
from tests.support.tiny_jobs import job, make_data, model

STILL = {"max_steps": 1, "learning_rate": 1e-12, "muon_learning_rate": 1e-12, "weight_decay": 0.0, "ema": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def storage(file_storage: Storage) -> Storage:
    return file_storage


def trained(storage: Storage, name: str, entry: dict[str, Any], attempt: int = 1) -> Run:
    name = submit(storage, job(name, entry))
    torch.manual_seed(1234)  # earlier work in this process makes no difference
    run_attempt(storage, name, entry["name"], attempt, Group())
    return Run(storage, name, entry["name"])


def published(storage: Storage, run: Run, ref: CheckpointRef, alias: str = "production") -> Version:
    with checkpoint.scratch_folder() as name:
        manifest = checkpoint.fetch(storage, run.checkpoint_prefix(ref), Path(name))
        version = Registry(storage).publish(run, ref, manifest, Path(name), None)
    Registry(storage).promote(run.model, alias, version.version, "a test")
    return version


def served(run: Run, ref: CheckpointRef) -> dict[str, torch.Tensor]:
    with checkpoint.scratch_folder() as name:
        checkpoint.fetch(run.storage, run.checkpoint_prefix(ref), Path(name))
        return load_tensors(Path(name) / checkpoint.WEIGHTS)


def assert_same_weights(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert result.keys() == expected.keys()
    parameters = {name for name in expected if expected[name].is_floating_point() and "running" not in name}
    assert parameters
    for name in parameters:
        torch.testing.assert_close(
            result[name], expected[name], atol=1e-6, rtol=0, msg=lambda message, n=name: f"{n}: {message}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", models.names())
def test_it_begins_with_the_served_weights_of_a_version_and_of_a_step(
    data: Path, storage: Storage, family: str
) -> None:
    source = trained(storage, "source", model(data, family))
    version = published(storage, source, CheckpointRef(attempt=1, step=6))
    for reference, step in ((family, 6), (f"{family}@{source.job}:step-3", 3)):
        entry = model(data, family, "more", **STILL, init_from=reference)
        run = trained(storage, f"from-{step}", entry)
        assert_same_weights(
            served(run, CheckpointRef(attempt=1, step=1)), served(source, CheckpointRef(attempt=1, step=step))
        )
        pinned = {6: version.name, 3: reference}[step]
        assert Jobs(storage).model_spec(run.job, "more").train.init_from == pinned
    assert references.pinned_checkpoints(source) == [CheckpointRef(attempt=1, step=3)]


@pytest.mark.slow
def test_the_step_the_schedule_and_the_optimizer_begin_anew(data: Path, storage: Storage) -> None:
    source = trained(storage, "source", model(data, "minigpt", max_steps=20, learning_rate=1e-2))
    published(storage, source, CheckpointRef(attempt=1, step=20))
    run = trained(storage, "more", model(data, "minigpt", "more", init_from="minigpt@1"))
    rows, before = list(metric_rows(run)), list(metric_rows(source))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["samples"] == 12
    assert rows[0]["learning_rate"] == before[0]["learning_rate"] / 10
    assert rows[2]["val_loss"] < before[2]["val_loss"] - 0.1
    assert rows[2]["val_loss"] == pytest.approx(before[-1]["val_loss"], abs=0.1)


def test_a_name_means_what_it_meant_at_submit(data: Path, storage: Storage) -> None:
    source = trained(storage, "source", model(data, "vae"))
    for step in (3, 6):
        published(storage, source, CheckpointRef(attempt=1, step=step))
    spec = job("more", *(model(data, "vae", f"m{i}", init_from=name) for i, name in enumerate(NAMES)))
    name = submit(storage, spec)
    Registry(storage).promote("vae", "production", 1, "rolled back")
    assert submit(storage, spec) == name
    assert [Jobs(storage).model_spec(name, f"m{i}").train.init_from for i in range(len(NAMES))] == [
        "vae@2", "vae@2", "vae@2", "vae@1"
    ]  # fmt: skip
    pinned = references.resolve_references(spec, storage)
    assert pinned.models[0].train.init_from == "vae@1"
    assert references.resolve_references(pinned, storage) == pinned


NAMES = ["vae", "vae@production", "vae@latest", "vae@1"]


def test_live_and_a_step_are_of_the_run_that_was_submitted_last(data: Path, storage: Storage) -> None:
    name, _ = Jobs(storage).submit(job("older", model(data, "vae")))
    run_attempt(storage, name, "vae", 1, Group())
    for reference, step in (("vae@live", 6), ("vae@step-3", 3)):
        assert references.resolve_reference(reference, storage) == f"vae@{name}:step-{step}"
    time.sleep(0.002)  # the index is by the millisecond
    newer, _ = Jobs(storage).submit(job("newer", model(data, "vae")))
    with pytest.raises(
        SpecError, match=f"vae@live: no such checkpoint; steps of vae in job {newer} with one: none yet"
    ):
        references.resolve_reference("vae@live", storage)
    run_attempt(storage, newer, "vae", 1, Group())
    assert references.resolve_reference("vae@live", storage) == f"vae@{newer}:step-6"
    with pytest.raises(SpecError, match="gan@live: no job has trained 'gan' in this storage"):
        references.resolve_reference("gan@live", storage)


@pytest.mark.slow
def test_a_run_that_resumes_needs_its_source_no_more(data: Path, storage: Storage) -> None:
    source = trained(storage, "source", model(data, "minigpt"))
    published(storage, source, CheckpointRef(attempt=1, step=6))
    entry = model(data, "minigpt", "more", init_from="minigpt")
    run = trained(storage, "more", entry)
    last = CheckpointRef(attempt=1, step=6)
    expected = run.manifest(last).files
    storage.delete(f"{run.checkpoint_prefix(last)}/{checkpoint.MANIFEST}")
    for key in [*storage.list("models/"), *storage.list(f"runs/{source.job}/")]:
        storage.delete(key)
    run_attempt(storage, run.job, "more", 2, Group())
    assert run.chain()[-1].parent == CheckpointRef(attempt=1, step=3)
    assert run.manifest(CheckpointRef(attempt=2, step=6)).files == expected


@pytest.mark.slow
def test_a_text_is_read_with_the_tokenizer_of_the_model_it_continues(
    data: Path, storage: Storage, tmp_path: Path
) -> None:
    source = trained(storage, "source", model(data, "minigpt"))
    published(storage, source, CheckpointRef(attempt=1, step=6))
    entry = model(tmp_path, "minigpt", "more", init_from="minigpt")
    (tmp_path / "play.txt").write_text("What light through yonder window breaks?\n" * 60)  # fewer characters
    run = trained(storage, "more", entry)
    with checkpoint.scratch_folder() as name:
        checkpoint.fetch(storage, run.checkpoint_prefix(CheckpointRef(attempt=1, step=3)), Path(name, "more"))
        checkpoint.fetch(storage, source.checkpoint_prefix(CheckpointRef(attempt=1, step=3)), Path(name, "source"))
        tokenizers = [Path(name, of, "assets", "tokenizer.json").read_bytes() for of in ("more", "source")]
    assert tokenizers[0] == tokenizers[1]
    storage.delete(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=6))}/{checkpoint.MANIFEST}")
    run_attempt(storage, run.job, "more", 2, Group())
    assert run.checkpoints()[-1] == CheckpointRef(attempt=2, step=6)

    (tmp_path / "play.txt").write_text("Dort was\n" * 300)
    unknown = r"train.init_from: the text has characters that the model's tokenizer does not know: 'D'; remove them"
    with pytest.raises(SpecError, match=unknown):
        check_job(job("other", entry), storage, open_data=True)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("vae@7", r"models\[0\].train.init_from: model 'vae' has no version 7; aliases: production; versions: 1"),
        ("vae@canary", r"models\[0\].train.init_from: model 'vae' has no alias 'canary'"),
        (
            "gone",
            r"models\[0\].train.init_from: no model 'gone'; `genmodels models` or GET /v1/models lists all models",
        ),
        ("vae@no-job:step-3", r"vae@no-job:step-3: no such checkpoint; steps of vae in job no-job with one: none yet"),
        ("vae@{job}:step-4", r"no such checkpoint; steps of vae in job source-\w+ with one: 3, 6"),
    ],
)
def test_what_is_not_there_is_said_at_submit(data: Path, storage: Storage, reference: str, message: str) -> None:
    source = trained(storage, "source", model(data, "vae"))
    published(storage, source, CheckpointRef(attempt=1, step=6))
    entry = model(data, "vae", "more", init_from=reference.format(job=source.job))
    before = storage.list("")
    with pytest.raises(SpecError, match=message):
        submit(storage, job("more", entry))
    assert storage.list("") == before


def test_what_does_not_fit_is_said_by_field(data: Path, storage: Storage) -> None:
    source = trained(storage, "source", model(data, "vae"))
    published(storage, source, CheckpointRef(attempt=1, step=6))
    with pytest.raises(SpecError, match=r"train.init_from: vae@1 is of family vae, but this model is of family gan"):
        check_job(job("a", model(data, "gan", init_from="vae")), storage, open_data=True)
    wider = model(data, "vae", init_from="vae")
    wider["model"]["latent_dim"] = 6
    with pytest.raises(SpecError, match=r"train.init_from: .* another shape \(latent_dim 4, here 6\)$"):
        check_job(job("b", wider), storage, open_data=True)
    larger = model(data, "vae", init_from="vae")
    larger["data"]["image_size"] = 24
    with pytest.raises(SpecError, match=r"another shape \(height 16, here 24; width 16, here 24\)$"):
        check_job(job("c", larger), storage, open_data=True)
    assert check_job(job("d", model(data, "vae", init_from="vae")), storage).facts["vae"].info.kind == "image"
    blob = next(key for key in storage.list("models/vae/blobs/"))
    storage.put(blob, storage.get(blob)[0] + b"x")
    with pytest.raises(SpecError, match=r"train.init_from: vae@1: .*damaged"):
        check_job(job("e", model(data, "vae", init_from="vae")), storage, open_data=True)
    storage.delete(f"{source.checkpoint_prefix(CheckpointRef(attempt=1, step=3))}/{checkpoint.MANIFEST}")
    with pytest.raises(SpecError, match="no such checkpoint"):
        check_job(job("f", model(data, "vae", init_from=f"vae@{source.job}:step-3")), storage, open_data=True)


def test_a_marked_step_stays_the_one_it_was_and_asking_marks_nothing(data: Path, storage: Storage) -> None:
    source = trained(storage, "source", model(data, "vae"))
    reference = f"vae@{source.job}:step-6"
    assert references.resolve_reference(reference, storage, pin=False) == reference
    assert references.pinned_checkpoints(source) == []
    assert references.resolve_reference(reference, storage) == reference
    last = CheckpointRef(attempt=1, step=6)
    source.start_attempt(2, CheckpointRef(attempt=1, step=3), 1)  # a later attempt takes over before that step
    assert last not in source.checkpoints()
    assert references.resolve_reference(reference, storage) == reference
    assert references.find_checkpoint(reference, storage)[1] == last
    storage.delete(f"{source.checkpoint_prefix(last)}/{checkpoint.MANIFEST}")
    with pytest.raises(SpecError, match="that checkpoint was deleted; name another step or a version"):
        references.resolve_reference(reference, storage)


def test_an_added_dataset_is_pinned_at_submit(
    data: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = model(data, "minigpt") | {"data": {"dataset": "mine"}}
    body = yaml.safe_dump({"name": "mine", "models": [entry]}).encode()
    with pytest.raises(SpecError, match="unknown dataset 'mine'"):
        parse_spec(body, "job.yaml", datasets=added.Kinds(storage))
    first, _ = uploads.add(storage, "mine", data / "play.txt")
    spec = parse_spec(body, "job.yaml", datasets=added.Kinds(storage))
    name = submit(storage, spec)
    (tmp_path / "tale.txt").write_text("Once upon a time there was a mouse.\n" * 100)
    second, _ = uploads.add(storage, "mine", tmp_path / "tale.txt", replace=True)
    assert Jobs(storage).model_spec(name, "minigpt").data.sha256 == first.sha256
    run_attempt(storage, name, "minigpt", 1, Group())
    run = Run(storage, name, "minigpt")
    assert run.manifest(run.checkpoints()[0]).lineage.data_digest == first.sha256
    other = submit(storage, spec)
    assert other != name  # a different content is a different job
    assert Jobs(storage).model_spec(other, "minigpt").data.sha256 == second.sha256
    assert smoke(spec.models[0], storage).startswith("continued ")
    for key in storage.list("datasets/"):
        storage.delete(key)
    with pytest.raises(SpecError, match=r"models\[0\].data.dataset: dataset 'mine' is not in the storage"):
        submit(storage, spec)
