"""Test that gateway and hosts count requests, tokens, images and disconnected clients exactly once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from prometheus_client import Histogram, Metric
from prometheus_client.parser import text_string_to_metric_families

from genmodels import metrics
from genmodels.engine import metrics as engine_metrics
from genmodels.engine.text.choices import TextDelta
from genmodels.errors import RequestError
from genmodels.keys import Keys
from genmodels.metrics import version_labels
from genmodels.registry.store import Registry
from genmodels.storage import Storage, open_storage
from services.cluster.ports import free_ports
from services.gateway import model_host
from services.gateway.model_host import CompletionStarted, ModelHost
from services.gateway.proxy import proxy_middlewares
from services.gateway.routes import create_app
from services.http.middleware import MAX_BODY
from services.http.request_metrics import OTHER, ROUTES, RequestMetrics, route_of
from tests.support.asgi_client import PICTURE, ask
from tests.support.asgi_server import served
from tests.support.published_models import publish, save_checkpoint
from tests.support.scripted_pool import ScriptedPool
from tests.support.watched_hosts import watch

CANARY = "canaryqzx"
LONG = {"prompt": "To be", "max_tokens": 4000, "stream": True}

Series: TypeAlias = dict[tuple[str, ...], float]  # (name, label values in alphabetical order of the labels) -> value
Requests: TypeAlias = Counter[tuple[str, str, str]]  # (route, code, version as in shapes@3, or nothing)


def series(metrics: Any) -> Series:
    """Return the series that are not 0, without buckets and times of creation."""
    samples = [sample for metric in metrics for sample in metric.samples]
    return {
        (sample.name.removeprefix("genmodels_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for sample in samples
        if sample.value and not sample.name.endswith(("_bucket", "_created"))
    }


def here() -> Series:
    return series(metric for one in metrics.ALL for metric in one.collect())


def scraped(url: str) -> list[Metric]:
    answer = httpx.get(url, trust_env=False).raise_for_status()
    return list(text_string_to_metric_families(answer.text))


def grown(before: Series, now: Series) -> Series:
    """Return the series that changed, with their differences."""
    changes = {key: now.get(key, 0) - before.get(key, 0) for key in {*before, *now}}
    return {key: change for key, change in changes.items() if change}


def only(samples: Series, *names: str) -> Series:
    return {key: value for key, value in samples.items() if key[0] in names}


def stays(read: Callable[[], Any], expected: Any, seconds: float = 30) -> None:
    """Check that a count reaches a value and stays there: a client may have its answer before the server counts it."""
    deadline = time.monotonic() + seconds
    while (value := read()) != expected:
        assert time.monotonic() < deadline, grown(expected, value) if isinstance(expected, dict) else value
        time.sleep(0.05)
    for _ in range(3):
        time.sleep(0.05)
        assert read() == expected


def requests_total(requests: Requests) -> Series:
    """Return the series that these requests must give."""
    counted: Counter[tuple[str, ...]] = Counter()
    for (route, code, name), count in requests.items():
        model, family, version = version_labels(name, FAMILIES[name.partition("@")[0]]) if name else ("", "", "")
        counted["requests_total", code, family, model, route, version] += count
    return dict(counted)


FAMILIES = {"play": "minigpt", "left": "minigpt", "shapes": "vae", "m": "minigpt"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    for name in ("play", "left"):
        publish(storage, name, "minigpt")
    publish(storage, "shapes", "vae")
    return storage


@pytest.fixture(scope="module")
def host(models: Storage) -> ModelHost:
    return ModelHost(models.url, pin=3)


@pytest.fixture(scope="module")
def app(host: ModelHost) -> Any:
    return create_app(host)


@pytest.fixture
def before(host: ModelHost) -> Series:
    return here()


# Counts


COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"n": 2, "best_of": 5},
    {"echo": True, "max_tokens": 0},
    {"echo": True, "n": 2, "logprobs": 2},
    {"stop": ["e", "a", "t"]},
    {"n": 4, "stop": ["e", "a"]},
    {"best_of": 3, "stop": "e"},
    {"max_tokens": 40},  # beyond the window
    {"prompt": "x" * 70, "max_tokens": 1},
]


@pytest.mark.parametrize("fields", COMPLETIONS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_those_of_the_usage(app: Any, before: Series, fields: dict[str, Any], stream: bool) -> None:
    body = {"model": "play", "prompt": "To be", "max_tokens": 12, "seed": 3, **fields}
    if stream and "best_of" in fields:
        body["stream"] = False
    elif stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = ask(app, "POST", "/v1/completions", body)
    usage = json.loads(answer.text.split("data: ")[-2])["usage"] if body.get("stream") else answer.json()["usage"]
    made, texts = usage["completion_tokens"], body.get("best_of") or body.get("n", 1)
    version = ("minigpt", "play", "1")
    expected = {
        ("tokens_total", "minigpt", "prompt", "play", "1"): usage["prompt_tokens"],
        ("tokens_total", "minigpt", "completion", "play", "1"): made,
        ("time_to_first_token_seconds_count", *version): min(made, 1),
        ("time_between_tokens_seconds_count", *version): max(made - texts, 0),
    }
    names = {key[0] for key in expected}
    stays(lambda: only(grown(before, here()), *names), {key: value for key, value in expected.items() if value})


def test_many_observations_at_once_are_as_many_one_by_one() -> None:
    once, one_by_one = (Histogram("h", "", registry=None, buckets=(0.1, 0.5)) for _ in range(2))
    for amount, count in ((0.05, 3), (0.1, 2), (0.3, 1), (0.5, 4), (7.0, 5)):
        engine_metrics.observe_many(once, amount, count)
        for _ in range(count):
            one_by_one.observe(amount)
    samples, expected = ([(s.name, s.labels, s.value) for s in h.collect()[0].samples][:-1] for h in (once, one_by_one))
    assert samples == [(name, labels, pytest.approx(value)) for name, labels, value in expected]


def test_pictures_and_latents_are_counted_by_verb(app: Any, before: Series) -> None:
    latents = ask(app, "POST", "/v1/models/shapes/encode", {"images": [PICTURE] * 3}).json()["latents"]
    for verb, body in {
        "decode": {"latents": latents},
        "reconstruct": {"images": [PICTURE]},
        "interpolate": {"start": 1, "end": 2, "steps": 20},
    }.items():
        assert ask(app, "POST", f"/v1/models/shapes/{verb}", body).status_code == 200
    for fields in ({"n": 2}, {"n": 9, "grid": True}, {"n": 65}):  # a grid is one picture; 65 are refused
        ask(app, "POST", "/v1/images/generations", {"model": "shapes", **fields})
    made = {"encode": 3, "decode": 3, "reconstruct": 1, "interpolate": 20, "generate": 3}
    expected: Series = {("images_total", "vae", "shapes", verb, "1"): count for verb, count in made.items()}
    rows = 3 + 3 + 2 * 1 + 20 + 2 + 9  # a reconstruction is two passes
    expected["batch_size_sum", "vae", "shapes", "1"] = rows
    stays(lambda: only(grown(before, here()), "images_total", "batch_size_sum", "waiting_requests"), expected)


def test_requests_are_counted_by_route_code_and_version(app: Any, before: Series) -> None:
    requests: Requests = Counter()

    def send(route: str, path: str, body: Any = None, by: str = "", method: str = "POST", **options: Any) -> None:
        requests[route, str(ask(app, method, path, body, **options).status_code), by] += 1

    for _ in range(3):
        send("/v1/completions", "/v1/completions", {"model": "play", "prompt": CANARY, "max_tokens": 1}, "play@1")
        send("/v1/models/{model}/decode", "/v1/models/shapes@1/decode", {"latents": [[0.0] * 4]}, "shapes@1")
        send("/v1/models/{model}/decode", f"/v1/models/{CANARY}/decode", {"latents": [[0.0]]})
        send("/v1/completions", "/v1/completions", {"model": CANARY, "prompt": "x"})
        send(OTHER, f"/{CANARY}/{uuid.uuid4()}")
        send("/healthz", "/healthz", method="GET")
    send("/v1/completions", "/v1/completions", {"model": "play", "prompt": "x", "top_p": 9}, "play@1")  # the host's 400
    send("/v1/completions", "/v1/completions", {"model": "shapes", "prompt": "x"}, "shapes@1")  # no such verb: 404
    send("/v1/completions", "/v1/completions", b"{")
    send("/v1/completions", "/v1/completions", b"x" * (MAX_BODY + 1))
    send("/v1/completions", "/v1/completions", b"{}", base="http://evil.example")
    send("/v1/completions", "/v1/completions", method="PUT")
    send("/v1/models/{model}", "/v1/models/shapes", by="shapes@1", method="GET")
    send("/v1/models/{model}/history", "/v1/models/shapes/history", by="shapes@1", method="GET")
    send("/playground/{name}", f"/playground/{CANARY}", method="GET")
    send("/", "/", method="GET")
    assert {code for _, code, _ in requests} == {"200", "400", "403", "404", "405", "413"}
    stays(lambda: only(grown(before, here()), "requests_total"), requests_total(requests))
    timed = {key: value for key, value in grown(before, here()).items() if key[0] == "request_seconds_count"}
    assert sum(timed.values()) == sum(requests.values())
    assert CANARY not in str(here())


def test_every_route_has_its_name(app: Any) -> None:
    paths = {route.path for route in app.routes}
    assert paths == set(ROUTES)
    for path in paths:
        assert route_of(path.format(model="m@1", step=5, name="x.png", verb="")) == path
    assert route_of("/v1/models/a/b/c/d") == route_of("/V1/models") == OTHER


def test_a_key_that_asks_too_much_is_counted(models: Storage, host: ModelHost, before: Series) -> None:
    keys = Keys(models)
    tokens = [keys.create("slow", ("generate",), rate=2)[1], "gm_wrong"]
    app = create_app(host, hosts=None, keys=keys)
    for token in [tokens[0]] * 5 + [tokens[1]] * 2:
        ask(app, "GET", "/v1/models", headers={"authorization": f"Bearer {token}"})
    route = "/v1/models"
    expected: Requests = Counter({(route, "200", ""): 2, (route, "429", ""): 3, (route, "401", ""): 2})
    stays(lambda: only(grown(before, here()), "requests_total"), requests_total(expected))


# Streams


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ([TextDelta(0, "d", 1, "stop")], "200"),
        ([RequestError("full", status=429, code="queue_full")], "429"),
        ([], "503"),
        ([ValueError(CANARY)], "500"),
    ],
)
def test_a_stream_is_counted_by_how_it_ended(before: Series, ending: list[Any], code: str) -> None:
    app = create_app(ScriptedPool(CompletionStarted("m@1", "minigpt", 1, 1), TextDelta(0, "abc", 3), *ending))
    for stream in (True, False):
        ask(app, "POST", "/v1/completions", {"model": "m", "prompt": "x", "stream": stream})
    expected: Requests = Counter({("/v1/completions", code, "m@1"): 2})
    stays(lambda: only(grown(before, here()), "requests_total"), requests_total(expected))


def test_clients_that_leave_are_499_and_hold_no_slot(host: ModelHost, app: Any, before: Series) -> None:
    read = 0
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        for n in (1, 3):
            with client.stream("POST", "/v1/completions", json={**LONG, "model": "left", "n": n}) as stream:
                read += sum(map(len, itertools.islice(texts(stream), 3)))
        with contextlib.suppress(httpx.ReadTimeout):
            client.post("/v1/completions", json={**LONG, "model": "left", "stream": False}, timeout=0.2)
        expected: Requests = Counter({("/v1/completions", "499", "left@1"): 3})
        counted = lambda: only(grown(before, here()), "requests_total", "waiting_requests", "kv_slots")  # noqa: E731
        stays(counted, requests_total(expected))
    made = here()["tokens_total", "minigpt", "completion", "left", "1"]
    assert read <= made < 20_000  # a character is a token; generation stops for clients that have disconnected
    assert here()["kv_slots", "minigpt", "left", "total", "1"] == 64


def texts(stream: httpx.Response) -> Iterator[str]:
    for line in stream.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


# Versions


def test_versions_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    storage = open_storage(tmp_path.as_uri())
    publish(storage, "come", "minigpt")
    start = here()
    host = ModelHost(storage.url, pin=["come"])

    def gauges() -> Series:
        gauges = only(here(), "version_active", "loaded_bytes", "kv_slots")
        return {key: value for key, value in gauges.items() if "come" in key}

    size = host._cache._entries["come@1"].size

    def of(version: str) -> Series:
        labels = ("minigpt", "come", version)
        slots = ("kv_slots", "minigpt", "come", "total", version)
        return {("version_active", *labels): 1, ("loaded_bytes", *labels): size, slots: 64}

    assert gauges() == of("1")
    counted = ("tokens_total", "batch_size_count", "time_to_first_token_seconds_count", "images_total")
    assert only(grown(start, here()), *counted) == {}, "the probe of a version is not counted as a request"
    assert grown(start, here())["version_load_seconds_count", "minigpt"] == 1
    publish(storage, "come", "minigpt", step=2)
    for _ in range(2):  # the version is swapped after the first one
        watch(host)
    stays(gauges, of("2"))  # the engine of the version before ends first
    assert here()["versions_swapped_total", "minigpt", "come", "2"] == 1
    Registry(storage).promote("come", "production", 1, "back")
    for _ in range(2):
        watch(host)
    stays(gauges, of("1"))
    assert host._cache._entries


def test_all_checkpoints_of_a_model_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    storage = open_storage(tmp_path.as_uri())
    for step in (10, 20):
        save_checkpoint(storage, "study-00000001", "drafts", "minigpt", step=step)
    host = ModelHost(storage.url)
    app = create_app(host)
    for name in ("drafts@live", "drafts@step-10"):
        assert ask(app, "POST", "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2}).status_code == 200
    samples = {key: value for key, value in here().items() if "drafts" in key}
    assert {key[-1] for key in samples} == {"checkpoint"}
    assert samples["requests_total", "200", "minigpt", "drafts", "/v1/completions", "checkpoint"] == 2
    assert samples["kv_slots", "minigpt", "drafts", "total", "checkpoint"] == 2 * 64
    assert samples["loaded_bytes", "minigpt", "drafts", "checkpoint"] == sum(
        held.size for held in host._cache._entries.values()
    )
    assert not only(samples, "version_active"), "no alias means a checkpoint"
    host._cache.unload_when_idle("drafts@study-00000001:step-10")
    left = ("kv_slots", "minigpt", "drafts", "total", "checkpoint")
    stays(lambda: here()[left], 64)


# Serve


@pytest.mark.parametrize(
    ("status", "content_type", "counts"),
    [
        (503, "text/plain", True),  # an answer of Serve itself
        (500, "text/plain", True),
        (408, "text/plain", False),  # the gateway counts the disconnected client
        (200, "text/plain", False),
        (429, "application/json", False),  # an answer of the gateway
    ],
)
def test_the_proxy_counts_what_does_not_reach_the_gateway(
    before: Series, status: int, content_type: str, counts: bool
) -> None:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    app: Any = serve
    for middleware in proxy_middlewares():  # as Serve does
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    assert isinstance(app, RequestMetrics)
    ask(app, "POST", "/v1/completions", {})
    assert ask(app, "POST", "/v1/completions", b"x" * (MAX_BODY + 1)).status_code == 413
    expected: Requests = Counter({("/v1/completions", "413", ""): 1})
    if counts:
        expected["/v1/completions", str(status), ""] += 1
    stays(lambda: only(grown(before, here()), "requests_total"), requests_total(expected))


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, models: Storage) -> Iterator[str]:
    """Serve two gateways with two hosts; return their address."""
    from ray import serve

    from services.cluster.ports import HOST
    from services.cluster.ray_start import serve_http_options
    from services.gateway.app import Gateway, pool_hosts
    from services.gateway.pool_config import Pool, Pools

    port = free_ports(1)
    serve.start(http_options=serve_http_options(HOST, port), logging_config={"log_level": "ERROR"})
    gateway: Any = Gateway
    pool = Pool(name="default", min_replicas=2, max_replicas=2, pin=3)
    gateway = gateway.options(num_replicas=2, user_config=Pools(pools=[pool]).model_dump(mode="json"))
    hosts = {pool.name: pool_hosts(models.url, pool)}
    serve.run(gateway.bind(models.url, True, hosts), name="genmodels", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def exporter(metrics_folder: Path) -> Iterator[str]:
    """Run the exporter, which reads the files of all processes; return its address."""
    url = f"http://127.0.0.1:{(port := free_ports(1))}/metrics"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder)}
    with subprocess.Popen(
        [sys.executable, "-m", "services.node.exporter", "--port", str(port)], env=environment
    ) as process:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, trust_env=False)
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url
        process.terminate()


BODY = {"model": "play", "prompt": CANARY, "max_tokens": 20}


class Client:
    """Send requests, and count them and their answers."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.lock = threading.Lock()
        self.requests: Requests = Counter()
        self.tokens: Counter[str] = Counter()
        self.pictures: Counter[str] = Counter()

    def completion(self, **fields: Any) -> None:
        answer = self._send("/v1/completions", "/v1/completions", {**BODY, **fields})
        if answer.status_code != 200:
            return
        text = answer.text.split("data: ")[-2] if fields.get("stream") else answer.text
        usage = json.loads(text)["usage"]
        with self.lock:
            self.tokens += Counter(prompt=usage["prompt_tokens"], completion=usage["completion_tokens"])

    def refused(self) -> None:
        """Send a request that the host refuses: the gateway does not know the bounds of this field."""
        assert self._send("/v1/completions", "/v1/completions", {**BODY, "top_p": 9}, by="play@1").status_code == 400

    def picture(self, verb: str, **body: Any) -> None:
        known = verb != "generate"
        path = f"/v1/models/shapes/{verb}" if known else "/v1/images/generations"
        route = f"/v1/models/{{model}}/{verb}" if known else "/v1/images/generations"
        answer = self._send(route, path, body).json()
        with self.lock:
            self.pictures[verb] += len(answer.get("data", answer.get("latents", [])))

    def model(self, name: str, **headers: str) -> None:
        self._send("/v1/models/{model}", f"/v1/models/{name}", method="GET", headers=headers)

    def leave(self, **fields: Any) -> None:
        with self.http.stream("POST", "/v1/completions", json={**LONG, "model": "left", **fields}) as stream:
            assert next(texts(stream)) is not None
        with self.lock:
            self.requests["/v1/completions", "499", "left@1"] += 1

    def _send(
        self, route: str, path: str, body: Any = None, *, by: str = "", method: str = "POST", **options: Any
    ) -> httpx.Response:
        answer = self.http.request(method, path, json=body, **options)
        with self.lock:
            self.requests[route, str(answer.status_code), answer.headers.get("x-genmodels-version", by)] += 1
        return answer


@pytest.fixture
def client(endpoint: str, models: Storage) -> Iterator[Client]:
    headers = {"authorization": f"Bearer {Keys(models).create('tests', ('generate',))[1]}"}
    with httpx.Client(base_url=endpoint, headers=headers, timeout=60) as http:
        yield Client(http)


def test_all_processes_together_count_what_their_clients_count(
    client: Client, endpoint: str, exporter: str, models: Storage, metrics_folder: Path
) -> None:
    """Compare the counts of two gateways, two hosts and Serve's proxy; then kill one of the hosts."""
    _, narrow = Keys(models).create("narrow", ("generate",), rate=1)
    before = series(scraped(exporter))

    def counted(*names: str) -> Series:
        return only(grown(before, series(scraped(exporter))), *names)

    def work() -> None:
        ways: list[Callable[[], None]] = [
            lambda: client.completion(),
            lambda: client.completion(n=3, best_of=4),
            lambda: client.completion(n=2, stream=True, stream_options={"include_usage": True}),
            lambda: client.completion(echo=True, stop=["e", "a"]),
            lambda: client.completion(model=CANARY),
            lambda: client.refused(),
            lambda: client.picture("generate", model="shapes", n=3),
            lambda: client.picture("decode", latents=[[0.0] * 4] * 2),
            lambda: client.picture("encode", images=[PICTURE]),
            lambda: client.model("shapes"),
            lambda: client.model(CANARY),
            lambda: client.model("play", authorization=f"Bearer {CANARY}"),
            lambda: client.model("play", authorization=f"Bearer {narrow}"),
            lambda: client.leave(),
        ]
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(way) for way in ways * 4]:
                done.result()

    def check() -> None:
        stays(lambda: counted("requests_total"), requests_total(client.requests))
        expected: Series = {("tokens_total", "minigpt", kind, "play", "1"): n for kind, n in client.tokens.items()}
        expected |= {("images_total", "vae", "shapes", verb, "1"): count for verb, count in client.pictures.items()}
        stays(lambda: of_known(counted("tokens_total", "images_total")), expected)

    work()
    large = socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=20)
    with large:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
        large.sendall(head.encode())
        assert large.recv(100).startswith(b"HTTP/1.1 413")
    client.requests["/v1/completions", "413", ""] += 1
    check()
    assert {code for _, code, _ in client.requests} == {"200", "400", "401", "404", "413", "429", "499"}
    gauges: Series = {("version_active", FAMILIES[name], name, "1"): 2 for name in ("play", "left", "shapes")}
    gauges |= {("kv_slots", "minigpt", name, "total", "1"): 2 * 64 for name in ("play", "left")}

    def levels() -> Series:
        return only(series(scraped(exporter)), "version_active", "kv_slots", "waiting_requests")

    stays(levels, gauges)
    host = next(hosts_of(metrics_folder))
    os.kill(host, signal.SIGKILL)
    check()  # its counts stay
    stays(lambda: scraped(exporter) and host in hosts_of(metrics_folder), False)
    stays(levels, gauges, 60)
    work()
    check()
    text = httpx.get(exporter, trust_env=False).text
    assert CANARY not in text
    labels = {value for key in series(scraped(exporter)) for value in key[1:] if {"play", "shapes"} & {*key}}
    numbers = {label for label in labels if label.isdecimal()}
    assert labels - numbers <= {"", OTHER, *ROUTES, *FAMILIES, *FAMILIES.values(), *STATES, *VERBS}


STATES = {"total", "prompt", "completion"}
VERBS = {"generate", "encode", "decode", "reconstruct", "denoise", "interpolate"}


def of_known(samples: Series) -> Series:
    """Leave out the tokens of clients that have disconnected: only the engine has counted them."""
    return {key: value for key, value in samples.items() if "left" not in key}


def hosts_of(folder: Path) -> Iterator[int]:
    """Return their processes: no other process has such gauges."""
    return (int(re.split("[_-]", path.stem)[2]) for path in folder.glob("gauge_livesum_*.db"))
