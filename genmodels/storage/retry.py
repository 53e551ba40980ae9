"""Retry operations on storage: for as long as an outage lasts, or a few times at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from genmodels.errors import (
    StorageUnavailable,
)

log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0  # between two tries during an outage


T = TypeVar("T")


def retry_until_available(
    work: Callable[[], T], waiting: Callable[[StorageUnavailable], None] = lambda outage: None
) -> T:
    """Return the result of `work`; retry it for as long as an outage lasts.

    Args:
        waiting: called before each pause; an exception from it ends the retries.
    """

    def before_sleep(state: RetryCallState) -> None:
        outage = state.outcome.exception() if state.outcome else None
        assert isinstance(outage, StorageUnavailable)
        if state.attempt_number == 1:
            log.warning("waiting, because %s: %s", outage.reason, outage)
        waiting(outage)

    retrying = Retrying(
        retry=retry_if_exception_type(StorageUnavailable),
        wait=wait_random_exponential(multiplier=0.2, max=MAX_WAIT_SECONDS),
        before_sleep=before_sleep,
    )
    return retrying(work)


class PassingFailure(StorageUnavailable):
    """Report a failure after which the next try is likely to succeed."""


retry_passing = tenacity.retry(
    retry=tenacity.retry_if_exception_type(PassingFailure),
    wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
    stop=tenacity.stop_after_attempt(8),
    reraise=True,
)
