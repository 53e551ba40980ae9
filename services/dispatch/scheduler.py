"""Plan which queued runs start, with how many workers, and which running runs make room. `plan` is a pure function.

The order is priority, then first come first served. A run starts when its whole worker group fits. One that does not
fit is passed by smaller runs a few times; then the resources that it needs are reserved for it. A run of higher
priority makes runs of lower priority save and stop. An elastic run starts with the fewest workers while other runs
wait, and takes the resources that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.dispatch.backends.base import Capacity

MAX_BACKFILLED = 4  # later runs that pass a blocked run before resources are reserved for it


@dataclass(frozen=True)
class Queued:
    """A run that waits. `key`: its name; `sizes`: the numbers of workers that it may have, ascending."""

    key: str
    priority: int
    submitted: tuple[str, int]  # time of submission, and the model's place in the job
    sizes: Sequence[int]
    use_gpu: bool = False
    backfilled: int = 0  # number of later runs that started while it could not
    hold_reason: str = ""  # why it must not start now, even if it fits
    reserves: bool = False  # it starts so soon that its resources are reserved


@dataclass(frozen=True)
class Running:
    """A run that has workers, or to which workers are assigned.

    `growable`: a restart pays, because the run is neither too young nor too close to its end.
    """

    key: str
    priority: int
    since: str
    sizes: Sequence[int]
    workers: int
    use_gpu: bool = False
    stopping: bool = False
    growable: bool = False
    placed: bool = True  # its worker group is placed


@dataclass
class Plan:
    starts: list[tuple[str, int]] = field(default_factory=list)  # run, number of workers
    preemptions: list[tuple[str, str]] = field(default_factory=list)  # run that makes room, and why
    grows: list[tuple[str, str]] = field(default_factory=list)  # run that could have more workers
    backfilled: list[str] = field(default_factory=list)  # runs that others are started past
    reasons: list[tuple[str, str]] = field(default_factory=list)  # of the runs that still wait, in their order


@dataclass
class _Free:
    """Free resources; below zero if the runs use more than the cluster has, for example after the loss of a node."""

    cpus: int
    gpus: int

    def fits(self, workers: int, use_gpu: bool) -> bool:
        return workers <= self.cpus and (not use_gpu or workers <= self.gpus)

    def take(self, workers: int, use_gpu: bool) -> None:
        self.cpus -= workers
        self.gpus -= workers if use_gpu else 0


def plan(queued: Sequence[Queued], running: Sequence[Running], capacity: Capacity) -> Plan:
    """Return what to do now; each worker takes one CPU, and one GPU if the run uses GPUs.

    With unlimited capacity all runs start at once with the fewest workers, in their order; no run makes room or grows.
    """
    result = Plan()
    if capacity.unlimited:
        for run in sorted(queued, key=_order):
            result.reasons += [(run.key, run.hold_reason)] if run.hold_reason else []
            result.starts += [] if run.hold_reason else [(run.key, run.sizes[0])]
        return result
    most = Capacity(max(capacity.cpus, capacity.max_cpus), max(capacity.gpus, capacity.max_gpus))
    there, able = _Free(capacity.cpus, capacity.gpus), _Free(most.cpus, most.gpus)
    for other in running:
        there.take(other.workers, other.use_gpu)
        able.take(other.workers, other.use_gpu)
    blocked: list[Queued] = []
    starting: list[Queued] = []
    stranded = _stranded(running, able)
    stopping = {other.key for other in running if other.stopping} | {other.key for other in stranded}
    result.preemptions += [(other.key, "the cluster has shrunk") for other in stranded]
    waiting_for_room = False
    for run in sorted(queued, key=_order):
        fewest = run.sizes[0]
        if run.hold_reason:
            if run.reserves:
                there.take(fewest, run.use_gpu)
                able.take(fewest, run.use_gpu)
            result.reasons.append((run.key, run.hold_reason))
        elif not _Free(most.cpus, most.gpus).fits(fewest, run.use_gpu):
            result.reasons.append((run.key, f"needs {_amount(fewest, run.use_gpu)}; the cluster has {_has(most)}"))
        elif able.fits(fewest, run.use_gpu):
            there.take(fewest, run.use_gpu)
            able.take(fewest, run.use_gpu)
            starting.append(run)
            result.backfilled += [waiting.key for waiting in blocked]
        else:
            waiting_for_room = True
            reason = f"needs {_amount(fewest, run.use_gpu)}, free: {_has(able)}"
            makers = _make_room(run, running, able, stopping)
            if makers:
                stopping |= {other.key for other in makers}
                result.preemptions += [(other.key, _why(run, other)) for other in makers if not other.stopping]
                reason = "waits for others to save and stop"
            if makers or run.backfilled >= MAX_BACKFILLED:  # resources that become free are for this run
                able.take(fewest, run.use_gpu)
            else:
                blocked.append(run)
            result.reasons.append((run.key, reason))
    for run in starting:
        result.starts.append((run.key, _enlarged(run.sizes, run.sizes[0], run.use_gpu, there, able)))
    if not waiting_for_room:
        result.grows = _growing(running, stopping, there, able)
    return result


def _order(run: Queued) -> tuple[int, tuple[str, int]]:
    return -run.priority, run.submitted


def _stranded(running: Sequence[Running], able: _Free) -> list[Running]:
    """Return the runs whose groups wait in vain for lost resources, the youngest first.

    Runs whose group is placed are left out: the loss of a worker ends their attempt.
    """
    free, stranded = _Free(able.cpus, able.gpus), []
    for run in sorted(running, key=lambda run: (run.stopping, run.since), reverse=True):
        if run.stopping or (not run.placed and not free.fits(0, run.use_gpu)):
            free.take(-run.workers, run.use_gpu)
            stranded += [] if run.stopping else [run]
    return stranded


def _make_room(run: Queued, running: Sequence[Running], able: _Free, stopping: set[str]) -> list[Running]:
    """Return the runs that must stop so that `run` can start, the least important and youngest first.

    The list is empty if `run` could not start even then.
    """
    free = _Free(able.cpus, able.gpus)
    makers = []
    going = [other for other in running if other.key in stopping]
    fitting = [other for other in running if other.key not in stopping and _gives_way(other, run)]
    for other in [*going, *sorted(fitting, key=lambda other: (-other.priority, other.since), reverse=True)]:
        gain = other.workers - (other.sizes[0] if other.priority >= run.priority and not other.stopping else 0)
        free.take(-gain, other.use_gpu)
        makers.append(other)
        if free.fits(run.sizes[0], run.use_gpu):
            return makers
    return []


def _gives_way(other: Running, run: Queued) -> bool:
    """Tell whether `other` makes room for `run`: with all its workers if its priority is lower.

    With an equal priority it gives only the workers beyond its fewest.
    """
    return other.priority < run.priority or (other.priority == run.priority and other.workers > other.sizes[0])


def _why(run: Queued, other: Running) -> str:
    """Return the reason for the history of `other`. It does not name `run`, which a reader may not know."""
    if other.priority < run.priority:
        return f"preempted by a run of priority {run.priority}"
    return "makes room for another run"


def _growing(running: Sequence[Running], stopping: set[str], there: _Free, able: _Free) -> list[tuple[str, str]]:
    """Return the elastic runs that can have more workers now, the most important first."""
    grown = []
    for run in sorted(running, key=lambda run: (-run.priority, run.since)):
        if not run.growable or run.key in stopping:
            continue
        size = _enlarged(run.sizes, run.workers, run.use_gpu, there, able)
        if size > run.workers:
            grown.append((run.key, f"grows from {run.workers} to {size} workers"))
    return grown


def _enlarged(sizes: Sequence[int], taken: int, use_gpu: bool, there: _Free, able: _Free) -> int:
    """Return the largest size that fits the remaining resources, and take these resources."""
    for size in reversed(sizes):
        more = size - taken
        if more <= 0:
            break
        if there.fits(more, use_gpu) and able.fits(more, use_gpu):
            there.take(more, use_gpu)
            able.take(more, use_gpu)
            return size
    return taken


def _amount(workers: int, use_gpu: bool) -> str:
    return _has(Capacity(workers, workers if use_gpu else 0), bare=not use_gpu)


def _has(free: Capacity | _Free, bare: bool = False) -> str:
    cpus, gpus = max(0, free.cpus), max(0, free.gpus)
    parts = [f"{cpus} CPU{'' if cpus == 1 else 's'}", f"{gpus} GPU{'' if gpus == 1 else 's'}"]
    return parts[0] if bare or not gpus else " and ".join(parts)
