"""Test what `genmodels up` refuses before it starts a process."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from typing import Any

import pytest

from genmodels.errors import GenmodelsError
from genmodels.storage import Storage
from services.cluster.ports import check_port, free_ports
from services.local.up import Options, up


@pytest.mark.parametrize("pair", list(itertools.combinations(["port", "api_port", "metrics_port"], 2)))
def test_two_services_do_not_get_one_port(pair: tuple[str, str], file_storage: Storage) -> None:
    first = free_ports(3)
    ports = {"port": first, "api_port": first + 1, "metrics_port": first + 2}
    ports[pair[1]] = ports[pair[0]]
    one, other = (f"--{name.replace('_', '-')}" for name in pair)
    with pytest.raises(GenmodelsError, match=f"^{one} and {other} are both {ports[pair[0]]}; choose different ports$"):
        up(file_storage, Options(auth=False, **ports))


@pytest.mark.parametrize(
    ("number", "problem"), [(errno.EADDRINUSE, "is taken"), (errno.EACCES, "cannot be used: Permission denied")]
)
def test_a_port_that_cannot_be_used_is_told_with_the_reason(
    number: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(GenmodelsError, match=f"^port 80 of 127.0.0.1 {problem}; choose another with --port$"):
        check_port(80)
