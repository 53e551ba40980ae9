"""`strategy: fsdp2`: the same training as with ddp, checkpoints in parts, resumed with another number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from genmodels import checkpoint
from genmodels.checkpoint import WEIGHTS, CheckpointRef, File, Lineage, Manifest
from genmodels.checkpoint.parts import INDEX, PARTS, StoredState, assemble, share, tensor_name
from genmodels.data import open_dataset
from genmodels.errors import SpecError
from genmodels.models import names
from genmodels.preflight import parameters
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from genmodels.training.attempt import _build_models, build, run_attempt
from genmodels.training.group import Group
from genmodels.training.role_trainer import RoleTrainer
from genmodels.training.sharding import local
from genmodels.training.shared_state import SharedState
from services.local.platform import submit
from tests.support.plain_workers import WorkerGroup
from tests.support.storages import Wrapped
from tests.support.tiny_jobs import job, make_data, model

FAMILIES = names()
QUICK = [("gan", "adamw"), ("minigpt", "adamw")]
LONG = [("autoencoder", "adamw"), ("vae", "adamw"), ("minigpt", "muon"), ("gan", "muon")]
SETTINGS: dict[str, Any] = {"clip_norm": 1.0, "accumulation_steps": 2, "batch_size": 24}
TOLERANCE = {"adamw": 6e-5, "muon": 6e-3}  # a step changes a number by up to 1e-3 and 0.02; Muon may round to bfloat16


class Runs:
    """Runs of tiny models in one storage, by name: `<family>-<optimizer>-<strategy>` with 6 steps, saved at 3 and 6."""

    def __init__(self, folder: Path) -> None:
        self.data, self.storage = make_data(folder), open_storage((folder / "storage").as_uri())

    def submit(self, family: str, optimizer: str, strategy: str, name: str = "base", **train: Any) -> Run:
        settings = SETTINGS | {"optimizer": optimizer, "strategy": strategy} | train
        entry = model(self.data, family, **settings)
        if family == "vae":
            entry["model"]["likelihood"] = "gaussian"  # has a parameter without dimensions
        if family == "minigpt":
            entry["model"]["dropout"] = 0.0  # its masks depend on the number of workers
        return Run(self.storage, submit(self.storage, job(f"{name}-{family}-{optimizer}-{strategy}", entry)), family)

    def train(self, world_size: int, *runs: Run, attempt: int = 1) -> None:
        with WorkerGroup(world_size, self.storage.url, [(run.job, run.model, attempt) for run in runs]) as group:
            group.succeed(240)

    def copied(self, source: Run, target: Run, damage: str = "", damaged_step: int = 6) -> Run:
        """Copy an attempt without its last checkpoint, so that the next one resumes at step 3.

        Args:
            damage: change a byte of this file, in the checkpoint of `damaged_step`, which is copied too.
        """
        prefix = f"runs/{source.job}/{source.model}/attempt-1/"
        first, last = (source.checkpoint_prefix(CheckpointRef(attempt=1, step=step)) for step in (3, 6))
        damaged = f"{first if damaged_step == 3 else last}/{damage}"
        for key in self.storage.list(prefix):
            if key.startswith(f"{last}/") and not (damage and damaged_step == 6):
                continue
            data = self.storage.get(key)[0]
            data = data[:-1] + bytes([data[-1] ^ 1]) if key == damaged else data
            self.storage.put(key.replace(f"/{source.job}/", f"/{target.job}/", 1), data)
        return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


Trained = dict[tuple[str, str, str], Run]


def train_both(runs: Runs, kinds: list[tuple[str, str]]) -> Trained:
    """Train families and optimizers on two workers, with both strategies."""
    trained = {(*kind, strategy): runs.submit(*kind, strategy) for kind in kinds for strategy in ("ddp", "fsdp2")}
    runs.train(2, *trained.values())
    return trained


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Trained:
    return train_both(runs, QUICK)


@pytest.fixture(scope="module")
def more(runs: Runs, trained: Trained) -> Trained:
    return trained | train_both(runs, LONG)


def weights(run: Run, attempt: int = 1, step: int = 6) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, whether it has parts or not."""
    ref = CheckpointRef(attempt=attempt, step=step)
    manifest, prefix = run.manifest(ref), run.checkpoint_prefix(ref)
    assert manifest.samples == step * SETTINGS["batch_size"]
    whole = [name for name in manifest.files if name.endswith(".safetensors") and not name.startswith(PARTS)]
    files = {name: checkpoint.read_tensors(run.storage, f"{prefix}/{name}", manifest.files[name]) for name in whole}
    if INDEX in manifest.files:
        files |= assemble(run.storage, prefix, manifest, pinned=False)
    return {tensor_name(name, key): tensor for name, file in files.items() for key, tensor in file.tensors.items()}


def assert_close(run: Run, other: Run, attempt: int = 1, optimizer: str = "adamw") -> None:
    """Check that all tensors differ by a small part of what six steps change, and that the metrics agree."""
    mine, theirs = weights(run, attempt), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        difference, size = (each.double().square().mean().sqrt().item() for each in (tensor - theirs[name], tensor))
        assert difference <= 1e-3 * size + TOLERANCE[optimizer], name
    metrics, expected = (r.manifest(CheckpointRef(attempt=n, step=6)).metrics for r, n in ((run, attempt), (other, 1)))
    assert metrics == pytest.approx(expected, rel=1e-5 if optimizer == "adamw" else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "optimizer"), QUICK)
def test_two_workers_train_as_with_ddp(family: str, optimizer: str, trained: Trained) -> None:
    """Weights, averages, moments and metrics after six steps with clipping, accumulation and EMA."""
    assert_close(*(trained[family, optimizer, strategy] for strategy in ("fsdp2", "ddp")), optimizer=optimizer)


@pytest.mark.long
@pytest.mark.parametrize(("family", "optimizer"), LONG)
def test_more_families_and_optimizers_train_as_with_ddp(family: str, optimizer: str, more: Trained) -> None:
    assert_close(*(more[family, optimizer, strategy] for strategy in ("fsdp2", "ddp")), optimizer=optimizer)


@pytest.mark.slow
def test_a_checkpoint_has_one_part_for_each_worker_and_no_pickle(runs: Runs, trained: Trained, tmp_path: Path) -> None:
    """Torch's own reader of safetensors gets the same tensors from the parts."""
    run = trained["minigpt", "adamw", "fsdp2"]
    ref = CheckpointRef(attempt=1, step=6)
    manifest, prefix = run.manifest(ref), run.checkpoint_prefix(ref)
    parts = [name for name in manifest.files if name.startswith(PARTS)]
    assert parts == [f"{PARTS}00000.safetensors", f"{PARTS}00001.safetensors"]
    assert {name for name in manifest.files if name not in parts} == {
        WEIGHTS, "config.json", "assets/tokenizer.json", INDEX
    }  # fmt: skip
    stored = {key.removeprefix(f"{prefix}/") for key in runs.storage.list(f"{prefix}/")}
    assert stored == {*manifest.files, "manifest.json"}
    sizes = [manifest.files[name].size for name in parts]
    assert max(sizes) < 1.2 * min(sizes)

    for name in parts:
        runs.storage.download(f"{prefix}/{name}", tmp_path / Path(name).name)
    expected = weights(run)
    read = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    with pytest.warns(UserWarning, match="single process"):
        load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_run_resumes_with_another_strategy_or_alone(runs: Runs, trained: Trained) -> None:
    """From parts to parts (the same bits), to ddp, to one process; and from ddp to parts. No sample is lost."""
    shared, whole = (trained["minigpt", "adamw", strategy] for strategy in ("fsdp2", "ddp"))
    same = runs.copied(shared, runs.submit("minigpt", "adamw", "fsdp2", "same"))
    to_ddp = runs.copied(shared, runs.submit("minigpt", "adamw", "ddp", "to-ddp"))
    from_ddp = runs.copied(whole, runs.submit("minigpt", "adamw", "fsdp2", "from-ddp"))
    damaged = runs.copied(
        shared, runs.submit("minigpt", "adamw", "fsdp2", "damaged"), damage=f"{PARTS}00001.safetensors"
    )
    only = runs.copied(
        shared, runs.submit("minigpt", "adamw", "fsdp2", "only"), damage=f"{PARTS}00001.safetensors", damaged_step=3
    )
    game = trained["gan", "adamw", "fsdp2"]
    two_roles = runs.copied(game, runs.submit("gan", "adamw", "fsdp2", "two-roles"))
    runs.train(2, same, to_ddp, from_ddp, damaged, two_roles, only, attempt=2)
    alone = runs.copied(shared, runs.submit("minigpt", "adamw", "fsdp2", "alone"))
    assert run_attempt(runs.storage, alone.job, alone.model, 2, Group())
    for run in (same, to_ddp, from_ddp, damaged, two_roles, alone):
        assert run.chain()[-1].parent == CheckpointRef(attempt=1, step=3), run.job
    for run in (to_ddp, from_ddp, alone):
        assert_close(run, whole, attempt=2)
    assert only.chain()[-1].parent is None  # one rank could not read its part, so all of them begin again
    for run, first in ((same, shared), (damaged, shared), (two_roles, game), (only, shared)):
        mine, theirs = weights(run, attempt=2), weights(first)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert INDEX not in alone.manifest(CheckpointRef(attempt=2, step=6)).files


@pytest.mark.long
def test_from_two_workers_to_four_and_back(runs: Runs, more: Trained) -> None:
    """With every family, and rows that do not divide: some ranks have no row of a tensor."""
    first = {family: more[family, "adamw", "fsdp2"] for family in FAMILIES}
    grown = {f: runs.copied(first[f], runs.submit(f, "adamw", "fsdp2", "grown")) for f in FAMILIES}
    four = {f: runs.submit(f, "adamw", "fsdp2", "four") for f in FAMILIES}
    ddp = {f: runs.submit(f, "adamw", "ddp", "four") for f in FAMILIES}
    muon = [runs.submit("minigpt", "muon", strategy, "four") for strategy in ("fsdp2", "ddp")]
    runs.train(4, *four.values(), *ddp.values(), *muon)
    runs.train(4, *grown.values(), attempt=2)
    shrunk = {f: runs.copied(four[f], runs.submit(f, "adamw", "fsdp2", "shrunk")) for f in FAMILIES}
    runs.train(2, *shrunk.values(), attempt=2)
    for family in FAMILIES:
        assert_close(four[family], ddp[family])
        if family == "minigpt":  # the others draw noise, which depends on the number of workers
            assert_close(grown[family], first[family], attempt=2)
            assert_close(shrunk[family], four[family], attempt=2)
        assert len(share(grown[family].manifest(CheckpointRef(attempt=2, step=6)), 0, 1)) == 4
    assert_close(*muon, optimizer="muon")


class CountedReads(Wrapped):
    bytes_read = 0

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        self.bytes_read += len(target)
        return super().read_into(key, start, target)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Make this process a rank of a group without communication."""
    rank, world_size = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    yield rank, world_size
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("place", [(0, 2), (1, 2), (0, 3), (2, 3), (5, 200)], indirect=True)
def test_a_rank_reads_its_own_part_and_the_rows_that_it_needs(place: tuple[int, int], trained: Trained) -> None:
    rank, world_size = place
    run, ref = trained["minigpt", "adamw", "fsdp2"], CheckpointRef(attempt=1, step=6)
    manifest, prefix = run.manifest(ref), run.checkpoint_prefix(ref)
    storage = CountedReads(run.storage)
    whole = (INDEX, *share(manifest, rank, world_size))
    state = StoredState.read(storage, prefix, manifest, whole[1:], pinned=False)
    verified = sum(manifest.files[name].size for name in whole)
    assert storage.bytes_read == verified

    mesh, expected = init_device_mesh("cpu", (world_size,)), weights(run)
    needed = {name: rows_of(tensor, rank, world_size) for name, tensor in expected.items()}
    targets = {
        name: DTensor.from_local(
            torch.full_like(needed[name], torch.nan), mesh, [Shard(0)], run_check=False,
            shape=tensor.shape, stride=tensor.stride(),
        ) if tensor.ndim else torch.empty_like(tensor)
        for name, tensor in expected.items()
    }  # fmt: skip
    state.load(targets)
    for name, target in targets.items():
        assert torch.equal(target.to_local() if isinstance(target, DTensor) else target, needed[name]), name
    assert storage.bytes_read <= verified + sum(rows.nbytes for rows in needed.values())
    if world_size == 2:  # as many ranks as before: only the counts of steps, which rank 0 has saved, are not its own
        assert storage.bytes_read - verified == rank * sum(t.nbytes for t in expected.values() if not t.ndim)


def rows_of(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """Return the rows that `fully_shard` gives to a rank."""
    at_most = -(-len(tensor) // world_size) if tensor.ndim else 0
    return tensor[rank * at_most : (rank + 1) * at_most] if tensor.ndim else tensor


@pytest.mark.parametrize("place", [(1, 2), (3, 10), (7, 200)], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_worker_holds_its_share(place: tuple[int, int], family: str, tmp_path: Path) -> None:
    """Of weights, gradients and moments: as estimated before a run, but for rows that cannot be divided."""
    _, world_size = place
    spec = job("x", model(make_data(tmp_path), family, strategy="fsdp2")).models[0]
    group, dataset = Group(*place), open_dataset(spec.data)
    built, averaged, initial = _build_models(spec, dataset, group, None)
    assert initial is None, "rank 0 alone builds a whole model"
    assert all(tensor.is_meta for each in (built, averaged) for tensor in each.tensors().values())
    roles = built.roles(spec.train)
    shapes = [parameter.shape for role in roles for parameter in role.loss.parameters()]
    trainers = [RoleTrainer(role, spec.train, group, alone=len(roles) == 1) for role in roles]
    SharedState.begin(trainers, built, averaged, None, group, has_average=True)
    kept = sum(local(p).numel() for p in averaged.network.parameters())
    assert kept <= sum(
        -(-p.shape[0] // world_size) * p.shape[1:].numel() for p in averaged.network.parameters() if p.ndim
    )
    for parameter in (shared := [p for trainer in trainers for p in trainer.parameters]):
        parameter.grad = torch.zeros_like(parameter)
    for trainer in trainers:
        trainer.update()
    states = [value for t in trainers for o in t.optimizers for state in o.state.values() for value in state.values()]
    held = sum(local(tensor).numel() for tensor in [*shared, *shared, *(state for state in states if state.ndim)])
    assert held <= 4 * sum(-(-shape[0] // world_size) * shape[1:].numel() for shape in shapes)
    if world_size == 2:
        size = parameters.count(type(built), spec.model, dataset.info, spec.train)
        averaged = size.served / world_size + size.served  # this rank's rows, and all of it for an evaluation
        assert held == pytest.approx(parameters.held(size, spec.train, world_size) - averaged, rel=0.05)


@pytest.mark.parametrize("place", [(0, 1)], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_rank_0_builds_the_only_whole_model_and_frees_it(place: tuple[int, int], family: str, tmp_path: Path) -> None:
    """The shared models get the bits that every worker of ddp builds."""
    entry = model(make_data(tmp_path), family, strategy="fsdp2")
    if family == "vae":
        entry["model"]["likelihood"] = "gaussian"  # has a parameter without dimensions
    spec, group = job("x", entry).models[0], Group(*place)
    dataset = open_dataset(spec.data)
    built, averaged, initial = _build_models(spec, dataset, group, None)
    assert initial is not None
    torch.manual_seed(spec.train.seed)
    expected = build(spec, dataset).tensors()
    roles = built.roles(spec.train)
    trainers = [RoleTrainer(role, spec.train, group, alone=len(roles) == 1) for role in roles]
    SharedState.begin(trainers, built, averaged, initial, group, has_average=True)
    assert all(tensor.is_meta for tensor in initial.tensors().values())
    for each in (built, averaged):
        held = {name: local(tensor) for name, tensor in each.tensors().items() if not tensor.is_meta}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
        left = {name.partition(".")[0] for name in expected.keys() - held.keys()}
        assert left == ({"discriminator"} if each is averaged and family == "gan" else set()), "it has no average"
    changed = {id(p) for t in trainers for o in t.optimizers for part in o.param_groups for p in part["params"]}
    assert changed == {id(parameter) for trainer in trainers for parameter in trainer.parameters}


@pytest.mark.parametrize("world_size", [1, 10, 200])
@pytest.mark.parametrize("parts", [1, 10, 200])
def test_each_part_is_verified_by_one_rank(parts: int, world_size: int) -> None:
    lineage = Lineage(spec_digest="", data_digest="", code_version="", world_size=parts, parent=None)
    names = [f"{PARTS}{i:05}.safetensors" for i in range(parts)]
    files = {name: File(size=1, sha256="0" * 64) for name in (*names, INDEX, WEIGHTS, "config.json")}
    manifest = Manifest(step=1, samples=1, metrics={}, lineage=lineage, files=files)
    shares = [share(manifest, rank, world_size) for rank in range(world_size)]
    assert sorted(name for names in shares for name in names) == names
    assert max(map(len, shares)) == -(-parts // world_size)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="compile: got true, but strategy fsdp2 cannot be compiled; write false"):
        job("x", model(tmp_path, "vae", strategy="fsdp2", compile=True))
