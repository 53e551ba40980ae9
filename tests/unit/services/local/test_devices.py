"""Test that pools are refused whose hosts this machine cannot start."""

from __future__ import annotations

import pytest

from genmodels.errors import SpecError
from services.gateway.pool_config import Pool, Pools
from services.local import devices


@pytest.mark.parametrize(
    ("there", "gpu", "fits"),
    [
        (0, Pool(name="gpu", gpus=0.5), False),
        (0, Pool(name="gpu", gpus=0.5, min_replicas=0), True),
        (1, Pool(name="gpu", gpus=0.5, min_replicas=2, max_replicas=8), True),
        (1, Pool(name="gpu", gpus=0.5, min_replicas=3, max_replicas=8), False),
    ],
)
def test_the_smallest_number_of_hosts_must_find_gpus(
    monkeypatch: pytest.MonkeyPatch, there: int, gpu: Pool, fits: bool
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: there)
    pools = Pools(pools=[Pool(name="default"), gpu])
    if fits:
        devices.check_pools(pools)
        return
    with pytest.raises(SpecError, match=rf"gpus: gpu needs .* GPUs, and this machine has {there}; write gpus: 0"):
        devices.check_pools(pools)


def test_pools_on_cpus_ask_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: pytest.fail("torch is imported in vain"))
    devices.check_pools(Pools(pools=[Pool(name="default", min_replicas=5, max_replicas=5)]))
