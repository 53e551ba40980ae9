"""Test a run's objects in storage: one history despite late writes of superseded attempts, one winner per contest."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.checkpoint import MANIFEST, CheckpointRef
from genmodels.errors import CheckpointError, Conflict, StorageUnavailable, Superseded
from genmodels.runs.log_lines import log_lines
from genmodels.runs.metric_rows import metric_rows, training_seconds
from genmodels.runs.records import AttemptStart, ChainLink, GateResult, Heartbeat, Result, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage, write_document
from genmodels.storage.retry import retry_until_available
from tests.support.run_parts import write_log as write_part
from tests.support.run_parts import write_metrics
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped, in_threads, save


def rows(run: Run, attempt: int, first: int, last: int) -> None:
    steps = range(first, last + 1)
    write_metrics(run, attempt, [{"step": step, "by": attempt, "seconds": float(step)} for step in steps])


# ---- the chain


def test_what_a_superseded_attempt_writes_later_is_no_part_of_the_history(storage: Storage) -> None:
    run = Run(storage, "job-00000000", "model")
    assert (run.checkpoints(), list(metric_rows(run)), run.samples(), run.chain()) == ([], [], [], [])
    run.start_attempt(1, None, 2)
    for step in (3, 6):
        save(run, 1, step)
    rows(run, 1, 1, 3)
    rows(run, 1, 4, 6)
    run.write_sample(1, 6, "a.png", b"six")
    one = CheckpointRef(attempt=1, step=6)

    run.start_attempt(2, one, 2)
    rows(run, 2, 7, 9)
    save(run, 2, 9)
    run.write_sample(2, 9, "a.png", b"nine")
    # attempt 1 was paused before its next check of the fence, and continues as before
    run.fence = lambda attempt: None
    for step in (9, 12):
        save(run, 1, step)
    del run.fence
    rows(run, 1, 7, 12)
    run.write_sample(1, 9, "late.png", b"late")

    run.start_attempt(3, CheckpointRef(attempt=2, step=9), 2)
    rows(run, 3, 10, 10)
    rows(run, 2, 10, 11)

    assert run.chain() == [
        ChainLink(1, 6, None),
        ChainLink(2, 9, one),
        ChainLink(3, None, CheckpointRef(attempt=2, step=9)),
    ]
    assert run.checkpoints() == [CheckpointRef(attempt=1, step=3), one, CheckpointRef(attempt=2, step=9)]
    assert [ref for ref, _ in run.manifests()] == run.checkpoints()
    assert [(row["step"], row["by"]) for row in metric_rows(run)] == [
        *((step, 1) for step in range(1, 7)),
        *((step, 2) for step in range(7, 10)),
        (10, 3),
    ]
    assert run.samples() == [
        (6, "runs/job-00000000/model/attempt-1/samples/00000006/a.png"),
        (9, "runs/job-00000000/model/attempt-2/samples/00000009/a.png"),
    ]


def test_an_attempt_that_did_not_go_on_from_the_one_before_leaves_it_out() -> None:
    """Attempt 2 saved nothing; attempt 3 skipped the newest checkpoint of attempt 1, which is damaged."""
    run = Run(MemoryStorage(), "j", "m")
    run.start_attempt(1, None, 1)
    for step in (3, 6):
        save(run, 1, step)
    run.start_attempt(2, CheckpointRef(attempt=1, step=6), 1)
    rows(run, 2, 7, 8)
    run.start_attempt(3, CheckpointRef(attempt=1, step=3), 1)
    rows(run, 3, 4, 5)
    assert [(link.attempt, link.until) for link in run.chain()] == [(1, 3), (3, None)]
    assert run.checkpoints() == [CheckpointRef(attempt=1, step=3)]
    assert [(row["by"], row["step"]) for row in metric_rows(run)] == [(3, 4), (3, 5)]


def test_numbers_of_two_digits_are_not_mistaken(storage: Storage) -> None:
    run, other = Run(storage, "j", "m"), Run(storage, "j", "m2")
    for attempt in range(1, 13):
        run.start_attempt(attempt, None, 1)
    save(run, 12, 1)
    rows(run, 12, 1, 1)
    rows(run, 1, 1, 1)
    assert run.started() == list(range(1, 13))
    assert run.checkpoints() == [CheckpointRef(attempt=12, step=1)]
    assert [row["by"] for row in metric_rows(run)] == [12]
    assert (other.started(), other.checkpoints()) == ([], [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5))
def test_history_is_what_its_own_attempts_did(attempts: list[tuple[int, int, int]]) -> None:
    """Compare with a model: each attempt saves some steps, is superseded, and then still writes more."""
    run = Run(MemoryStorage(), "j", "m")
    unfenced = Run(run.storage, "j", "m")
    unfenced.fence = lambda attempt: None
    expected: list[tuple[int, int]] = []  # (attempt, step) of the checkpoints that count
    late: list[tuple[int, int]] = []
    for number, (saves, lost, more) in enumerate(attempts, 1):
        expected = expected[: max(0, len(expected) - lost)]  # the newest `lost` checkpoints are damaged
        parent = CheckpointRef(attempt=expected[-1][0], step=expected[-1][1]) if expected else None
        run.start_attempt(number, parent, 1)
        for attempt, step in late:
            save(unfenced, attempt, step)
            rows(run, attempt, step, step)
        first = parent.step if parent else 0
        for step in range(first + 1, first + 1 + saves):
            save(run, number, step)
            rows(run, number, step, step)
            expected.append((number, step))
        late = [(number, first + saves + 1 + i) for i in range(more)]
    run.start_attempt(
        len(attempts) + 1, CheckpointRef(attempt=expected[-1][0], step=expected[-1][1]) if expected else None, 1
    )
    for attempt, step in late:
        save(unfenced, attempt, step)
        rows(run, attempt, step, step)
    assert [(ref.attempt, ref.step) for ref in run.checkpoints()] == expected
    assert [(row["by"], row["step"]) for row in metric_rows(run)] == expected


@pytest.mark.parametrize("parent", [1, 2])
def test_a_damaged_start_causes_no_endless_loop(parent: int) -> None:
    run = Run(MemoryStorage(), "j", "m")
    start = AttemptStart(
        attempt=1, parent=CheckpointRef(attempt=parent, step=3), world_size=1, time="2026-01-01T00:00Z"
    )
    write_document(run.storage, "runs/j/m/attempt-1/start.json", start.model_dump())
    with pytest.raises(CheckpointError, match=f"attempt 1 cannot continue from attempt {parent}"):
        run.chain()


def test_a_history_with_a_hole_is_an_error() -> None:
    run = Run(MemoryStorage(), "j", "m")
    run.start_attempt(3, CheckpointRef(attempt=2, step=3), 1)
    with pytest.raises(CheckpointError, match=r"names attempt 2, which has no start\.json"):
        run.checkpoints()


# ---- logs


def write_log(run: Run, attempt: int, source: str, number: int, *rows: tuple[str, str]) -> None:
    lines = [json.dumps({"time": time, "line": line}) + "\n" for time, line in rows]
    write_part(run, attempt, source, number, "".join(lines).encode())


def started(run: Run, attempt: int, time: str) -> None:
    """Start an attempt at a given time."""
    start = AttemptStart(attempt=attempt, parent=None, world_size=1, time=time)
    write_document(run.storage, f"{run.prefix}/attempt-{attempt}/start.json", start.model_dump(mode="json"))


def test_logs_are_merged_by_time_and_cut_where_a_later_attempt_took_over(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    assert list(log_lines(run)) == []
    write_log(
        run,
        1,
        "driver",
        1,
        ("2026-01-01T10:00Z", "driver 1 begins"),
        ("2026-01-01T10:09Z", "driver 1: a worker was lost"),
    )
    started(run, 1, "2026-01-01T10:02Z")
    write_log(run, 1, "0", 1, ("2026-01-01T10:03Z", "rank 0"), ("2026-01-01T10:04Z", "rank 0 again"))
    write_log(run, 1, "0", 2, ("2026-01-01T10:06Z", "rank 0 at last"))
    write_log(run, 1, "1", 1, ("2026-01-01T10:03Z", "rank 1"), ("2026-01-01T10:05Z", "rank 1 at last"))
    write_log(run, 2, "driver", 1, ("2026-01-01T10:10Z", "driver 2: no workers"))  # it never started: no cut
    write_log(run, 1, "1", 2, ("2026-01-01T10:12Z", "paused until now; attempt 2 has not started"))
    write_log(run, 3, "driver", 1, ("2026-01-01T10:19Z", "driver 3 begins"))
    started(run, 3, "2026-01-01T10:20Z")
    write_log(run, 3, "0", 1, ("2026-01-01T10:21Z", "rank 0 of 3"))
    # both wake
    write_log(
        run,
        1,
        "1",
        3,
        ("2026-01-01T10:19Z", "just in time"),
        ("2026-01-01T10:20Z", "late"),
        ("2026-01-01T10:30Z", "later"),
    )
    write_log(run, 2, "driver", 2, ("2026-01-01T10:21Z", "late too"))
    assert [(line.attempt, line.source, line.line) for line in log_lines(run)] == [
        (1, "driver", "driver 1 begins"),
        (1, "0", "rank 0"),
        (1, "1", "rank 1"),
        (1, "0", "rank 0 again"),
        (1, "1", "rank 1 at last"),
        (1, "0", "rank 0 at last"),
        (1, "driver", "driver 1: a worker was lost"),
        (1, "1", "paused until now; attempt 2 has not started"),
        (1, "1", "just in time"),
        (2, "driver", "driver 2: no workers"),
        (3, "driver", "driver 3 begins"),
        (3, "0", "rank 0 of 3"),
    ]
    assert [line.line for line in log_lines(run, "1")] == [
        "rank 1",
        "rank 1 at last",
        "paused until now; attempt 2 has not started",
        "just in time",
    ]
    assert list(log_lines(run, "7")) == []


def test_a_log_is_followed_with_a_cursor(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    cursor: dict[str, str] = {}

    def new(source: str | None = None) -> list[str]:
        return [line.line for line in log_lines(run, source, cursor)]

    assert new() == []
    write_log(run, 1, "driver", 1, ("2026-01-01T10:00Z", "a"))
    write_log(run, 1, "0", 1, ("2026-01-01T10:01Z", "b"), ("2026-01-01T10:02Z", "c"))
    assert new() == ["a", "b", "c"]
    assert new() == []
    write_log(run, 1, "0", 2, ("2026-01-01T10:03Z", "d"))
    write_log(run, 1, "1", 1, ("2026-01-01T10:01Z", "e"))  # shipped after the cursor
    assert new() == ["e", "d"]
    started(run, 2, "2026-01-01T10:05Z")
    write_log(run, 1, "0", 3, ("2026-01-01T10:04Z", "f"), ("2026-01-01T10:05Z", "late"))
    write_log(run, 2, "0", 1, ("2026-01-01T10:06Z", "g"))
    assert new() == ["f", "g"]
    assert new() == []
    assert [line.line for line in log_lines(run, "driver", {})] == ["a"]


def test_many_parts_of_logs_and_metrics_do_not_slow_the_fence() -> None:
    """The fence lists the attempts, not their objects."""

    class Counting(Wrapped):
        looked = 0

        def after(self, verb: str, key: str) -> None:
            self.looked += 1

    storage = Counting()
    run = Run(storage, "j", "m")
    for attempt in (1, 2, 3):
        run.start_attempt(attempt, None, 1)
    for number in range(1, 501):
        write_log(run, 3, "0", number, ("2026-01-01T10:00Z", "a"))
    storage.looked, listed = 0, storage.list

    def no_list(prefix: str, **options: object) -> list[str]:
        raise AssertionError(f"{prefix} is listed")

    storage.list = no_list
    run.fence(3)
    assert storage.looked == 1
    with pytest.raises(Superseded):
        run.fence(2)
    assert storage.looked == 3
    assert len(listed("runs/j/m/attempt-3/logs/")) == 500


# ---- starts and the fence


def test_an_attempt_is_started_once(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    assert run.start_attempt(1, None, 2) == run.attempt_start(1)
    with pytest.raises(Superseded, match="attempt 1 of j/m was started by another process"):
        run.start_attempt(1, None, 2)
    assert run.attempt_start(1).world_size == 2
    assert run.attempt_start(2) is None


def test_one_of_eight_contenders_starts(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    answers = in_threads(8, lambda i: run.start_attempt(1, None, i + 1))
    winners = [answer for answer in answers if isinstance(answer, AttemptStart)]
    assert len(winners) == 1
    assert run.attempt_start(1) == winners[0]
    assert all(isinstance(answer, Superseded) for answer in answers if answer is not winners[0])


def test_the_fence_passes_only_the_highest_start() -> None:
    run = Run(MemoryStorage(), "j", "m")
    run.fence(1)
    run.start_attempt(2, None, 1)
    run.fence(2)
    run.write_heartbeat(3, Heartbeat(phase="starting"))  # an attempt that has not started overtakes no other
    run.fence(2)
    for attempt in (0, 1):
        with pytest.raises(Superseded, match=f"attempt 2 of j/m has taken over from attempt {attempt}"):
            run.fence(attempt)
    with pytest.raises(Superseded, match="attempt 2 of j/m has taken over from attempt 1"):
        run.start_attempt(1, None, 1)
    with pytest.raises(Superseded):
        save(run, 1, 3)
    assert run.chain() == [ChainLink(2, None, None)]
    assert not any(MANIFEST in key for key in run.storage.list("runs/"))


@pytest.mark.parametrize("error", [StorageUnavailable, Conflict])
def test_a_start_whose_answer_was_lost_is_a_win(error: type[Exception]) -> None:
    """A client that tries again after a lost answer gets a Conflict."""

    class Lossy(Wrapped):
        lost = 0

        def after(self, verb: str, key: str) -> None:
            if verb == "put" and not self.lost:
                self.lost += 1
                raise error(key)

    storage = Lossy()
    run = Run(storage, "j", "m")
    start = run.start_attempt(1, None, 2)
    assert (storage.lost, run.attempt_start(1)) == (1, start)
    with pytest.raises(Superseded):
        run.start_attempt(1, None, 2)


# ---- commands and status


def test_commands_are_for_their_attempt(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    run.send_command("stop", 1, "Ctrl-C")
    run.send_command("stop", 2, "preempted")
    assert run.send_command("kill", 2, "a person", then="cancelled") == run.commands(2)[1]
    assert [(command.action, command.reason) for command in run.commands(2)] == [
        ("stop", "preempted"),
        ("kill", "a person"),
    ]
    assert [command.attempt for command in run.commands(1)] == [1]
    assert run.commands(3) == []
    assert [(command.seq, command.attempt, command.then) for command in run.commands()] == [
        (1, 1, "queued"),
        (2, 2, "queued"),
        (3, 2, "cancelled"),
    ]
    assert [command.seq for command in run.commands(after=1)] == [2, 3]
    assert [command.seq for command in run.commands(1, after=1)] == []
    assert run.commands(after=3) == []


def test_no_command_of_eight_is_lost(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    sent = in_threads(8, lambda i: run.send_command("stop", 1, f"reason {i}"))
    assert sorted(command.seq for command in sent) == list(range(1, 9))
    assert sorted(sent, key=lambda command: command.seq) == run.commands(1)
    assert sorted(command.reason for command in run.commands(1)) == [f"reason {i}" for i in range(8)]


def test_status_is_swapped_by_the_process_that_read_it_last(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    status, etag = run.status()
    assert (status, etag, status.reason) == (Status(state="queued"), None, "")
    mine = run.write_status(status.to("starting", "attempt 1", attempt=1), None)
    with pytest.raises(Conflict):
        run.write_status(status.to("starting", "attempt 1 too", attempt=1), None)
    run.write_status(run.status()[0].to("running", "training"), mine)
    with pytest.raises(Conflict):
        run.write_status(status.to("failed", "late"), mine)
    stored, _ = run.status()
    assert (stored.state, stored.attempt, stored.reason) == ("running", 1, "training")
    history = [(change.state, change.reason) for change in stored.history]
    assert history == [("starting", "attempt 1"), ("running", "training")]


def test_one_of_eight_dispatchers_swaps_the_status(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    etag = run.write_status(Status(state="queued"), None)
    answers = in_threads(8, lambda i: run.write_status(Status(state="queued").to("starting", f"{i}", attempt=i), etag))
    winners = [i for i, answer in enumerate(answers) if isinstance(answer, str)]
    assert len(winners) == 1
    assert run.status()[0].attempt == winners[0]


# ---- documents


def test_figures_that_are_not_finite_survive(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    run.start_attempt(1, None, 1)
    row = {"step": 1, "loss": math.nan, "up": math.inf, "down": -math.inf, "val_loss": 0.1 + 0.2, "seconds": 1.0}
    write_metrics(run, 1, [row])
    for line in storage.get("runs/j/m/attempt-1/metrics/00000000-00000001.jsonl")[0].decode().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (stored,) = metric_rows(run)
    assert math.isnan(stored.pop("loss"))
    assert stored == {key: value for key, value in row.items() if key != "loss"}

    save(run, 1, 1, val_loss=math.nan, val_psnr=math.inf)
    metrics = run.manifest(CheckpointRef(attempt=1, step=1)).metrics
    assert math.isnan(metrics["val_loss"])
    assert metrics["val_psnr"] == math.inf

    run.write_heartbeat(1, Heartbeat(phase="training", step=3, loss=math.nan))
    assert math.isnan(run.heartbeat(1).loss)
    gate = GateResult(metric="val_loss", value=math.nan, passed=False, reason="no")
    run.write_result(1, Result(outcome="failed", cause="gate", metrics={"val_loss": math.nan}, gate=gate))
    result = run.result(1)
    assert result is not None
    assert math.isnan(result.metrics["val_loss"])
    assert math.isnan(result.gate.value)


def test_an_object_not_yet_written_is_none() -> None:
    run = Run(MemoryStorage(), "j", "m")
    assert (run.heartbeat(1), run.result(1), run.attempt_start(1)) == (None, None, None)


def test_an_older_process_reads_what_a_newer_one_wrote() -> None:
    run = Run(MemoryStorage(), "j", "m")
    change = {"state": "running", "time": "2026-01-01T00:00Z", "reason": "r", "by": "x"}
    documents = {
        "status.json": {"state": "running", "attempt": 1, "priority": 9, "history": [change]},
        "attempt-1/start.json": {
            "attempt": 1,
            "parent": None,
            "world_size": 2,
            "time": "2026-01-01T00:00Z",
            "nodes": ["a"],
        },
        "attempt-1/heartbeat.json": {"phase": "training", "step": 4, "gpu": 0.5},
        "attempt-1/result.json": {"outcome": "stopped", "step": 4, "cost": 1},
        "commands/00000001.json": {
            "action": "stop",
            "attempt": 1,
            "then": "queued",
            "reason": "r",
            "time": "2026-01-01T00:00Z",
            "by": "x",
        },
    }
    for name, document in documents.items():
        write_document(run.storage, f"runs/j/m/{name}", document)
    assert run.status()[0].history[0].reason == "r"
    assert run.chain() == [ChainLink(1, None, None)]
    assert run.heartbeat(1) == Heartbeat(phase="training", step=4)
    assert run.result(1) == Result(outcome="stopped", step=4)
    assert [command.action for command in run.commands(1)] == ["stop"]


def test_training_seconds_are_those_of_the_steps_that_count() -> None:
    """Attempt 1 is cut at step 2 of 4; attempt 2 counts its own seconds, more than attempt 1 ended with."""
    run = Run(MemoryStorage(), "j", "m")
    assert training_seconds(run) == 0
    run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": step, "seconds": step * 1.0} for step in (1, 2, 3, 4)])
    assert training_seconds(run) == 4.0
    run.start_attempt(2, CheckpointRef(attempt=1, step=2), 1)
    write_metrics(run, 2, [{"step": 3, "seconds": 7.0}, {"step": 4, "seconds": 8.5}])
    assert training_seconds(run) == 2.0 + 8.5
    run.start_attempt(3, CheckpointRef(attempt=2, step=3), 1)
    assert training_seconds(run) == 2.0 + 7.0


# ---- leftovers


def test_leftovers_are_directories_without_a_manifest_below_a_step(storage: Storage) -> None:
    run = Run(storage, "j", "m")
    run.start_attempt(1, None, 1)
    for step in (3, 6, 9):
        save(run, 1, step)
    storage.put("runs/j/m/attempt-2/checkpoints/step-00000005/state/model.safetensors", b"an upload that never ended")
    for step in (3, 9):
        storage.delete(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=step))}/{MANIFEST}")
    three = "runs/j/m/attempt-1/checkpoints/step-00000003/model.safetensors"
    five = "runs/j/m/attempt-2/checkpoints/step-00000005/state/model.safetensors"
    nine = "runs/j/m/attempt-1/checkpoints/step-00000009/model.safetensors"
    assert run.leftovers(before_step=3) == []
    assert run.leftovers(before_step=9) == [three, five]
    assert run.leftovers(before_step=10) == [three, nine, five]


def test_manifests_skips_damaged_objects() -> None:
    run = Run(MemoryStorage(), "j", "m")
    run.start_attempt(1, None, 1)
    for step in (1, 2, 3):
        save(run, 1, step)
    run.storage.put(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=2))}/{MANIFEST}", b"{")
    assert [ref.step for ref, _ in run.manifests()] == [1, 3]


# ---- retries


def test_retries_outlast_an_outage_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genmodels.storage.retry.MAX_WAIT_SECONDS", 0.001)
    storage = FailingStorage()
    storage.away = True
    waits = []

    def wait(outage: StorageUnavailable) -> None:
        assert outage.reason == "the storage does not answer"
        waits.append(storage.refused)
        storage.away = len(waits) < 5

    assert retry_until_available(lambda: storage.put("a", b"1"), wait) == storage.get("a")[1]
    assert waits == [1, 2, 3, 4, 5]
    storage.away = True
    with pytest.raises(KeyboardInterrupt):
        retry_until_available(lambda: storage.get("a"), _interrupt)
    storage.away = False
    with pytest.raises(Conflict):
        retry_until_available(lambda: storage.put("a", b"2", if_absent=True))


def _interrupt(outage: StorageUnavailable) -> None:
    raise KeyboardInterrupt
