"""Check that this machine has the GPUs that are asked for."""

from __future__ import annotations

from genmodels.errors import SpecError
from services.gateway.pool_config import Pools, pools_file


def gpus() -> int:
    """Return the number of GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count()


def check_pools(pools: Pools) -> None:
    """Refuse pools whose hosts this machine cannot start: Serve would wait for a GPU for ever.

    Raises:
        SpecError: the smallest number of hosts needs more GPUs.
    """
    needed = sum(pool.gpus * pool.min_replicas for pool in pools.pools)
    if needed and needed > (there := gpus()):
        names = ", ".join(pool.name for pool in pools.pools if pool.gpus and pool.min_replicas)
        remedy = "write gpus: 0, or min_replicas: 0"
        raise SpecError(f"{pools_file()}: gpus: {names} needs {needed:g} GPUs, and this machine has {there}; {remedy}")
