"""Test what a user sees of a waiting run: the reason of the wait, with a terminal and without one."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from genmodels.runs.records import Heartbeat, Status
from services.console.progress import Board, Shown, TrainingView
from services.console.tables import note
from services.jobs.schemas import RunView
from tests.support.tiny_jobs import job, model

TRAINING = Shown(
    "m", "running", "training", step=50, max_steps=100, loss=1.5, seconds_left=11.0, note="the workers train"
)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def plain() -> tuple[Board, io.StringIO]:
    output = io.StringIO()
    return Board(Console(file=output, width=132)), output


def drawn(run: Shown) -> str:
    """Return the bar of a run on a terminal."""
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    board = Board(console)
    board.show(run)
    with console.capture() as captured:
        console.print(board._bars())
    return captured.get()


def test_lines_say_what_a_run_waits_for_and_no_time_left(clock: Clock) -> None:
    board, output = plain()
    board.show(TRAINING)
    waiting = replace(TRAINING, step=60, waiting="waiting, because the storage is full")
    for second in range(30):
        clock.now += 1
        board.show(replace(waiting, step=60 + second // 15))
    board.show(replace(TRAINING, step=70))
    assert output.getvalue().splitlines() == [
        "m: running, step 50/100, loss 1.5, 0:11 left (the workers train)",
        "m: running, step 60/100, loss 1.5 (waiting, because the storage is full)",
        "m: running, step 61/100, loss 1.5 (waiting, because the storage is full)",
        "m: running, step 70/100, loss 1.5, 0:11 left (the workers train)",
    ]


def test_a_bar_says_what_a_run_waits_for_and_no_time_left() -> None:
    bar = drawn(replace(TRAINING, waiting="waiting, because the storage is full"))
    assert "step 50/100, loss 1.5, waiting, because the storage is full" in bar
    assert "left" not in bar
    assert "0:11 left" in drawn(TRAINING)


def test_a_run_without_a_step_for_a_while_is_not_shown_as_progress(clock: Clock) -> None:
    """If storage accepts no writes, the heartbeats do not arrive either."""
    board, output = plain()
    for _ in range(60):
        board.show(TRAINING)
        clock.now += 1
    board.show(replace(TRAINING, step=51))
    assert output.getvalue().splitlines() == [
        "m: running, step 50/100, loss 1.5, 0:11 left (the workers train)",
        "m: running, step 50/100, loss 1.5 (no step for over 15 s)",
        "m: running, step 51/100, loss 1.5, 0:11 left (the workers train)",
    ]


@pytest.mark.parametrize("phase", ["evaluating", "compiling", "saving"])
def test_what_takes_its_time_is_not_said_to_stand_still(clock: Clock, phase: str) -> None:
    board, output = plain()
    for _ in range(60):
        board.show(replace(TRAINING, phase=phase))
        clock.now += 1
    assert "no step" not in output.getvalue()


@pytest.mark.parametrize("phase", ["training", "saving", "waiting for storage", "publishing"])
def test_a_heartbeat_that_waits_is_shown_everywhere(tmp_path: Path, phase: str) -> None:
    reason = "the disk of this machine is full"
    output = io.StringIO()
    spec = job("tiny", model(tmp_path, "minigpt")).models[0]
    with TrainingView(Console(file=output, width=132)).follow(spec) as watch:
        watch(Status(state="running"), Heartbeat(phase=phase, step=5, waiting=reason, seconds_left=31.0))
    assert output.getvalue() == f"minigpt: running, step 5/6 (waiting, because {reason})\n"
    assert note(RunView(model="m", state="running", phase=phase, waiting=reason)) == f"waiting, because {reason}"
