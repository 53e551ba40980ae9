"""A model in memory: the common interface of image and text models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from genmodels.engine.requests import Request, parse_options
from genmodels.errors import ModelNotFound
from genmodels.family import Family
from genmodels.metrics import Labels, version_labels
from genmodels.schema.base import Section


@dataclass(frozen=True)
class Contract:
    """The requests that a model accepts: the verbs, and the options of its family."""

    name: str  # exact, e.g. `shapes@3`
    family: str
    verbs: frozenset[str]
    options: type[Section]  # of requests, as the family declares them

    def parse_options(self, verb: str, request: Request) -> Any:
        """Parse the family's options of a request.

        Raises:
            ModelNotFound: the model does not support the verb; the message lists the verbs that it supports.
            RequestError: an option is unknown or wrong.
        """
        self.check_verb(verb)
        return parse_options(self.options, request)

    def check_verb(self, verb: str) -> None:
        """Raise ModelNotFound if the model does not support the verb; the message lists the verbs that it supports."""
        if verb not in self.verbs:
            supported = ", ".join(sorted(self.verbs))
            message = f"{self.name} ({self.family}) has no {verb!r}; it answers: {supported}"
            raise ModelNotFound(message, code="verb_not_supported")


@dataclass(frozen=True)
class LoadedModel(ABC):
    """A model that can answer requests; `name` is the exact name of its version, e.g. `shapes@3`."""

    name: str
    family: Family[Any, Any]

    @property
    def contract(self) -> Contract:
        return Contract(self.name, self.family.family_name(), self.family.verbs, self.family.Request)

    @property
    def labels(self) -> Labels:
        """Return the labels of its metrics."""
        return version_labels(self.name, self.family.family_name())

    @abstractmethod
    def describe(self) -> dict[str, int | str]:
        """Return the sizes that `GET /v1/models` shows, by the name of the API's field."""

    @abstractmethod
    def enable_metrics(self) -> None:
        """Count requests from now on; requests of the warm-up are not counted."""

    def start(self, torch_threads: int) -> None:
        """Start the threads that requests need. Default: none."""
        return

    def close(self) -> None:
        """Accept no more requests; requests in progress are completed."""
        return
