"""The request router of model hosts: Serve calls it in the gateway for each request.

Serve's own routing for multiplexed models finds models in memory as often (docs/results.md), but does not fit a host:
`serve.multiplexed` counts models instead of bytes, loads one model at a time, and unloads a model that is in use. Its
list of the models on each replica goes through Serve's controller, and is a few tenths of a second behind.
"""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from services.gateway.replica_order import replicas_in_order


class ModelRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Try the replicas in the order of `replicas_in_order`; for a request without a model, one of two at random.

    The mixins match a replica that was chosen for a model to the oldest request for this model. Serve's default
    matches by the id of the HTTP request, which several calls of one HTTP request share.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve tries full replicas without a pause
        if pending_request is None or not pending_request.metadata.multiplexed_model_id:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        in_progress = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()
        }
        model = pending_request.metadata.multiplexed_model_id
        return [[replicas[name]] for name in replicas_in_order(model, in_progress)]
