"""The servers that are measured: the endpoint as Ray Serve runs it, and the bare server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from services.cluster.ports import HOST, free_ports

THREADS = 1  # of each computation
START_SECONDS = 120.0


@contextmanager
def endpoint(storage_url: str) -> Iterator[str]:
    """Serve the application on its own Ray cluster, without keys, with metrics as under `genmodels up`."""
    from tests.support.ray_cluster import own_cluster  # sets up Ray's environment before Ray is imported

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray import serve
    from services.cluster.ray_start import serve_http_options
    from services.gateway.app import build
    from services.gateway.pool_config import Pool, Pools

    with tempfile.TemporaryDirectory() as folder, own_cluster(Path(folder)):
        port = free_ports(1)
        serve.start(http_options=serve_http_options(HOST, port), logging_config={"log_level": "ERROR"})
        pools = Pools(pools=[Pool(name="default", torch_threads=THREADS)])
        serve.run(build(storage_url, auth=False, pools=pools), name="genmodels", route_prefix="/")
        yield f"http://{HOST}:{port}"
        serve.shutdown()


@contextmanager
def bare_server(storage_url: str) -> Iterator[str]:
    """Run `tests.bench.serving.bare`."""
    port = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.serving.bare", storage_url, str(port)])
    try:
        _wait_for(f"http://{HOST}:{port}", process)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/healthz").raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the bare server did not start")
