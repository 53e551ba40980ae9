"""Check which runs start, wait, make room and grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dispatch import scheduler
from services.dispatch.backends.base import Capacity
from services.dispatch.scheduler import MAX_BACKFILLED, Plan, Queued, Running, plan


def waits(key: str, sizes: int | Sequence[int] = 1, priority: int = 0, at: str = "0", **more: Any) -> Queued:
    return Queued(key, priority, (at, 0), [sizes] if isinstance(sizes, int) else sizes, **more)


def runs(key: str, workers: int, priority: int = 0, since: str = "0", sizes: Any = None, **more: Any) -> Running:
    return Running(key, priority, since, sizes or [workers], workers, **more)


def decide(queued: Sequence[Queued], running: Sequence[Running] = (), cpus: int = 4, **more: int) -> Plan:
    return plan(queued, running, Capacity(cpus, **{"gpus": 0, **more}))


def test_priority_first_then_first_come_first_served() -> None:
    queue = [waits("late", at="2"), waits("early", at="1"), waits("urgent", at="3", priority=1), waits("not", at="4")]
    planned = decide(queue, cpus=3)
    assert planned.starts == [("urgent", 1), ("early", 1), ("late", 1)]
    assert planned.reasons == [("not", "needs 1 CPU, free: 0 CPUs")]


def test_with_unlimited_capacity_all_start_in_their_order_and_none_makes_room() -> None:
    queue = [waits("elastic", [2, 4, 8], at="1"), waits("urgent", 64, at="2", priority=9, use_gpu=True)]
    queue.append(waits("later", at="0", hold_reason="backs off after a failure"))
    running = [runs("low", 4, sizes=[1, 4, 8], growable=True)]
    planned = plan(queue, running, Capacity(0, 0, unlimited=True))
    starts = [("urgent", 64), ("elastic", 2)]
    assert planned == Plan(starts=starts, reasons=[("later", "backs off after a failure")])


def test_a_group_starts_whole_or_not_at_all() -> None:
    assert decide([waits("a", 4)], cpus=4).starts == [("a", 4)]
    planned = decide([waits("a", 4)], [runs("b", 1)], cpus=4)
    assert (planned.starts, planned.reasons) == ([], [("a", "needs 4 CPUs, free: 3 CPUs")])


def test_no_more_runs_start_than_drivers_fit() -> None:
    queue = [waits("low", at="0"), waits("first", at="1", priority=1), waits("second", at="2", priority=1)]
    planned = decide(queue, [runs("there", 1, sizes=[1, 2], growable=True)], cpus=9, drivers=3)
    assert planned.starts == [("first", 1), ("second", 1)]
    assert planned.reasons == [("low", "waits for memory for its driver; 3 drivers fit the nodes, 768 MiB each")]
    assert (planned.preemptions, planned.grows) == ([], []), "a run that grows would lose its place"


def test_a_less_important_run_makes_room_for_a_driver() -> None:
    planned = decide([waits("urgent", priority=9)], [runs("low", 4), runs("same", 1, priority=9)], cpus=8, drivers=2)
    assert (planned.starts, planned.preemptions) == ([], [("low", "preempted by a run of priority 9")])
    planned = decide([waits("equal")], [runs("large", 4, sizes=[1, 4])], cpus=8, drivers=1)
    assert (planned.starts, planned.preemptions) == ([], []), "it would start again at once, with its driver"


def test_a_run_that_never_fits_gives_its_reason_and_blocks_no_other() -> None:
    planned = decide([waits("huge", 8, at="0", backfilled=100), waits("small", at="1")], cpus=4)
    assert (planned.starts, planned.backfilled) == ([("small", 1)], [])
    assert planned.reasons == [("huge", "needs 8 CPUs; the cluster has 4 CPUs")]


def test_a_run_fits_if_the_cluster_may_grow_to_its_size() -> None:
    assert decide([waits("large", 8)], cpus=2, max_cpus=16).starts == [("large", 8)]
    planned = decide([waits("large", 8)], [runs("other", 10)], cpus=2, max_cpus=16)
    assert planned.reasons == [("large", "needs 8 CPUs, free: 6 CPUs")]


def test_small_runs_pass_a_blocked_run_but_not_for_ever() -> None:
    backfilled = 0
    while backfilled < 100:
        planned = decide([waits("large", 4, at="0", backfilled=backfilled), waits("small", at="1")], [runs("first", 1)])
        if not planned.starts:
            break
        assert (planned.starts, planned.backfilled) == ([("small", 1)], ["large"])
        backfilled += 1
    assert backfilled == MAX_BACKFILLED
    held = [waits("large", 4, at="0", backfilled=backfilled), waits("small", at="1")]
    assert decide(held, [runs("first", 1)]).starts == []
    assert decide(held, []).starts == [("large", 4)], "the resources that became free were reserved for it"


def test_only_the_needed_resources_are_reserved() -> None:
    held = [waits("large", 4, at="0", use_gpu=True, backfilled=MAX_BACKFILLED), waits("small", 2, at="1")]
    planned = decide(held, [runs("first", 2, use_gpu=True)], cpus=16, gpus=4)
    assert planned.starts == [("small", 2)], "it takes no GPU, and the CPUs are enough for both"


def test_gpus() -> None:
    queue = [waits("a", 2, use_gpu=True, at="0"), waits("b", 2, at="1")]
    planned = decide(queue, cpus=4, gpus=1)
    assert planned.starts == [("b", 2)]
    assert planned.reasons == [("a", "needs 2 CPUs and 2 GPUs; the cluster has 4 CPUs and 1 GPU")]


def test_a_higher_priority_preempts_lower_ones() -> None:
    running = [runs("old", 2, since="1"), runs("young", 2, since="2"), runs("dear", 2, priority=9)]
    planned = decide([waits("urgent", 2, priority=5)], running, cpus=6)
    assert planned.preemptions == [("young", "preempted by a run of priority 5")]
    assert planned.reasons == [("urgent", "waits for others to save and stop")]
    again = decide(
        [waits("urgent", 2, priority=5), waits("small", 1)],
        [running[0], runs("young", 2, since="2", stopping=True), running[2]],
        cpus=6,
    )
    assert (again.preemptions, again.starts) == ([], []), (
        "one preemption is enough, and its workers are not for other runs"
    )


def test_no_run_stops_if_that_would_not_be_enough() -> None:
    planned = decide([waits("urgent", 4, priority=5)], [runs("low", 1), runs("dear", 3, priority=9)])
    assert (planned.preemptions, planned.starts) == ([], [])


def test_equal_priorities_do_not_preempt() -> None:
    assert decide([waits("a", 4)], [runs("b", 4)]).preemptions == []


def test_an_elastic_run_takes_all_that_is_free() -> None:
    elastic = [1, 2, 4]
    assert decide([waits("a", elastic)], cpus=8).starts == [("a", 4)]
    assert decide([waits("a", elastic)], cpus=3).starts == [("a", 2)]
    assert decide([waits("a", elastic)], [runs("b", 7)], cpus=8).starts == [("a", 1)]
    assert decide([waits("a", elastic)], cpus=2, max_cpus=64).starts == [("a", 2)], "it does not wait for nodes"


def test_elastic_runs_share() -> None:
    planned = decide([waits("a", [1, 2, 4], at="0"), waits("b", 2, at="1"), waits("c", [1, 2], at="2")], cpus=5)
    assert planned.starts == [("a", 2), ("b", 2), ("c", 1)]


def test_an_elastic_run_gives_its_surplus_to_others() -> None:
    grown = runs("grown", 4, sizes=[1, 2, 4])
    planned = decide([waits("a", 2)], [grown])
    assert planned.preemptions == [("grown", "makes room for another run")]
    both = decide([waits("grown", [1, 2, 4], at="0"), waits("a", 2, at="1")])
    assert both.starts == [("grown", 2), ("a", 2)]
    assert decide([waits("a", 4)], [grown]).preemptions == [], "it keeps its fewest workers"


def test_growing_into_free_room() -> None:
    small = runs("small", 1, sizes=[1, 2, 4], growable=True)
    assert decide([], [small]).grows == [("small", "grows from 1 to 4 workers")]
    assert decide([], [small, runs("b", 1)]).grows == [("small", "grows from 1 to 2 workers")]
    assert decide([], [small], cpus=1).grows == []
    assert decide([waits("b", 4)], [small]).grows == [], "another run waits for this room"
    assert decide([waits("b", 64)], [small]).grows, "a run that can never start does not count"
    assert decide([], [runs("small", 1, sizes=[1, 2])]).grows == []


def test_after_the_loss_of_a_node_no_run_starts_that_does_not_fit() -> None:
    planned = decide([waits("a")], [runs("b", 4)], cpus=2)
    assert planned.starts == []
    assert planned.reasons == [("a", "needs 1 CPU, free: 0 CPUs")]


def test_a_run_that_backs_off_is_passed_and_reserves_nothing() -> None:
    planned = decide([waits("a", 4, hold_reason="backs off"), waits("b", 4, at="1")])
    assert (planned.starts, planned.reasons) == ([("b", 4)], [("a", "backs off")])


def test_a_run_that_starts_again_in_a_moment_keeps_its_place() -> None:
    planned = decide(
        [waits("a", 3, hold_reason="backs off", reserves=True), waits("b", 2, at="1"), waits("c", 1, at="2")]
    )
    assert (planned.starts, planned.backfilled) == ([("c", 1)], ["b"])
    assert planned.reasons == [("a", "backs off"), ("b", "needs 2 CPUs, free: 1 CPU")]


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted)


@given(
    queue=st.lists(st.tuples(SIZES, st.integers(-1, 1), st.booleans(), st.integers(0, 9)), max_size=8),
    active=st.lists(st.tuples(SIZES, st.integers(-1, 1), st.booleans()), max_size=4),
    cpus=st.integers(0, 12),
    gpus=st.integers(0, 4),
    drivers=st.none() | st.integers(0, 6),
)
def test_runs_never_exceed_the_capacity_and_each_has_a_start_or_a_reason(
    queue: Any, active: Any, cpus: int, gpus: int, drivers: int | None
) -> None:
    queued = [
        waits(f"q{i}", sizes, priority, str(i), use_gpu=gpu, backfilled=backfilled)
        for i, (sizes, priority, gpu, backfilled) in enumerate(queue)
    ]
    running = [
        runs(f"r{i}", sizes[0], priority, str(i), sizes, use_gpu=gpu) for i, (sizes, priority, gpu) in enumerate(active)
    ]
    planned = plan(queued, running, Capacity(cpus, gpus, drivers=drivers))
    by_key = {run.key: run for run in queued}
    starts = dict(planned.starts)
    assert sorted([*starts, *dict(planned.reasons)]) == sorted(by_key)
    assert all(workers in by_key[key].sizes for key, workers in starts.items())
    used = sum(run.workers for run in running)
    if starts:
        assert used + sum(starts.values()) <= cpus
        assert drivers is None or len(running) + len(starts) <= drivers
    gpus_used = sum(run.workers for run in running if run.use_gpu)
    if any(by_key[key].use_gpu for key in starts):
        assert gpus_used + sum(workers for key, workers in starts.items() if by_key[key].use_gpu) <= gpus
    preempted = {key for key, _ in planned.preemptions}
    assert preempted <= {run.key for run in running}


@pytest.mark.parametrize("cpus", [2, 3, 4])
def test_every_run_is_started_in_the_end(cpus: int) -> None:
    """Simulate a stream of small runs, a large run and an elastic run until all have run, each for three rounds."""
    queue = [waits("large", cpus, at="1"), waits("elastic", [1, cpus], at="2")]
    queue += [waits(f"small-{i:02}", 1, at=f"0{i:02}" if i < 2 else f"3{i:02}") for i in range(20)]
    running: dict[Any, tuple[Running, int]] = {}
    backfilled: dict[Any, int] = {}
    order = []
    for _ in range(200):
        running = {key: (run, rounds - 1) for key, (run, rounds) in running.items() if rounds > 1}
        ready = [waits(str(q.key), q.sizes, at=q.submitted[0], backfilled=backfilled.get(q.key, 0)) for q in queue]
        planned = decide(ready, [run for run, _ in running.values()], cpus)
        for key in planned.backfilled:
            backfilled[key] = backfilled.get(key, 0) + 1
        for key, workers in planned.starts:
            order.append(key)
            (mine,) = [q for q in queue if q.key == key]
            queue.remove(mine)
            running[key] = runs(str(key), workers, sizes=mine.sizes), 3
        if not queue:
            break
    assert len(order) == 22
    assert order.index("large") <= 2 + MAX_BACKFILLED + 1


def test_a_group_that_waits_for_lost_nodes_stops_and_starts_with_fewer_workers() -> None:
    waiting = runs("elastic", 3, since="1", sizes=[1, 2, 3], placed=False)
    assert decide([], [waiting], cpus=3).preemptions == []
    assert decide([], [waiting], cpus=2).preemptions == [("elastic", "the cluster has shrunk")]
    assert decide([], [waiting], cpus=2, max_cpus=8).preemptions == []  # more nodes are on their way
    assert decide([], [runs("placed", 3)], cpus=2).preemptions == []  # the loss of its worker ends it
    older = runs("older", 1, since="0", placed=False)
    assert decide([], [older, waiting], cpus=1).preemptions == [("elastic", "the cluster has shrunk")]
    stopping = runs("elastic", 3, since="1", placed=False, stopping=True)
    planned = decide([waits("next", 1)], [stopping, older], cpus=2)
    assert (planned.preemptions, planned.starts) == ([], [])


@pytest.mark.parametrize("priority", [0, 1], ids=["none makes room", "each makes room"])
@pytest.mark.parametrize("size", [1, 50])
def test_the_work_of_a_plan_grows_with_the_runs_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch, priority: int, size: int
) -> None:
    looks = 0

    def counted(work: Any) -> Any:
        def count(*arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            return work(*arguments)

        return count

    for name in ("_set_free", "_gives_way"):
        monkeypatch.setattr(scheduler, name, counted(getattr(scheduler, name)))

    def cost(number: int) -> int:
        nonlocal looks
        looks = 0
        queue = [waits(f"q{i}", size, priority, f"{i:05}") for i in range(number)]
        running = [runs(f"r{i}", 1, since=f"{i:05}") for i in range(number)]
        planned = decide(queue, running, cpus=number)
        assert bool(planned.preemptions) == bool(priority)
        assert len(planned.reasons) == number
        return looks

    assert cost(2000) <= 11 * cost(200)


def test_each_passed_run_is_named_once_for_each_run_that_passes_it_up_to_the_bound() -> None:
    small = [waits(f"small{i}", at=str(i)) for i in range(1, 8)]
    planned = decide([waits("large", 9, at="0"), *small], [runs("first", 2)], cpus=10)
    assert len(planned.starts) == 7
    assert planned.backfilled == ["large"] * MAX_BACKFILLED
