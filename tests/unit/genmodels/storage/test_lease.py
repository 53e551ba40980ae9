"""Test the lease: one holder at a time, also when a holder is paused or killed, or the store's responses are lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from genmodels.errors import LeaseLost, StorageUnavailable
from genmodels.storage import Storage
from genmodels.storage import lease as lease_module
from genmodels.storage.lease import Lease
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped, in_threads


class Clock:
    """Act as a monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


class LostAnswers(Wrapped):
    """Carry out a put but lose its response; the store stays away for the next read."""

    def __init__(self) -> None:
        super().__init__()
        self.losing = self.away = False

    def before(self, verb: str, key: str) -> None:
        if self.away:
            raise StorageUnavailable(f"{key}: no answer")

    def after(self, verb: str, key: str) -> None:
        if self.losing and verb == "put":
            self.away = True
            raise StorageUnavailable(f"{key}: answer lost")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def test_one_holds_it(storage: Storage, clock: Clock) -> None:
    a, b = Lease(storage), Lease(storage)
    assert a.try_acquire() == 1
    assert a.held()
    assert b.try_acquire() is None
    assert not b.held()
    for _ in range(10):  # no other process gets the lease while it is renewed
        clock.now += 14
        a.renew()
        assert b.try_acquire() is None
    assert a.held()


def test_the_next_waits_a_whole_length_of_its_own_clock(clock: Clock) -> None:
    store = MemoryStorage()
    a, b = Lease(store), Lease(store)
    assert a.try_acquire() == 1
    clock.now += 1000  # b has not read the lease before: no renewal is old by its clock
    assert b.try_acquire() is None
    clock.now += 14.9
    assert b.try_acquire() is None
    clock.now += 0.1
    assert b.try_acquire() == 2
    with pytest.raises(LeaseLost, match="term 1"):
        a.renew()


def test_one_that_was_paused_knows_it_and_comes_too_late(storage: Storage, clock: Clock) -> None:
    a, b = Lease(storage), Lease(storage)
    assert a.try_acquire() == 1
    assert b.try_acquire() is None
    clock.now += 15  # a is paused and does not renew
    assert not a.held()
    assert b.try_acquire() == 2
    assert b.held()
    with pytest.raises(LeaseLost):
        a.renew()
    with pytest.raises(LeaseLost):
        a.renew()  # and goes on to say so
    a.release()  # the release takes nothing from b
    assert a.try_acquire() is None
    b.renew()
    assert b.held()
    clock.now += 15
    assert a.try_acquire() is None  # b's renewal is new to it
    clock.now += 15
    assert a.try_acquire() == 3


def test_paused_but_nobody_came(clock: Clock) -> None:
    a = Lease(MemoryStorage())
    assert a.try_acquire() == 1
    clock.now += 100
    assert not a.held()
    a.renew()
    assert a.held()


def test_at_no_moment_do_two_hold_it(clock: Clock) -> None:
    """A renewal is written at any moment of the watcher's read, which takes 5 s."""
    for moment in range(6):
        store = Wrapped()
        a, b = Lease(store.inner), Lease(store)
        assert a.try_acquire() == 1

        def slow(verb: str, key: str, a: Lease = a, moment: int = moment) -> None:
            clock.now += moment
            a.renew()
            clock.now += 5 - moment

        store.before = slow
        assert b.try_acquire() is None
        store.before = lambda verb, key: None
        while a.held():
            assert b.try_acquire() is None
            clock.now += 0.25
        clock.now += 5
        assert b.try_acquire() == 2


def test_given_back_there_is_nothing_to_wait_for(storage: Storage, clock: Clock) -> None:
    a, b = Lease(storage), Lease(storage)
    assert a.try_acquire() == 1
    assert b.try_acquire() is None
    a.release()
    assert not a.held()
    with pytest.raises(LeaseLost):
        a.renew()
    assert b.try_acquire() == 2
    a.release()
    assert b.held()
    assert a.try_acquire() is None


def test_terms_only_grow(storage: Storage, clock: Clock) -> None:
    terms = []
    for _ in range(4):
        one = Lease(storage)
        terms.append(one.try_acquire())
        one.release()
        terms.append(one.try_acquire())
        terms.append(one.try_acquire())  # its own lease: no wait
        one.release()
    assert terms == list(range(1, 13))


def test_many_at_once(storage: Storage) -> None:
    leases = [Lease(storage) for _ in range(12)]
    assert sorted(in_threads(12, lambda i: leases[i].try_acquire() or 0)) == [0] * 11 + [1]
    assert sum(lease.held() for lease in leases) == 1


def test_the_store_is_away(clock: Clock) -> None:
    store = FailingStorage()
    a = Lease(store)
    assert a.try_acquire() == 1
    store.away = True
    clock.now += 10
    with pytest.raises(StorageUnavailable):
        a.renew()
    assert a.held()  # it was renewed 10 s ago
    with pytest.raises(StorageUnavailable):
        Lease(store).try_acquire()
    clock.now += 5
    assert not a.held()
    store.away = False
    a.renew()
    assert a.held()


def test_renewals_whose_answer_was_lost_are_its_own(clock: Clock) -> None:
    store = LostAnswers()
    a, b = Lease(store), Lease(store)
    assert a.try_acquire() == 1
    for _ in range(3):
        clock.now += 5
        store.losing = True
        with pytest.raises(StorageUnavailable):
            a.renew()
        assert a.held()
        store.losing = store.away = False
        a.renew()
    assert a.held()
    assert b.try_acquire() is None
    store.losing = True
    with pytest.raises(StorageUnavailable):
        Lease(store, name="other").try_acquire()


def test_its_object_was_removed(clock: Clock) -> None:
    store = MemoryStorage()
    a = Lease(store)
    assert a.try_acquire() == 1
    store.delete("dispatcher/lease.json")
    with pytest.raises(LeaseLost):
        a.renew()
    a.release()
