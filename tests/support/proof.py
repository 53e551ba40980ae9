"""Run the steps of a proof against a real system in order, print each, and wait for what they need."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import httpx

STEP_SECONDS = 420.0  # for each condition: a slow machine is not a failure

Check = Callable[[], object]


class TooLate(AssertionError):
    """Report a condition that did not become true in time."""


def until(look: Callable[[], Any], what: str, seconds: float = STEP_SECONDS) -> Any:
    """Call `look` until its result is true; return the result. Requests may fail meanwhile, as for any user."""
    deadline = time.monotonic() + seconds
    while True:
        broken: Exception | None = None
        try:
            if value := look():
                return value
        except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
            broken = error
        if time.monotonic() > deadline:
            raise TooLate(f"not within {seconds:g} s: {what}") from broken
        time.sleep(0.5)


def run_checks(checks: Sequence[tuple[str, Check]], state: Callable[[], str]) -> bool:
    """Run named checks up to the first that fails, and say at the end how many passed.

    Args:
        state: what to print of the system after a failure.
    """
    began, passed = time.monotonic(), 0
    for name, check in checks:
        since = time.monotonic()
        try:
            detail = check()
        except Exception:
            print(f"FAIL {name}", flush=True)
            traceback.print_exc(file=sys.stdout)
            with contextlib.suppress(Exception):
                print(state(), flush=True)
            break
        passed += 1
        line = f"ok   {name}" + (f": {detail}" if detail else "")
        print(f"{line} ({time.monotonic() - since:.0f} s)", flush=True)
    print(f"after {time.monotonic() - began:.0f} s")
    print(f"{passed} passed, {int(passed < len(checks))} failed", flush=True)
    return passed == len(checks)
