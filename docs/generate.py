"""Write what the code knows into the pages of this folder: `make docs`, or `python docs/generate.py`.

A page marks where a block stands, and only the text between its marks is replaced:

    <!-- generated: metrics -->
    ...
    <!-- end -->

With `--check` nothing is written, and the exit code is 1 if a page is not current.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from genmodels import metrics, models
from genmodels.family import ImageInfo, TextInfo
from genmodels.keys import Keys
from genmodels.spec.json_schema import json_schema
from genmodels.storage import open_storage
from services.cli import main as cli
from services.gateway import routes
from services.gateway.pool_config import Pool
from services.jobs import app

PAGES = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES: dict[str, Any] = {
    "image": ImageInfo(channels=1, height=28, width=28, num_classes=10),
    "text": TextInfo(vocab_size=65),
}
TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "object": "mapping"}

VALUES = {int: "N", Path: "PATH"}  # how the value of an option is shown

Schema = Mapping[str, Any]
Row = Sequence[str]


def main() -> int:
    outdated = []
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text()
        current = render(text)
        if text != current:
            outdated.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(current)
    print(f"changed: {', '.join(outdated)}" if outdated else "every page is current")
    return 1 if outdated and "--check" in sys.argv else 0


def render(page: str) -> str:
    """Return the page with each of its generated blocks replaced."""
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", page)


def metric_table() -> str:
    rows = []
    for metric in metrics.ALL:
        (described,) = metric.describe()
        suffix = "_total" if described.type == "counter" else ""
        labels = ", ".join(metric._labelnames)
        rows.append((f"`{described.name}{suffix}`", described.type, labels, described.documentation))
    return table(("metric", "type", "labels", "meaning"), rows)


def spec_fields() -> str:
    """Return a table for each section of a job spec. The families' own settings are in `family_tables`."""
    schema = json_schema()
    parts = [f"**The job**\n\n{fields(schema, schema)}"]
    for path, section in _sections(schema["$defs"]["ModelSpec"], "models[]", schema):
        parts.append(f"**`{path}`**\n\n{fields(section, schema)}")
    return "\n\n".join(parts)


def pool_fields() -> str:
    schema = Pool.model_json_schema()
    return fields(schema, schema)


def family_tables() -> str:
    """Return the settings, metrics, evaluation metrics, verbs and request options of each family."""
    return "\n\n".join(_family(name) for name in models.names())


def command_list() -> str:
    return "\n\n".join(_command(path, command) for path, command in _commands(typer.main.get_command(cli.app)))


def job_routes() -> str:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder).as_uri())
        return _routes(app.create_app(storage, keys=Keys(storage), hosts=None).openapi())


def gateway_routes() -> str:
    pool: Any = None  # the routes are listed, not called
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder).as_uri())
        return _routes(routes.create_app(pool, keys=Keys(storage), hosts=None).openapi())


def example_family() -> str:
    """Return the file of the family that tests/http/test_adding_a_family.py adds."""
    return f"```python\n{(PAGES.parent / 'tests/support/families/flow.py').read_text()}```"


BLOCKS: dict[str, Callable[[], str]] = {
    "metrics": metric_table,
    "spec": spec_fields,
    "pools": pool_fields,
    "families": family_tables,
    "commands": command_list,
    "job-routes": job_routes,
    "gateway-routes": gateway_routes,
    "example-family": example_family,
}


def table(header: Row, rows: Sequence[Row]) -> str:
    lines: list[Row] = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def fields(section: Schema, document: Schema) -> str:
    """Return the table of an object's fields."""
    required = section.get("required", ())
    rows = [
        (f"`{name}`", _type(field, document), _default(field, name in required, document), field.get("description", ""))
        for name, field in section["properties"].items()
    ]
    return table(("field", "type", "default", "meaning"), rows)


def _family(name: str) -> str:
    family = models.load(name)
    schema = family.Config.model_json_schema()
    options = family.Request.model_json_schema()
    model: Any = family(family.Config(), SIZES[family.kind])
    facts = [
        ("learns from", f"{family.kind}s"),
        ("metrics in training", _names(family.metric_names)),
        ("metrics of the evaluation", _names(family.evaluation_names)),
        ("verbs (default settings)", _names(sorted(model.verbs))),
    ]
    parts = [
        f"### `{name}`",
        "\n".join(f"- {what}: {which}" for what, which in facts),
        f"Settings, in `model`:\n\n{fields(schema, schema)}",
        f"Options of a request:\n\n{fields(options, options)}",
    ]
    return "\n\n".join(parts)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sections(section: Schema, path: str, document: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the section and those below it, each with its path in a spec."""
    yield path, section
    for name, field in section["properties"].items():
        for choice in field.get("anyOf", [field]):
            if "$ref" in choice:
                yield from _sections(_resolve(choice, document), f"{path}.{name}", document)


def _commands(command: Any, path: str = "genmodels") -> Iterator[tuple[str, Any]]:
    """Yield each command below a group of typer's, with the words that call it."""
    for name, part in command.commands.items():
        if hasattr(part, "commands"):
            yield from _commands(part, f"{path} {name}")
        else:
            yield f"{path} {name}", part


def _command(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([path, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)])
    rows = [(f"`{_argument(p)}`", _command_default(p), p.help or "") for p in arguments]
    rows += [(f"`{_option(p)}`", _command_default(p), _option_help(p)) for p in options]
    about = f"### `{usage}`\n\n{inspect.cleandoc(command.help or '')}"
    return f"{about}\n\n{table(('argument or option', 'default', 'meaning'), rows)}" if rows else about


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    names = ", ".join(option.opts)
    if option.is_flag:
        return names
    if option.metavar:
        return f"{names} {option.metavar}"
    kind = option.type_descriptor.annotation
    return f"{names} {'|'.join(kind) if issubclass(kind, StrEnum) else VALUES[kind]}"


def _option_help(option: Any) -> str:
    return f"{option.help or ''} Environment: `{option.envvar}`." if option.envvar else option.help or ""


def _command_default(parameter: Any) -> str:
    default = parameter.default
    if default is None or default is False or callable(default):
        return ""
    values = default if isinstance(default, list | tuple) else [default]
    return ", ".join(f"`{getattr(value, 'value', value)}`" for value in values)


def _routes(document: Schema) -> str:
    """Return a table of all routes, then the parameters and the body of each route that has some."""
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    rows = [(f"`{name}`", _scopes(operation), _summary(operation)) for name, operation in operations]
    details = [
        f"**`{name}`**\n\n{inputs}" for name, operation in operations if (inputs := _inputs(operation, document))
    ]
    return "\n\n".join([table(("route", "scope of the key", "meaning"), rows), *details])


def _scopes(operation: Schema) -> str:
    scopes = [scope for need in operation.get("security", ()) for names in need.values() for scope in names]
    return " or ".join(f"`{scope}`" for scope in scopes) or "no key"


def _summary(operation: Schema) -> str:
    return " ".join((operation.get("description") or operation["summary"]).split())


def _inputs(operation: Schema, document: Schema) -> str:
    """Return the table of query parameters, headers and fields of the body."""
    rows = [
        (f"`{p['name']}`", p["in"], _type(p["schema"], document), _default(p["schema"], p["required"], document),
         p.get("description", ""))
        for p in operation.get("parameters", ())
        if p["in"] != "path"
    ]  # fmt: skip
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    resolved = _resolve(body, document)
    if "JobSpec" not in body.get("$ref", ""):
        required = resolved.get("required", ())
        rows += [
            (f"`{name}`", "body", _type(field, document), _default(field, name in required, document),
             field.get("description", ""))
            for name, field in resolved.get("properties", {}).items()
        ]  # fmt: skip
    return table(("name", "in", "type", "default", "meaning"), rows) if rows else ""


def _resolve(schema: Schema, document: Schema) -> Schema:
    """Return the schema that a `$ref` names, else the schema itself."""
    if "$ref" not in schema:
        return schema
    target: Any = document
    for key in schema["$ref"].removeprefix("#/").split("/"):
        target = target[key]
    return target


def _type(schema: Schema, document: Schema) -> str:
    """Return a JSON Schema's type and bounds in words."""
    if choices := schema.get("anyOf", schema.get("oneOf")):
        words = [_type(choice, document) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    schema = _resolve(schema, document)
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_type(items, document)}" if items else "list"
    kind = TYPES.get(schema.get("type", ""), "any")
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {_number(low)} to {_number(high)}"
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    return "".join(f", {word} {_number(limit)}" for word, limit in limits.items() if limit is not None)


def _number(value: float) -> str:
    if value != int(value) or abs(value) >= 2**64:
        return f"{value:g}"
    power = int(value).bit_length() - 1
    return f"2^{power}" if value > 10_000 and value == 2**power else f"{int(value)}"


def _default(schema: Schema, required: bool, document: Schema) -> str:
    if required:
        return "required"
    default = schema.get("default")
    if default in (None, "", [], {}) or isinstance(default, dict):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    sys.exit(main())
