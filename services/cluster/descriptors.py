"""Open files and sockets: how many a process of ours may have. Ray waits for ever where they are too few."""

from __future__ import annotations

import resource

from genmodels.errors import GenmodelsError

LEAST, MOST = 1024, 65_536


def raise_file_limit() -> None:
    """Raise the limit for this process and its children as far as it may be raised.

    Raises:
        GenmodelsError: it stays too low for a platform.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if file_limit() < LEAST:
        raise GenmodelsError(
            f"open files: this process may have {file_limit()}, and Ray and the services need {LEAST} or more; "
            f"raise the limit first: ulimit -Hn {LEAST} (as root), docker run --ulimit nofile={LEAST}"
        )


def file_limit() -> int:
    """How many files and sockets this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft
