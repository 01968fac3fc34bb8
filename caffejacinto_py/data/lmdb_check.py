"""Is an LMDB whole? Looked at before liblmdb opens it, which trusts its pages: a damaged one ends the process there (an
assertion, SIGSEGV, SIGBUS), and nobody learns which database it was.

The whole tree of the main database is walked, a level at a time with numpy: both meta pages, branch pages, leaf pages
and the places of large values; not the values themselves. 1.3 million records take about as long as liblmdb takes to
list their keys. Source: the page format of LMDB 0.9 (mdb.c: MDB_page, MDB_meta, MDB_node), 64 bit, little endian.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from caffejacinto_py.errors import DataError

_META = np.dtype(
    [("pgno", "<u8"), ("pad", "<u2"), ("flags", "<u2"), ("pages", "<u4"), ("magic", "<u4"), ("version", "<u4"),
     ("address", "<u8"), ("mapsize", "<u8"), ("dbs", [("pad", "<u4"), ("flags", "<u2"), ("depth", "<u2"),
     ("branch", "<u8"), ("leaf", "<u8"), ("overflow", "<u8"), ("entries", "<u8"), ("root", "<u8")], 2),
     ("last", "<u8"), ("txnid", "<u8")]
)  # fmt: skip
_MAGIC, _VERSIONS = 0xBEEFC0DE, (1, 2)
_BRANCH, _LEAF, _KINDS, _IS_META = 1, 2, 0x6F, 8  # bits of a page's flags; dirty pages may be marked so on disk
_BIG, _SUB = 1, 6  # bits of a node's flags: value on pages of its own; a database or duplicates inside
_DUPSORT, _MAIN = 4, 1
_HEADER, _NODE = 16, 8  # bytes of a page's and of a node's header
_NONE = (1 << 64) - 1  # the root of an empty tree
_BATCH = 2048  # pages looked at together


class Damage(Exception):
    """What is wrong, for a sentence about the database."""

    start, hint = "the LMDB is damaged", "copy or convert it again"


class BadHeader(Damage):
    start, hint = "not a readable LMDB", "is it whole, and written by LMDB?"


@dataclass(frozen=True)
class _File:
    pages: np.ndarray  # (number, bytes of a page), uint8, mapped

    @property
    def size(self) -> int:
        return int(self.pages.shape[1])

    @property
    def last(self) -> int:
        return len(self.pages) - 1


def check(path: str) -> None:
    """Raises DataError where LMDB directory `path` is damaged in a way that could end the process."""
    name = os.path.join(path, "data.mdb")
    try:
        with open(name, "rb") as f:
            head = f.read(2 * 65536)
        size = os.path.getsize(name)
        meta = _meta(head)
        page = int(meta["dbs"][0]["pad"])
        count = int(meta["last"]) + 1
        if size < count * page:
            text = f"{path}: data.mdb is truncated: {size} bytes, its header says {count * page}"
            raise DataError(text, hint="copy it again")
        main = meta["dbs"][_MAIN]
        if int(main["root"]) != _NONE:
            _walk(_File(np.memmap(name, np.uint8, "r", shape=(count, page))), main)
    except Damage as damage:
        raise DataError(f"{path}: {damage.start}: {damage}", hint=damage.hint) from None
    except OSError as error:
        raise DataError(f"{path}: cannot read data.mdb: {error.strerror}") from error


def _meta(head: bytes) -> np.void:
    """The meta page that LMDB would take. The first one says how long pages are."""
    first = _one_meta(head, 0)
    page = int(first["dbs"][0]["pad"])
    if not 256 <= page <= 65536 or page & (page - 1):
        raise BadHeader(f"its header says that pages have {page} bytes")
    second = _one_meta(head, page)
    chosen = second if int(first["txnid"]) < int(second["txnid"]) else first
    if int(chosen["dbs"][0]["pad"]) != page:
        raise BadHeader("its two headers disagree")
    if int(chosen["last"]) >= 1 << 48:
        raise BadHeader(f"its header says that it has {int(chosen['last'])} pages")
    return chosen


def _one_meta(head: bytes, at: int) -> np.void:
    if len(head) < at + _META.itemsize:
        raise BadHeader(f"data.mdb ends after {len(head)} bytes, within its header")
    meta: np.void = np.frombuffer(head, _META, 1, at)[0]
    if meta["magic"] != _MAGIC or not meta["flags"] & _IS_META:
        raise BadHeader("its header is not that of an LMDB")
    if meta["version"] not in _VERSIONS:
        raise BadHeader(f"its header says version {meta['version']}")
    return meta


def _walk(file: _File, main: np.void) -> None:
    """The tree, level by level. Raises Damage."""
    level = np.array([int(main["root"])], np.uint64)
    depth, seen, entries = int(main["depth"]), 0, 0
    if not 1 <= depth <= 32:
        raise Damage(f"its header says that its tree has {depth} levels")
    for i in range(depth):
        if (level < 2).any() or (level > file.last).any():
            raise Damage("a page of its tree lies outside of the file")
        if len(np.unique(level)) != len(level) or (seen := seen + len(level)) > file.last + 1:
            raise Damage("its tree goes round in circles")
        below = []
        for start in range(0, len(level), _BATCH):
            part = level[start : start + _BATCH]
            if i < depth - 1:
                below.append(_children(file, part))
            else:
                entries += _records(file, part, bool(main["flags"] & _DUPSORT))
        level = np.concatenate(below) if below else level
    if not main["flags"] & _DUPSORT and entries != int(main["entries"]):
        raise Damage(f"its pages hold {entries} records, its header says {int(main['entries'])}")


def _nodes(file: _File, numbers: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pages, row of each node in them, where it begins, its header as four numbers), all in bounds. Raises Damage."""
    pages = np.ascontiguousarray(file.pages[numbers.astype(np.int64)])
    words = pages.view("<u2")
    lower, upper = words[:, 6].astype(np.int64), words[:, 7].astype(np.int64)
    right = (pages[:, :8].copy().view("<u8").ravel() == numbers) & ((words[:, 5] & _KINDS) == kind)
    least = _HEADER + (4 if kind == _BRANCH else 2)  # liblmdb asserts that a branch has two children
    right &= (lower >= least) & (lower % 2 == 0) & (lower <= upper) & (upper <= file.size)
    if not right.all():
        bad = int(numbers[~right][0])
        raise Damage(f"page {bad} at byte {bad * file.size} is not a {'branch' if kind == _BRANCH else 'leaf'} page")
    counts = (lower - _HEADER) // 2
    rows, columns = np.nonzero(np.arange(counts.max()) < counts[:, None])
    places = words[rows, _HEADER // 2 + columns].astype(np.int64)
    inside = (places >= lower[rows]) & (places % 2 == 0) & (places <= file.size - _NODE)
    if not inside.all():
        raise Damage(f"an entry of page {int(numbers[rows[~inside][0]])} lies outside of it")
    head = words[rows[:, None], places[:, None] // 2 + np.arange(4)].astype(np.int64)
    ends = places + _NODE + head[:, 3]
    if (ends > file.size).any():
        raise Damage(f"a key of page {int(numbers[rows[ends > file.size][0]])} ends outside of it")
    return pages, rows, places, head


def _children(file: _File, numbers: np.ndarray) -> np.ndarray:
    _, _, _, head = _nodes(file, numbers, _BRANCH)
    return (head[:, 0] | head[:, 1] << 16 | head[:, 2] << 32).astype(np.uint64)


def _records(file: _File, numbers: np.ndarray, duplicates: bool) -> int:
    """How many there are on these leaf pages. Raises Damage for values that are not where they should be."""
    pages, rows, places, head = _nodes(file, numbers, _LEAF)
    sizes, start = head[:, 0] | head[:, 1] << 16, places + _NODE + head[:, 3]
    big = (head[:, 2] & _BIG) != 0
    if (head[:, 2] & _SUB).any() and not duplicates:
        raise BadHeader("it holds databases within the database")
    ends = start + np.where(big, 8, sizes)
    if (ends > file.size).any():
        raise Damage(f"a value of page {int(numbers[rows[ends > file.size][0]])} ends outside of it")
    at = start[big, None] + np.arange(8)
    first = pages[rows[big, None], at].copy().view("<u8").ravel()
    needed = (_HEADER + sizes[big] + file.size - 1) // file.size
    outside = (first < 2) | (first > file.last) | (first + needed.astype(np.uint64) > file.last + 1)
    if outside.any():
        raise Damage(f"a value of page {int(numbers[rows[big][outside][0]])} lies outside of the file")
    return len(rows)
