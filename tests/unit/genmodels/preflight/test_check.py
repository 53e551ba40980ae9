"""Test that a whole job is checked before training: data, shapes, batches, workers and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genmodels.data import DATASETS, DataConfig, uploads
from genmodels.data.facts import Facts, facts_of
from genmodels.data.text import TrainWindows, ValWindows
from genmodels.errors import DataError, SpecError
from genmodels.family import EvaluationMetric, TextInfo
from genmodels.preflight import check
from genmodels.preflight.check import check_job
from genmodels.registry.evaluations import Evaluation
from genmodels.runs.records import Result, Status
from genmodels.sizing.memory import HOST_MEMORY
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage
from services.console.progress import digits, few_examples_note, summary
from services.console.tables import evaluation_table
from tests.support.asgi_client import refused
from tests.support.job_service import Service, spec
from tests.support.published_models import publish
from tests.support.storages import MemoryStorage, RecordingStorage, Wrapped

PHOTOS = 58


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "photos").mkdir()
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    (folder / "novel.txt").write_text("Call me Ishmael. Some years ago.\n" * 70)
    return folder


def job(folder: Path, *entries: dict[str, Any]) -> JobSpec:
    document = {"name": "mine", "models": list(entries)}
    return parse_spec(yaml.safe_dump(document).encode(), "job.yaml", folder, {"photos": "image"})


def photos(name: str = "photos", **sections: Any) -> dict[str, Any]:
    return {"name": name, "model": {"family": "vae"}, "data": {"path": "photos"}, **sections}


def novel(name: str = "novel", **sections: Any) -> dict[str, Any]:
    return {"name": name, "model": {"family": "minigpt"}, "data": {"path": "novel.txt"}, **sections}


def problems(job: JobSpec, storage: Storage | None = None, **options: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        check_job(job, storage or MemoryStorage(), **options)
    return list(caught.value.problems)


# ---- batches


@pytest.mark.parametrize("open_data", [False, True])
def test_small_data_gets_a_batch_that_fits_with_a_note(folder: Path, open_data: bool) -> None:
    checked = check_job(job(folder, novel(), photos()), MemoryStorage(), open_data=open_data)
    assert [model.train.batch_size for model in checked.job.models] == [8, 32]
    assert checked.notes["photos"] == [
        "photos: 58 pictures as RGB 32 x 32, 58 of them scaled and centre-cropped",
        "train.batch_size is 32 instead of 64, because there are only 53 training examples",
    ]
    assert (
        checked.notes["novel"][1] == "train.batch_size is 8 instead of 64, because there are only 15 training examples"
    )
    assert checked.facts["photos"].validation == 5


def test_the_same_file_is_the_same_job_and_is_chosen_only_once(folder: Path) -> None:
    once = check_job(job(folder, photos()), MemoryStorage()).job
    assert once == check_job(job(folder, photos()), MemoryStorage()).job
    again = check_job(once, MemoryStorage())
    assert again.job == once
    assert not any("batch_size" in note for note in again.notes["photos"])


def test_a_batch_that_was_given_and_is_too_large_is_an_error(folder: Path) -> None:
    (message,) = problems(job(folder, photos(train={"batch_size": 64})))
    assert message == (
        "models[0].train.batch_size: got 64, expected at most the number of training examples, 53; "
        "write 53 or less, or leave it out"
    )


sizes = st.integers(1, 200)
workers = st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 4), st.integers(4, 8)))


@settings(max_examples=150, deadline=None)
@given(examples=sizes, workers=workers, passes=st.integers(1, 4), given_size=st.one_of(st.none(), st.integers(1, 400)))
def test_whatever_is_chosen_trains_and_whatever_is_named_is_taken(
    examples: int, workers: int | tuple[int, int], passes: int, given_size: int | None
) -> None:
    """The chosen values obey the spec's rules; the largest value that an error names is accepted, and no larger one."""
    number: Any = workers if isinstance(workers, int) else {"min": workers[0], "max": workers[1]}

    def entry(size: int | None) -> ModelSpec | None:
        train = {"accumulation_steps": passes} | ({} if size is None else {"batch_size": size})
        try:
            return job(Path("/"), photos(train=train, scaling={"num_workers": number})).models[0]
        except SpecError:  # the size is not divisible
            return None

    result = entry(given_size)
    if result is None:
        return
    try:
        chosen, _ = check._fit_batch(result, examples)
    except SpecError as error:
        named = str(error).partition("expected at most")[2].partition("; write ")[2].partition(" ")[0]
        largest = int(named or 0)  # 0: too few to share among the workers
    else:
        largest = None
    if largest is not None:
        again = entry(largest) if largest else None
        assert not largest or (again and check._fit_batch(again, examples) == (again, []))
        assert not any(entry(size) for size in range(largest + 1, min(examples, largest + 20) + 1))
        return
    size = chosen.train.batch_size
    assert size <= examples
    assert entry(size)  # by the rules of the spec
    assert size == result.train.batch_size or given_size is None


@pytest.mark.parametrize("length", [32, 33, 47, 100, 1000])
@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_windows_are_counted_as_they_are_taken(length: int, block_size: int) -> None:
    tokens = np.zeros(length, np.uint8)
    facts = Facts(TextInfo(vocab_size=2), length, length)
    assert facts.examples(block_size) == (len(TrainWindows(tokens, block_size)), len(ValWindows(tokens, block_size)))


# ---- data, shapes, workers


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    bad_job = job(
        folder,
        photos("a", data={"path": "nowhere"}),
        novel("b", model={"family": "minigpt", "block_size": 4000}),
        photos("c", data={"path": "novel.txt"}),
        photos("d", scaling={"num_workers": 8}, train={"batch_size": 8}),
        photos("e"),
    )
    message = problems(bad_job)
    assert [line.partition(": ")[0] for line in message] == [
        "models[0].data.path",
        "models[1].model.block_size",
        "models[2].data",
        "models[3].scaling.num_workers",
    ]
    assert "vae learns from images, but this dataset has texts" in message[2]
    assert "8 workers need at least 8 validation examples, but there are only 5" in message[3]
    assert check_job(bad_job, MemoryStorage(), only=["e"]).job.models[4].train.batch_size == 32


def test_each_dataset_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DataConfig] = []

    def count(config: DataConfig, *arguments: Any, **options: Any) -> Facts:
        opened.append(config)
        return facts_of(config, *arguments, **options)

    monkeypatch.setattr(check, "facts_of", count)
    check_job(job(folder, *(photos(f"m{i}") for i in range(20))), MemoryStorage())
    assert len(opened) == 1


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_known_of_built_in_data_is_true(name: str) -> None:
    facts = facts_of(DataConfig(dataset=name), None, open_all=False)
    source = DATASETS[name]
    assert facts.info.kind == source.kind
    assert facts.training > facts.validation > 0
    try:
        opened = facts_of(DataConfig(dataset=name), None, open_all=True)
    except DataError:
        return  # the file is not on this machine
    assert (facts.info, facts.training, facts.validation) == (opened.info, opened.training, opened.validation)


@pytest.mark.parametrize("classes", [1, 3, 31])
def test_what_is_known_of_stored_data_is_true(tmp_path: Path, classes: int) -> None:
    storage = MemoryStorage()
    for number in range(62):
        path = tmp_path / "photos" / f"class-{number % classes}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(path)
    dataset, _ = uploads.add(storage, "photos", tmp_path / "photos", 8)
    config = DataConfig.model_validate({"dataset": "photos", "sha256": dataset.sha256}, context={"stored": True})
    report, opened = (facts_of(config, storage, open_all=open_all) for open_all in (False, True))
    assert (report.info, report.training, report.validation) == (opened.info, opened.training, opened.validation)
    before = dataset.model_dump(mode="json", exclude={"validation", "digest"})
    storage.objects[f"datasets/photos/{dataset.sha256}/dataset.json"] = (
        uploads.StoredDataset.model_validate(before).model_dump_json().encode()
    )
    assert facts_of(config, storage, open_all=False).training > 0  # stored by a release that recorded less


def test_init_from_of_another_shape_is_told_at_submission(file_storage: Storage) -> None:
    publish(file_storage, "small", "vae")  # 16 x 16, latent_dim 4
    service = Service(file_storage)
    document = spec("x", "good", "bad")
    document["models"][1]["train"] = {"init_from": "small"}
    for query in ("", "?dry_run=true"):
        error = refused(service.post(document, query), 400)
        assert error["message"].startswith("models[1].train.init_from: its networks have another shape (")
        assert "height 16, here 28" in error["message"]
        assert error["param"] == "models[1].train.init_from"
    document["models"][1]["model"] = {"family": "gan"}
    error = refused(service.post(document), 400)
    assert error["message"] == "models[1].train.init_from: small@1 is of family vae, but this model is of family gan"
    assert service.storage.list("jobs/") == service.storage.list("open/") == []


def test_settings_that_change_no_shape_may_differ(file_storage: Storage) -> None:
    publish(file_storage, "gpt", "minigpt")
    own = {"n_embd": 16, "n_layer": 1, "n_head": 2, "block_size": 16, "dropout": 0.3}
    entry = {"name": "more", "model": {"family": "minigpt", **own}, "data": {"dataset": "shakespeare"}}
    document = {"name": "x", "models": [entry | {"train": {"init_from": "gpt"}}]}
    assert Service(file_storage).post(document).status_code == 201
    document["models"][0]["model"]["n_layer"] = 2
    assert "n_layer 1, here 2" in refused(Service(file_storage).post(document), 400)["message"]


# ---- submission


def test_what_is_chosen_and_expected_is_told_with_the_job(file_storage: Storage, tmp_path: Path) -> None:
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    uploads.add(file_storage, "photos", tmp_path / "photos", 8)
    service = Service(file_storage)
    service.queue({"cpus": 2, "gpus": 0})
    document = spec("x", "a", "b")
    document["models"][0]["data"] = {"dataset": "photos"}
    document["models"][1]["scaling"] = {"use_gpu": True}
    response = service.post(document)
    batch = "a: train.batch_size is 32 instead of 64, because there are only 53 training examples"
    device = "b: needs 1 GPU for its workers, but the cluster has 0: it waits for more"
    assert response.json()["notes"] == [batch, device]
    job = response.json()["job"]
    assert service.jobs.spec(job).models[0].train.batch_size == 32
    plan = service.post(document, "?dry_run=true").json()["models"]
    assert plan[0]["batch_size"] == 32
    assert batch.removeprefix("a: ") in plan[0]["notes"]
    assert [note for note in plan[1]["notes"] if "GPU" in note] != []
    document["models"][0]["train"] = {"batch_size": 64}
    error = refused(service.post(document), 400)
    assert error["message"].endswith(
        "expected at most the number of training examples, 53; write 53 or less, or leave it out"
    )


class Counting(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def before(self, verb: str, key: str) -> None:
        self.read.append(f"{verb} {key}")


def test_a_submission_reads_what_is_noted_and_never_the_data(tmp_path: Path) -> None:
    storage = Counting()
    (tmp_path / "lines.txt").write_text("Call me Ishmael.\n" * 1000)
    uploads.add(storage, "lines", tmp_path / "lines.txt")
    service = Service(storage)
    document = spec("x", *(f"m{i}" for i in range(50)))
    for entry in document["models"]:
        entry |= {"model": {"family": "minigpt"}, "data": {"dataset": "lines"}}
    storage.read.clear()
    assert service.post(document, "?dry_run=true").status_code == 200
    assert not any(key.endswith(("text.txt", "pictures.safetensors")) for key in storage.read)
    assert len([key for key in storage.read if key.startswith("get ")]) < 5 * 50


def test_nothing_is_written_for_a_job_that_is_refused(tmp_path: Path) -> None:
    storage = RecordingStorage()
    document = spec("x", "a")
    document["models"][0]["scaling"] = {"num_workers": 512}
    document["models"][0]["train"] = {"batch_size": 512}
    assert "512 workers" in refused(Service(storage).post(document), 400)["message"]
    assert storage.log == []


# ---- figures of few examples


@pytest.mark.parametrize(
    ("examples", "shown"), [(None, "98.77"), (1000, "98.77"), (999, "98.8"), (100, "98.8"), (99, "99"), (5, "99")]
)
def test_few_validation_examples_have_few_digits(examples: int | None, shown: str) -> None:
    model = job(Path("/"), photos()).models[0]
    result = Result(outcome="succeeded", metrics={"val_loss": 98.7654}, version=1)
    counts = {} if examples is None else {"photos": examples}
    table = summary([(model, Status(state="succeeded"), result)], None, counts)
    (cell,) = table.columns[3].cells
    few = f" (of {examples} validation examples)" if examples is not None and examples < 100 else ""
    assert cell == f"val_loss {shown}{few}"
    assert f"{98.7654:.{digits(examples)}g}" == shown
    assert bool(few_examples_note(examples)) == bool(few)


@pytest.mark.parametrize(
    ("examples", "shown", "message"), [(500, "12.3 dB", False), (5, "12 dB", True), (None, "12.35 dB", False)]
)
def test_an_evaluation_on_few_examples_says_so(examples: int | None, shown: str, message: bool) -> None:
    notes: Any = {} if examples is None else {"validation_examples": examples}
    created = "2026-01-01T00:00:00+00:00"
    facts = {"model": "m", "version": 1, "id": "x", "created": created, "code_version": "0", "data_digest": "d"}
    metrics = {"psnr": EvaluationMetric(value=12.345, unit="dB", baselines={"PCA": 11.987})}
    evaluation = Evaluation(**facts, thorough=False, seconds=1, metrics=metrics, notes=notes)
    table = evaluation_table(evaluation)
    assert next(iter(table.columns[1].cells)) == shown
    assert ("computed from 5 validation examples: more digits are not significant" in str(table.caption)) == message


# ---- pools


def test_a_pool_that_does_not_exist_is_refused_with_the_list_of_pools(folder: Path) -> None:
    entries = [photos("a", serve={"pool": "gpus"}), photos("b"), photos("c", serve={"pool": "x"})]
    pools = {"default": HOST_MEMORY, "gpu": HOST_MEMORY}
    for planned in (False, True):
        assert problems(job(folder, *entries), pools=pools, planned=planned) == [
            "models[0].serve.pool: got 'gpus', expected one of default, gpu; did you mean 'gpu'?",
            "models[2].serve.pool: got 'x', expected one of default, gpu",
        ]
    check_job(job(folder, *entries), MemoryStorage())  # the pools are not known


def test_a_model_that_no_worker_can_train_is_refused_where_their_memory_is_known(folder: Path) -> None:
    entries = [photos("a"), photos("b", scaling={"use_gpu": True})]
    for memory in (None, {}, {"cpus": 2**30, "gpus": 2**30}):
        check_job(job(folder, *entries), MemoryStorage(), worker_memory=memory)
    (problem,) = problems(job(folder, *entries), worker_memory={"cpus": 2**20, "gpus": 2**30})
    assert problem.startswith("models[0].model.")
    assert "of memory to train" in problem
    assert "and a worker has 0.0 GiB; write at most" in problem
    check_job(job(folder, *entries), MemoryStorage(), worker_memory={"cpus": 2**20}, planned=True)


def test_the_memory_of_its_pool_bounds_a_model(folder: Path) -> None:
    entries = [photos("a", serve={"pool": "small"}), photos("b", serve={"pool": "large"})]
    (problem,) = problems(job(folder, *entries), pools={"default": HOST_MEMORY, "small": 2**20, "large": HOST_MEMORY})
    assert problem.startswith("models[0].model.")
    assert "of memory to serve, and a model host has 0.0 GiB" in problem
