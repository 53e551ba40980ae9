"""Ports of this machine: whether one is free, and free ones in a row."""

from __future__ import annotations

import contextlib
import errno
import random
import socket

from genmodels.errors import GenmodelsError

HOST = "127.0.0.1"


def check_port(port: int, option: str = "--port") -> None:
    """Raise GenmodelsError if a port cannot be used; the message names the option that chooses another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            problem = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise GenmodelsError(f"port {port} of {HOST} {problem}; choose another with {option}") from None


def is_free(port: int) -> bool:
    try:
        check_port(port)
    except GenmodelsError:
        return False
    return True


def free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row, below those that the system gives to outgoing connections.

    Raises:
        GenmodelsError: no such ports are free.
    """
    for _ in range(100):
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind((HOST, port))
            return first
    raise GenmodelsError(f"no {count} free ports in a row between 20000 and 32000")
