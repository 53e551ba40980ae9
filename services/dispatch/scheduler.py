"""Plan which queued runs start, with how many workers, and which running ones make room. A pure function.

The order is priority, then first come first served. A run starts when its whole worker group fits. One that does not
fit is passed by smaller ones a few times; then what it needs is reserved for it. A run of higher priority makes lower
ones save and stop. An elastic run starts with the fewest workers while others wait, and takes what is left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.dispatch.backends.base import Capacity

MAX_BACKFILLED = 4  # by later runs, until a blocked run's resources are held for it


@dataclass(frozen=True)
class Queued:
    """A run that waits. `key`: its name; `sizes`: numbers of workers it may have, ascending."""

    key: str
    priority: int
    submitted: tuple[str, int]  # time of submission, and the model's place in the job
    sizes: Sequence[int]
    use_gpu: bool = False
    backfilled: int = 0  # how many later ones have started since it could not
    hold_reason: str = ""  # why it is not to start now, whatever is free
    reserves: bool = False  # it starts so soon that what it needs is kept for it


@dataclass(frozen=True)
class Running:
    """A run that has workers, or has been given them.

    `growable`: it has run long enough, and has long enough to go, for a restart to pay.
    """

    key: str
    priority: int
    since: str
    sizes: Sequence[int]
    workers: int
    use_gpu: bool = False
    stopping: bool = False
    growable: bool = False
    placed: bool = True  # its group is there


@dataclass
class Plan:
    starts: list[tuple[str, int]] = field(default_factory=list)  # run, number of workers
    preemptions: list[tuple[str, str]] = field(default_factory=list)  # run that makes room, and why
    grows: list[tuple[str, str]] = field(default_factory=list)  # run that could have more workers
    backfilled: list[str] = field(default_factory=list)  # runs that others are started past
    reasons: list[tuple[str, str]] = field(default_factory=list)  # of those that go on waiting, in their order


@dataclass
class _Free:
    """What is free; below zero if more is used than there is, as after the loss of a node."""

    cpus: int
    gpus: int

    def fits(self, workers: int, use_gpu: bool) -> bool:
        return workers <= self.cpus and (not use_gpu or workers <= self.gpus)

    def take(self, workers: int, use_gpu: bool) -> None:
        self.cpus -= workers
        self.gpus -= workers if use_gpu else 0


def plan(queued: Sequence[Queued], running: Sequence[Running], capacity: Capacity) -> Plan:
    """What to do now; each worker takes one CPU, and one GPU where the run uses GPUs.

    With unlimited capacity all start at once with the fewest workers, in their order, and none makes room or grows.
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
            if makers or run.backfilled >= MAX_BACKFILLED:  # what comes free is for this one
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
    """Runs whose groups would wait in vain for what has gone, the youngest first; the lost ones of a group end it."""
    free, stranded = _Free(able.cpus, able.gpus), []
    for run in sorted(running, key=lambda run: (run.stopping, run.since), reverse=True):
        if run.stopping or (not run.placed and not free.fits(0, run.use_gpu)):
            free.take(-run.workers, run.use_gpu)
            stranded += [] if run.stopping else [run]
    return stranded


def _make_room(run: Queued, running: Sequence[Running], able: _Free, stopping: set[str]) -> list[Running]:
    """Runs whose stopping lets this one start, the least important and youngest first; none if that is not enough."""
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
    """A lower priority gives way altogether; an equal one only what it has beyond its fewest workers."""
    return other.priority < run.priority or (other.priority == run.priority and other.workers > other.sizes[0])


def _why(run: Queued, other: Running) -> str:
    """For the other run's history, whose reader may not know this one."""
    if other.priority < run.priority:
        return f"preempted by a run of priority {run.priority}"
    return "makes room for another run"


def _growing(running: Sequence[Running], stopping: set[str], there: _Free, able: _Free) -> list[tuple[str, str]]:
    """Elastic runs for whom there are more workers now, the most important first."""
    grown = []
    for run in sorted(running, key=lambda run: (-run.priority, run.since)):
        if not run.growable or run.key in stopping:
            continue
        size = _enlarged(run.sizes, run.workers, run.use_gpu, there, able)
        if size > run.workers:
            grown.append((run.key, f"grows from {run.workers} to {size} workers"))
    return grown


def _enlarged(sizes: Sequence[int], taken: int, use_gpu: bool, there: _Free, able: _Free) -> int:
    """The largest size that what is left over allows, which is taken from it."""
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
