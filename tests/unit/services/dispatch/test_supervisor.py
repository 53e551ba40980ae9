"""Test a run from the queue to its end: which failures are retried, and which process decides. Drivers are scripts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import GenmodelsError, StorageUnavailable
from genmodels.metrics import ATTEMPTS
from genmodels.runs.records import GateResult, Heartbeat, Result, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.dispatch import retry_policy, single_run
from services.dispatch.backends.base import LOST
from services.dispatch.single_run import run_to_completion
from services.dispatch.supervisor import Supervisor
from tests.support.scripted_drivers import Driver, Drivers, Script, dies, ends, obedient, stubborn, succeeds
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped, save

JOB, MODEL = "job-00000000", "model"


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_run, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(retry_policy, "BACK_OFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("genmodels.storage.retry.MAX_WAIT_SECONDS", 0.001)


class WatchedStates(list[tuple[str, str | None]]):
    """Record the states and phases that a watcher gets, without repetitions."""

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        shown = (status.state, heartbeat.phase if heartbeat else None)
        if not self or self[-1] != shown:
            self.append(shown)


def complete(storage: Storage, *scripts: Script, watch: Any = None) -> tuple[Status, Result | None, Drivers]:
    backend = Drivers(storage, *scripts)
    status, result = run_to_completion(storage, backend, JOB, MODEL, 2, WatchedStates() if watch is None else watch)
    stored, _ = Run(storage, JOB, MODEL).status()
    assert stored == status
    return status, result, backend


def states(status: Status) -> list[tuple[str, str]]:
    return [(change.state, change.reason) for change in status.history]


# ---- ends


def test_success(storage: Storage) -> None:
    watched = WatchedStates()
    status, result, backend = complete(storage, succeeds, watch=watched)
    assert result is not None
    assert (status.state, status.attempt, result.version, backend.attempts) == ("succeeded", 1, 3, [1])
    assert states(status) == [
        ("starting", "attempt 1 with 2 workers"),
        ("running", "the workers train"),
        ("publishing", "training has ended"),
        ("succeeded", "published as model@3"),
    ]
    assert all(change.time for change in status.history)
    assert watched == [
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

    complete(storage, ends("failed", "infrastructure"), succeeds, watch=watch)


def test_what_has_succeeded_never_changes() -> None:
    storage = MemoryStorage()
    first, _, _ = complete(storage, succeeds)
    objects = dict(storage.objects)
    again, result, backend = complete(storage, dies)
    assert (again, backend.attempts) == (first, [])
    assert result is not None
    assert result.version == 3
    assert storage.objects == objects


@pytest.mark.parametrize("cause", ["user", "diverged", None])
def test_the_user_is_told_at_once(cause: Any) -> None:
    status, result, backend = complete(MemoryStorage(), ends("failed", cause, "step 7: loss = nan"))
    assert (status.state, status.reason, backend.attempts) == ("failed", "step 7: loss = nan", [1])
    assert result is not None
    assert result.cause == cause


def test_a_failed_gate_is_final() -> None:
    storage = MemoryStorage()
    gate = GateResult(metric="val_loss", value=130.0, passed=False, reason="val_loss 130 is not <= 120")
    script = ends("failed", "gate", "not published: val_loss 130 is not <= 120", saves=True, gate=gate)
    first, _, backend = complete(storage, script)
    assert (first.state, backend.attempts) == ("failed", [1])
    again, result, backend = complete(storage, succeeds)
    assert (again, backend.attempts) == (first, [])
    assert result is not None
    assert result.gate == gate


def test_what_failed_otherwise_is_tried_again_by_a_second_carry() -> None:
    storage = MemoryStorage()
    complete(storage, ends("failed", "user", "no such file"))
    status, _, backend = complete(storage, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [2])
    assert [state for state, _ in states(status)][:3] == ["starting", "running", "failed"]


# ---- tried again


@pytest.mark.parametrize("cause", ["infrastructure", "superseded", "out of memory"])
def test_what_may_pass_is_tried_again(cause: Any) -> None:
    status, _, backend = complete(MemoryStorage(), ends("failed", cause, "a worker was lost"), succeeds)
    assert (status.state, status.attempt, backend.attempts) == ("succeeded", 2, [1, 2])
    assert states(status)[1:4] == [
        ("running", "the workers train"),
        ("queued", "a worker was lost; continues from step 0"),
        ("starting", "attempt 2 with 2 workers"),
    ]


def test_an_attempt_that_left_is_followed_by_the_next() -> None:
    storage = MemoryStorage()
    status, _, backend = complete(storage, ends("stopped", saves=True), succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2])
    assert Run(storage, JOB, MODEL).chain()[-1].parent == CheckpointRef(attempt=1, step=10)


def test_a_driver_that_dies_without_a_word_is_tried_again() -> None:
    status, _, backend = complete(MemoryStorage(), dies, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2])
    assert states(status)[1] == (
        "queued",
        "the driver ended with code 137 and left no result; continues from step 0",
    )


def test_a_driver_that_is_gone_has_no_exit_code() -> None:
    def is_gone(run: Run, attempt: int) -> Iterator[object]:
        run.start_attempt(attempt, None, 1)
        yield from ()
        return LOST

    status, _, _ = complete(MemoryStorage(), is_gone, succeeds)
    assert states(status)[1] == ("queued", "the driver is gone and left no result; continues from step 0")


def test_a_result_counts_whatever_the_exit_code() -> None:
    def script(run: Run, attempt: int) -> Iterator[object]:
        yield from succeeds(run, attempt)
        return 1

    assert complete(MemoryStorage(), script)[0].state == "succeeded"


class Clock:
    """A clock that advances only in `sleep` of this thread. Threads that another test has left keep the real clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, own = 1000.0, threading.get_ident()
        monotonic, sleep = time.monotonic, time.sleep
        monkeypatch.setattr(time, "monotonic", lambda: self.now if threading.get_ident() == own else monotonic())
        monkeypatch.setattr(time, "sleep", lambda s: self.sleep(s) if threading.get_ident() == own else sleep(s))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_three_attempts_that_lead_nowhere_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(retry_policy, "BACK_OFF_SECONDS", (1.0, 5.0, 15.0))
    monkeypatch.setattr(single_run, "POLL_SECONDS", 0.5)
    status, _, backend = complete(MemoryStorage(), dies)
    assert (status.state, backend.attempts) == ("failed", [1, 2, 3])
    assert status.reason == (
        "3 attempts without a new checkpoint; the last: the driver ended with code 137 and left no result"
    )
    assert 20.0 <= clock.now - 1000 <= 25.0, "it backed off for 5 and 15 seconds"


def test_a_new_checkpoint_resets_the_count() -> None:
    lost, saved = ends("failed", "infrastructure"), ends("failed", "infrastructure", saves=True)
    status, _, backend = complete(MemoryStorage(), dies, lost, saved, dies, lost, saved, saved, dies, lost, dies)
    assert (status.state, backend.attempts) == ("failed", list(range(1, 11)))
    status, _, backend = complete(MemoryStorage(), *[saved] * 8, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", list(range(1, 10)))


def test_a_new_checkpoint_is_progress_also_below_one_that_was_damaged() -> None:
    """Attempt 1 saved step 50, now damaged: attempts 2 and 3 save 20 and 30, and are not no_progress_attempts."""

    def far(run: Run, attempt: int) -> Iterator[object]:
        run.start_attempt(attempt, None, 1)
        save(run, attempt, 50)
        yield

    def again(run: Run, attempt: int) -> Iterator[object]:
        run.start_attempt(attempt, None, 1)
        save(run, attempt, attempt * 10)
        yield

    status, _, backend = complete(MemoryStorage(), far, again, again, again, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2, 3, 4, 5])


def test_memory_is_short_twice_at_most() -> None:
    short = ends("failed", "out of memory", "out of memory; lower train.batch_size", saves=True)
    status, result, backend = complete(MemoryStorage(), short)
    assert (status.state, status.reason) == ("failed", "out of memory; lower train.batch_size")
    assert backend.attempts == [1, 2]
    assert result is not None
    assert result.cause == "out of memory"


def test_attempts_are_numbered_on_after_whatever_happened() -> None:
    """The supervising process was killed during the run: the next process neither waits nor uses a number twice."""
    storage = MemoryStorage()
    run = Run(storage, JOB, MODEL)
    run.write_status(Status(state="queued").to("running", "by one that was killed", attempt=4), None)
    status, _, backend = complete(storage, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [5])


# ---- two dispatchers


def test_of_two_dispatchers_one_stops_at_its_next_write() -> None:
    storage = MemoryStorage()

    def script(run: Run, attempt: int) -> Iterator[object]:
        status, etag = run.status()
        run.write_status(status.to("starting", "attempt 2 of another", attempt=2), etag)
        run.write_heartbeat(attempt, Heartbeat(phase="training", step=1))
        while not run.commands(attempt):
            yield
        run.write_result(attempt, Result(outcome="stopped"))

    backend = Drivers(storage, script)
    with pytest.raises(GenmodelsError, match="another dispatcher works on run job-00000000/model; this one stops"):
        run_to_completion(storage, backend, JOB, MODEL, 2, WatchedStates())
    status, _ = Run(storage, JOB, MODEL).status()
    assert (status.state, status.reason, status.attempt) == ("starting", "attempt 2 of another", 2)
    assert backend.attempts == [1]
    assert backend.drivers[0].code == 0, "its driver got a stop command and stopped"


def test_a_dispatcher_that_comes_second_starts_nothing() -> None:
    class Contested(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith("status.json") and not self.inner.exists(key):
                Run(self.inner, JOB, MODEL).write_status(Status(state="starting", attempt=1), None)

    storage = Contested()
    backend = Drivers(storage, succeeds)
    with pytest.raises(GenmodelsError, match="another dispatcher works on run"):
        run_to_completion(storage, backend, JOB, MODEL, 2, WatchedStates())
    assert backend.attempts == []


# ---- Ctrl-C


class Interrupting:
    """Raise an interrupt at a state and phase, `times` times."""

    def __init__(self, state: str, phase: str | None, times: int = 1) -> None:
        self.at, self.times = (state, phase), times

    def __call__(self, status: Status, heartbeat: Heartbeat | None) -> None:
        if self.at == (status.state, heartbeat.phase if heartbeat else None) and self.times:
            self.times -= 1
            raise KeyboardInterrupt


def interrupted(storage: Storage, script: Script, watch: Interrupting) -> tuple[Status, Drivers]:
    backend = Drivers(storage, script)
    with pytest.raises(KeyboardInterrupt):
        run_to_completion(storage, backend, JOB, MODEL, 2, watch)
    return Run(storage, JOB, MODEL).status()[0], backend


def test_ctrl_c_has_the_attempt_save_and_leave(storage: Storage) -> None:
    status, backend = interrupted(storage, obedient, Interrupting("running", "training"))
    run = Run(storage, JOB, MODEL)
    assert [(command.action, command.reason) for command in run.commands(1)] == [("stop", "stopped by Ctrl-C")]
    assert (backend.drivers[0].code, backend.drivers[0].killed) == (0, False)
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; continues from step 8")
    again, _, _ = complete(storage, succeeds)
    assert again.state == "succeeded"


def test_ctrl_c_while_nothing_is_trained_yet_ends_it_at_once() -> None:
    def slow(run: Run, attempt: int) -> Iterator[object]:
        run.write_heartbeat(attempt, Heartbeat(phase="starting"))
        while True:
            yield

    status, backend = interrupted(MemoryStorage(), slow, Interrupting("starting", "starting"))
    assert backend.drivers[0].killed
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; continues from step 0")


def test_ctrl_c_before_the_driver_is_started() -> None:
    status, backend = interrupted(MemoryStorage(), succeeds, Interrupting("starting", None))
    assert backend.attempts == []
    assert (status.state, status.reason) == ("queued", "stopped by Ctrl-C; continues from step 0")


def test_ctrl_c_after_the_driver_has_ended_sends_no_command() -> None:
    storage = MemoryStorage()

    def quick(run: Run, attempt: int) -> Iterator[object]:
        run.write_heartbeat(attempt, Heartbeat(phase="publishing"))
        run.write_result(attempt, Result(outcome="succeeded", version=1))
        return
        yield

    status, _ = interrupted(storage, quick, Interrupting("publishing", "publishing"))
    assert status.state == "queued"
    assert Run(storage, JOB, MODEL).commands(1) == []


def test_a_driver_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_run, "STOP_SECONDS", 0.05)
    storage = MemoryStorage()
    status, backend = interrupted(storage, stubborn, Interrupting("running", "training"))
    assert backend.drivers[0].killed
    assert len(Run(storage, JOB, MODEL).commands(1)) == 1
    assert status.state == "queued"


def test_a_second_ctrl_c_kills_at_once() -> None:
    class Impatient(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and "/commands/" in key:
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
        run_to_completion(storage, backend, JOB, MODEL, 2, watch)
    assert backend.drivers[0].code == 0
    assert Run(storage, JOB, MODEL).status()[0].reason == "stopped: the terminal is gone; continues from step 8"


# ---- a store that is away


def test_an_outage_neither_fails_a_run_nor_counts() -> None:
    """The store is unreachable for a while, at each point of a run in turn."""

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
        while True:  # the driver handles an outage itself
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
        status, _ = run_to_completion(storage, backend, JOB, MODEL, 2, WatchedStates())
        assert (status.state, backend.attempts) == ("succeeded", [1])
        assert {state for state, _ in states(status)} <= {"starting", "running", "publishing", "succeeded"}
        if not storage.refused:
            break
    assert at > 10


def test_a_lost_answer_is_not_taken_for_another_dispatcher() -> None:
    """The status is written, the answer is lost, and the store stays unreachable for a while."""

    class Lossy(FailingStorage):
        def after(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith("status.json"):
                self.away, self.refused = True, 0
                raise StorageUnavailable(key)

        def before(self, verb: str, key: str) -> None:
            self.away = self.away and self.refused < 20
            super().before(verb, key)

    status, _, _ = complete(Lossy(), succeeds)
    assert [state for state, _ in states(status)] == ["starting", "running", "publishing", "succeeded"]


def test_ctrl_c_in_an_outage_does_not_hang() -> None:
    storage = FailingStorage()
    backend = Drivers(storage, stubborn)

    def watch(status: Status, heartbeat: Heartbeat | None) -> None:
        if heartbeat:
            storage.away = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_completion(storage, backend, JOB, MODEL, 2, watch)
    assert backend.drivers[0].killed
    storage.away = False
    assert Run(storage, JOB, MODEL).status()[0].state == "running"
    assert complete(storage, succeeds)[0].state == "succeeded"


# ---- step by step: commands, hangs, leases


def supervised(storage: Storage, *scripts: Script) -> tuple[Supervisor, Drivers]:
    """Return the supervisor of a run under a lease, as in the dispatcher."""
    backend = Drivers(storage, *scripts)
    run = Run(storage, JOB, MODEL)
    supervisor = Supervisor(run, backend, *run.status())
    supervisor.stamp(1)
    return supervisor, backend


def play(supervisor: Supervisor, state: str, workers: int = 1) -> None:
    """Step until the run is in a state; start the run when it is queued."""
    for _ in range(50):
        supervisor.step()
        if supervisor.status.state == state:
            return
        if supervisor.status.state == "queued":
            supervisor.start(workers)
    pytest.fail(f"still {supervisor.status.state}: {states(supervisor.status)}")


def settle(supervisor: Supervisor) -> None:
    """Step until the run is queued or has ended."""
    for _ in range(50):
        supervisor.step()
        if not supervisor.active:
            return
    pytest.fail(f"still {supervisor.status.state}")


def test_a_cancelled_run_saves_first_and_a_resume_goes_on_from_there() -> None:
    storage = MemoryStorage()
    supervisor, backend = supervised(storage, obedient, succeeds)
    play(supervisor, "running")
    supervisor.run.send_command("stop", 1, "cancelled by key 1234", then="cancelled")
    supervisor.commands_pending = True
    settle(supervisor)
    assert (supervisor.status.state, backend.drivers[0].killed) == ("cancelled", False)
    assert supervisor.status.reason == "cancelled by key 1234; a resume continues from step 8"
    supervisor.run.send_command("resume", 1, "resumed by key 1234", then="queued")
    supervisor.commands_pending = True
    supervisor.step()
    assert (supervisor.status.state, supervisor.status.reason) == ("queued", "resumed by key 1234")
    play(supervisor, "succeeded")
    assert backend.attempts == [1, 2]
    assert supervisor.run.chain()[-1].parent == CheckpointRef(attempt=1, step=8)


def test_a_queued_run_is_cancelled_at_once() -> None:
    supervisor, backend = supervised(MemoryStorage(), succeeds)
    supervisor.run.send_command("stop", 0, "cancelled", then="cancelled")
    supervisor.step()
    assert (supervisor.status.state, backend.attempts) == ("cancelled", [])


def test_a_cancel_that_was_meant_for_the_attempt_before_reaches_the_next() -> None:
    supervisor, backend = supervised(MemoryStorage(), ends("stopped", saves=True), obedient)
    play(supervisor, "running")
    supervisor.run.send_command("stop", 1, "cancelled", then="cancelled")
    supervisor.status = supervisor.status.model_copy(update={"attempt": 1})
    backend.scripts.insert(0, obedient)
    supervisor.start(1)
    supervisor.step()
    assert supervisor.status.attempt == 2
    supervisor.commands_pending = True
    settle(supervisor)
    assert supervisor.status.state == "cancelled"
    assert [(command.attempt, command.then) for command in supervisor.run.commands()] == [
        (1, "cancelled"),
        (2, "cancelled"),
    ]


def test_cancel_now_kills_what_does_not_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    supervisor, backend = supervised(MemoryStorage(), stubborn)
    play(supervisor, "running")
    supervisor.run.send_command("kill", 1, "cancelled now", then="cancelled")
    supervisor.commands_pending = True
    for _ in range(4):
        clock.sleep(4)
        supervisor.step()
    assert not backend.drivers[0].killed, "the ranks have time to write down their stacks"
    clock.sleep(5)
    supervisor.step()
    assert backend.drivers[0].killed
    counted = {cause: ATTEMPTS.labels(cause)._value.get() for cause in ("infrastructure", "cancelled")}
    supervisor.step()
    assert supervisor.status.state == "cancelled"
    assert ATTEMPTS.labels("infrastructure")._value.get() == counted["infrastructure"], "nothing failed"
    assert ATTEMPTS.labels("cancelled")._value.get() == counted["cancelled"] + 1


def test_commands_are_applied_once() -> None:
    supervisor, _ = supervised(MemoryStorage(), obedient, succeeds)
    supervisor.run.send_command("stop", 0, "cancelled", then="cancelled")
    supervisor.run.send_command("resume", 0, "resumed", then="queued")
    supervisor.step()
    assert [state for state, _ in states(supervisor.status)] == ["queued", "cancelled", "queued"]
    supervisor.commands_pending = True
    supervisor.step()
    assert len(supervisor.status.history) == 3
    play(supervisor, "running")


def test_a_resume_changes_nothing_that_succeeded_or_runs() -> None:
    supervisor, _ = supervised(MemoryStorage(), obedient)
    play(supervisor, "running")
    supervisor.run.send_command("resume", 1, "resumed", then="queued")
    supervisor.commands_pending = True
    supervisor.step()
    assert (supervisor.status.state, supervisor.stopping) == ("running", False)
    assert supervisor.run.status()[0].last_command == 1, "it is not applied again"
    other, _ = supervised(MemoryStorage(), succeeds)
    play(other, "succeeded")
    other.run.send_command("resume", 1, "resumed", then="queued")
    other.commands_pending = True
    other.step()
    assert other.status.state == "succeeded"


def test_preempted_attempts_do_not_count() -> None:
    supervisor, backend = supervised(MemoryStorage(), obedient)
    for _ in range(5):
        play(supervisor, "running")
        supervisor.request_stop("preempted by job/model")
        settle(supervisor)
        assert (supervisor.status.state, supervisor.status.no_progress_attempts) == ("queued", 0)
        assert supervisor.status.reason.startswith("preempted by job/model; continues from step 8")
        assert not supervisor.seconds_to_wait
    assert backend.attempts == [1, 2, 3, 4, 5]


def test_the_reason_of_an_end_is_the_first_that_asked_for_it() -> None:
    """A driver that is ended while its group starts also reports a SIGTERM."""
    supervisor, _ = supervised(MemoryStorage(), obedient)
    play(supervisor, "running")
    supervisor.request_stop("preempted by job/model")
    supervisor.run.send_command("stop", 1, "the driver was told to end (SIGTERM)")
    settle(supervisor)
    assert supervisor.status.reason.startswith("preempted by job/model; continues")


@pytest.mark.parametrize("cause", ["no workers", "storage"])
def test_what_never_got_to_work_does_not_count(cause: Any) -> None:
    def script(run: Run, attempt: int) -> Iterator[object]:
        run.write_result(attempt, Result(outcome="failed", cause=cause, message="not this time"))
        yield

    status, _, backend = complete(MemoryStorage(), *[script] * 6, succeeds)
    assert (status.state, backend.attempts) == ("succeeded", [1, 2, 3, 4, 5, 6, 7])


def hangs(phase: Any, step_seconds: float | None = None, heartbeats: int = 1) -> Script:
    def script(run: Run, attempt: int) -> Iterator[object]:
        run.start_attempt(attempt, None, 1)
        for count in range(heartbeats):
            run.write_heartbeat(
                attempt, Heartbeat(phase=phase, step=7, progress_count=count, step_seconds=step_seconds)
            )
            yield
        while True:
            yield

    return script


@pytest.mark.parametrize(
    ("phase", "step_seconds", "patience"),
    [("training", 0.1, 120), ("evaluating", None, 120), ("training", 60.0, 600), ("compiling", None, 900)],
)
def test_a_hang_is_found_its_stacks_are_asked_for_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, phase: Any, step_seconds: float | None, patience: int
) -> None:
    clock = Clock(monkeypatch)
    supervisor, backend = supervised(MemoryStorage(), hangs(phase, step_seconds), succeeds)
    play(supervisor, "running")
    while clock.now < 1000 + patience:
        clock.sleep(1)
        supervisor.step()
        assert not supervisor.stopping
    while not supervisor.stopping:
        clock.sleep(1)
        supervisor.step()
        assert clock.now < 1000 + patience + 5
    (command,) = supervisor.run.commands(1)
    assert (command.action, command.then) == ("kill", "queued")
    assert command.reason.startswith("no progress for ")
    assert command.reason.endswith(f"in phase {phase!r} at step 7")
    while supervisor.active:
        clock.sleep(1)
        supervisor.step()
    assert backend.drivers[0].killed
    assert (supervisor.status.state, supervisor.status.no_progress_attempts) == ("queued", 1)
    assert supervisor.status.reason.startswith("no progress for ")
    clock.sleep(60)
    play(supervisor, "succeeded")


def test_what_makes_progress_does_not_hang_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    supervisor, _ = supervised(MemoryStorage(), hangs("evaluating", heartbeats=40))
    play(supervisor, "running")
    for _ in range(38):
        for _ in range(20):
            clock.sleep(5)
            supervisor._monitor.observe(supervisor.heartbeat)
        supervisor.step()
        assert not supervisor.stopping


def test_an_outage_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    storage = FailingStorage()
    supervisor, _ = supervised(storage, hangs("training"))
    play(supervisor, "running")
    storage.away = True
    for _ in range(600):
        clock.sleep(1)
        with pytest.raises(StorageUnavailable):
            supervisor.step()
    storage.away = False
    supervisor.step()
    assert not supervisor.stopping


def test_the_next_dispatcher_finds_the_driver_and_goes_on() -> None:
    storage = MemoryStorage()
    first, backend = supervised(storage, obedient)
    play(first, "running")

    class Adopting(Drivers):
        def find(self, job: str, model: str, attempt: int) -> Driver:
            assert (job, model, attempt) == (JOB, MODEL, 1)
            return backend.drivers[0]

    run = Run(storage, JOB, MODEL)
    second = Supervisor(run, Adopting(storage, succeeds), *run.status())
    second.stamp(2)
    with pytest.raises(GenmodelsError, match="another dispatcher works on run"):
        first.to("failed", "a stale dispatcher wakes")
    second.step()
    assert second.status.state == "running"
    second.request_stop("preempted")
    settle(second)
    assert (second.status.state, backend.drivers[0].code) == ("queued", 0)
    with pytest.raises(GenmodelsError, match="is in lease term 2; term 1 is over"):
        Supervisor(run, backend, *run.status()).stamp(1)


def test_a_driver_that_nobody_knows_any_more_is_lost_and_counts_only_if_it_had_begun() -> None:
    for began in (False, True):
        storage = MemoryStorage()
        first, _ = supervised(storage, stubborn if began else hangs("starting", heartbeats=0))
        play(first, "running" if began else "starting")
        if began:
            first.step()
        else:
            storage.delete(f"runs/{JOB}/{MODEL}/attempt-1/start.json")
        run = Run(storage, JOB, MODEL)
        second = Supervisor(run, Drivers(storage, succeeds), *run.status())
        second.stamp(2)
        second.step()
        assert (second.status.state, second.status.no_progress_attempts) == ("queued", int(began))
        play(second, "succeeded")


def test_a_late_write_of_the_old_holder_does_not_stop_the_new_one() -> None:
    """The late write comes after the new holder read the status and before it writes its stamp."""
    storage = MemoryStorage()
    first, _ = supervised(storage, stubborn)
    run = Run(storage, JOB, MODEL)
    second = Supervisor(run, Drivers(storage, succeeds), *run.status())
    first.to("starting", "attempt 1 with 1 worker", attempt=1)
    second.stamp(2)
    assert (second.status.lease_term, second.status.attempt, second.status.state) == (2, 1, "starting")
