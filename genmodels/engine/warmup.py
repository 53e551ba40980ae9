"""Answer small requests before the first client: they find errors, and they take the extra time of first requests."""

from __future__ import annotations

import time

from genmodels.engine.model import LoadedModel
from genmodels.errors import CheckpointError, RequestError

MAX_SECONDS = 30.0  # that the small requests may take


def warm_up(model: LoadedModel, max_seconds: float = MAX_SECONDS) -> None:
    """Let a model answer small requests; no other request may use it yet.

    Raises:
        CheckpointError: the model cannot answer, or is too slow.
    """
    started = time.monotonic()
    try:
        model.warm_up()
    except RequestError as error:
        raise CheckpointError(f"it cannot answer a small request: {error}") from error
    seconds = time.monotonic() - started
    if seconds > max_seconds:
        raise CheckpointError(f"it is too slow: a small request took {seconds:.1f} s, the maximum is {max_seconds:g} s")
