"""Settings from the environment: every variable of this project that services read, with its default.

Variables that a command-line option also sets are read where the option is declared (`services/cli/options.py`,
`services/jobs/app.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from genmodels.errors import GenmodelsError


@dataclass(frozen=True)
class Settings:
    """Settings of the dispatcher, drivers and nodes. All times are in seconds."""

    hang_seconds: float  # without progress, after which an attempt is killed; longer if its steps are slow
    slow_seconds: float  # the same, for phases that rarely report progress
    grow_seconds: float  # that workers must be free before a run grows into them
    grow_worth_seconds: float  # of training that must be left; growing a run with less costs more than it gains
    start_timeout_seconds: float  # in which a run's workers must be placed
    job_stop_seconds: str  # that Ray gives a driver to save before it kills it
    gcs_folder: str | None  # where the head keeps its state, so that it knows its cluster after a restart
    ray_token_path: str  # the file with the cluster's secret


def settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings.

    Args:
        environment: default: this process's.

    Raises:
        GenmodelsError: a value is not a number.
    """
    env = os.environ if environment is None else environment

    def number(name: str, default: float) -> float:
        text = env.get(name)
        try:
            return float(text) if text else default
        except ValueError:
            raise GenmodelsError(f"{name}: got {text!r}, expected a number of seconds") from None

    return Settings(
        hang_seconds=number("GENMODELS_HANG_SECONDS", 120.0),
        slow_seconds=number("GENMODELS_SLOW_SECONDS", 900.0),
        grow_seconds=number("GENMODELS_GROW_SECONDS", 15.0),
        grow_worth_seconds=number("GENMODELS_GROW_WORTH_SECONDS", 60.0),
        start_timeout_seconds=number("GENMODELS_START_TIMEOUT_S", 120.0),
        job_stop_seconds=env.get("RAY_JOB_STOP_WAIT_TIME_S") or "60",
        gcs_folder=env.get("GENMODELS_GCS") or None,
        ray_token_path=env.get("RAY_AUTH_TOKEN_PATH") or "/run/secrets/ray_token",
    )
