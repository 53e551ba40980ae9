"""The page at `/`: which models there are and how to ask them. Plain HTML, until the playground comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>genmodels</title>
<style>
body {{ font: 16px/1.5 system-ui; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ background: #eee; padding: .6rem; overflow: auto }}
</style>
<h1>genmodels</h1>
<p>An endpoint in OpenAI's shapes: <a href="/v1/models">/v1/models</a>, <a href="/openapi.json">/openapi.json</a>.</p>
{models}
</html>
"""
_KEY = '-H "Authorization: Bearer $GENMODELS_KEY"'
_JSON = "-H 'content-type: application/json'"
_SAVE = (
    'python3 -c "import base64, json, sys; '
    "sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
)


def page(models: Iterable[Mapping[str, Any]] | None, base_url: str) -> str:
    """The page.

    Args:
        models: as in `GET /v1/models`; None where a key is asked for, which a page cannot send: then it lists none.
    """
    if models is None:
        ask = f"curl -s {base_url}/v1/models {_KEY}"
        return _PAGE.format(models=f"<p>Models are listed for those who have a key:</p><pre>{escape(ask)}</pre>")
    sections = "".join(_section(model, base_url) for model in models)
    return _PAGE.format(models=sections or "<p>No model has been published yet.</p>")


def curl(model: Mapping[str, Any], base_url: str, *, key: bool = False) -> list[str]:
    """Commands that show what a model does.

    Args:
        model: as in `GET /v1/models`.
        key: whether a key is asked for, which then stands in the environment.
    """
    name, verbs, lines = model["id"], model["verbs"], []

    def command(path: str, body: Mapping[str, Any], flags: str = "-s") -> str:
        headers = f"{_KEY} {_JSON}" if key else _JSON
        return f"curl {flags} {base_url}{path} {headers} -d '{json.dumps(body)}'"

    if "complete" in verbs:
        body = {"model": name, "prompt": "The ", "max_tokens": 200, "stream": True}
        lines.append(command("/v1/completions", body, "-sN"))
    if "generate" in verbs:
        body = {"model": name, "prompt": "", "n": 16, "grid": True}
        lines.append(f"{command('/v1/images/generations', body)} | {_SAVE} > {name}.png")
    if "interpolate" in verbs:
        body = {"start": 1, "end": 2, "steps": 8, "grid": True}
        lines.append(f"{command(f'/v1/models/{name}/interpolate', body)} | {_SAVE} > {name}-way.png")
    return lines


def _section(model: Mapping[str, Any], base_url: str) -> str:
    verbs = ", ".join(model["verbs"]) or model.get("problem") or "nothing"
    title = (
        f"<h2>{escape(model['id'])}</h2><p>{escape(model['family'])}, version {model['version']}: {escape(verbs)}</p>"
    )
    return title + "".join(f"<pre>{escape(line)}</pre>" for line in curl(model, base_url))
