"""Validation errors in words for the person who wrote the document: path, what was found, what would be right."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

MOST = 20  # problems that anyone wants to read at once

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and in words."""

    loc: Loc
    text: str

    def __str__(self) -> str:
        path = path_of(self.loc)
        return f"{path}: {self.text}" if path else self.text


Homes = Callable[[Loc], list[str]]


def explain(error: ValidationError, root: type[BaseModel], homes: Homes = lambda loc: []) -> list[Problem]:
    """The problems of a failed validation against `root`, one for each wrong field; of very many, the first ones.

    Args:
        homes: other sections of the document, in words, that have a key which is unknown where it stands.
    """
    shown = error.errors(include_url=False)[:MOST]
    return [Problem(details["loc"], _words(details, root, homes)) for details in shown]


def wrong(text: str) -> PydanticCustomError:
    """To raise in a validator: `text` says what was found and what would be right."""
    return PydanticCustomError("explained", "{text}", {"text": text})


def all_wrong(problems: Iterable[Problem]) -> ValidationError:
    """To raise in a validator that has found several problems; their locs are relative to what it validates."""
    return ValidationError.from_exception_data(
        "explained", [{"type": wrong(problem.text), "loc": problem.loc, "input": None} for problem in problems]
    )


def nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` where a choice is near, else nothing."""
    found = difflib.get_close_matches(str(word)[:100], list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""


def as_label(name: str) -> str:
    """Return the label nearest to a name, `meu-coracao` for `Meu coração`; "" where no letter of it is Latin."""
    spelt = "".join(_LETTERS.get(letter, letter) for letter in name.lower())
    latin = "".join(letter for letter in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9]+", "-", latin)[:63].strip("-")


def sections_of(root: type[BaseModel], path: Loc = ()) -> Iterator[tuple[Loc, type[BaseModel]]]:
    """Yield a section and those below it, each with the names that lead to it."""
    yield path, root
    for name, field in root.model_fields.items():
        for section in _all_inner(field.annotation):
            yield from sections_of(section, (*path, name))


def path_of(loc: Loc) -> str:
    """`models[0].train.learning_rate`"""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[\w-]{1,64}", part):
            path += f".{part}" if path else part
        else:
            path += f"[{show(part)}]"
    return path


def show(value: object) -> str:
    """A value as the person wrote it, in at most 60 characters of one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# Letters that Unicode does not take apart into a Latin one and a mark.
_LETTERS = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i", "ħ": "h"}
_STRONG = 0.75  # above that a near key is taken for a slip of the keyboard, without a look at other sections

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_EXAMPLES = {"int": "100", "float": "0.001", "bool": "true"}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_LENGTHS = {
    "too_short": ("min_length", "entries, expected at least"),
    "too_long": ("max_length", "entries, expected at most"),
    "string_too_short": ("min_length", "characters, expected at least"),
    "string_too_long": ("max_length", "characters, expected at most"),
}


def _words(details: ErrorDetails, root: type[BaseModel], homes: Homes) -> str:
    kind, loc, value, context = details["type"], details["loc"], details["input"], details.get("ctx", {})
    if kind == "explained":
        return str(context["text"])
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown_key(loc, root, homes)
    field = _field(root, loc)
    if kind == "missing":
        meaning = f" ({field.description})" if field and field.description else ""
        return f"missing; add it{meaning}"
    if kind in _LENGTHS and isinstance(value, Sized):
        bound, words = _LENGTHS[kind]
        return f"got {len(value)} {words} {context[bound]}"
    return f"got {show(value)}, {_expected(kind, value, context, field) or _as_pydantic_says(details['msg'])}"


def _expected(kind: str, value: object, context: dict[str, Any], field: FieldInfo | None) -> str:
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"expected {_number(field)} {words} {context[bound]}{_hint(field)}"
    if kind in ("literal_error", "enum"):
        choices = [choice.strip("'") for choice in re.split(", | or ", str(context["expected"]))]
        return f"expected one of {', '.join(choices)}{nearest(value, choices)}"
    if kind == "int_from_float":
        return "expected a whole number" + _write(value)
    if kind == "finite_number":
        return "expected a finite number"
    if kind == "string_pattern_mismatch":
        return f"expected text of the form {context['pattern']}"
    name = kind.removesuffix("_type").removesuffix("_parsing")
    if name not in _TYPES:
        return ""
    if name == "int" and isinstance(value, float) and value.is_integer():
        return "expected a whole number" + _write(value)
    if name == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return "expected text; put it in quotes"
    return f"expected {_TYPES[name]}{_hint(field, _EXAMPLES.get(name))}"


def _number(field: FieldInfo | None) -> str:
    return "a whole number" if field and (field.annotation is int or int in get_args(field.annotation)) else "a number"


def _hint(field: FieldInfo | None, otherwise: str | None = None) -> str:
    default = field.default if field and not field.is_required() else None
    if isinstance(default, bool):
        return f"; write e.g. {str(default).lower()}"
    if isinstance(default, int | float | str):
        return f"; write e.g. {default}"
    return f"; write e.g. {otherwise}" if otherwise else ""


def _write(value: object) -> str:
    return f"; write {int(value)}" if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else ""


def _unknown_key(loc: Loc, root: type[BaseModel], homes: Homes) -> str:
    section = _section(root, loc[:-1])
    known = list(section.model_fields) if section else []
    key = loc[-1]
    if hint := nearest(key, known, _STRONG):
        return f"unknown key{hint}"
    below = [repr(name) for name, info in section.model_fields.items() if _has(info, key)] if section else []
    if places := below[:1] or homes(loc):
        return f"unknown key; it belongs under {' or '.join(places)}"
    return (
        f"unknown key{nearest(key, known)}" if nearest(key, known) else f"unknown key; known here: {', '.join(known)}"
    )


def _has(field: FieldInfo, key: str | int) -> bool:
    inner = _inner(field.annotation)
    return inner is not None and key in inner.model_fields


def _field(root: type[BaseModel], loc: Loc) -> FieldInfo | None:
    """The field at a loc; for an entry of a list, the list's."""
    names = [part for part in loc if isinstance(part, str)]
    section = _section(root, tuple(names[:-1]))
    return section.model_fields.get(names[-1]) if section and names else None


def _section(root: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = _inner(field.annotation) if field else None
    return section


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation such as `list[Section]` or `Section | None` is about."""
    return next(_all_inner(annotation), None)


def _all_inner(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _all_inner(argument)


def _as_pydantic_says(message: str) -> str:
    return message.replace("Input should be", "expected").replace("Value error, ", "")
