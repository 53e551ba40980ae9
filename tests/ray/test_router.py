"""Test how the request router that Serve calls orders replicas, without a cluster."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

from services.gateway.replica_order import MIN_BOUND, replicas_in_order

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing Ray defines settings in ways that pydantic warns of
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.request_router.common import ReplicaQueueLengthCache
    from ray.serve.request_router import PendingRequest, ReplicaID

    from services.gateway.router import ModelRouter

NAMES = [f"replica-{i}" for i in range(4)]
REPLICAS: dict[str, Any] = {
    name: SimpleNamespace(replica_id=ReplicaID(unique_id=name, deployment_id=DeploymentID(name="default")))
    for name in NAMES
}


def ranks(model: str, in_progress: dict[str, int]) -> list[list[str]]:
    """Return the replicas that Serve tries for a request, rank by rank."""
    router: Any = ModelRouter.__new__(ModelRouter)  # its constructor needs a cluster
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    for name, count in in_progress.items():
        router._replica_queue_len_cache.update(REPLICAS[name].replica_id, count)

    async def choose() -> list[list[Any]]:
        request = PendingRequest(args=[], kwargs={}, metadata=SimpleNamespace(multiplexed_model_id=model))
        chosen: list[list[Any]] = await router.choose_replicas(list(REPLICAS.values()), request)
        assert request.routing_context.should_backoff, "else Serve tries full replicas again without a pause"
        return chosen

    return [[replica.replica_id.unique_id for replica in rank] for rank in asyncio.run(choose())]


def test_a_request_tries_the_replicas_in_the_order_of_its_model() -> None:
    idle = dict.fromkeys(NAMES, 0)
    order = replicas_in_order("shapes", idle)
    assert ranks("shapes", {}) == [[name] for name in order]
    busy = {order[0]: 3 * MIN_BOUND}
    assert ranks("shapes", busy) == [[name] for name in [*order[1:], order[0]]]


def test_a_request_without_a_model_goes_to_one_of_two_replicas() -> None:
    (two,) = ranks("", {})
    assert len(set(two)) == 2
