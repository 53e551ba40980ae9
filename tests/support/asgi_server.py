"""Serve an ASGI application on a real socket, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def served(app: Any, port: int = 0, **options: Any) -> Iterator[str]:
    """Yield the URL of a server that is up; stop the server at the end.

    Args:
        options: uvicorn's.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen()  # from now on connections are accepted, if not at once
    quiet: dict[str, Any] = {"log_config": None, "log_level": "critical"}
    config = uvicorn.Config(app, lifespan="off", ws="none", timeout_graceful_shutdown=1, **(quiet | options))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
