"""Test that a checkpoint is complete or invisible: all damage is detected before a load, and nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genmodels import checkpoint
from genmodels.checkpoint import CONFIG, MANIFEST, WEIGHTS, CheckpointRef, File, Manifest
from genmodels.checkpoint.manifest import _digest
from genmodels.errors import CheckpointError, KeyNotFound, StorageError
from genmodels.family import OptimizerConfig
from genmodels.nn import optim
from genmodels.runs.store import Run
from genmodels.spec.parse import dump
from genmodels.storage import Storage, open_storage, read_document, write_document
from genmodels.training import attempt
from genmodels.training.group import Group
from genmodels.training.resume import newest_complete
from tests.support.storages import LINEAGE, MemoryStorage, RecordingStorage, upload
from tests.support.tiny_jobs import job, make_data, model

JOB, MODEL = "tiny-00000000", "vae"


class Recorded:
    """Hold a run of six steps in two attempts, with a save and a clean-up per step, and its log of changes."""

    def __init__(self, data: Path) -> None:
        self.storage = RecordingStorage()
        entry = model(data, "vae", save_every=1, eval_every=1, max_steps=6)
        entry["model"]["density_components"] = 2
        entry |= {"checkpoints": {"num_to_keep": 2}, "serve": {"gate": {"metric": "val_loss", "max": 1e6}}}
        self.storage.put(f"jobs/{JOB}/spec.json", dump(job("tiny", entry)))
        self.run = Run(self.storage, JOB, MODEL)
        for number, steps in ((1, 3), (2, 6)):
            self.attempt(number, steps)
        self.prefix = self.run.checkpoint_prefix(CheckpointRef(attempt=2, step=6))

    def attempt(self, number: int, steps: int) -> None:
        """Run an attempt, and cut the log soon after the manifest of step `steps`, as if it was killed there."""
        attempt.run_attempt(self.storage, JOB, MODEL, number, Group())
        last = f"{self.run.checkpoint_prefix(CheckpointRef(attempt=number, step=steps))}/{MANIFEST}"
        ends = next(i for i, (key, _) in enumerate(self.storage.log) if key == last) + 3
        self.storage.log = self.storage.log[:ends]
        objects = MemoryStorage()
        for entry in self.storage.log:
            replay(objects, *entry)
        self.storage.inner = objects

    def copy(self) -> MemoryStorage:
        """Return a copy of the final storage, to be damaged."""
        storage = MemoryStorage()
        storage.objects = dict(self.storage.inner.objects)  # type: ignore[attr-defined]
        return storage


def replay(storage: Storage, key: str, data: bytes | None) -> None:
    if data is None:
        storage.delete(key)
    else:
        storage.put(key, data)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(make_data(tmp_path_factory.mktemp("data")))


# ---- whole or invisible


def test_after_every_operation_recovery_finds_the_newest_complete_checkpoint(
    recorded: Recorded, tmp_path: Path
) -> None:
    storage = open_storage((tmp_path / "replayed").as_uri())
    run = Run(storage, JOB, MODEL)
    committed: CheckpointRef | None = None
    deleted = 0
    for i, (key, data) in enumerate(recorded.storage.log):
        replay(storage, key, data)
        name = key.removeprefix(f"{run.prefix}/")
        if name.endswith(f"/{MANIFEST}") and data is not None:
            number, _, step, _ = name.split("/")
            committed = CheckpointRef(
                attempt=int(number.removeprefix("attempt-")), step=int(step.removeprefix("step-"))
            )
        deleted += data is None
        recovered = newest_complete(run)
        assert (recovered.checkpoint if recovered else None) == committed, f"after operation {i}, {key}"
        if recovered:
            assert recovered.manifest.step == recovered.checkpoint.step
            for name, file in recovered.files.items():
                assert hashlib.sha256(file.data).hexdigest() == recovered.manifest.files[name].sha256
            assert len(recovered.files) == 3
    assert committed == CheckpointRef(attempt=2, step=6)
    assert deleted >= 10, "the log has no clean-up in it"


def test_the_manifest_comes_last_and_goes_first(recorded: Recorded) -> None:
    """In the log, nothing is put into a directory after its manifest, and no file is deleted before its manifest."""
    whole: set[str] = set()
    for key, data in recorded.storage.log:
        folder, _, name = key.partition("/step-")
        if not name:
            continue
        step, _, name = name.partition("/")
        prefix = f"{folder}/{step}"
        if name == MANIFEST:
            assert (prefix in whole) == (data is None)
            whole ^= {prefix}
        else:
            assert prefix not in whole, key


def test_each_file_of_a_checkpoint_is_listed(recorded: Recorded) -> None:
    manifest = recorded.run.manifest(CheckpointRef(attempt=2, step=6))
    stored = {key.removeprefix(f"{recorded.prefix}/") for key in recorded.storage.list(f"{recorded.prefix}/")}
    assert stored == {*manifest.files, MANIFEST}
    assert {WEIGHTS, CONFIG, "state/model.safetensors", "state/model.optimizer-0.safetensors"} <= stored
    assert manifest.samples == 6 * 12
    assert manifest.lineage.parent == CheckpointRef(attempt=1, step=3)


# ---- damage


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def damages(data: bytes) -> dict[str, bytes | None]:
    bits, some = 8 * len(data), random.Random(0)
    chosen = {0, 7, 8 * 8, bits // 2, bits - 1, *(some.randrange(bits) for _ in range(12))}
    flips: dict[str, bytes | None] = {f"bit {bit} flipped": flip(data, bit) for bit in chosen if bit < bits}
    swapped = data[len(data) // 2 :] + data[: len(data) // 2]
    return flips | {"cut": data[:-1], "longer": data + b"\0", "empty": b"", "removed": None, "halves swapped": swapped}


def test_every_damage_of_a_file_is_found_before_it_is_loaded(recorded: Recorded, tmp_path: Path) -> None:
    storage, tried = recorded.copy(), 0
    for name in recorded.run.manifest(CheckpointRef(attempt=2, step=6)).files:
        key = f"{recorded.prefix}/{name}"
        sound = storage.objects[key]
        for what, damaged in damages(sound).items():
            if damaged is None:
                del storage.objects[key]
            else:
                storage.objects[key] = damaged
            with pytest.raises(CheckpointError, match="missing" if damaged is None else "damaged") as caught:
                checkpoint.fetch(storage, recorded.prefix, tmp_path / f"{tried}")
            assert key in str(caught.value), what
            tried += 1
        storage.objects[key] = sound
    assert tried > 100
    checkpoint.fetch(storage, recorded.prefix, tmp_path / "sound")


def test_files_that_changed_places_are_found(recorded: Recorded, tmp_path: Path) -> None:
    storage = recorded.copy()
    one, two = f"{recorded.prefix}/{WEIGHTS}", f"{recorded.prefix}/state/model.safetensors"  # each is valid by itself
    storage.objects[one], storage.objects[two] = storage.objects[two], storage.objects[one]
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.fetch(storage, recorded.prefix, tmp_path / "swapped")


def test_every_flipped_bit_of_a_manifest_is_found_or_says_nothing(recorded: Recorded) -> None:
    """Only flipped bits of the writer's nonce stay undetected; the nonce is no part of the manifest's content."""
    storage, key = recorded.copy(), f"{recorded.prefix}/{MANIFEST}"
    data, unseen = storage.objects[key], 0
    sound = checkpoint.read_manifest(storage, recorded.prefix)
    for bit in range(8 * len(data)):
        storage.objects[key] = flip(data, bit)
        with contextlib.suppress(CheckpointError):
            assert checkpoint.read_manifest(storage, recorded.prefix) == sound
            unseen += 1
    assert unseen <= 8 * 32, "more than the nonce's bits"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe", b'{"digest": 1, "nonce": 2}'])
def test_a_manifest_that_is_none(data: bytes) -> None:
    storage = MemoryStorage()
    storage.put(f"a/{MANIFEST}", data)
    with pytest.raises(CheckpointError, match=r"a/manifest\.json: damaged"):
        checkpoint.read_manifest(storage, "a")


def test_no_manifest_no_checkpoint(tmp_path: Path) -> None:
    storage = MemoryStorage()
    storage.put(f"a/{WEIGHTS}", b"")
    with pytest.raises(CheckpointError, match="a: no complete checkpoint"):
        checkpoint.fetch(storage, "a", tmp_path)


def test_a_store_that_refuses_is_no_damage() -> None:
    """Otherwise a run whose credentials have expired would restart from step 0."""

    class Refusing(MemoryStorage):
        def get(self, key: str) -> tuple[bytes, str]:
            raise StorageError("not allowed")

    with pytest.raises(StorageError, match="not allowed"):
        checkpoint.read_manifest(Refusing(), "a")


def test_recovery_passes_over_damage_to_the_checkpoint_before(recorded: Recorded) -> None:
    storage = recorded.copy()
    run = Run(storage, JOB, MODEL)
    refs = run.checkpoints()
    assert len(refs) >= 2
    storage.objects[f"{recorded.prefix}/{WEIGHTS}"] = b"spoiled"
    recovered = newest_complete(run)
    assert recovered is not None
    assert recovered.checkpoint == refs[-2]
    for ref in refs[:-1]:
        storage.delete(f"{run.checkpoint_prefix(ref)}/{WEIGHTS}")
    assert newest_complete(run) is None


def test_an_older_process_reads_a_newer_manifest(recorded: Recorded) -> None:
    storage, key = recorded.copy(), f"{recorded.prefix}/{MANIFEST}"
    sound = checkpoint.read_manifest(storage, recorded.prefix)
    document, _ = read_document(storage, key)
    forge(storage, recorded.prefix, document | {"compression": "zstd"})
    assert checkpoint.read_manifest(storage, recorded.prefix) == sound


# ---- hostile names and files


def forge(storage: Storage, prefix: str, document: dict[str, Any]) -> None:
    """Write a manifest with any content, and the matching digest."""
    document = {name: value for name, value in document.items() if name != "digest"}
    write_document(storage, f"{prefix}/{MANIFEST}", document | {"digest": _digest(document)})


@pytest.mark.parametrize(
    "name", ["../x", "{abroad}/x", "a/../../x", "state/../../x", "..", ".", "", "/", "a//b", "a/", "nul\0x", "line\nx"]
)
def test_names_in_a_manifest_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    class Obliging(MemoryStorage):
        def get(self, key: str) -> tuple[bytes, str]:
            return super().get(key) if key.endswith(MANIFEST) else (b"evil", "")

    storage = Obliging()
    name = name.format(abroad=tmp_path)
    evil = hashlib.sha256(b"evil").hexdigest()
    manifest = Manifest(step=1, samples=1, metrics={}, lineage=LINEAGE, files={name: File(size=4, sha256=evil)})
    forge(storage, "a", manifest.model_dump())
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is not a valid file name in a checkpoint"):
        checkpoint.fetch(storage, "a", folder)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", folder]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_pickle_is_opened(recorded: Recorded, tmp_path: Path, form: str) -> None:
    folder, sign = fetched(recorded, tmp_path), tmp_path / "code from data ran"
    if form == "pickle":
        (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(sign)))
    else:
        torch.save({"weights": Bomb(sign)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable as safetensors"):
        checkpoint.load_family(folder)
    assert not sign.exists()
    pickle.loads(pickle.dumps(Bomb(sign)))  # noqa: S301 - the test's own: the bomb is live
    assert sign.exists()


# ---- load_family


def fetched(recorded: Recorded, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    checkpoint.fetch(recorded.storage, recorded.prefix, folder)
    return folder


def change(folder: Path, **values: Any) -> None:
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(document | values))


def test_a_checkpoint_answers_as_the_weights_it_holds(recorded: Recorded, tmp_path: Path) -> None:
    folder = fetched(recorded, tmp_path)
    family = checkpoint.load_family(folder)
    stored = checkpoint.load_tensors(folder / WEIGHTS)
    result = family.network.state_dict()
    assert result.keys() == stored.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in stored.items())
    assert family.assets() == checkpoint.read_assets(folder)
    assert not family.network.training
    assert not any(parameter.requires_grad for parameter in family.network.parameters())


def test_loading_leaves_the_global_random_numbers_alone(recorded: Recorded, tmp_path: Path) -> None:
    folder = fetched(recorded, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    checkpoint.load_family(folder)
    assert torch.equal(torch.rand(5), expected)


def test_settings_that_a_newer_release_added_are_passed_over(recorded: Recorded, tmp_path: Path) -> None:
    folder = fetched(recorded, tmp_path)
    expected = checkpoint.load_family(folder).probe()
    document = json.loads((folder / CONFIG).read_text())
    change(folder, config=document["config"] | {"sparkle": 2}, data=document["data"] | {"depth": 16}, release="9")
    result = checkpoint.load_family(folder).probe()
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": {"latent_dim": 5}}, r"model\.safetensors: \S+ is 8 x \d+, but config\.json says 10 x \d+, and"),
        ({"config": {"latent_dim": 4, "blocks": 2}}, r"model\.safetensors: \S+ is missing, but config\.json says"),
        ({"family": "autoencoder", "config": {"latent_dim": 4}}, r"model\.safetensors: \S+ is 8 x .* says 4 x"),
        ({"config": {"latent_dim": 4, "blocks": 0}}, r"model\.safetensors: .* more differ"),
        ({"config": {"latent_dim": 4, "width": 512, "blocks": 8}}, r"model\.safetensors: "),
        ({"data": {"kind": "image", "channels": 3, "height": 16_384, "width": 16_384}}, r"model\.safetensors: "),
        (
            {"data": {"kind": "image", "channels": 3, "height": 10**30, "width": 8}},
            r"config\.json: damaged \(it has a number of",
        ),
        ({"family": "../evil"}, r"config\.json: model\.family: got '\.\./evil', expected one of autoencoder"),
        ({"family": ["vae"]}, r"config\.json: damaged \(family"),
        ({"config": {"latent_dim": "many"}}, r"config\.json: .*latent_dim"),
        ({"config": {"latent_dim": 4096}}, r"config\.json: model\.latent_dim: 4096"),
        ({"config": None}, r"config\.json: "),
        ({"data": {"kind": "sound"}}, r"config\.json: .*sound"),
    ],
)
def test_what_does_not_fit_is_said(recorded: Recorded, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = fetched(recorded, tmp_path)
    change(folder, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_family(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}"])
def test_a_config_that_is_none(recorded: Recorded, tmp_path: Path, text: str) -> None:
    folder = fetched(recorded, tmp_path)
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        checkpoint.load_family(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        checkpoint.load_family(folder)


def test_weights_in_memory_need_no_file(recorded: Recorded, tmp_path: Path) -> None:
    folder = fetched(recorded, tmp_path)
    weights = {name: tensor + 1 for name, tensor in checkpoint.load_tensors(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    family = checkpoint.load_family(folder, weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in family.network.state_dict().items())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        checkpoint.load_family(folder)


# ---- optimizers


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_goes_on_with_the_same_bits(kind: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        head = nn.Linear(8, 1)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 8), head)
        return network, optim.make_optimizers(network, OptimizerConfig(optimizer=kind, weight_decay=0.1), [head])

    def steps(network: nn.Module, optimizers: list[torch.optim.Optimizer], first: int, count: int) -> None:
        for step in range(first, first + count):
            torch.manual_seed(step)
            network.zero_grad()
            network(torch.randn(4, 2, 4, 4)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    network, optimizers = build()
    assert len(optimizers) == (2 if kind == "muon" else 1)
    steps(network, optimizers, 0, 3)
    again, restored = build()
    again.load_state_dict(network.state_dict())
    for i, (optimizer, fresh) in enumerate(zip(optimizers, restored, strict=True)):
        tensors = checkpoint.optimizer_tensors(optimizer.state_dict())
        assert tensors
        save_file(tensors, tmp_path / f"{i}")
        checkpoint.load_optimizer(fresh, checkpoint.load_tensors(tmp_path / f"{i}"))
        back = checkpoint.optimizer_tensors(fresh.state_dict())
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
        assert all(back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    steps(network, optimizers, 3, 2)
    steps(again, restored, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_an_upload_stops_at_the_fence(recorded: Recorded, tmp_path: Path) -> None:
    folder, storage = fetched(recorded, tmp_path), MemoryStorage()
    manifest = recorded.run.manifest(CheckpointRef(attempt=2, step=6))

    def fence() -> None:
        assert storage.list("a/") == sorted(f"a/{name}" for name in manifest.files)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        upload(storage, "a", folder, manifest, fence)
    with pytest.raises(KeyNotFound):
        storage.get(f"a/{MANIFEST}")
    upload(storage, "a", folder, manifest, lambda: None)
    assert checkpoint.read_manifest(storage, "a") == manifest
