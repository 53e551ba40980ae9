"""One Ray cluster for all tests that need one: on 127.0.0.1, with a token of its own, never one that runs already."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.local import ray_environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a cluster with 4 logical CPUs; workers see the environment as it is when the first test asks."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**ray_environment(), "PYTHONPATH": python_path}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing Ray defines settings in ways that pydantic warns of
            import ray
            import ray.serve

        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
        yield str(context.address_info["gcs_address"])
        ray.shutdown()
