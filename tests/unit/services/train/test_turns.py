"""Test the driver that takes attempts in turn, and what it gives its worker group. No Ray is started."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.runs.log_lines import log_lines
from genmodels.runs.records import Result
from genmodels.runs.store import Run
from genmodels.spec.sections import TrainConfig
from genmodels.storage import open_storage
from services.dispatch.backends import local_process
from services.dispatch.backends.local_process import SubprocessBackend
from services.dispatch.single_run import run_to_completion
from services.local.platform import submit
from services.train import warm_group
from services.train.turn_queue import Turn, TurnQueue
from services.train.turns import ended_well
from tests.support.paths import ROOT
from tests.support.plain_workers import WorkerGroup
from tests.support.tiny_jobs import job, make_data, model

PLAIN = [sys.executable, "-m", "tests.support.plain_turns"]


def test_each_rank_takes_each_turn_and_the_giver_waits_for_all() -> None:
    async def body() -> None:
        queue, ranks, taken = TurnQueue(3), range(3), list[tuple[int, Turn | None]]()

        async def work(rank: int) -> None:
            number = 0
            while turn := await queue.take(number):
                taken.append((rank, turn))
                await queue.done(number)
                number += 1
            taken.append((rank, None))

        workers = [asyncio.create_task(work(rank)) for rank in ranks[:2]]
        first = asyncio.create_task(queue.give(Turn("j", "a", 1)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert taken == [(0, Turn("j", "a", 1)), (1, Turn("j", "a", 1))]
        assert not first.done()  # the third rank has not done it
        workers.append(asyncio.create_task(work(2)))
        await first
        await queue.give(Turn("j", "b", 1))
        assert [turn for rank, turn in taken if rank == 2] == [Turn("j", "a", 1), Turn("j", "b", 1)]
        end = asyncio.create_task(queue.give(None))
        await asyncio.gather(*workers)
        assert [turn for rank, turn in taken[-3:]] == [None, None, None]
        end.cancel()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Result(outcome="succeeded"), True),
        (Result(outcome="failed", cause="gate"), True),
        (Result(outcome="stopped"), False),
        *((Result(outcome="failed", cause=cause), False) for cause in ("diverged", "superseded", "storage", "user")),
        *(
            (Result(outcome="failed", cause=cause), False)
            for cause in ("infrastructure", "out of memory", "no workers")
        ),
    ],
    ids=str,
)
def test_only_an_attempt_that_has_trained_to_its_end_leaves_a_group(result: Result, expected: bool) -> None:
    assert ended_well(result) == expected


@pytest.mark.slow
def test_one_driver_takes_attempts_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fails ends the driver; the result, the log and the log file of each attempt are its own."""
    data, storage = make_data(tmp_path), open_storage((tmp_path / "storage").as_uri())
    entries = [model(data, "minigpt", name, max_steps=2, save_every=2) for name in ("refused", "bad", "c")]
    entries[0]["serve"] = {"gate": {"metric": "val_loss", "max": 0.001}}
    entries[1]["train"] |= {"learning_rate": 1e30, "max_steps": 20}
    name = submit(storage, job("turns", *entries))
    monkeypatch.setattr(local_process, "turns_command", lambda number: [*PLAIN, str(number), "--here"])
    backend = SubprocessBackend(tmp_path / "logs", {"PYTHONPATH": str(ROOT)})
    states, processes = [], []
    for entry in entries:
        status, _ = run_to_completion(storage, backend, name, entry["name"], 1, lambda status, heartbeat: None)
        states.append(status.state)
        processes.append(backend._turns[name, entry["name"], status.attempt].process)
    assert states == ["failed", "failed", "succeeded"]
    assert processes[0] is processes[1] is not processes[2]
    for entry in entries:
        (last,) = [line.line for line in log_lines(Run(storage, name, entry["name"]), "driver")][-1:]
        assert f"attempt 1 of {name}/{entry['name']}: " in last
        assert last in backend.log(entry["name"], 1).read_text()
    backend.end_idle()
    assert processes[2]._popen.wait(30) == 0


@pytest.mark.slow
def test_the_bits_of_a_model_do_not_depend_on_the_models_before_it(tmp_path: Path) -> None:
    """In one worker group in turn, in two orders: the same files of the checkpoints."""
    data, families = make_data(tmp_path), ["gan", "vae", "minigpt", "autoencoder"]
    entries = [model(data, family, max_steps=3, save_every=3) for family in families]
    files = []
    for folder, order in ("one", families), ("other", families[::-1]):
        storage = open_storage((tmp_path / folder).as_uri())
        name = submit(storage, job("bits", *entries))
        with WorkerGroup(1, storage.url, [(name, family, 1) for family in order]) as group:
            group.succeed()
        manifests = [Run(storage, name, family).manifest(CheckpointRef(attempt=1, step=3)) for family in families]
        files.append([{name: file.sha256 for name, file in manifest.files.items()} for manifest in manifests])
    assert files[0] == files[1]


class FakeGroup:
    """A worker group that notes what becomes of it."""

    def __init__(self, shape: warm_group.Shape) -> None:
        self.shape, self.is_alive, self.turns = shape, True, list[str]()
        EVENTS.append(f"{shape.workers} workers start")

    def train(self, turn: Turn) -> None:
        EVENTS.append(turn.model)

    def end(self) -> None:
        EVENTS.append("end")


EVENTS = list[str]()


def test_a_group_is_kept_for_models_of_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that has died, another shape, and whatever might change the bits of the next model, need a new one."""
    EVENTS.clear()
    monkeypatch.setattr(warm_group, "_Group", FakeGroup)
    monkeypatch.setattr(warm_group, "connect", lambda watch: None)
    data = make_data(tmp_path)
    names = ("a", "b", "two", "compiled", "c", "sharded", "d", "e")
    specs = {name: job("j", model(data, "minigpt", name)).models[0] for name in names}
    specs["compiled"] = specs["compiled"].model_copy(update={"train": TrainConfig(compile=True)})
    specs["sharded"] = specs["sharded"].model_copy(update={"train": TrainConfig(strategy="fsdp2")})
    with warm_group.WarmGroup() as group:
        for name in names:
            workers = 2 if name in ("two", "sharded") else 1
            if name == "e" and group._group:
                group._group.is_alive = False
            group.train("file:///s", "j", specs[name], 1, workers, None)
    assert [
        *("1 workers start", "a", "b", "end"),
        *("2 workers start", "two", "end"),
        *("1 workers start", "compiled", "end"),
        *("1 workers start", "c", "end"),
        *("2 workers start", "sharded", "end"),
        *("1 workers start", "d", "end"),
        *("1 workers start", "e", "end"),
    ] == EVENTS
