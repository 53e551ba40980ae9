"""Test the file of the pools: what it may say, and how its errors are worded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from genmodels.errors import SpecError
from genmodels.sizing.memory import HOST_MEMORY
from services.gateway.pool_config import VARIABLE, Pool, Pools, WatchedPools, read_pools

GPU = """\
pools:
  - name: default
    memory: 1.5 GiB
  - name: gpu
    gpus: 0.25
    dtype: bfloat16
    slots: 64
    min_replicas: 0
    max_replicas: 4
    pin: [play, shapes@next]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "pools.yaml"))
    return tmp_path / "pools.yaml"


def test_the_file_of_the_package_says_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_pools() == Pools(pools=[Pool(name="default", pin=4)])
    (pool,) = read_pools().pools
    assert (pool.memory, pool.slots, pool.device) == (HOST_MEMORY, None, "cpu")


def test_a_file_of_two_pools(file: Path) -> None:
    file.write_text(GPU)
    default, gpu = read_pools().pools
    assert read_pools().memory == {"default": 3 * 2**29, "gpu": HOST_MEMORY}
    assert (default.device, gpu.device, gpu.gpus, gpu.dtype) == ("cpu", "cuda", 0.25, "bfloat16")
    assert (gpu.min_replicas, gpu.max_replicas, gpu.pin) == (0, 4, ["play", "shapes@next"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("memory: 2 apples", "got '2 apples', expected a number of bytes, or e.g. 2 GiB or 512 MiB"),
        ("gpus: 2", "got 2, expected a number at most 1.0; write e.g. 0.0"),
        ("slots: many", "got 'many', expected a whole number; write e.g. 100"),
        ("dtype: float16", "got 'float16'; on cpu write float32 or bfloat16"),
        ("dtype: fp32", "got 'fp32', expected one of float32, bfloat16, float16"),
        ("slot: 8", "unknown key; did you mean 'slots'?"),
        ("pin: [A b]", "got 'A b', expected a version or a checkpoint: "),
        ("pin: -1", "got -1, expected a whole number at least 0; write e.g. 0"),
        ("max_replicas: 0", "got 0, expected a whole number at least 1; write e.g. 1"),
    ],
)
def test_an_error_names_line_field_and_remedy(file: Path, line: str, says: str) -> None:
    file.write_text(f"pools:\n  - name: default\n    {line}\n")
    with pytest.raises(SpecError) as caught:
        read_pools()
    (problem,) = caught.value.problems
    field = line.partition(":")[0]
    assert problem.startswith((f"{file}:3: pools[0].{field}: {says}", f"{file}:3: pools[0].{field}[0]: {says}"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty; write a pools file, beginning with `pools:`"),
        ("pools: []", "1: pools: got 0 entries, expected at least 1"),
        ("pools: [{name: gpu}]", "1: pools: no pool is named 'default'"),
        ("pools: [{name: default}, {name: default}]", "pools[1].name: got 'default', which pools[0] already has"),
        (
            "pools: [{name: default}, {name: gateway}]",
            "pools[1].name: got 'gateway', which is the name of the endpoint",
        ),
        ("pools: [{name: default, min_replicas: 3}]", "max_replicas: got 1, expected at least min_replicas (3)"),
        ("pool: [{name: default}]", "pool: unknown key; did you mean 'pools'?"),
    ],
)
def test_pools_that_do_not_go_together(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_pools()
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(SpecError) as caught:
        read_pools()
    assert f"{file}: no such file; write the path of a pools file, e.g. services/gateway/pools.yaml" == str(
        caught.value
    )


def test_a_damaged_file_leaves_the_pools_as_they_were(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(GPU)
    watched = WatchedPools()
    file.write_text("pools: [")
    with caplog.at_level(logging.ERROR):
        assert [len(watched.read().pools) for _ in range(3)] == [2, 2, 2]
    assert len(caplog.records) == 1  # not one for each reading
    file.write_text("pools: [{name: default}]")
    assert watched.read().memory == {"default": HOST_MEMORY}
