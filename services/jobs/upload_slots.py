"""Slots for the uploads of datasets. Each upload takes disk, and memory while its data is checked.

A slow upload keeps its slot only while no other key needs it: when all slots are taken, a new upload gets the slot of
the slowest upload, if that one has had `MIN_SECONDS` and its mean speed is below `FULL_SPEED`. So a few keys that send
just fast enough for the time limit of the body cannot block all others, and a fast upload is never interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

from starlette.concurrency import run_in_threadpool

from genmodels.errors import RequestError

UPLOADS_AT_ONCE = 4  # of all keys; each key has one
MIN_SECONDS = 60.0  # that an upload may keep its slot at any speed
FULL_SPEED = 2**20  # bytes per second; an upload at this mean speed never gives way
RETRY_SECONDS = 30  # after which a refused upload may be tried again


@dataclass(eq=False)
class Upload:
    """An upload that holds a slot."""

    started: float
    size: int = 0  # bytes received
    is_receiving: bool = True  # an upload whose body is complete never gives way
    _given_up: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    async def receive(self, parts: AsyncIterator[bytes], file: IO[bytes]) -> None:
        """Write the whole body into a file.

        Raises:
            RequestError: 429; the slot was given to another upload.
        """
        try:
            async with self._given_up:
                async for part in parts:
                    self.size += len(part)
                    await run_in_threadpool(file.write, part)
        except TimeoutError:
            message = (
                f"this upload was slower than {FULL_SPEED:,} bytes per second, and after {MIN_SECONDS:g} s its place "
                f"was given to the upload of another key; try again in {RETRY_SECONDS} s"
            )
            raise RequestError(message, status=429, code="upload_too_slow", retry_after=RETRY_SECONDS) from None
        finally:
            self.is_receiving = False

    def give_up(self) -> None:
        """End `receive` with its error."""
        self._given_up.reschedule(-math.inf)


class UploadSlots:
    """One slot for each key, and `UPLOADS_AT_ONCE` in all; for the use in one event loop.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uploads: dict[str, Upload] = {}  # by key id

    @contextlib.contextmanager
    def take(self, key: str) -> Iterator[Upload]:
        """Hold a slot during the context.

        Raises:
            RequestError: 429; the key has an upload in progress, or no slot is free and no upload can give way.
        """
        if key in self._uploads:
            message = "this key has an upload in progress, and each key has one at a time"
            raise RequestError(message, status=429, code="too_many_at_once", retry_after=RETRY_SECONDS)
        if len(self._uploads) >= UPLOADS_AT_ONCE:
            self._make_room()
        upload = self._uploads[key] = Upload(self._clock())
        try:
            yield upload
        finally:
            if self._uploads.get(key) is upload:
                del self._uploads[key]

    def _make_room(self) -> None:
        now = self._clock()
        speeds = {
            key: upload.size / (now - upload.started)
            for key, upload in self._uploads.items()
            if upload.is_receiving and now - upload.started > MIN_SECONDS
        }
        slow = {key: speed for key, speed in speeds.items() if speed < FULL_SPEED}
        if not slow:
            message = f"{UPLOADS_AT_ONCE} uploads of all keys are in progress, the limit; try again in a moment"
            raise RequestError(message, status=429, code="too_many", retry_after=RETRY_SECONDS)
        self._uploads.pop(min(slow, key=slow.__getitem__)).give_up()
