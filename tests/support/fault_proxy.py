"""Run an HTTP proxy that fails on command. It keeps the Host header, so that signed requests stay valid."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

MODES = "ok | reset | drop-answer | cut-answer | hang-answer | hang | slow | a status such as 503 | 503 SlowDown"


@dataclass
class _Fault:
    mode: str
    times: int | None
    method: str
    path: str
    healed: threading.Event = field(default_factory=threading.Event)


class FaultProxy:
    """Fail on command: with FaultProxy(server.url) as proxy: proxy.fail("reset", times=1, method="PUT"); use proxy.url

    Modes:
        ok            forward
        503, ...      answer with that status, and an S3 error code if one follows, without forwarding; 200 for PUT is
                      the answer of a store that ignores conditions
        reset         reset the connection without forwarding
        drop-answer   forward, then reset the connection instead of answering
        cut-answer    forward, then close the connection in the middle of the response's body
        hang          neither forward nor answer until healed
        hang-answer   forward, but do not answer until healed
        slow          forward after `delay` seconds
    """

    def __init__(self, upstream: str, delay: float = 0.2) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.delay = delay
        self.requests: list[tuple[str, str, str]] = []  # method, path, mode of each request
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._faults: list[_Fault] = []
        self._choose: Callable[[], str] | None = None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, mode: str, *, times: int | None = None, method: str = "", path: str = "") -> _Fault:
        """Fail the next `times` requests (all, if None) of this method whose path and query contain `path`."""
        if not re.fullmatch(r"ok|reset|(drop|cut|hang)-answer|hang|slow|\d{3}( \w+)?", mode):
            raise ValueError(f"mode {mode!r}: must be one of {MODES}")
        with self.lock:
            self._faults.append(_Fault(mode, times, method, path))
            return self._faults[-1]

    def fail_at_random(self, choose: Callable[[], str]) -> None:
        """Handle each request that has no other fault in the mode that `choose` returns."""
        with self.lock:
            self._choose = choose

    def heal(self, fault: _Fault | None = None) -> None:
        """Remove one fault, or all of them, and release the requests that hang."""
        with self.lock:
            for healed in [fault] if fault else self._faults:
                healed.healed.set()
            self._faults = [other for other in self._faults if fault and other is not fault]
            self._choose = self._choose if fault else None

    def count(self, method: str, mode: str | None = None) -> int:
        """Count the requests of this method (and mode) so far."""
        with self.lock:
            return sum(verb == method and mode in (None, how) for verb, _, how in self.requests)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self.lock:
            for connection in self.connections:  # clients keep their connections open
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def take(self, method: str, path: str) -> _Fault:
        """Return the fault for this request."""
        with self.lock:
            for fault in self._faults:
                if fault.times != 0 and fault.method in ("", method) and fault.path in path:
                    if fault.times is not None:
                        fault.times -= 1
                    break
            else:
                fault = _Fault(self._choose() if self._choose else "ok", None, "", "")
            self.requests.append((method, path, fault.mode))
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: broken connections are the purpose of this proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.proxy.lock:
            self.server.proxy.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.proxy.lock:
            self.server.proxy.connections.discard(self.connection)
        super().finish()

    def serve(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.take(self.command, self.path)
        if fault.mode in ("hang", "slow"):
            fault.healed.wait(None if fault.mode == "hang" else proxy.delay)
        answer = self._find_answer(fault, body)
        if answer is None:
            self._reset()
        else:
            self._answer(*answer, cut=fault.mode == "cut-answer")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def _find_answer(self, fault: _Fault, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
        mode = fault.mode
        if mode in ("reset", "hang"):
            return None
        if mode[0].isdigit():
            status, _, code = mode.partition(" ")
            error = "" if status == "200" else f"<Error><Code>{code or 'Fault'}</Code></Error>"
            return int(status), [("Content-Type", "application/xml"), ("ETag", '"fault"')], error.encode()
        try:
            answer = self._forward(body)
        except OSError:
            return None
        if mode == "hang-answer":
            fault.healed.wait()
        return None if mode in ("drop-answer", "hang-answer") else answer

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "keep-alive"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        length = str(len(body))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset(abort=False)

    def _reset(self, abort: bool = True) -> None:
        if abort:  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Log nothing: tests read `proxy.requests`."""
