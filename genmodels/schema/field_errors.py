"""Word validation errors for the author of a document: path of the field, the value, the expected value."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

MAX_ERRORS = 20  # more errors would not help the reader

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class FieldError:
    """Describe one wrong field: its path and the problem in words."""

    loc: Loc
    text: str

    def __str__(self) -> str:
        path = path_of(self.loc)
        return f"{path}: {self.text}" if path else self.text


Homes = Callable[[Loc], list[str]]


def format_errors(error: ValidationError, root: type[BaseModel], homes: Homes = lambda loc: []) -> list[FieldError]:
    """Return the errors of a failed validation against `root`, one for each wrong field, at most MAX_ERRORS.

    Args:
        homes: returns other sections of the document, in words, that have the unknown key at a path.
    """
    shown = error.errors(include_url=False)[:MAX_ERRORS]
    return [FieldError(details["loc"], _words(details, root, homes)) for details in shown]


def field_error(text: str) -> PydanticCustomError:
    """Return an error to raise in a validator; `text` gives the value and the expected value."""
    return PydanticCustomError("worded", "{text}", {"text": text})


def field_errors(problems: Iterable[FieldError]) -> ValidationError:
    """Return an error with several problems to raise in a validator; their locs are relative to the validated value."""
    return ValidationError.from_exception_data(
        "worded", [{"type": field_error(problem.text), "loc": problem.loc, "input": None} for problem in problems]
    )


def nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean 'x'?` if a choice is similar, else ""."""
    matches = difflib.get_close_matches(str(word)[:100], list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def as_label(name: str) -> str:
    """Return the label nearest to a name, `meu-coracao` for `Meu coração`; "" if it has no Latin letter."""
    spelt = "".join(_LETTERS.get(letter, letter) for letter in name.lower())
    latin = "".join(letter for letter in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9]+", "-", latin)[:63].strip("-")


def sections_of(root: type[BaseModel], path: Loc = ()) -> Iterator[tuple[Loc, type[BaseModel]]]:
    """Yield a section and its subsections, each with its path."""
    yield path, root
    for name, field in root.model_fields.items():
        for section in _all_inner(field.annotation):
            yield from sections_of(section, (*path, name))


def path_of(loc: Loc) -> str:
    """Return a path as text, e.g. `models[0].train.learning_rate`."""
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
    """Return a value as the user wrote it, in one line of at most 60 characters."""
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


# Letters that Unicode does not decompose into a Latin letter and a mark.
_LETTERS = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i", "ħ": "h"}
_STRONG = 0.75  # a key that is more similar counts as a typing error, and other sections are not searched

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
_EXAMPLES: dict[str, tuple[float, ...]] = {
    "int": (100, 10, 2, 1, 0),
    "float": (0.001, 0.1, 1.0, 10.0, 0.0),
    "bool": (True,),
}
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
    if kind == "worded":
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
    is_entry = isinstance(loc[-1], int)  # an entry of a list
    form = _FieldForm(field, root.model_config) if field and not is_entry else None
    return f"got {show(value)}, {_expected(kind, value, context, field, form) or _as_pydantic_says(details['msg'])}"


def _expected(
    kind: str, value: object, context: dict[str, Any], field: FieldInfo | None, form: _FieldForm | None
) -> str:
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"expected {_number(field)} {words} {context[bound]}{_hint(form)}"
    if kind in ("literal_error", "enum"):
        choices = [choice.strip("'") for choice in re.split(", | or ", str(context["expected"]))]
        return f"expected one of {', '.join(choices)}{nearest(value, choices)}"
    if kind == "finite_number":
        return "expected a finite number"
    if kind == "string_pattern_mismatch":
        return f"expected text of the form {context['pattern']}"
    name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if name not in _TYPES:
        return ""
    if name == "int" and isinstance(value, float) and value.is_integer() and form and form.accepts(int(value)):
        return f"expected a whole number; write {int(value)}"
    if name == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return "expected text; put it in quotes"
    return f"expected {_TYPES[name]}{_hint(form, _EXAMPLES.get(name, ()))}"


def _number(field: FieldInfo | None) -> str:
    types = _types(field.annotation) if field else set()
    return "a whole number" if int in types and float not in types else "a number"


def _types(annotation: Any) -> set[Any]:
    """Return the number types in an annotation such as `Annotated[int, ...] | None`."""
    arguments = get_args(annotation)
    if arguments:
        return set().union(*map(_types, arguments))
    return {annotation} if annotation in (int, float) else set()


class _FieldForm:
    """Check that a field accepts a value before an error message suggests that value."""

    def __init__(self, field: FieldInfo, config: ConfigDict) -> None:
        self.field, self._config = field, config

    def accepts(self, value: object) -> bool:
        annotation: Any = Annotated[self.field.annotation, self.field]
        try:
            TypeAdapter(annotation, config=self._config).validate_python(value)
        except ValidationError:
            return False
        return True


def _hint(form: _FieldForm | None, examples: Iterable[object] = ()) -> str:
    if form is None:
        return ""
    for value in (form.field.default, *examples):
        if isinstance(value, bool | int | float | str) and form.accepts(value):
            return f"; write e.g. {show(value) if isinstance(value, bool) else value}"
    return ""


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
    """Return the field at a loc; for an entry of a list, the field of the list."""
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
    """Return the section in an annotation such as `list[Section]` or `Section | None`."""
    return next(_all_inner(annotation), None)


def _all_inner(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _all_inner(argument)


def _as_pydantic_says(message: str) -> str:
    return message.replace("Input should be", "expected").replace("Value error, ", "")
