"""Test the registry: numbers and aliases under contention, names, and versions that no host would serve."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.errors import CheckpointError, ModelNotFound, SpecError
from genmodels.family import Family
from genmodels.registry.gate import best, check_gate
from genmodels.registry.probe import PROBE, verify_probe, write_probe
from genmodels.registry.store import Registry, check_alias
from genmodels.registry.versions import Alias, Version
from genmodels.runs.records import GateResult
from genmodels.runs.store import Run
from genmodels.spec.sections import Gate
from genmodels.storage import Storage, read_document, write_document
from tests.support.published_models import build, write
from tests.support.storages import LINEAGE, MemoryStorage, RecordingStorage, Wrapped, in_threads

PASSED = GateResult(metric="val_loss", value=1.5, passed=True, reason="val_loss 1.5 is <= 2")


@pytest.fixture(scope="module")
def family() -> Family[Any, Any]:
    return build("minigpt")[0]


@pytest.fixture(scope="module")
def folder(family: Family[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of a verified checkpoint, with its optimizer state."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, family, {"tokenizer.json": b"{}"})
    (folder / "state").mkdir()
    (folder / "state" / "model.safetensors").write_bytes(b"raw weights")
    return folder


def publish(storage: Storage, folder: Path, job: str = "job-00000000", step: int = 1, attempt: int = 1) -> Version:
    manifest = manifest_of({"val_loss": 1.5, "odd": math.nan}, step)
    run, ref = Run(storage, job, "model"), CheckpointRef(attempt=attempt, step=step)
    with checkpoint.scratch_folder() as name:  # each publisher has its own copy
        own = shutil.copytree(folder, Path(name, "fetched"))
        return Registry(storage).publish(run, ref, manifest, own, PASSED)


def manifest_of(metrics: dict[str, float], step: int = 1) -> Manifest:
    return Manifest(step=step, samples=step, metrics=metrics, lineage=LINEAGE, files={})


def fill(storage: Storage, numbers: int, model: str = "model", **more: Any) -> None:
    """Write versions 1 to `numbers` directly."""
    for number in range(1, numbers + 1):
        version = {
            "model": model,
            "version": number,
            "family": "vae",
            "job": f"job-{number}",
            "checkpoint": {"attempt": 1, "step": 1},
            "metrics": {},
            "gate": None,
            "lineage": LINEAGE.model_dump(),
            "created": "2026-01-01T00:00Z",
            "files": {},
        }
        write_document(storage, f"models/{model}/versions/{number:08d}.json", version | more)


# ---- publishing


def test_a_version_holds_what_is_served(
    storage: Storage, folder: Path, family: Family[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    version = publish(storage, folder)
    result = Registry(storage).version("model", 1)
    assert result.model_dump(exclude={"metrics"}) == version.model_dump(exclude={"metrics"})
    assert (result.name, result.family, result.job, result.gate) == ("model@1", "minigpt", "job-00000000", PASSED)
    assert result.metrics["val_loss"] == 1.5
    assert math.isnan(result.metrics["odd"])
    assert set(result.files) == {"model.safetensors", "config.json", "assets/tokenizer.json", "probe.safetensors"}
    fetched = tmp_path_factory.mktemp("fetched")
    Registry(storage).fetch(result, fetched)
    assert checkpoint.describe_files(fetched) == result.files
    loaded = checkpoint.load_family(fetched)
    verify_probe(loaded, fetched)
    assert all(torch.equal(loaded.probe()[name], tensor) for name, tensor in family.probe().items())


def test_the_same_run_and_step_are_one_version(storage: Storage, folder: Path) -> None:
    first = publish(storage, folder)
    assert publish(storage, folder).created == first.created
    assert publish(storage, folder, step=2).version == 2
    assert publish(storage, folder, attempt=2).version == 3
    assert publish(storage, folder, job="other-00000000").version == 4
    assert publish(storage, folder, step=2).version == 2
    assert Registry(storage).versions("model") == [1, 2, 3, 4]


def test_eight_publishers_get_eight_numbers(storage: Storage, folder: Path) -> None:
    numbers = [version.version for version in in_threads(8, lambda i: publish(storage, folder, job=f"job-{i}"))]
    assert sorted(numbers) == list(range(1, 9))
    result = [Registry(storage).version("model", number).job for number in numbers]
    assert result == [f"job-{i}" for i in range(8)]


def test_eight_publishers_of_one_checkpoint_get_one_number(storage: Storage, folder: Path) -> None:
    versions = in_threads(8, lambda i: publish(storage, folder))
    assert [version.version for version in versions] == [1] * 8
    assert len({version.created for version in versions}) == 1
    assert Registry(storage).versions("model") == [1]


def test_a_publisher_that_was_paused_does_not_publish_twice(folder: Path) -> None:
    """Another publisher of the same run and step publishes between its read and its put."""

    class Paused(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and "/versions/" in key and not self.inner.list("models/model/versions/"):
                publish(self.inner, folder)

    storage = Paused()
    assert publish(storage, folder).version == 1
    assert Registry(storage).versions("model") == [1]


def test_blobs_are_stored_once(folder: Path) -> None:
    storage = RecordingStorage()
    first, second = publish(storage, folder), publish(storage, folder, step=2)
    assert first.files == second.files
    put = [key for key, _ in storage.log if "/blobs/" in key]
    assert sorted(put) == sorted({f"models/model/blobs/{file.sha256}" for file in first.files.values()})


def test_a_version_is_there_only_after_its_files(folder: Path) -> None:
    storage = RecordingStorage()
    version = publish(storage, folder)
    keys = [key for key, _ in storage.log if "/blobs/" in key or "/versions/" in key]
    assert keys[-1] == "models/model/versions/00000001.json"
    assert len(keys) == len(version.files) + 1


def test_a_damaged_blob_is_found(folder: Path, tmp_path: Path) -> None:
    storage = MemoryStorage()
    version = publish(storage, folder)
    key = f"models/model/blobs/{version.files['model.safetensors'].sha256}"
    storage.objects[key] = storage.objects[key][:-1] + b"\xff"
    with pytest.raises(CheckpointError, match=f"{key}: damaged"):
        Registry(storage).fetch(version, tmp_path / "a")
    storage.delete(key)
    with pytest.raises(CheckpointError, match=f"{key}: missing"):
        Registry(storage).fetch(version, tmp_path / "b")


def test_a_version_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    storage = MemoryStorage()
    evil = hashlib.sha256(b"evil").hexdigest()
    storage.put(f"models/model/blobs/{evil}", b"evil")
    fill(storage, 1, files={"../x": {"size": 4, "sha256": evil}})
    with pytest.raises(CheckpointError, match=r"'\.\./x' is not a valid file name"):
        Registry(storage).fetch(Registry(storage).version("model", 1), tmp_path / "folder")
    assert not (tmp_path / "x").exists()


def test_an_older_process_reads_what_a_newer_one_wrote() -> None:
    storage = MemoryStorage()
    fill(storage, 1, signature="s", gate={"metric": "val_loss", "value": 1, "passed": True, "reason": "r", "by": "x"})
    move = {"version": 1, "time": "2026-01-01T00:00Z", "reason": "r", "by": "x"}
    write_document(storage, "models/model/aliases/production.json", {"version": 1, "history": [move], "canary": 0.1})
    version = Registry(storage).resolve("model")
    assert (version.version, version.gate.reason if version.gate else "") == (1, "r")
    assert Registry(storage).aliases("model")["production"].history[0].reason == "r"


# ---- aliases


def test_an_alias_moves_and_remembers(storage: Storage) -> None:
    fill(storage, 3)
    store = Registry(storage)
    store.promote("model", "production", 1, "first")
    store.promote("model", "production", 3, "better")
    store.promote("model", "production", 3, "again")
    store.promote("model", "production", 1, "rollback")
    alias = store.aliases("model")["production"]
    assert alias.version == 1
    assert [(move.version, move.reason) for move in alias.history] == [(1, "first"), (3, "better"), (1, "rollback")]
    assert set(store.aliases("model")) == {"production"}


def test_no_move_of_eight_contenders_is_lost(storage: Storage) -> None:
    fill(storage, 8)
    answers = in_threads(8, lambda i: Registry(storage).promote("model", "production", i + 1, f"by {i}"))
    assert all(isinstance(answer, Alias) for answer in answers), answers
    alias = Registry(storage).aliases("model")["production"]
    assert sorted((move.version, move.reason) for move in alias.history) == [(i + 1, f"by {i}") for i in range(8)]
    assert alias.version == alias.history[-1].version


def test_contending_publishers_leave_the_highest(storage: Storage) -> None:
    fill(storage, 8)
    in_threads(8, lambda i: Registry(storage).promote("model", "production", i + 1, "", forward_only=True))
    alias = Registry(storage).aliases("model")["production"]
    assert alias.version == 8
    versions = [move.version for move in alias.history]
    assert versions == sorted(versions)


def test_a_publisher_never_undoes_a_rollback() -> None:
    storage = MemoryStorage()
    fill(storage, 6)
    store = Registry(storage)
    for number in (2, 5):
        store.promote("model", "production", number, "published", forward_only=True)
    store.promote("model", "production", 2, "a person rolls back")
    for number in (5, 4, 3, 2):
        assert store.promote("model", "production", number, "published again", forward_only=True).version == 2
    assert [move.version for move in store.aliases("model")["production"].history] == [2, 5, 2]
    assert store.promote("model", "production", 6, "a new version", forward_only=True).version == 6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=12))
def test_an_alias_follows_people_exactly_and_publishers_upwards(moves: list[tuple[int, bool]]) -> None:
    storage = MemoryStorage()
    fill(storage, 5)
    current, highest = None, 0
    for number, by_publisher in moves:
        alias = Registry(storage).promote("model", "a", number, "", forward_only=by_publisher)
        if not by_publisher or number > highest:
            current = number
            highest = max(highest, number)
        assert alias.version == current
    if moves:
        assert Registry(storage).resolve("model@a").version == current


def test_an_alias_needs_its_version() -> None:
    storage = MemoryStorage()
    fill(storage, 2)
    with pytest.raises(ModelNotFound, match="model 'model' has no version 3; aliases: none; versions: 1, 2"):
        Registry(storage).promote("model", "production", 3, "")
    assert Registry(storage).aliases("model") == {}


@pytest.mark.parametrize("alias", ["production", "a", "step", "3d", "latest-1", "x" * 63])
def test_what_an_alias_may_be(alias: str) -> None:
    check_alias(alias)


@pytest.mark.parametrize(
    "alias", ["latest", "live", "3", "007", "step-500", "step-", "", "A", "a.b", "../x", "a\n", "x" * 64, "-a", "a/b"]
)
def test_what_an_alias_cannot_be(alias: str) -> None:
    storage = MemoryStorage()
    fill(storage, 1)
    with pytest.raises(SpecError, match=r"^alias: got .*") as caught:
        Registry(storage).promote("model", alias, 1, "")
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert storage.list("models/model/aliases/") == []


# ---- names


def test_what_names_mean() -> None:
    storage = MemoryStorage()
    fill(storage, 12)
    store = Registry(storage)
    for alias, number in {"production": 2, "canary": 12, "3d": 3}.items():
        store.promote("model", alias, number, "")
    names = {"model": 2, "model@production": 2, "model@canary": 12, "model@3d": 3, "model@latest": 12}
    names |= {"model@7": 7, "model@007": 7, "model@12": 12}
    assert {name: store.resolve(name).version for name in names} == names
    assert store.models() == ["model"]
    assert store.versions("model") == list(range(1, 13))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "no model 'other'; `genmodels models` or GET /v1/models lists all models"),
        ("other@3", "no model 'other'; `genmodels models` or GET /v1/models lists all models"),
        ("other@latest", "no model 'other'; `genmodels models` or GET /v1/models lists all models"),
        ("mode", "no model 'mode'; `genmodels models` or GET /v1/models lists all models"),
        ("second", "model 'second' has no alias 'production'; aliases: none; versions: 1"),
        ("model@canary", "model 'model' has no alias 'canary'; aliases: production; versions: 1, 2"),
        ("model@3", "model 'model' has no version 3; aliases: production; versions: 1, 2"),
        ("model@0", "model 'model' has no version 0; aliases: production; versions: 1, 2"),
        ("", "no model '': a name has lower-case letters, digits and dashes"),
        ("../model", r"no model '../model': a name has lower-case letters, digits and dashes"),
        ("Model", "no model 'Model': a name has lower-case letters, digits and dashes"),
        ("model\n", r"no model 'model\n': a name has lower-case letters, digits and dashes"),
        ("model@", "'model@': write an alias, a version number, or `latest` after @"),
        ("model@a@b", "'model@a@b': write an alias, a version number, or `latest` after @"),
        ("model@../x", "'model@../x': write an alias, a version number, or `latest` after @"),
        ("model@1.5", "'model@1.5': write an alias, a version number, or `latest` after @"),
        ("model@\u0663", "'model@\u0663': write an alias, a version number, or `latest` after @"),
    ],
)
def test_names_that_mean_nothing_say_what_there_is(name: str, message: str) -> None:
    storage = MemoryStorage()
    fill(storage, 2)
    fill(storage, 1, "second")
    Registry(storage).promote("model", "production", 1, "")
    with pytest.raises(ModelNotFound) as caught:
        Registry(storage).resolve(name)
    assert str(caught.value) == message
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_an_empty_registry_says_so() -> None:
    store = Registry(MemoryStorage())
    assert (store.models(), store.versions("m"), store.aliases("m")) == ([], [], {})
    with pytest.raises(ModelNotFound, match="no model 'm'; `genmodels models` or GET /v1/models lists all models"):
        store.resolve("m")


# ---- gates


@pytest.mark.parametrize(
    ("gate", "value", "passed", "reason"),
    [
        ({"max": 120.0}, 98.25, True, "x 98.25 is <= 120"),
        ({"max": 120.0}, 120.0, True, "x 120 is <= 120"),
        ({"max": 120.0}, 120.5, False, "x 120.5 is not <= 120"),
        ({"max": 120.0}, math.nan, False, "x nan is not <= 120"),
        ({"max": 120.0}, -math.inf, False, "x -inf is not <= 120"),
        ({"max": 120.0}, None, False, "x nan is not <= 120"),
        ({"min": 0.5}, 0.75, True, "x 0.75 is >= 0.5"),
        ({"min": 0.5}, 0.25, False, "x 0.25 is not >= 0.5"),
        ({"min": 0.5}, math.inf, False, "x inf is not >= 0.5"),
        ({"min": 0.0}, 0.0, True, "x 0 is >= 0"),
        ({"min": -1.0}, math.nan, False, "x nan is not >= -1"),
    ],
)
def test_judging(gate: dict[str, float], value: float | None, passed: bool, reason: str) -> None:
    metrics = {"other": 0.0} if value is None else {"x": value, "other": 0.0}
    result = check_gate(Gate(metric="x", **gate), metrics)
    assert result is not None
    assert (result.passed, result.metric, result.reason) == (passed, "x", reason)
    assert check_gate(None, metrics) is None


@pytest.mark.parametrize(
    ("gate", "values", "expected"),
    [
        ({"max": 1.0}, [3.0, 2.0, 2.5], 1),
        ({"min": 1.0}, [3.0, 2.0, 2.5], 0),
        ({"max": 1.0}, [math.nan, 2.0, -math.inf, math.inf], 1),
        ({"min": 1.0}, [math.nan, 2.0, math.inf, -math.inf], 1),
        ({"max": 1.0}, [math.nan, math.nan], 1),
        ({"max": 1.0}, [None, 5.0, None], 1),
        ({"max": 1.0}, [None, None], 1),
        (None, [1.0, 2.0, 3.0], 2),
    ],
)
def test_the_best_checkpoint(gate: dict[str, float] | None, values: list[float | None], expected: int) -> None:
    metrics = [{} if value is None else {"x": value} for value in values]
    candidates = [(CheckpointRef(attempt=1, step=i), manifest_of(each, i)) for i, each in enumerate(metrics)]
    result = best(Gate(metric="x", **gate) if gate else None, candidates)
    assert result is candidates[expected]


# ---- the probe


def test_a_probe_accepts_rounding_and_nothing_more(family: Family[Any, Any], tmp_path: Path) -> None:
    write_probe(family, tmp_path)
    verify_probe(family, tmp_path)
    other, _ = build("minigpt", seed=1)
    with pytest.raises(CheckpointError, match=r"probe output 'logits' differs by 0\.\d+ from the published output"):
        verify_probe(other, tmp_path)
    changed, _ = build("minigpt")
    with torch.no_grad():
        next(changed.network.parameters()).mul_(1 + 1e-7)
    verify_probe(changed, tmp_path)
    with torch.no_grad():
        next(changed.network.parameters())[:4].add_(0.05)
    with pytest.raises(CheckpointError, match="differs by"):
        verify_probe(changed, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spoiled_weights_are_neither_published_nor_served(tmp_path: Path, value: float) -> None:
    family, assets = build("minigpt")
    (tmp_path / "sound").mkdir()
    write_probe(family, tmp_path / "sound")
    with torch.no_grad():
        list(family.network.parameters())[-1].view(-1)[0] = value
    with pytest.raises(CheckpointError, match="'logits' is missing, of another shape, or not finite"):
        verify_probe(family, tmp_path / "sound")
    (tmp_path / "spoiled").mkdir()
    write(tmp_path / "spoiled", family, assets)
    storage = MemoryStorage()
    with pytest.raises(CheckpointError, match="probe output 'logits' is not finite"):
        publish(storage, tmp_path / "spoiled")
    assert storage.objects == {}


def test_a_probe_that_promises_nothing_finite_is_refused(family: Family[Any, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    outputs = family.probe()
    save_file({"logits": torch.full_like(outputs["logits"], math.nan)}, tmp_path / PROBE)
    with pytest.raises(CheckpointError, match="differs by nan"):
        verify_probe(family, tmp_path)
    save_file({"logits": outputs["logits"][:, :1].clone()}, tmp_path / PROBE)
    with pytest.raises(CheckpointError, match="another shape"):
        verify_probe(family, tmp_path)
    save_file({"gone": outputs["logits"]}, tmp_path / PROBE)
    with pytest.raises(CheckpointError, match="'gone' is missing"):
        verify_probe(family, tmp_path)
    (tmp_path / PROBE).unlink()
    with pytest.raises(CheckpointError, match=r"probe\.safetensors: not readable"):
        verify_probe(family, tmp_path)


def test_a_version_says_where_it_came_from(folder: Path) -> None:
    storage = MemoryStorage()
    publish(storage, folder)
    document, _ = read_document(storage, "models/model/versions/00000001.json")
    assert document["checkpoint"] == {"attempt": 1, "step": 1}
    assert document["lineage"] == LINEAGE.model_dump()
    assert document["metrics"] == {"val_loss": 1.5, "odd": "nan"}
