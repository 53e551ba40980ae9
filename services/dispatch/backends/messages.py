"""Shorten a message of Kubernetes, KubeRay or a registry to one line that a reason may have."""

from __future__ import annotations

import re

LENGTH = 300  # characters
# What a registry or a webhook may repeat of a request: the user of a URL, and values that are secret by their names
USER = re.compile(r"(?<=://)[^/\s@]+@")
SECRET = re.compile(r"((?:bearer\s+|\b\w*(?:token|password|secret|signature|credential)=))[^\s&,;\"')]+", re.IGNORECASE)
UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")


def short(message: str, length: int = LENGTH) -> str:
    """Return the first line without secrets and control characters."""
    line = message.strip().partition("\n")[0][: 10 * length]  # before the expressions: a message may have a megabyte
    return UNPRINTABLE.sub("?", SECRET.sub(r"\1***", USER.sub("", line)))[:length]
