"""Read YAML (or JSON) of users safely.

Common loaders have these faults: a few hundred bytes of aliases grow to millions of values, deep nesting ends the
process, `1e-4` is a string, `no` is false, a second `seed:` silently wins, tags run code. Here a document is a tree of
mappings with text keys, sequences, and scalars of the YAML 1.2 core schema; anchors, aliases and tags are refused. The
pure-Python parser of PyYAML gives events one by one, so the depth is limited before any recursion.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from genmodels.errors import SpecError
from genmodels.schema.field_errors import FieldError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_ERRORS = 20  # more errors would not help the reader

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Kind:
    """Name a kind of document in messages."""

    name: str
    first: str  # the key that it begins with
    example: str  # a path of one


JOB_SPEC = Kind("job spec", "name", "jobs/quickstart.yaml")


@dataclass(frozen=True)
class Document:
    """Hold the content of a document, and the line at which each of its values begins (1 is the first)."""

    value: dict[str, Any]
    lines: dict[Path, int]

    def line(self, loc: Path) -> int:
        """Return the line of a field; if the document lacks it, the line of the nearest section above."""
        ways_up = (loc[:n] for n in range(len(loc), -1, -1))
        return next(self.lines[loc] for loc in ways_up if loc in self.lines)

    def error(self, source: str, problems: Iterable[FieldError], count: int) -> SpecError:
        """Return an error with a line `source:line: path: text` for each problem.

        Args:
            count: of all problems, of which `problems` may be the first.
        """
        lines = sorted((self.line(problem.loc), f"{problem}") for problem in problems)
        messages = [f"{source}:{line}: {text}" for line, text in lines]
        more = count - len(messages)
        return SpecError(*messages, *([f"{source}: and {more} more"] if more else []))


def read_file(path: pathlib.Path, kind: Kind = JOB_SPEC) -> bytes:
    """Return the bytes of a file of the user; read at most MAX_BYTES + 1 of them.

    Raises:
        SpecError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; write the path of a {kind.name}, e.g. {kind.example}") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: a directory; write the path of a {kind.name} in it") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def check_size(data: bytes, source: str, max_bytes: int = MAX_BYTES, kind: Kind = JOB_SPEC) -> None:
    """Raise a SpecError if the document is larger than `max_bytes`."""
    if len(data) > max_bytes:
        _fail(
            source,
            None,
            f"larger than {max_bytes // 1024} KiB, which no {kind.name} needs; check that it is the right file",
        )


def read(data: bytes, source: str, max_bytes: int = MAX_BYTES, kind: Kind = JOB_SPEC) -> Document:
    """Read one document whose top level is a mapping.

    Raises:
        SpecError: with one line `source:line: what is wrong; remedy` for each error.
    """
    check_size(data, source, max_bytes, kind)
    text = _text(data, source)
    reader = _Reader(source, kind)
    try:
        value = reader.document(yaml.parse(text, Loader=_Loader))  # never the C loader: 200 KB of "[" crash it
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        _fail(source, line, f"the character U+{error.character:04X} is not allowed in YAML; remove it")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = " ".join(filter(None, [error.context, error.problem]))
        has_tab = mark is not None and "\t" in text[mark.index - mark.column :].partition("\n")[0]
        hint = "use spaces instead of tabs" if has_tab else "check the indentation and the quotes in this line"
        _fail(source, mark.line + 1 if mark else None, f"not valid YAML: {where}; {hint}")
    except (ValueError, OverflowError):  # an escape such as \UFFFFFFFF or a version of 5,000 digits
        _fail(source, None, "not valid YAML: a number in an escape or a directive is out of range")
    if reader.problems:
        raise SpecError(*reader.problems)
    return Document(value, reader.lines)


def scalar(text: str) -> Any:
    """Return the value of a plain scalar by the YAML 1.2 core schema. Raises OverflowError for huge numbers."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for pattern, base in ((_DECIMAL, 10), (_OCTAL, 8), (_HEXADECIMAL, 16)):
        if pattern.fullmatch(text):
            return _bounded(text if base == 10 else text[2:], base)
    if not _FLOAT.fullmatch(text):
        return text
    number = float(text)
    if math.isinf(number):
        raise OverflowError(text)
    return number


_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def _bounded(digits: str, base: int) -> int:
    if len(digits) > 64:  # int() takes quadratic time, and its own error for 4,300 digits is meant for programmers
        raise OverflowError(digits)
    number = int(digits, base)
    if not -(2**63) <= number < 2**63:
        raise OverflowError(digits)
    return number


def _text(data: bytes, source: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        _fail(source, None, "written in UTF-16; save it as UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        _fail(source, line, "a NUL byte: this is not a text file; write YAML in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _fail(source, line, f"the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8")
    return text


class _Loader(yaml.SafeLoader):
    """Accept tabs as separators and in JSON, as YAML does; PyYAML refuses them everywhere.

    Tabs as indentation stay an error: YAML 1.2.2, 6.1 and 6.2.
    """

    def scan_to_next_token(self) -> None:
        super().scan_to_next_token()
        while self.peek() == "\t" and (self.flow_level or not self._indents()):
            if not self.flow_level:
                self.allow_simple_key = False  # no block may begin after a tab: the tab would indent it
            while self.peek() in " \t":
                self.forward()
            super().scan_to_next_token()

    def _indents(self) -> bool:
        """Return whether the tab begins a line with content for which indentation matters."""
        if self.buffer[self.pointer - self.column : self.pointer].strip():
            return False
        at = self.pointer
        while self.buffer[at] in " \t":
            at += 1
        return self.buffer[at] not in "\r\n\0#" and not (self.buffer[at] == "{" and self.indent < 0)


@dataclass
class _Reader:
    """Build values from parser events. Collect errors in `problems` if reading can continue, else raise them."""

    source: str
    kind: Kind
    problems: list[str] = field(default_factory=list)
    lines: dict[Path, int] = field(default_factory=dict)

    def document(self, events: Iterator[yaml.Event]) -> dict[str, Any]:
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            _fail(self.source, None, f"empty; write a {self.kind.name}, beginning with `{self.kind.first}:`")
        top = next(events)
        value: Any = self._node(top, events, ())
        next(events)  # the document's end
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            _fail(self.source, _line(after), "a second document begins here; keep one per file")
        if not isinstance(value, dict) and not self.problems:
            keys = f"the keys of a {self.kind.name}, beginning with `{self.kind.first}:`"
            _fail(self.source, _line(top), f"expected a mapping with {keys}")
        return value

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            _fail(self.source, _line(event), f"nested more than {MAX_DEPTH} deep, which no {self.kind.name} needs")
        self.lines[path] = _line(event)
        if isinstance(event, yaml.AliasEvent):
            self._note(event, f"the alias *{event.anchor:.40} is not allowed; write the value out")
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            self._note(event, f"the anchor &{event.anchor:.40} is not allowed; write repeated values out")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(event, f"the tag {_short(tag)} is not allowed; remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        return (
            self._sequence(events, path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(events, path)
        )

    def _sequence(self, events: Iterator[yaml.Event], path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._node(event, events, (*path, len(items))))
        return items

    def _mapping(self, events: Iterator[yaml.Event], path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        first: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._node(event, events, (*path, "?"))
            value_event = next(events)
            if not isinstance(key, str):
                self._note(event, f"the key {_short(key)} is not text; put it in quotes if it is meant")
                key = "?"
            elif key in first:
                self._note(event, f"the key {_short(key)} is repeated, first in line {first[key]}; keep one")
            first.setdefault(key, _line(event))
            items[key] = self._node(value_event, events, (*path, key))
            self.lines[(*path, key)] = _line(event)
        return items

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        try:
            value = scalar(event.value) if event.style is None else event.value
        except OverflowError:
            self._note(event, f"the number {_short(event.value)} is too large; write a smaller one")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._note(event, f"{_short(event.value)} is not allowed; write a finite number")
            return None
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self._note(event, "the character U+0000 is escaped here; remove it")
        if value.isascii():
            return value
        try:  # JSON writes a character beyond U+FFFF as two escapes
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._note(event, "half of a surrogate pair is escaped here; write the character itself")
            return None

    def _note(self, event: yaml.Event, problem: str) -> None:
        if len(self.problems) < MAX_ERRORS:
            self.problems.append(f"{self.source}:{_line(event)}: {problem}")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _fail(source: str, line: int | None, problem: str) -> NoReturn:
    raise SpecError(f"{source}:{line}: {problem}" if line else f"{source}: {problem}")
