"""Choose the replica that answers a request to a model: the one that has the model in memory, without a list of them.

Rendezvous hashing (Thaler and Ravishankar, 1998, https://doi.org/10.1109/90.663936) gives each model an order of all
replicas that depends on the names alone. So every gateway sends a model to the same replica, and a replica that starts
or dies moves its own share of the models only.

The load is bounded (Mirrokni, Thorup and Zadimoghaddam, 2018, https://arxiv.org/abs/1608.01350): a replica that has
many more requests in progress than the average is left out until it has fewer. So a hot model spreads over the next
replicas in its order, which load it once and keep it while it stays hot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b

MAX_IMBALANCE = 1.25  # requests in progress on a replica, as a multiple of the average
MIN_BOUND = 8  # requests in progress at which a replica may be left out: fewer are not worth another load


def replicas_in_order(model: str, in_progress: Mapping[str, int]) -> list[str]:
    """Return all replicas, the best one for a model first.

    Args:
        in_progress: number of requests in progress by replica.
    """
    if not in_progress:
        return []
    bound = max(MIN_BOUND, math.ceil(MAX_IMBALANCE * (sum(in_progress.values()) + 1) / len(in_progress)))
    ranked = sorted(in_progress, key=lambda replica: _score(model, replica), reverse=True)
    return sorted(ranked, key=lambda replica: max(0, in_progress[replica] - bound + 1))


def _score(model: str, replica: str) -> bytes:
    return blake2b(f"{model}\0{replica}".encode(), digest_size=8).digest()
