"""The limit of open files and sockets of a process. Ray waits for ever where the limit is too low."""

from __future__ import annotations

import resource

from genmodels.errors import GenmodelsError

MIN_FILES, MAX_FILES = 1024, 65_536


def raise_file_limit() -> None:
    """Raise the limit for this process and its children as far as the system allows, up to MAX_FILES.

    Raises:
        GenmodelsError: the limit stays below MIN_FILES.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if file_limit() < MIN_FILES:
        raise GenmodelsError(
            f"open files: this process may have {file_limit()}, and Ray and the services need {MIN_FILES} or more; "
            f"raise the limit first: ulimit -Hn {MIN_FILES} (as root), docker run --ulimit nofile={MIN_FILES}"
        )


def file_limit() -> int:
    """Return how many files and sockets this process may have open; MAX_FILES if there is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft
