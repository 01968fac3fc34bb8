"""Prototxt text to message and back, with a source map and errors a user can act on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format

from caffejacinto_py.errors import Loc, PrototxtError, raise_all
from caffejacinto_py.schema.diagnose import Findings, examine
from caffejacinto_py.schema.mark import header, read_header
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.scan import Locs, Scan, scan

_MASK = re.compile(r"[^\n]")
_NET = "NetParameter"


@dataclass
class Document:
    """A parsed file: the message, where each field stands, and what there is to tell the user about it."""

    message: Any
    file: str
    text: str
    locs: Locs
    notices: list[str] = field(default_factory=list)
    unknown: list[tuple[str, Loc]] = field(default_factory=list)  # dropped fields: path text, place


def parse(text: str, message_name: str, *, file: str = "<text>", unknown: str = "error") -> Document:
    """Parse prototxt text as `message_name` (``NetParameter``, ``SolverParameter``, ``LabelMap``, ...).

    unknown: ``error`` refuses fields that no fork has; ``collect`` drops them and lists them in `Document.unknown`.
    The mark on top of a net (`schema.mark`) becomes its field `dialect`.
    Raises PrototxtError, or ManyErrors with all that is wrong; each has its place and, where we know, what to do.
    """
    if unknown not in ("error", "collect"):
        raise ValueError(f"unknown must be 'error' or 'collect', not {unknown!r}")
    doc = _parse(text, message_name, file, unknown)
    if message_name == _NET:
        read_header(doc.message, text, file, doc.locs.find(("dialect",)) if doc.message.dialect else None)
    return doc


def _parse(text: str, message_name: str, file: str, unknown: str) -> Document:
    message = getattr(pb, message_name)()
    problem = _merge(text, message)
    if problem is None:
        return Document(message, file, text, Locs(text, file))
    scanned = scan(text)
    findings = examine(scanned, text, message_name, file)
    if unknown == "error" or findings.other:
        raise_all(list(findings.errors))
    elif findings.unknown:
        return _without(findings, text, message_name, file, scanned)
    raise _official(problem, file)


def dumps(message: Any) -> str:
    """The message in text format: two spaces per level, shortest floats that read back equal.

    The dialect of a net is a comment on top, which C++ Caffe reads over.
    """
    top = ""
    if message.DESCRIPTOR.name == _NET and message.HasField("dialect"):
        top, bare = header(message), type(message)()
        bare.CopyFrom(message)
        bare.ClearField("dialect")
        message = bare
    return top + text_format.MessageToString(message, as_utf8=True)


def _merge(text: str, message: Any) -> Exception | None:
    try:
        text_format.Parse(text, message)
    except (text_format.ParseError, ValueError, RecursionError, UnicodeError) as error:
        return error
    return None


def _without(findings: Findings, text: str, message_name: str, file: str, scanned: Scan) -> Document:
    """Parse again with the unknown fields blanked out, so that every other place stays where it is."""
    pieces, done = [], 0
    spans = sorted(tuple(f.whole) if f.whole else (f.start, f.end) for _, _, f in findings.unknown)
    for start, end in spans:
        pieces += [text[done:start], _MASK.sub(" ", text[start:end])]
        done = end
    message = getattr(pb, message_name)()
    problem = _merge("".join([*pieces, text[done:]]), message)
    if problem is not None:
        raise _official(problem, file)
    unknown = [(path, loc) for path, loc, _ in findings.unknown]
    return Document(message, file, text, Locs(text, file, scanned), unknown=sorted(unknown, key=lambda u: u[1]))


def _official(problem: Exception, file: str) -> PrototxtError:
    """The official parser's own words, for what `examine` did not find."""
    if isinstance(problem, text_format.ParseError):
        line, column = problem.GetLine(), problem.GetColumn()
        text = re.sub(r"^\d+:\d+ : (?:'.*': )?", "", str(problem), flags=re.DOTALL).replace("caffejacinto.", "")
        return PrototxtError(text, loc=Loc(file, line or 0, column or 0))
    return PrototxtError(f"cannot read this as text: {problem}", loc=Loc(file))
