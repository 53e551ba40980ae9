from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from genmodels.storage import Storage, open_storage
from tests.support.ray_cluster import metrics_folder, ray_cluster
from tests.support.s3_server import S3Server

__all__ = ["metrics_folder", "ray_cluster"]

# A background process of a shell ignores Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These take minutes, so they run first: the two workers of `make test` then end together. The short file between them
# goes to the first worker, which gets the files 1 and 3.
LONG_FILES = ("ray/test_faults.py", "ray/test_quick_run.py", "http/test_access.py", "ray/test_up.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that follow from folders and fixtures, and put the long files first."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONG_FILES)}
    for item in items:
        for marker in _markers(item, item.path.relative_to(folder).parts[0]):
            item.add_marker(marker)
    items.sort(key=lambda item: places.get(item.path, len(places)))


def _markers(item: pytest.Item, room: str) -> Iterator[str]:
    """Name what a test needs beyond this process: a Ray cluster, an S3 server, a browser."""
    fixtures = set(getattr(item, "fixturenames", ()))
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if room == "ray" or "ray_cluster" in fixtures:
        yield "ray"
    if fixtures & {"s3_server", "s3_storage"} or parameters.get("storage") == "s3":
        yield "s3"
    if room == "browser":
        yield "browser"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands that run in this process from changing its environment: other tests share it."""
    monkeypatch.setattr("services.cli.main.isolate_process", lambda: None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Yield one real S3 server for the whole session."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_storage(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Yield an empty storage on the S3 server, whose endpoint and credentials are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def file_storage(tmp_path: Path) -> Storage:
    """Return an empty storage in a local folder."""
    return open_storage((tmp_path / "storage").as_uri())


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """Run each test that uses this on a local folder and on S3."""
    storage: Storage = request.getfixturevalue(f"{request.param}_storage")
    return storage
