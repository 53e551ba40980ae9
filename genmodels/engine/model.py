"""TODO"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genmodels.engine.requests import Request, parse_options
from genmodels.errors import ModelNotFound
from genmodels.family import Family
from genmodels.metrics import Labels, version_labels


@dataclass(frozen=True)
class Loaded:
    """A model that can answer; `name` is that of its version, as in `shapes@3`."""

    name: str
    family: Family[Any, Any]

    def options(self, verb: str, request: Request) -> Any:
        """The family's own part of a request.

        Raises:
            ModelNotFound: the model does not answer this verb; the message says which it does.
            RequestError: an option is unknown or wrong.
        """
        self.check_verb(verb)
        return parse_options(self.family.Request, request)

    def check_verb(self, verb: str) -> None:
        """Raise ModelNotFound where the model does not answer this verb; the message says which it does."""
        verbs = self.family.verbs
        if verb not in verbs:
            family, answered = self.family.family_name(), ", ".join(sorted(verbs))
            raise ModelNotFound(
                f"{self.name} ({family}) has no {verb!r}; it answers: {answered}", code="verb_not_supported"
            )

    @property
    def labels(self) -> Labels:
        """Of what is counted of it."""
        return version_labels(self.name, self.family.family_name())

    def meter(self) -> None:
        """Count from now on; until then it was only tried."""

    def close(self) -> None:
        """Take no more requests; what is under way goes on to its end."""
