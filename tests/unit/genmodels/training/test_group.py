"""Test what ranks tell each other outside of collectives."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from genmodels.training import group
from genmodels.training.group import Group


def test_an_announcement_reaches_the_other_ranks_until_rank_0_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    stores = [served, dist.TCPStore("127.0.0.1", served.port, is_master=False)]  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "_meeting_place", lambda: stores[-1])
    assert Group(1, 2).announced("killed") is None
    served.set("killed", "no progress for 120 s")
    assert Group(1, 2).announced("killed") == "no progress for 120 s"
    assert Group(1, 2).announced("of another attempt") is None
    del served, stores[0]
    assert Group(1, 2).announced("killed") is None


def test_a_single_process_has_none_to_tell() -> None:
    Group().announce("killed", "x")
    assert Group().announced("killed") is None
