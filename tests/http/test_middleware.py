from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from services.gateway.routes import create_app
from services.http.bodies import BodyLimit
from services.http.middleware import LOOPBACK, MAX_BODY, IngressMiddleware, StreamedRoute
from tests.support.asgi_client import ask, refused


class Pool:
    problem: str | None = None

    async def health(self) -> str | None:
        return self.problem


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(Pool())  # no request here reaches a model


@pytest.mark.parametrize(
    ("base", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost", 200),
        ("http://LOCALHOST:1", 200),
        ("http://[::1]:8000", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("http://localhost.evil.example:8000", 403),
        ("http://10.0.0.1", 403),
        ("http://[::2]", 403),
    ],
)
def test_only_loopback_names_are_answered(app: Any, base: str, status: int) -> None:
    response = ask(app, "GET", "/healthz", base=base)
    assert response.status_code == status
    if status == 403:
        error = refused(response, 403)
        assert (error["code"], "DNS rebinding" in error["message"]) == ("host_not_allowed", True)


def test_nothing_is_opened_to_other_origins(app: Any) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert refused(ask(app, "OPTIONS", "/v1/completions", headers=headers), 405)
    response = ask(app, "GET", "/healthz", headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 415),
        ("http://evil.example", 403),
        ("http://127.0.0.1:8001", 403),
        ("null", 403),
        ("", 415),
    ],
)
def test_a_form_of_another_site_is_refused(app: Any, origin: str, status: int) -> None:
    """A browser sends such a form without asking the server: with a content type of forms, or without a body."""
    headers = {"content-type": "text/plain", **({"origin": origin} if origin else {})}
    error = refused(ask(app, "POST", "/v1/completions", content=b"{}", headers=headers), status)
    assert error["code"] == ("origin_not_allowed" if status == 403 else "not_json")


def test_where_keys_are_asked_for_any_origin_may_try() -> None:
    client = Client(part(b""))
    client.call(IngressMiddleware(echo), (b"host", b"api.example"), (b"origin", b"https://other.example"))
    assert client.status == 200
    client = Client(part(b""))
    client.call(IngressMiddleware(echo, hosts=LOOPBACK), (b"host", b"localhost"), (b"origin", b"https://other.example"))
    assert client.status == 403


def test_an_authorization_header_is_accepted_and_ignored(app: Any) -> None:
    assert ask(app, "GET", "/healthz", headers={"authorization": "Bearer anything"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/v1",
        "/v1/models/",
        "/v1/models/a/b/c",
        "/redoc",
        "/v1/chat/completions",
        "//evil.example/%2e%2e",
    ],
)
def test_an_unknown_route_is_404(app: Any, path: str) -> None:
    assert refused(ask(app, "GET", path), 404)["type"] == "not_found_error"


def test_another_method_is_405(app: Any) -> None:
    response = ask(app, "GET", "/v1/completions")
    assert (refused(response, 405)["type"], response.headers["allow"]) == ("invalid_request_error", "POST")
    assert refused(ask(app, "DELETE", "/v1/models/play"), 405)


def test_an_id_is_a_uuid_whatever_the_client_sends(app: Any) -> None:
    own = str(uuid.uuid4())
    assert ask(app, "GET", "/healthz", headers={"x-request-id": own}).headers["x-request-id"] == own
    for sent in ("1", "x" * 5000, own + "0"):
        assert uuid.UUID(ask(app, "GET", "/healthz", headers={"x-request-id": sent}).headers["x-request-id"]) != sent


class Client:
    """Act as an ASGI client that can misbehave: send the given messages and keep those that come back."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages, self.sent = list(messages), []
        self.taken = 0

    async def receive(self) -> dict[str, Any]:
        if self.taken == len(self.messages):
            await asyncio.Event().wait()
        self.taken += 1
        return self.messages[self.taken - 1]

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def call(self, app: Any, *headers: tuple[bytes, bytes]) -> Any:
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": list(headers)}
        asyncio.run(asyncio.wait_for(app(scope, self.receive, self.send), 20))
        return self.sent

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> dict[str, Any]:
        assert [message["type"] for message in self.sent] == ["http.response.start", "http.response.body"]
        return json.loads(self.sent[1]["body"])["error"]


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body and the names of the headers of the request."""
    body = await Request(scope, receive).body()
    names = b" ".join(name for name, _ in scope["headers"])
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"1"), (b"x-request-id", b"2")]}
    )
    await send({"type": "http.response.body", "body": body + b"|" + names, "more_body": False})


def test_a_body_that_is_announced_too_large_is_refused_unread() -> None:
    client = Client(part(b"x"))
    client.call(IngressMiddleware(echo), (b"content-length", str(MAX_BODY + 1).encode()))
    assert (client.status, client.error["code"], client.taken) == (413, "body_too_large", 0)
    client = Client(part(b"x"))
    client.call(IngressMiddleware(echo), (b"content-length", b"9" * 4000))
    assert (client.status, client.taken) == (413, 0)


def test_reading_a_body_of_unknown_size_stops_at_the_limit() -> None:
    client = Client(*[part(b"x" * 2**20, more=True)] * 100)
    client.call(IngressMiddleware(echo))
    assert (client.status, client.error["code"], client.taken) == (413, "body_too_large", 9)
    whole = Client(*[part(b"x" * 2**20, more=True)] * 8, part(b""))
    whole.call(IngressMiddleware(echo))
    assert (whole.status, len(whole.sent[1]["body"])) == (200, MAX_BODY + len(b"|x-request-id"))


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    client = Client(part(b"x", more=True))
    client.call(IngressMiddleware(echo, body_seconds=0.05))
    assert (client.status, client.error["type"]) == (408, "invalid_request_error")


def test_a_client_that_leaves_in_its_body_is_forgotten() -> None:
    client = Client(part(b"x", more=True), {"type": "http.disconnect"})
    assert client.call(IngressMiddleware(echo)) == []


UPLOAD = StreamedRoute("POST", "/", BodyLimit(3000, 30.0))


async def swallow(scope: Any, receive: Any, send: Any) -> None:
    """Read the body as it arrives, and answer with its size."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode(), "more_body": False})


def test_a_streamed_body_has_its_own_limit() -> None:
    edge = IngressMiddleware(swallow, max_body=10, streamed=UPLOAD)
    client = Client(*[part(b"x" * 1000, more=True)] * 3, part(b""))
    assert client.call(edge)[1]["body"] == b"3000"
    client = Client(*[part(b"x" * 1000, more=True)] * 100)
    client.call(edge)
    assert (client.status, client.error["code"], client.taken) == (413, "body_too_large", 4)
    client = Client(part(b"x" * 11))
    client.call(IngressMiddleware(swallow, max_body=10, streamed=StreamedRoute("PUT", "/", BodyLimit(3000, 30.0))))
    assert client.status == 413


def test_a_streamed_body_that_stops_coming_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(part(b"x", more=True))
    client.call(IngressMiddleware(swallow, streamed=StreamedRoute("POST", "/", BodyLimit(3000, 0.05))))
    assert client.status == 408
    client = Client(part(b"x", more=True), {"type": "http.disconnect"})
    assert client.call(IngressMiddleware(swallow, streamed=UPLOAD)) == []
    assert caplog.text == ""


def test_headers_that_steer_serve_do_not_get_through() -> None:
    client = Client(part(b""))
    internal = [
        "X-Request-Timeout-Seconds",
        "x-request-disconnect-disabled",
        "serve_multiplexed_model_id",
        "X_Session_Id",
    ]
    client.call(IngressMiddleware(echo), *((name.encode(), b"0") for name in [*internal, "accept"]))
    assert client.sent[1]["body"] == b"|accept x-request-id"


def test_an_answer_has_one_id() -> None:
    client = Client(part(b""))
    client.call(IngressMiddleware(echo))
    assert [name.lower() for name, _ in client.sent[0]["headers"]] == [b"x-request-id"]
    assert uuid.UUID(client.headers["x-request-id"])


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
def test_plain_errors_of_serve_become_ours(status: int) -> None:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"internal detail", "more_body": False})

    client = Client(part(b""))
    client.call(IngressMiddleware(serve))
    assert (client.status, client.headers["content-type"], client.headers["retry-after"]) == (
        status,
        "application/json",
        "7",
    )
    assert "internal detail" not in client.error["message"]
    assert uuid.UUID(client.headers["x-request-id"])


def test_an_application_that_breaks_is_500_without_internals(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("internal detail")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return None

    for app in (broken, silent):
        client = Client(part(b""))
        client.call(IngressMiddleware(app))
        assert (client.status, client.error["type"]) == (500, "server_error")
        assert client.headers["x-request-id"] in client.error["message"]
        assert "internal detail" not in client.error["message"]
    assert "failed: ValueError" in caplog.text  # with its location; its message might quote a request
    assert "test_middleware.py" in caplog.text
    assert "internal detail" not in caplog.text


def test_a_stream_that_breaks_off_ends_in_an_error() -> None:
    async def cut(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    client = Client(part(b""))
    *_, last = client.call(IngressMiddleware(cut))
    assert not last["more_body"]
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["type"] == "server_error"
