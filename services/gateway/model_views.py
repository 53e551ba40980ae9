"""Show models of the catalogue as the endpoint's list does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from genmodels.registry.entries import ModelEntry


def shown_name(entry: ModelEntry) -> str:
    """Return the name for requests: the bare one, or the latest version where there is no alias production."""
    has_default = "production" in entry.aliases or "production" in entry.damaged
    return entry.model if has_default else f"{entry.model}@{entry.latest}"


def model_view(entry: ModelEntry) -> dict[str, Any]:
    """Return a model as the list shows it."""
    number = entry.aliases.get("production", entry.latest)
    summary = None if "production" in entry.damaged else entry.versions.get(number)
    problem = entry.damaged.get("production") or entry.damaged.get(str(number)) or f"version {number} was deleted"
    serving = summary.serving if summary else None
    return {
        "id": shown_name(entry),
        "object": "model",
        "created": int(datetime.fromisoformat(summary.created).timestamp()) if summary else 0,
        "owned_by": "genmodels",
        "family": summary.family if summary else None,
        "kind": serving.kind if serving else None,
        "verbs": serving.verbs if serving else [],
        "version": summary.version if summary else None,
        "aliases": entry.aliases,
        "metrics": summary.metrics if summary else {},
        **(serving.sizes if serving else {"problem": f"this model cannot be served: {problem}"}),
    }
