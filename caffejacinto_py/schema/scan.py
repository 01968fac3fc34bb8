"""A small scanner of protobuf text format that remembers where every field stands.

It knows the grammar but no schema, never raises on bad text, and is linear in the text: the official parser decides
what is valid, this one answers "where" (and, in `diagnose`, "what else is wrong").
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from caffejacinto_py.errors import Loc

MAX_DEPTH = 100  # no schema message nests deeper than 8

_SPACE = r"\s*(?:#[^\n]*(?:\n\s*|\Z))*"
_STRING = r""""(?:[^"\n\\]|\\.)*"|'(?:[^'\n\\]|\\.)*'"""
_VALUE = rf"{_STRING}|[-+.\d][\w.+-]*(?:(?<=-){_SPACE}[A-Za-z_][\w]*)?|[A-Za-z_]\w*"
_FIELD = re.compile(rf"([A-Za-z_]\w*){_SPACE}(:?){_SPACE}(?:([{{<\[])|({_VALUE}))?")
_ELEMENT = re.compile(rf"([{{<])|({_VALUE})")
_MORE_STRING = re.compile(rf"{_SPACE}({_STRING})")
_SKIP = re.compile(_SPACE)
_CLOSE = {"{": "}", "<": ">"}


class Field:
    """One field as written: `start`..`end` are text offsets, `at` is where its value begins.

    `value` is the raw scalar text, None for a message. `children` holds a message's fields by name, in order.
    """

    __slots__ = ("at", "children", "end", "name", "start", "value", "whole")

    def __init__(self, name: str = "", start: int = -1, at: int = -1, end: int = -1, value: str | None = None) -> None:
        self.name = name
        self.start = start
        self.at = at
        self.end = end
        self.value = value
        self.children: dict[str, list[Field]] = {}
        self.whole: list[int] | None = None  # where the list begins and ends that this is an element of

    def add(self, child: Field) -> None:
        self.children.setdefault(child.name, []).append(child)

    def walk(self) -> Iterator[Field]:
        """The direct children in the order of the text."""
        return iter(sorted((c for group in self.children.values() for c in group), key=lambda c: (c.start, c.at)))

    def first(self, name: str) -> Field | None:
        return self.children.get(name, [None])[0]

    def moved(self, name: str) -> Field:
        """The same place under another name (upgrades move fields)."""
        copy = Field(name, self.start, self.at, self.end, self.value)
        copy.children, copy.whole = self.children, self.whole
        return copy


class Problem(NamedTuple):
    """Why the scan stopped before the end of the text, and where."""

    offset: int
    text: str
    opened: Field | None = None  # the message that is not closed


class Scan(NamedTuple):
    root: Field
    problem: Problem | None


def scan(text: str) -> Scan:
    """Read the whole text, or up to the first syntax error; what was read is in the tree either way."""
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.root = Field(start=0, end=len(text))
        self.stack: list[tuple[Field, str]] = []  # the messages we are in, and the characters that close them

    def run(self) -> Scan:
        problem = self._fields()
        if problem is None and self.stack:
            field = self.stack[-1][0]
            problem = Problem(len(self.text), f"a '{self.stack[-1][1]}' is missing at the end of the file", field)
        for field, _ in self.stack:
            field.end = problem.offset if problem else len(self.text)
        return Scan(self.root, problem)

    def _fields(self) -> Problem | None:
        text, size, match, skip = self.text, len(self.text), _FIELD.match, _SKIP.match
        here, pos = self.root, skip(text, 0).end()  # type: ignore[union-attr]
        while pos < size:
            found = match(text, pos)
            if found is None:
                char = text[pos]
                if char in ";,":
                    pos += 1
                elif self.stack and char == self.stack[-1][1]:
                    field, _ = self.stack.pop()
                    field.end = pos = pos + 1
                    here = self.stack[-1][0] if self.stack else self.root
                    if field.whole is not None:
                        pos, here, problem = self._elements(pos, here, field.name, field.whole, first=False)
                        if problem:
                            return problem
                else:
                    return self._unexpected(pos)
            else:
                name, colon, opener, value = found.groups()
                start = found.start()
                if value is not None and colon:
                    end = found.end()
                    if value[0] in "\"'":
                        end = self._more_strings(end)
                    here.children.setdefault(name, []).append(Field(name, start, found.start(4), end, value))
                    pos = end
                elif opener == "[":
                    pos, here, problem = self._elements(found.end(), here, name, [start, start], first=True)
                    if problem:
                        return problem
                elif opener:
                    problem = self._open(here, Field(name, start, found.start(3)), opener)
                    if problem:
                        return problem
                    here, pos = self.stack[-1][0], found.end()
                else:
                    return self._no_value(name, colon, start, found.end())
            pos = skip(text, pos).end()  # type: ignore[union-attr]
        return None

    def _open(self, parent: Field, field: Field, opener: str) -> Problem | None:
        if len(self.stack) >= MAX_DEPTH:
            return Problem(field.start, f"messages are nested deeper than {MAX_DEPTH} levels")
        parent.add(field)
        self.stack.append((field, _CLOSE[opener]))
        return None

    def _elements(
        self, pos: int, here: Field, name: str, whole: list[int], *, first: bool
    ) -> tuple[int, Field, Problem | None]:
        """The rest of a list; returns at its `]`, or inside its next message."""
        text = self.text
        while True:
            pos = _SKIP.match(text, pos).end()  # type: ignore[union-attr]
            char = text[pos : pos + 1]
            if char == "]":
                whole[1] = pos + 1
                return pos + 1, here, None
            if not first:
                if char != ",":
                    return pos, here, Problem(pos, f"expected ',' or ']' in the list of '{name}'")
                pos = _SKIP.match(text, pos + 1).end()  # type: ignore[union-attr]
            found = _ELEMENT.match(text, pos)
            if found is None:
                return pos, here, Problem(pos, f"expected a value in the list of '{name}'")
            element = Field(name, pos, pos, pos, found[2])
            element.whole = whole
            if found[1]:
                problem = self._open(here, element, found[1])
                return (pos, here, problem) if problem else (found.end(), self.stack[-1][0], None)
            element.end = self._more_strings(found.end()) if found[2][0] in "\"'" else found.end()
            here.add(element)
            pos, first = element.end, False

    def _more_strings(self, pos: int) -> int:
        """Adjacent string literals are one value."""
        while found := _MORE_STRING.match(self.text, pos):
            pos = found.end()
        return pos

    def _no_value(self, name: str, colon: str, start: int, end: int) -> Problem:
        rest = self.text[end : end + 1]
        if rest and rest in "\"'":
            return Problem(end, f"the string of '{name}' is not closed on its line")
        if rest and not rest.isspace() and rest not in "}>];,#":
            return Problem(end, f"unexpected {_shown(rest)} after '{name}{colon}'")
        return Problem(start, f"'{name}:' has no value" if colon else f"expected ':' or '{{' after '{name[:80]}'")

    def _unexpected(self, pos: int) -> Problem:
        char = self.text[pos]
        if char in "}>":
            expected = f"; '{self.stack[-1][1]}' was expected" if self.stack else " closes nothing"
            return Problem(pos, f"'{char}'{expected}", self.stack[-1][0] if self.stack else None)
        if char in "\"'":
            return Problem(pos, "a string that belongs to no field")
        return Problem(pos, f"unexpected {_shown(char)}")


def _shown(char: str) -> str:
    """A character for an error text; a byte that is not UTF-8 was read as a lone surrogate."""
    return f"byte 0x{ord(char) & 0xFF:02x}" if "\udc80" <= char <= "\udcff" else repr(char)


class Lines:
    """Text offsets to line and column, both from 1."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def loc(self, offset: int) -> Loc:
        line = bisect_right(self.starts, offset)
        return Loc(self.file, line, offset - self.starts[line - 1] + 1)


class Locs:
    """The source map of one text: `find` answers where the field at a path stands.

    A path is names and, after the name of a repeated field, its index: ``("layer", 3, "convolution_param", "pad", 0)``.
    """

    def __init__(self, text: str = "", file: str = "<text>", scanned: Scan | None = None) -> None:
        self.file = file
        self._text = text
        self._root = scanned.root if scanned else None
        self._lines: Lines | None = None

    @property
    def root(self) -> Field:
        """The field tree; scanned at first use. Upgrades change it together with the message."""
        if self._root is None:
            self._root = scan(self._text).root
        return self._root

    def loc(self, field: Field) -> Loc | None:
        if field.start < 0:
            return None
        if self._lines is None:
            self._lines = Lines(self._text, self.file)
        return self._lines.loc(field.start)

    def find(self, path: tuple[str | int, ...]) -> Loc | None:
        """The exact place of a field, else that of the nearest enclosing field that is in the text, else None; for the
        empty path the file."""
        if not path:
            return Loc(self.file)
        here, best, at = self.root, None, 0
        while at < len(path):
            group = here.children.get(str(path[at]))
            at += 1
            index = 0
            if at < len(path) and isinstance(path[at], int):
                index = int(path[at])
                at += 1
            if group is None or not -len(group) <= index < len(group):
                break
            here = group[index]
            best = here if here.start >= 0 else best
        return self.loc(best) if best else None
