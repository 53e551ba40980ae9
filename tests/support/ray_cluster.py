"""Start one Ray cluster for all tests: on 127.0.0.1, with its own token, never a cluster that already runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prometheus_client  # noqa: F401  it looks at the environment once, and this process writes no files
import pytest

from services.cluster.ray_start import local_environment
from tests.support.paths import ROOT

# Ray reads these variables at import, whichever test imports it first: conftest imports this module before all tests.
os.environ |= {
    **local_environment(),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def metrics_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the processes of the cluster write their counters."""
    return tmp_path_factory.mktemp("metrics")


@contextmanager
def own_cluster(metrics_folder: Path) -> Iterator[str]:
    """Run a cluster with 4 logical CPUs; its processes write their counters into a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray defines settings in ways that pydantic warns of
        import ray
        import ray.serve

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PROMETHEUS_MULTIPROC_DIR", str(metrics_folder))
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(metrics_folder: Path) -> Iterator[str]:
    """Yield the address of the cluster of all tests."""
    with own_cluster(metrics_folder) as address:
        yield address
