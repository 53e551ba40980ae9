"""From a queued run to its end: what is tried again, what is not, and who may say so. Drivers are scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import FailingStorage, MemoryStorage, Wrapped, save

from genmodels import run as run_module
from genmodels.checkpoint import Place
from genmodels.errors import GenmodelsError, StorageUnavailable
from genmodels.run import GateResult, Heartbeat, Result, Run, Status
from genmodels.storage import Storage
from services import dispatch
from services.dispatch import Dispatcher, SubprocessBackend

JOB, MODEL = "job-00000000", "model"
Script = Callable[[Run, int], Iterator[object]]  # what a driver does; each `yield` is one look at it


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "BACK_OFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(run_module, "LONGEST_WAIT_SECONDS", 0.001)


class Driver:
    def __init__(self, steps: Iterator[object]) -> None:
        self.steps, self.code, self.killed = steps, None, False

    def poll(self) -> int | None:
        if self.code is None:
            try:
                next(self.steps)
            except StopIteration as end:
                self.code = end.value or 0
        return self.code

    def kill(self) -> None:
        self.code, self.killed = -9, True


class Drivers:
    """A backend whose n-th driver follows the n-th script; the last one is used again and again."""

    def __init__(self, storage: Storage, *scripts: Script) -> None:
        self.storage, self.scripts = storage, list(scripts)
        self.attempts: list[int] = []
        self.drivers: list[Driver] = []

    def start(self, storage_url: str, job: str, model: str, attempt: int) -> Driver:
        assert storage_url == self.storage.url
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.attempts.append(attempt)
        self.drivers.append(Driver(script(Run(self.storage, job, model), attempt)))
        return self.drivers[-1]


class Seen(list[tuple[str, str | None]]):
    """A watcher: the states and phases it was shown, without repetitions."""

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        shown = (status.state, heartbeat.phase if heartbeat else None)
        if not self or self[-1] != shown:
            self.append(shown)


def ends(outcome: Any, cause: Any = None, message: str = "", saves: bool = False, **more: Any) -> Script:
    """A driver that trains, saves a checkpoint if told, and leaves this result."""

    def script(run: Run, attempt: int) -> Iterator[object]:
        run.beat(attempt, Heartbeat(phase="starting"))
        yield
        run.start(attempt, (run.checkpoints() or [None])[-1], 1)
        run.beat(attempt, Heartbeat(phase="training", step=attempt * 10 - 9))
        yield
        if saves:
            save(run, attempt, attempt * 10)
        run.end(attempt, Result(outcome=outcome, cause=cause, message=message or f"{outcome} {attempt}", **more))

    return script


def succeeds(run: Run, attempt: int) -> Iterator[object]:
    yield from ends("left", saves=True)(run, attempt)
    run.beat(attempt, Heartbeat(phase="publishing"))
    yield
    run.end(attempt, Result(outcome="succeeded", version=3, message="published as model@3"))


def dies(run: Run, attempt: int) -> Iterator[object]:
    yield
    return 137


def carry(storage: Storage, *scripts: Script, watch: Any = None) -> tuple[Status, Result | None, Drivers]:
    backend = Drivers(storage, *scripts)
    status, result = Dispatcher(storage, backend).carry(JOB, MODEL, Seen() if watch is None else watch)
    stored, _ = Run(storage, JOB, MODEL).status()
    assert stored == status
    return status, result, backend


def states(status: Status) -> list[tuple[str, str]]:
    return [(change.state, change.reason) for change in status.history]


# ---- ends


def test_success(storage: Storage) -> None:
    seen = Seen()
    status, result, backend = carry(storage, succeeds, watch=seen)
    assert result is not None
    assert (status.state, status.attempt, result.version, backend.attempts) == ("succeeded", 1, 3, [1])
    assert states(status) == [
        ("starting", "attempt 1"),
        ("running", "the workers train"),
        ("publishing", "training has ended"),
        ("succeeded", "published as model@3"),
    ]
    assert all(change.time for change in status.history)
    assert seen == [
        ("starting", None),
        ("starting", "starting"),
        ("running", None),
        ("running", "training"),
        ("publishing", None),
        ("publishing", "publishing"),
        ("succeeded", None),
    ]


def test_a_state_is_stored_before_anyone_is_told() -> None:
    storage = MemoryStorage()

    def watch(status: Status, heartbeat: Heartbeat | None) -> None:
        assert Run(storage, JOB, MODEL).status()[0] == status

    carry(storage, ends("failed", "infrastructure"), succeeds, watch=watch)


def test_what_has_succeeded_never_changes() -> None:
    storage = MemoryStorage()
    first, _, _ = carry(storage, succeeds)
    objects = dict(storage.objects)
    again, result, backend = carry(storage, dies)
    assert (again, backend.attempts) == (first, [])
    assert result is not None
    assert result.version == 3
    assert storage.objects == objects


@pytest.mark.parametrize("cause", ["user", "diverged", None])
def test_the_user_is_told_at_once(cause: Any) -> None:
    status, result, backend = carry(MemoryStorage(), ends("failed", cause, "step 7: loss = nan"))
    assert (status.state, status.reason, backend.attempts) == ("failed", "step 7: loss = nan", [1])
    assert result is not None
    assert result.cause == cause


def test_a_failed_gate_is_final() -> None:
    storage = MemoryStorage()
    gate = GateResult(metric="val_loss", value=130.0, passed=False, reason="val_loss 130 is not <= 120")
    script = ends("failed", "gate", "not published: val_loss 130 is not <= 120", saves=True, gate=gate)
    first, _, backend = carry(storage, script)
    assert (first.state, backend.attempts) == ("failed", [1])
    again, result, backend = carry(storage, succeeds)
    assert (again, backend.attempts) == (first, [])
    assert result is not None
    assert result.gate == gate


def test_what_failed_otherwise_is_tried_again_by_a_second_carry() -> None:
    storage = MemoryStorage()
    carry(storage, ends("failed", "user", "no such file"))
    status, _, backend = carry(storage, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [2])
    assert [state for state, _ in states(status)][:3] == ["starting", "running", "failed"]


# ---- tried again


@pytest.mark.parametrize("cause", ["infrastructure", "superseded", "out of memory"])
def test_what_may_pass_is_tried_again(cause: Any) -> None:
    status, _, backend = carry(MemoryStorage(), ends("failed", cause, "a worker was lost"), succeeds)
    assert (status.state, status.attempt, backend.attempts) == ("succeeded", 2, [1, 2])
    assert states(status)[1:4] == [
        ("running", "the workers train"),
        ("queued", "a worker was lost"),
        ("starting", "attempt 2"),
    ]


def test_an_attempt_that_left_is_followed_by_the_next() -> None:
    storage = MemoryStorage()
    status, _, backend = carry(storage, ends("left", saves=True), succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2])
    assert Run(storage, JOB, MODEL).chain()[-1].parent == Place(attempt=1, step=10)


def test_a_driver_that_dies_without_a_word_is_tried_again() -> None:
    status, _, backend = carry(MemoryStorage(), dies, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2])
    assert states(status)[1] == ("queued", "the driver ended with code 137 and left no result")


def test_a_result_counts_whatever_the_exit_code() -> None:
    def script(run: Run, attempt: int) -> Iterator[object]:
        yield from succeeds(run, attempt)
        return 1

    assert carry(MemoryStorage(), script)[0].state == "succeeded"


def test_three_attempts_that_lead_nowhere_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(dispatch, "BACK_OFF_SECONDS", (1.0, 5.0, 15.0))
    monkeypatch.setattr(dispatch.time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    status, _, backend = carry(MemoryStorage(), dies)
    assert (status.state, backend.attempts) == ("failed", [1, 2, 3])
    assert status.reason == (
        "3 attempts without a new checkpoint; the last: the driver ended with code 137 and left no result"
    )
    assert pauses == [5.0, 15.0]


def test_a_new_checkpoint_resets_the_count() -> None:
    lost, saved = ends("failed", "infrastructure"), ends("failed", "infrastructure", saves=True)
    status, _, backend = carry(MemoryStorage(), dies, lost, saved, dies, lost, saved, saved, dies, lost, dies)
    assert (status.state, backend.attempts) == ("failed", list(range(1, 11)))
    status, _, backend = carry(MemoryStorage(), *[saved] * 8, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", list(range(1, 10)))


def test_a_new_checkpoint_is_progress_also_below_one_that_was_damaged() -> None:
    """Attempt 1 saved step 50, which was found damaged: 2 and 3 save 20 and 30, and are not fruitless."""

    def far(run: Run, attempt: int) -> Iterator[object]:
        run.start(attempt, None, 1)
        save(run, attempt, 50)
        yield

    def again(run: Run, attempt: int) -> Iterator[object]:
        run.start(attempt, None, 1)
        save(run, attempt, attempt * 10)
        yield

    status, _, backend = carry(MemoryStorage(), far, again, again, again, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2, 3, 4, 5])


def test_memory_is_short_twice_at_most() -> None:
    short = ends("failed", "out of memory", "out of memory; lower train.batch_size", saves=True)
    status, result, backend = carry(MemoryStorage(), short)
    assert (status.state, status.reason) == ("failed", "out of memory; lower train.batch_size")
    assert backend.attempts == [1, 2]
    assert result is not None
    assert result.cause == "out of memory"


def test_attempts_are_numbered_on_after_whatever_happened() -> None:
    """The process that carried the run was killed in mid-run: the next one neither waits nor uses a number twice."""
    storage = MemoryStorage()
    run = Run(storage, JOB, MODEL)
    run.write_status(Status(state="queued").to("running", "by one that was killed", 4), None)
    status, _, backend = carry(storage, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [5])


# ---- two dispatchers


def test_of_two_dispatchers_one_stops_at_its_next_write() -> None:
    storage = MemoryStorage()

    def script(run: Run, attempt: int) -> Iterator[object]:
        status, etag = run.status()
        run.write_status(status.to("starting", "attempt 2 of another", 2), etag)
        run.beat(attempt, Heartbeat(phase="training", step=1))
        while not run.wishes(attempt):
            yield
        run.end(attempt, Result(outcome="left"))

    backend = Drivers(storage, script)
    with pytest.raises(GenmodelsError, match="run job-00000000/model is carried by another dispatcher; this one stops"):
        Dispatcher(storage, backend).carry(JOB, MODEL, Seen())
    status, _ = Run(storage, JOB, MODEL).status()
    assert (status.state, status.reason, status.attempt) == ("starting", "attempt 2 of another", 2)
    assert backend.attempts == [1]
    assert backend.drivers[0].code == 0, "its driver was asked to leave, and did"


def test_a_dispatcher_that_comes_second_starts_nothing() -> None:
    class Contested(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith("status.json") and not self.inner.exists(key):
                Run(self.inner, JOB, MODEL).write_status(Status(state="starting", attempt=1), None)

    storage = Contested()
    backend = Drivers(storage, succeeds)
    with pytest.raises(GenmodelsError, match="carried by another dispatcher"):
        Dispatcher(storage, backend).carry(JOB, MODEL, Seen())
    assert backend.attempts == []


# ---- Ctrl-C


class Interrupting:
    """A watcher that is interrupted at a state and phase, `times` times."""

    def __init__(self, state: str, phase: str | None, times: int = 1) -> None:
        self.at, self.times = (state, phase), times

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        if self.at == (status.state, heartbeat.phase if heartbeat else None) and self.times:
            self.times -= 1
            raise KeyboardInterrupt


def obedient(run: Run, attempt: int) -> Iterator[object]:
    """Trains until it is asked to leave, then saves, which takes a while."""
    run.start(attempt, None, 1)
    run.beat(attempt, Heartbeat(phase="training", step=7))
    while not run.wishes(attempt):
        yield
    for _ in range(5):
        yield
    save(run, attempt, 8)
    run.end(attempt, Result(outcome="left", step=8))


def interrupted(storage: Storage, script: Script, watch: Interrupting) -> tuple[Status, Drivers]:
    backend = Drivers(storage, script)
    with pytest.raises(KeyboardInterrupt):
        Dispatcher(storage, backend).carry(JOB, MODEL, watch)
    return Run(storage, JOB, MODEL).status()[0], backend


def test_ctrl_c_has_the_attempt_save_and_leave(storage: Storage) -> None:
    status, backend = interrupted(storage, obedient, Interrupting("running", "training"))
    run = Run(storage, JOB, MODEL)
    assert [(wish.wish, wish.reason) for wish in run.wishes(1)] == [("leave", "stopped by Ctrl-C")]
    assert (backend.drivers[0].code, backend.drivers[0].killed) == (0, False)
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; goes on from step 8")
    again, _, _ = carry(storage, succeeds)
    assert again.state == "succeeded"


def test_ctrl_c_while_nothing_is_trained_yet_ends_it_at_once() -> None:
    def slow(run: Run, attempt: int) -> Iterator[object]:
        run.beat(attempt, Heartbeat(phase="starting"))
        while True:
            yield

    status, backend = interrupted(MemoryStorage(), slow, Interrupting("starting", "starting"))
    assert backend.drivers[0].killed
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; goes on from step 0")


def test_ctrl_c_before_the_driver_is_started() -> None:
    status, backend = interrupted(MemoryStorage(), succeeds, Interrupting("starting", None))
    assert backend.attempts == []
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; goes on from step 0")


def test_ctrl_c_after_the_driver_has_ended_wishes_nothing() -> None:
    storage = MemoryStorage()

    def quick(run: Run, attempt: int) -> Iterator[object]:
        run.beat(attempt, Heartbeat(phase="publishing"))
        run.end(attempt, Result(outcome="succeeded", version=1))
        return
        yield

    status, _ = interrupted(storage, quick, Interrupting("publishing", "publishing"))
    assert status.state == "queued"
    assert Run(storage, JOB, MODEL).wishes(1) == []


def stubborn(run: Run, attempt: int) -> Iterator[object]:
    run.start(attempt, None, 1)
    run.beat(attempt, Heartbeat(phase="training", step=7))
    while True:
        yield


def test_a_driver_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEAVE_SECONDS", 0.05)
    storage = MemoryStorage()
    status, backend = interrupted(storage, stubborn, Interrupting("running", "training"))
    assert backend.drivers[0].killed
    assert len(Run(storage, JOB, MODEL).wishes(1)) == 1
    assert status.state == "queued"


def test_a_second_ctrl_c_kills_at_once() -> None:
    class Impatient(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and "/wishes/" in key:
                raise KeyboardInterrupt

    storage = Impatient()
    status, backend = interrupted(storage, stubborn, Interrupting("running", "training"))
    assert backend.drivers[0].killed
    assert status.state == "queued"


def test_what_goes_wrong_here_lets_the_attempt_leave_too() -> None:
    storage = MemoryStorage()
    backend = Drivers(storage, obedient)

    def watch(status: Status, heartbeat: Heartbeat | None) -> None:
        if heartbeat:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        Dispatcher(storage, backend).carry(JOB, MODEL, watch)
    assert backend.drivers[0].code == 0
    assert Run(storage, JOB, MODEL).status()[0].reason == "stopped: the terminal is gone; goes on from step 8"


# ---- a store that is away


def test_an_outage_neither_fails_a_run_nor_counts() -> None:
    """The store goes away at every point of a run in turn, for a while."""

    class Blinking(Wrapped):
        operations, refused, at = 0, 0, 0

        def before(self, verb: str, key: str) -> None:
            if driving:
                return
            self.operations += 1
            if self.operations >= self.at and self.refused < 12:
                self.refused += 1
                raise StorageUnavailable(key)

    def sheltered(run: Run, attempt: int) -> Iterator[object]:
        nonlocal driving
        steps = succeeds(run, attempt)
        while True:  # the driver has its own ways with an outage
            driving = True
            try:
                next(steps)
            except StopIteration:
                return
            finally:
                driving = False
            yield

    driving, at = False, 0
    while True:
        at += 1
        storage = Blinking()
        storage.at = at
        backend = Drivers(storage, sheltered)
        status, _ = Dispatcher(storage, backend).carry(JOB, MODEL, Seen())
        assert (status.state, backend.attempts) == ("succeeded", [1])
        assert {state for state, _ in states(status)} <= {"starting", "running", "publishing", "succeeded"}
        if not storage.refused:
            break
    assert at > 10


def test_a_lost_answer_is_not_taken_for_another_dispatcher() -> None:
    """The status is written, the answer is lost, and the store stays away for a while."""

    class Lossy(FailingStorage):
        def after(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith("status.json"):
                self.away, self.refused = True, 0
                raise StorageUnavailable(key)

        def before(self, verb: str, key: str) -> None:
            self.away = self.away and self.refused < 20
            super().before(verb, key)

    status, _, _ = carry(Lossy(), succeeds)
    assert [state for state, _ in states(status)] == ["starting", "running", "publishing", "succeeded"]


def test_ctrl_c_in_an_outage_does_not_hang() -> None:
    storage = FailingStorage()
    backend = Drivers(storage, stubborn)

    def watch(status: Status, heartbeat: Heartbeat | None) -> None:
        if heartbeat:
            storage.away = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher(storage, backend).carry(JOB, MODEL, watch)
    assert backend.drivers[0].killed
    storage.away = False
    assert Run(storage, JOB, MODEL).status()[0].state == "running"
    assert carry(storage, succeeds)[0].state == "succeeded"


# ---- drivers as processes


def test_a_process_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is replaced by a script that starts a child of its own, and writes down how it was called."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nsleep 600 &\necho "$! $GREETING $@"\necho "$!" > {tmp_path}/child\nwait\n')
    fake.chmod(0o755)
    monkeypatch.setattr(dispatch.sys, "executable", str(fake))
    backend = SubprocessBackend(tmp_path / "logs", {"GREETING": "hello"})
    driver = backend.start("file:///somewhere", JOB, MODEL, 3)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        assert driver.poll() is None
    child = int((tmp_path / "child").read_text())
    driver.kill()
    assert driver.poll() == -9
    state = Path(f"/proc/{child}/stat")
    for _ in range(1000):
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        dispatch.time.sleep(0.01)
    else:
        pytest.fail("the driver's child outlived it")
    said = (tmp_path / "logs" / "model-attempt-3.log").read_text()
    options = f"--storage file:///somewhere --job {JOB} --model {MODEL} --attempt 3"
    assert said == f"{child} hello -m services.train {options}\n"
    driver.kill()  # once more does no harm
