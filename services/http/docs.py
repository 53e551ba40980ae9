"""The page at `/docs`: an OpenAPI document as one HTML page that loads no other files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
METHODS = ("get", "post", "put", "delete")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.2rem; font: 600 1.05rem ui-monospace, monospace; border-top: 1px solid #ccc; padding-top: 1rem }
pre, code { background: #f2f2f2; font: .9rem ui-monospace, monospace }
pre { padding: .7rem; overflow: auto; max-height: 30rem }
table { border-collapse: collapse }
td { padding: .15rem .8rem .15rem 0; vertical-align: top }
nav { columns: 2 } nav a { display: block; font: .9rem ui-monospace, monospace }
b { color: #06c }
"""


def page(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI 3.1 document as an HTML page. All texts are escaped."""
    title = escape(document["info"]["title"])
    about = _text(document["info"].get("description", ""))
    operations = list(_operations(document))
    links = "".join(f'<a href="#{_anchor(method, path)}">{_name(method, path)}</a>' for method, path, _ in operations)
    sections = "".join(_section(method, path, operation, document) for method, path, operation in operations)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1>{about}<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"<nav>{links}</nav>{sections}</html>\n"
    )


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield method, path, methods[method]


def _section(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    parts = [f'<h2 id="{_anchor(method, path)}">{_name(method, path)}</h2>']
    about = operation.get("description") or operation.get("summary", "")
    parts.append(_text(about))
    scopes = [scope for need in operation.get("security", []) for names in need.values() for scope in names]
    if scopes:
        parts.append(f"<p>Needs a key with the scope {' or '.join(f'<code>{escape(s)}</code>' for s in scopes)}.</p>")
    if rows := "".join(map(_parameter, operation.get("parameters", []))):
        parts.append(f"<table>{rows}</table>")
    for content_type, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, as <code>{escape(content_type)}</code>:</p>")
        if "example" in content:
            parts.append(f"<pre>{escape(content['example'])}</pre>")
        parts.append(_schema(content, document))
    for status, response in operation.get("responses", {}).items():
        if status.startswith("2"):
            parts.append(f"<p>Answers <b>{escape(status)}</b>.</p>")
            parts += [_schema(content, document) for content in response.get("content", {}).values()]
    return "".join(parts)


def _parameter(parameter: Mapping[str, Any]) -> str:
    schema = parameter.get("schema", {})
    facts = [f"{name} {schema[name]}" for name in ("default", "minimum", "maximum") if schema.get(name, "") != ""]
    if choices := schema.get("enum"):
        facts.append(f"one of {', '.join(map(str, choices))}")
    meaning = "; ".join(filter(None, [parameter.get("description", ""), *facts]))
    name, where = escape(parameter["name"]), escape(parameter["in"])
    return f"<tr><td><code>{name}</code></td><td>{where}</td><td>{_marked(meaning)}</td></tr>"


def _schema(content: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the schema of a body, collapsed; a reference at the top level is resolved."""
    schema = content.get("schema")
    if not schema:
        return ""
    name = str(schema.get("$ref", "")).removeprefix("#/components/schemas/")
    shown = json.dumps(document.get("components", {}).get("schemas", {}).get(name, schema), indent=1)
    return f"<details><summary>Schema</summary><pre>{escape(shown)}</pre></details>"


def _text(text: str) -> str:
    return "".join(f"<p>{_marked(part)}</p>" for part in text.split("\n\n"))


def _marked(text: str) -> str:
    """Return the text escaped, with the parts between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _name(method: str, path: str) -> str:
    return f"<b>{method.upper()}</b> {escape(path)}"


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}{path}", quote=True)
