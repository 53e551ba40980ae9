"""Test keys: permissions, from the token to the store and back, also while the store is away."""

from __future__ import annotations

import hmac
import re
import secrets
import threading
from collections.abc import Iterator

import pytest

from genmodels import keys as keys_module
from genmodels.errors import SpecError, StorageUnavailable
from genmodels.keys import FRESH_SECONDS, STALE_SECONDS, UNKNOWN_CACHED, Key, Keys, Scope
from genmodels.storage import Storage
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped, in_threads


class Clock:
    """Act as a monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class CountingStorage(Wrapped):
    def __init__(self, inner: Storage | None = None) -> None:
        super().__init__(inner)
        self.reads: list[str] = []

    def before(self, verb: str, key: str) -> None:
        self.reads.append(key)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(keys_module, "time", clock)
    return clock


def test_a_key_from_its_making_to_its_end(storage: Storage) -> None:
    keys = Keys(storage)
    assert not keys.any()
    key, token = keys.create("ci", ("submit",), ("vae",))
    assert re.fullmatch(r"gm_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", token)
    assert token.startswith(f"gm_{key.id}_")
    assert keys.any()
    assert keys.list() == [key]
    elsewhere = Keys(storage)
    assert elsewhere.check(token) == key
    revoked = keys.revoke(key.id)
    assert keys.revoke(key.id) == revoked
    assert keys.check(token) is None
    assert Keys(storage).check(token) is None
    assert not keys.any()
    assert [result.revoked for result in keys.list()] == [revoked.revoked]
    keys.delete(key.id)
    assert keys.list() == []
    assert storage.list("") == []


def test_the_store_never_sees_a_secret(storage: Storage) -> None:
    key, token = Keys(storage).create("ci", ("admin",))
    secret = token.removeprefix(f"gm_{key.id}_")
    assert all(secret.encode() not in storage.get(name)[0] for name in storage.list(""))
    assert secret not in repr(key)


def test_wrong_tokens() -> None:
    store = CountingStorage()
    keys = Keys(store)
    key, token = keys.create("ci", ("generate",))
    _, other = keys.create("other", ("generate",))
    store.reads.clear()
    malformed = ["", "gm_", token[:-1], token + "x", token + "\n", token.upper(), " " + token, "é" * 55, "x" * 10**6]
    assert [keys.check(text) for text in malformed] == [None] * len(malformed)
    assert store.reads == []  # malformed tokens cause no read
    assert keys.check(f"gm_{key.id}_{other[12:]}") is None
    assert keys.check(f"gm_{'0' * 8}_{token[12:]}") is None
    assert keys.check(token) == key


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    whole = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return whole(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys(MemoryStorage())
    key, token = keys.create("ci", ("generate",))
    for guess in (token, token[:-1] + ("A" if token[-1] != "A" else "B"), f"gm_{'0' * 8}_{token[12:]}"):
        keys.check(guess)
    assert [len(digest) for pair in compared for digest in pair] == [64] * 6  # once for each, known or not
    assert compared[0] == (key.sha256, key.sha256)
    assert compared[2][1] == "0" * 64


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (("generate",), {"generate"}),
        (("submit",), {"submit"}),
        (("generate", "submit"), {"generate", "submit"}),
        (("admin",), {"generate", "submit", "admin"}),
    ],
)
def test_scopes(scopes: tuple[Scope, ...], allowed: set[Scope]) -> None:
    key, _ = Keys(MemoryStorage()).create("k", scopes)
    every: tuple[Scope, ...] = ("generate", "submit", "admin")
    assert {scope for scope in every if key.allows(scope)} == allowed


def test_prefixes() -> None:
    keys = Keys(MemoryStorage())
    limited, _ = keys.create("k", ("submit",), ("team-a-", "vae"))
    names = ["team-a-1", "team-a-", "team-b-1", "team-a", "vae", "vae-2", "my-vae", ""]
    assert [name for name in names if limited.may_use(name)] == ["team-a-1", "team-a-", "vae", "vae-2"]
    free, _ = keys.create("k", ("submit",))
    assert all(free.may_use(name) for name in names)


@pytest.mark.parametrize(
    ("name", "scopes", "prefixes", "message"),
    [
        ("Ci key", ("submit",), (), "name: got 'Ci key'"),
        ("", ("submit",), (), "name: got ''"),
        ("ci", (), (), "scope: got 'none', expected one or more of generate, submit, admin"),
        ("ci", ("submit", "root"), (), "scope: got 'root'"),
        ("ci", ("submit",), ("",), "prefix: got ''"),
        ("ci", ("submit",), ("../x",), "prefix: got '../x'"),
    ],
)
def test_what_can_be_no_key(name: str, scopes: tuple[Scope, ...], prefixes: tuple[str, ...], message: str) -> None:
    store = MemoryStorage()
    with pytest.raises(SpecError, match=re.escape(message)):
        Keys(store).create(name, scopes, prefixes)
    assert store.objects == {}


@pytest.mark.parametrize("id", ["", "0" * 8, "../../x", "0" * 9, "G" * 8, "a/b"])
def test_no_such_key_to_revoke(id: str) -> None:
    with pytest.raises(SpecError, match="no key"):
        Keys(MemoryStorage()).revoke(id)


def test_a_taken_id_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(MemoryStorage())
    ids = iter(["aaaaaaaa", "0" * 32, "aaaaaaaa", "1" * 32, "bbbbbbbb", "2" * 32])  # every second value is a nonce
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(ids))
    first, token = keys.create("one", ("submit",))
    second, _ = keys.create("two", ("submit",))
    assert (first.id, second.id) == ("aaaaaaaa", "bbbbbbbb")
    assert keys.check(token) == first


def test_lookups_are_kept_for_a_while(clock: Clock) -> None:
    store = CountingStorage()
    keys = Keys(store)
    key, token = keys.create("ci", ("generate",))
    stranger = f"gm_{'f' * 8}_{'x' * 43}"
    store.reads.clear()
    for _ in range(100):
        assert keys.check(token) == key
        assert keys.check(stranger) is None
    assert store.reads == [f"keys/{key.id}.json", "keys/ffffffff.json"]
    clock.now += FRESH_SECONDS
    assert keys.check(token) == key
    assert keys.check(stranger) is None
    assert len(store.reads) == 4


def test_a_key_revoked_elsewhere_ends_within_seconds(clock: Clock) -> None:
    store = MemoryStorage()
    here, there = Keys(store), Keys(store)
    key, token = here.create("ci", ("generate",))
    assert here.check(token) == key
    there.revoke(key.id)
    assert here.check(token) == key
    clock.now += FRESH_SECONDS
    assert here.check(token) is None


def test_made_up_ids_take_no_memory_and_push_no_key_out(clock: Clock) -> None:
    store = FailingStorage()
    keys = Keys(store)
    key, token = keys.create("ci", ("generate",))
    assert keys.check(token) == key
    for i in range(UNKNOWN_CACHED + 100):
        keys.check(f"gm_{i:08x}_{'x' * 43}")
    assert len(keys._unknown) == UNKNOWN_CACHED
    store.away = True
    clock.now += FRESH_SECONDS
    assert keys.check(token) == key


def test_the_store_is_away(clock: Clock) -> None:
    store = FailingStorage()
    keys = Keys(store)
    key, token = keys.create("ci", ("generate",))
    _, never_seen = keys.create("new", ("generate",))
    gone, revoked = keys.create("old", ("generate",))
    keys.revoke(gone.id)
    assert keys.check(token) == key
    store.away = True
    with pytest.raises(StorageUnavailable):
        keys.check(never_seen)
    clock.now += FRESH_SECONDS
    refused = store.refused
    assert [keys.check(token) for _ in range(50)] == [key] * 50
    assert store.refused == refused + 1  # no caller waits for the store repeatedly
    assert keys.check(revoked) is None
    assert keys.check(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
    clock.now += STALE_SECONDS - FRESH_SECONDS - 1
    assert keys.check(token) == key
    clock.now += 1
    with pytest.raises(StorageUnavailable):
        keys.check(token)
    store.away = False
    assert keys.check(token) == key


def test_only_one_waits_for_a_slow_store(clock: Clock) -> None:
    answers, read_started = threading.Event(), threading.Event()

    class Slow(MemoryStorage):
        waiting = False

        def get(self, key: str) -> tuple[bytes, str]:
            if self.waiting:
                read_started.set()
                assert answers.wait(30)
            return super().get(key)

    store = Slow()
    keys = Keys(store)
    key, token = keys.create("ci", ("generate",))
    assert keys.check(token) == key
    clock.now += FRESH_SECONDS
    store.waiting = True
    result: list[Key | None] = []
    waiter = threading.Thread(target=lambda: result.append(keys.check(token)))
    waiter.start()
    assert read_started.wait(30)
    clock.now += FRESH_SECONDS  # however long it takes
    assert in_threads(8, lambda _: keys.check(token)) == [key] * 8  # otherwise they would hang here
    assert result == []
    answers.set()
    waiter.join(30)
    assert result == [key]


def test_a_key_that_was_made_elsewhere(storage: Storage) -> None:
    token = "gm_0123abcd_" + "k" * 43
    admitted = Keys(storage).admit(token, "first", ("admin",))
    assert Keys(storage).check(token) == admitted
    assert Keys(storage).admit(token, "first", ("admin",)) == admitted, "doing it again changes nothing"
    assert "k" * 43 not in storage.get("keys/0123abcd.json")[0].decode()
    Keys(storage).revoke(admitted.id)
    assert Keys(storage).admit(token, "first", ("admin",)).revoked, "nor does it bring back what was revoked"
    assert Keys(storage).check(token) is None
    with pytest.raises(SpecError, match="another key has the id"):
        Keys(storage).admit("gm_0123abcd_" + "x" * 43, "other", ("admin",))
    with pytest.raises(SpecError, match="not a key"):
        Keys(storage).admit("secret", "other", ("admin",))
