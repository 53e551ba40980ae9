"""Read the file of the pools: groups of model hosts, each with its own device, memory and number of hosts.

The gateway's deployment, `genmodels run` and the job service read the same file: the one that GENMODELS_POOLS names,
else `pools.yaml` in this folder. The file is small, and each reader reads it again when it needs it, so that a changed
file needs no restart.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from genmodels.engine.requests import ByForm
from genmodels.errors import SpecError
from genmodels.schema import yaml
from genmodels.schema.base import Section
from genmodels.schema.field_errors import FieldError, field_error, field_errors, format_errors, show
from genmodels.sizing.memory import HOST_MEMORY, SERVED_ROWS
from genmodels.sizing.placement import MAX_ROWS, DType, Placement
from genmodels.spec.names import Label, Reference

VARIABLE = "GENMODELS_POOLS"
PACKAGED = Path(__file__).with_name("pools.yaml")
DEFAULT = "default"  # the pool of specs that name none
RESERVED = "gateway"  # the deployment in front of all pools
KIND = yaml.Kind("pools file", "pools", str(PACKAGED.relative_to(PACKAGED.parents[2])))
logger = logging.getLogger("genmodels.pools")

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(KiB|MiB|GiB)", value):
        return int(float(match[1]) * UNITS[match[2]])
    raise field_error(f"got {show(value)}, expected a number of bytes, or e.g. 2 GiB or 512 MiB")


class Pool(Section):
    """Set how the hosts of a pool compute, and how many there are."""

    name: Label = Field(description="name of the pool, for `serve: {pool: ...}` of a job spec")
    gpus: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a GPU that each host reserves, e.g. 0.25 for four hosts on a GPU; 0: it computes on CPUs",
    )
    cpus: float = Field(
        0.0, ge=0, le=1024, description="CPUs of the Ray cluster that each host reserves; 0: it shares them with others"
    )
    dtype: DType = Field("float32", description="number format of weights and computations")
    memory: Annotated[int, BeforeValidator(_bytes)] = Field(
        HOST_MEMORY,
        ge=2**20,
        description="memory for models in each host, in bytes or e.g. 2 GiB; a larger model is refused at submission",
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=MAX_ROWS,
        description="texts that one model of a host generates at once. Default: 64, 32 or 16, the most with which the "
        "model takes at most 1/32 of the memory, and 16 for a larger model",
    )
    workers: int = Field(4, ge=1, le=64, description="image requests that a host computes at the same time")
    torch_threads: int = Field(1, ge=1, le=256, description="threads of each computation on CPUs")
    min_replicas: int = Field(
        1, ge=0, le=1000, description="smallest number of hosts; 0: the pool stops its last host when it is not used"
    )
    max_replicas: int = Field(1, ge=1, le=1000, description="largest number of hosts; their number follows the load")
    replicas_per_node: int | None = Field(
        None, ge=1, le=100, description="largest number of hosts on one node of the cluster; without it no limit"
    )
    pin: Annotated[
        Annotated[int, Field(ge=0, le=1000)] | Annotated[list[Reference], Field(max_length=1000)], ByForm()
    ] = Field(
        0,
        description="models that each host loads before it gets requests, and keeps in memory: their names, or how "
        "many of the newest ones in production, which take at most half of the memory",
    )
    idle_seconds: float = Field(
        300.0, ge=15, le=86_400, description="with min_replicas 0: time without requests before the last host stops"
    )
    wait_seconds: float = Field(
        60.0, gt=0, le=300, description="with min_replicas 0: longest time that a request waits for the first host"
    )
    max_waiting: int = Field(
        1,
        ge=1,
        le=64,
        description="with min_replicas 0: requests that wait for the first host at once; others get 429",
    )
    stop_seconds: float = Field(
        30.0, ge=0, le=3600, description="time for requests in progress when a host stops; then they are cut"
    )

    @property
    def device(self) -> str:
        """Return torch's name of the device that the hosts compute on."""
        return "cuda" if self.gpus else "cpu"

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.name == RESERVED:
            text = f"got {RESERVED!r}, which is the name of the endpoint itself; write another name, e.g. {DEFAULT}"
            raise field_errors([FieldError(("name",), text)])
        if self.min_replicas > self.max_replicas:
            text = f"got {self.max_replicas}, expected at least min_replicas ({self.min_replicas}); swap the two"
            raise field_errors([FieldError(("max_replicas",), text)])
        try:
            Placement(self.device, self.dtype, self.slots or SERVED_ROWS)
        except SpecError as error:
            field, _, text = str(error).partition(": ")
            raise field_errors([FieldError((field,), text)]) from None
        return self


class Pools(Section):
    """Set the pools of an endpoint."""

    pools: list[Pool] = Field(min_length=1, max_length=100, description="a list of pools")

    @property
    def memory(self) -> dict[str, int]:
        """Return the bytes of models that a host keeps in memory, by pool."""
        return {pool.name: pool.memory for pool in self.pools}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [pool.name for pool in self.pools]
        for place, name in enumerate(names):
            if (first := names.index(name)) < place:
                text = f"got {name!r}, which pools[{first}] already has; write another name"
                raise field_errors([FieldError(("pools", place, "name"), text)])
        if DEFAULT not in names:
            text = f"no pool is named {DEFAULT!r}, which serves each model whose spec names no pool; add it"
            raise field_errors([FieldError(("pools",), text)])
        return self


def pools_file() -> Path:
    """Return the path of the file that this process reads."""
    return Path(os.environ.get(VARIABLE) or PACKAGED)


def read_pools(path: Path | None = None) -> Pools:
    """Read the pools.

    Args:
        path: default: `pools_file()`.

    Raises:
        SpecError: with a line `file:line: field: got ..., expected ...` for each error.
    """
    path = path or pools_file()
    source = str(path)
    document = yaml.read(yaml.read_file(path, KIND), source, kind=KIND)
    try:
        return Pools.model_validate(document.value)
    except ValidationError as error:
        raise document.error(source, format_errors(error, Pools), error.error_count()) from None


class WatchedPools:
    """The pools of a file that may change while this process runs; a damaged file leaves the pools as they were.

    Raises:
        SpecError: the file is damaged from the start.
    """

    def __init__(self) -> None:
        self._pools, self._problem = read_pools(), ""

    def read(self) -> Pools:
        """Return the pools, as the file has them now."""
        try:
            self._pools, problem = read_pools(), ""
        except SpecError as error:
            problem = str(error)
        if problem and problem != self._problem:
            logger.error("the pools stay as they were: %s", problem)
        self._problem = problem
        return self._pools
