"""Read streams of completions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any


def events(text: str) -> list[Any]:
    """Return the data of server-sent events; if there is a [DONE], it comes last."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    assert "data: [DONE]" not in parts[:-1]
    return [part if part == "data: [DONE]" else json.loads(part.removeprefix("data: ")) for part in parts]


def joined(chunks: list[Any], index: int) -> dict[str, Any]:
    """Join the chunks of a stream into one choice."""
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
    assert all(part["finish_reason"] is None for part in parts[:-1])
    whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    if parts[0]["logprobs"]:
        names = parts[0]["logprobs"]
        whole["logprobs"] = {name: [value for part in parts for value in part["logprobs"][name]] for name in names}
    return whole


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
