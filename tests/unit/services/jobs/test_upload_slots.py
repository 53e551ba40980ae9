"""Test which uploads give their slots to others."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest

from genmodels.errors import RequestError
from services.jobs import upload_slots
from services.jobs.upload_slots import MIN_SECONDS, UPLOADS_AT_ONCE, UploadSlots


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Uploads:
    """Uploads that send what the test says, and then wait until the test ends them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.slots = UploadSlots(self.clock)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.may_end = asyncio.Event()

    async def start(self, key: str, size: int, *, whole: bool = False) -> None:
        """Start an upload that has sent `size` bytes; raise RequestError if it gets no slot."""
        sent = asyncio.Event()
        task = self.tasks[key] = asyncio.create_task(self._upload(key, self._parts(size, whole, sent), sent))
        await asyncio.wait((task, asyncio.create_task(sent.wait())), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()

    async def _upload(self, key: str, parts: AsyncIterator[bytes], sent: asyncio.Event) -> None:
        with self.slots.take(key) as upload:
            await upload.receive(parts, io.BytesIO())
            sent.set()
            await self.may_end.wait()  # the data is checked

    async def _parts(self, size: int, whole: bool, sent: asyncio.Event) -> AsyncIterator[bytes]:
        yield bytes(size)
        if not whole:
            sent.set()
            await self.may_end.wait()

    async def end(self) -> dict[str, str | None]:
        """End the uploads that still run; return each one's error code."""
        self.may_end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        errors: dict[str, Any] = {key: task.exception() for key, task in self.tasks.items()}
        return {key: error and error.code for key, error in errors.items()}


def keys(count: int) -> list[str]:
    return [f"key{number}" for number in range(count)]


def test_the_slowest_gives_way_to_a_new_one() -> None:
    async def play() -> None:
        uploads = Uploads()
        for number, key in enumerate(keys(UPLOADS_AT_ONCE)):
            await uploads.start(key, 5000 - 1000 * (number % 3))  # key2 is the slowest
        uploads.clock.now += MIN_SECONDS + 1
        await uploads.start("new", 10)
        codes = await uploads.end()
        assert codes == dict.fromkeys([*keys(UPLOADS_AT_ONCE), "new"]) | {"key2": "upload_too_slow"}

    asyncio.run(play())


@pytest.mark.parametrize("case", ["young", "fast", "complete"])
def test_no_other_upload_gives_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_slots, "FULL_SPEED", 1000)

    async def play() -> None:
        uploads = Uploads()
        seconds = MIN_SECONDS - 1 if case == "young" else MIN_SECONDS + 1
        size = int(seconds * 1000) + 1 if case == "fast" else 10
        for key in keys(UPLOADS_AT_ONCE):
            await uploads.start(key, size, whole=case == "complete")
        uploads.clock.now += seconds
        with pytest.raises(RequestError) as refusal:
            await uploads.start("new", 10)
        assert (refusal.value.status, refusal.value.code) == (429, "too_many")
        codes = await uploads.end()
        assert codes == dict.fromkeys(keys(UPLOADS_AT_ONCE)) | {"new": "too_many"}

    asyncio.run(play())


def test_each_key_has_one_upload_at_a_time_and_another_one_afterwards() -> None:
    async def play() -> None:
        uploads = Uploads()
        await uploads.start("a", 10)
        first = uploads.tasks["a"]
        uploads.clock.now += MIN_SECONDS + 1
        with pytest.raises(RequestError, match="one at a time"):
            await uploads.start("a", 10)
        assert not first.done()
        for key in ("b", "c", "d", "new"):
            await uploads.start(key, 100)
        with pytest.raises(RequestError, match="slower than"):
            await first
        uploads.clock.now += MIN_SECONDS + 1
        await uploads.start("a", 10)  # its slot was given away, so the key may ask again
        await uploads.end()
        with uploads.slots.take("a"), uploads.slots.take("b"):
            pass

    asyncio.run(play())
