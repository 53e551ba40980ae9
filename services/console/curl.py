"""Shell commands that send a request to a model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

SAMPLE_ROUTES = {"complete": "/v1/completions", "generate": "/v1/images/generations"}  # by verb
_KEY = '-H "Authorization: Bearer $GENMODELS_KEY"'
_JSON = "-H 'content-type: application/json'"
_SAVE = (
    'python3 -c "import base64, json, sys; '
    "sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
)


def curl(model: Mapping[str, Any], base_url: str, *, key: bool = False) -> list[str]:
    """Return one command for each thing that a model can do.

    Args:
        model: as in `GET /v1/models`.
        key: whether the endpoint requires a key; the commands read it from GENMODELS_KEY.
    """
    name, verbs, lines = model["id"], model["verbs"], []

    def command(path: str, body: Mapping[str, Any], flags: str = "-s") -> str:
        headers = f"{_KEY} {_JSON}" if key else _JSON
        return f"curl {flags} {base_url}{path} {headers} -d {shlex.quote(json.dumps(body))}"

    if "complete" in verbs:
        body = {"model": name, "prompt": model["example_prompt"], "max_tokens": 200, "stream": True}
        lines.append(command(SAMPLE_ROUTES["complete"], body, "-sN"))
    if "generate" in verbs:
        body = {"model": name, "prompt": "", "n": 16, "grid": True}
        lines.append(f"{command(SAMPLE_ROUTES['generate'], body)} | {_SAVE} > {name}.png")
    if "interpolate" in verbs:
        body = {"start": 1, "end": 2, "steps": 8, "grid": True}
        lines.append(f"{command(f'/v1/models/{name}/interpolate', body)} | {_SAVE} > {name}-way.png")
    return lines
