"""Read how much memory this machine or this container has."""

from __future__ import annotations

import os
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup v2, v1


def memory_limit() -> int:
    """Return the bytes that the processes of this container may have together, without a limit those of the machine."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (path.read_text().strip() for path in LIMITS if path.exists())
    return min([machine, *(int(limit) for limit in limits if limit.isdecimal())])
