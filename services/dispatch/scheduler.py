"""Plan which queued runs start, with how many workers, and which running runs make room. `plan` is a pure function.

The order is priority, then first come first served. A run starts when its whole worker group fits. One that does not
fit is passed by smaller runs a few times; then the resources that it needs are reserved for it. A run of higher
priority makes runs of lower priority save and stop. An elastic run starts with the fewest workers while other runs
wait, and takes the resources that remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.dispatch.backends.base import DRIVER_MEMORY, Capacity

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
    drivers: float = math.inf  # a run that starts takes one, a run that grows takes no other

    def fits(self, workers: int, use_gpu: bool, drivers: int = 1) -> bool:
        return workers <= self.cpus and (not use_gpu or workers <= self.gpus) and drivers <= self.drivers

    def take(self, workers: int, use_gpu: bool, drivers: int = 1) -> None:
        self.cpus -= workers
        self.gpus -= workers if use_gpu else 0
        self.drivers -= drivers


def plan(queued: Sequence[Queued], running: Sequence[Running], capacity: Capacity) -> Plan:
    """Return what to do now; each worker takes one CPU, and one GPU if the run uses GPUs; each run has one driver.

    With unlimited capacity all runs start at once with the fewest workers, in their order; no run makes room or grows.
    """
    result = Plan()
    if capacity.unlimited:
        for run in sorted(queued, key=_order):
            result.reasons += [(run.key, run.hold_reason)] if run.hold_reason else []
            result.starts += [] if run.hold_reason else [(run.key, run.sizes[0])]
        return result
    most = Capacity(max(capacity.cpus, capacity.max_cpus), max(capacity.gpus, capacity.max_gpus))
    drivers = math.inf if capacity.drivers is None else capacity.drivers
    there, able = _Free(capacity.cpus, capacity.gpus, drivers), _Free(most.cpus, most.gpus, drivers)
    for other in running:
        there.take(other.workers, other.use_gpu)
        able.take(other.workers, other.use_gpu)
    blocked: list[tuple[Queued, int]] = []  # and how many started before it was blocked
    starting: list[Queued] = []
    stranded = _stranded(running, able)
    room = _Room(running, {other.key for other in running if other.stopping} | {other.key for other in stranded})
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
        else:
            waiting_for_room = True
            reason = f"needs {_amount(fewest, run.use_gpu)}, free: {_has(able)}"
            if able.drivers < 1:
                reason = f"waits for memory for its driver; {_drivers_fit(drivers)}"
            makers = room.make(run, able)
            if makers is not None:
                result.preemptions += [(other.key, _why(run, other)) for other in makers]
                reason = "waits for others to save and stop"
            if makers is not None or run.backfilled >= MAX_BACKFILLED:  # resources that become free are for this run
                able.take(fewest, run.use_gpu)
            else:
                blocked.append((run, len(starting)))
            result.reasons.append((run.key, reason))
    for run in starting:
        result.starts.append((run.key, _enlarged(run.sizes, run.sizes[0], run.use_gpu, there, able)))
    for run, started in blocked:
        result.backfilled += [run.key] * min(len(starting) - started, MAX_BACKFILLED)
    if not waiting_for_room:
        result.grows = _growing(running, room.stopping, there, able)
    return result


def _order(run: Queued) -> tuple[int, tuple[str, int]]:
    return -run.priority, run.submitted


def _stranded(running: Sequence[Running], able: _Free) -> list[Running]:
    """Return the runs whose groups wait in vain for lost resources, the youngest first.

    Runs whose group is placed are left out: the loss of a worker ends their attempt.
    """
    free, stranded = _Free(able.cpus, able.gpus), []
    for run in sorted(running, key=lambda run: (run.stopping, run.since), reverse=True):
        if run.stopping or (not run.placed and not free.fits(0, run.use_gpu, 0)):
            free.take(-run.workers, run.use_gpu)
            stranded += [] if run.stopping else [run]
    return stranded


class _Room:
    """The running runs that can make room for queued runs, which ask in their order: by priority, highest first.

    No queued run looks at all running runs again: what the stopping runs set free is summed up, and after a run for
    which the room did not suffice, no later run that needs as much is tried.
    """

    def __init__(self, running: Sequence[Running], stopping: set[str]) -> None:
        """Args:
        stopping: keys of runs that stop anyway.
        """
        self.stopping = stopping
        self._going = [run for run in running if run.key in stopping]
        staying = (run for run in running if run.key not in stopping)
        # the least important and youngest first
        self._staying = sorted(staying, key=lambda run: (-run.priority, run.since), reverse=True)
        self._freed: dict[int, _Free] = {}  # by the priority of the run that asks: what the stopping runs set free
        self._too_large: dict[bool, int] = {}  # by `use_gpu`: the fewest workers for which the room did not suffice

    def make(self, run: Queued, able: _Free) -> list[Running] | None:
        """Return the runs that must stop as well so that `run` can start; None if it could not start even then."""
        fewest = run.sizes[0]
        if fewest >= self._too_large.get(run.use_gpu, fewest + 1):
            return None
        freed = self._freed_for(run.priority)
        free = _Free(able.cpus + freed.cpus, able.gpus + freed.gpus, able.drivers + freed.drivers)
        makers: list[Running] = []
        for other in self._staying:
            if free.fits(fewest, run.use_gpu) or other.priority > run.priority:
                break
            if _gives_way(other, run):
                _set_free(other, run.priority, free)
                makers.append(other)
        if not free.fits(fewest, run.use_gpu):
            self._too_large[run.use_gpu] = fewest
            return None
        self._stop(makers, freed, run.priority)
        return makers

    def _freed_for(self, priority: int) -> _Free:
        if priority not in self._freed:
            self._freed = {priority: _Free(0, 0, 0)}  # no run of a higher priority asks any more
            for other in self._going:
                _set_free(other, priority, self._freed[priority])
        return self._freed[priority]

    def _stop(self, makers: list[Running], freed: _Free, priority: int) -> None:
        if not makers:
            return
        for other in makers:
            _set_free(other, priority, freed)
        self.stopping |= {other.key for other in makers}
        self._going += makers
        self._staying = [other for other in self._staying if other.key not in self.stopping]


def _set_free(other: Running, priority: int, free: _Free) -> None:
    """Add to `free` what `other` sets free for a run of this priority.

    A run that is no less important starts again at once, with its fewest.
    """
    returns = other.priority >= priority and not other.stopping
    free.take(-(other.workers - (other.sizes[0] if returns else 0)), other.use_gpu, 0 if returns else -1)


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
        if there.fits(more, use_gpu, 0) and able.fits(more, use_gpu, 0):
            there.take(more, use_gpu, 0)
            able.take(more, use_gpu, 0)
            return size
    return taken


def _drivers_fit(drivers: float) -> str:
    return f"{drivers:.0f} driver{' fits' if drivers == 1 else 's fit'} the nodes, {DRIVER_MEMORY // 2**20} MiB each"


def _amount(workers: int, use_gpu: bool) -> str:
    return _has(Capacity(workers, workers if use_gpu else 0), bare=not use_gpu)


def _has(free: Capacity | _Free, bare: bool = False) -> str:
    cpus, gpus = max(0, free.cpus), max(0, free.gpus)
    parts = [f"{cpus} CPU{'' if cpus == 1 else 's'}", f"{gpus} GPU{'' if gpus == 1 else 's'}"]
    return parts[0] if bare or not gpus else " and ".join(parts)
