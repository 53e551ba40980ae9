"""Publish on a node where a worker ran, as a task of Ray: the head of a run's own cluster has little memory.

The evaluation needs the memory and the CPUs of a worker's pod. It computes on the CPU, whatever trained the model, so
that its figures can be compared between versions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from genmodels.runs.jobs import Jobs
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Result
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from genmodels.storage.disk import disk_outages
from genmodels.storage.retry import retry_until_available
from services.cluster.logs import log_to_stderr
from services.train.publish import publish_when_available

log = logging.getLogger("genmodels")

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container


def publish_on_worker(
    storage_url: str, job: str, model: str, attempt: int, connected: Callable[[], None] = lambda: None
) -> Result:
    """Call `publish_when_available` in a task, which gets a CPU of Ray; the head has none.

    Args:
        connected: called after `ray.init`, which sets a handler of SIGTERM.
    """
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)
    connected()
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(_publish)
        result: Result = ray.get(task.remote(storage_url, job, model, attempt))
    finally:
        ray.shutdown()
    return result


def _publish(storage_url: str, job: str, model: str, attempt: int) -> Result:
    import ray
    import torch

    log_to_stderr()
    torch.set_num_threads(_cpus())  # Ray and the image set one thread: the workers' share
    storage = open_storage(storage_url, in_use=True)
    run = Run(storage, job, model)
    # `disk_outages` is here because Ray passes on an error without its causes
    with LogShipper(run, attempt, "driver"), disk_outages():
        log.info("publishes on node %s", ray.util.get_node_ip_address())
        spec = retry_until_available(lambda: Jobs(storage).model_spec(job, model))
        return publish_when_available(run, spec, attempt)


def _cpus() -> int:
    """Return the number of CPUs that this container may use."""
    there = len(os.sched_getaffinity(0))
    quota, _, period = CPU_QUOTA.read_text().partition(" ") if CPU_QUOTA.exists() else ("max", "", "")
    return there if quota == "max" else min(there, max(1, int(quota) // int(period)))
