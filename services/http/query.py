"""The base of query parameters. The client of the job API imports it, so it imports no web framework."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Parameters of a query: a misspelt parameter is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")
