"""Test which replica a request to a model goes to."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.replica_order import MAX_IMBALANCE, MIN_BOUND, replicas_in_order

MODELS = [f"model-{i}" for i in range(1000)]
IDLE = {f"replica-{i}": 0 for i in range(4)}


def placed(replicas: dict[str, int]) -> dict[str, str]:
    return {model: replicas_in_order(model, replicas)[0] for model in MODELS}


def test_each_gateway_sends_a_model_to_the_same_replica_and_each_replica_has_its_share() -> None:
    assert placed(IDLE) == placed(dict(reversed(IDLE.items())))
    assert all(200 <= share <= 300 for share in Counter(placed(IDLE).values()).values())


def test_a_replica_that_dies_moves_only_its_own_models_and_spreads_them() -> None:
    before, after = placed(IDLE), placed({name: 0 for name in IDLE if name != "replica-2"})
    moved = Counter(after[model] for model in MODELS if before[model] != after[model])
    assert all(before[model] == "replica-2" for model in MODELS if before[model] != after[model])
    assert set(moved) == {"replica-0", "replica-1", "replica-3"}


def test_a_hot_model_spreads_over_the_replicas_in_its_own_order() -> None:
    in_progress, first = dict(IDLE), replicas_in_order("hot", IDLE)
    taken: list[str] = []
    for _ in range(40):
        replica = replicas_in_order("hot", in_progress)[0]
        in_progress[replica] += 1
        taken.append(replica)
    assert list(dict.fromkeys(taken)) == first
    assert taken[:MIN_BOUND] == first[:1] * MIN_BOUND
    assert max(in_progress.values()) <= MAX_IMBALANCE * 40 / 4 + 1


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1), st.integers(0, 64), max_size=6))
def test_every_replica_is_tried_and_the_busiest_one_is_never_first_among_unequal_ones(loads: dict[str, int]) -> None:
    order = replicas_in_order("m", loads)
    assert sorted(order) == sorted(loads)
    if order and max(loads.values()) > MIN_BOUND and min(loads.values()) == 0:
        assert loads[order[0]] < max(loads.values())
