"""Damaged databases: a sentence, never the end of the process; whole ones of every shape are let through."""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.data.lmdb_check import check
from caffejacinto_py.data.sources import Database
from caffejacinto_py.errors import DataError

PAGE = 4096
Size = Callable[[int], int]
SHAPES: dict[str, tuple[int, Size]] = {
    "one": (1, lambda i: 3),
    "empty values": (10, lambda i: 0),
    "one page": (20, lambda i: 50),
    "small": (2500, lambda i: 40 + i % 60),
    "large": (150, lambda i: 2000 + 31 * i),
    "mixed": (300, lambda i: 20 if i % 3 else 2500),
}


def make(path: Path, count: int, size: Size) -> Path:
    rng = random.Random(count)
    with lmdb.open(str(path), map_size=1 << 26, sync=False) as env, env.begin(write=True) as txn:
        for i in range(count):
            txn.put(b"%0*d" % (4 + i % 3, i), rng.randbytes(size(i)))
    return path


def read(path: Path) -> int:
    """All bytes of all values."""
    database, total = Database(str(path)), 0
    for i in range(len(database)):
        with database.read([i]) as values:
            total += len(bytes(values[0]))
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_databases(tmp_path: Path, shape: str) -> None:
    count, size = SHAPES[shape]
    path = make(tmp_path / "db", count, size)
    check(str(path))
    assert read(path) == sum(map(size, range(count)))
    with lmdb.open(str(path), map_size=1 << 26) as env, env.begin(write=True) as txn:
        for key in list(txn.cursor().iternext(values=False))[:: 1 if count == 1 else 2]:
            txn.delete(key)
    check(str(path))  # with free pages; a tree of one record is empty now


def test_databases_within_a_database(tmp_path: Path) -> None:
    """Their descriptions would be taken for records."""
    with lmdb.open(str(tmp_path / "a"), max_dbs=3) as env:
        inner = env.open_db(b"inner", dupsort=True)
        with env.begin(write=True) as txn:
            for i in range(1000):
                txn.put(b"%d" % (i % 7), b"%d" % i, db=inner)
    with pytest.raises(DataError, match="not a readable LMDB: it holds databases within"):
        check(str(tmp_path / "a"))


def change(path: Path, at: int, form: str, value: int) -> None:
    with open(path / "data.mdb", "r+b") as f:
        f.seek(at)
        f.write(struct.pack(form, value))


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (16, "<I", 1, "not a readable LMDB: its header is not that of an LMDB"),
        (20, "<I", 77, "not a readable LMDB: its header says version 77"),
        (40, "<I", 0, "not a readable LMDB: its header says that pages have 0 bytes"),
        (40, "<I", 4095, "says that pages have 4095 bytes"),
        (94, "<H", 0, "its header says that its tree has 0 levels"),
        (94, "<H", 99, "its header says that its tree has 99 levels"),
        (120, "<Q", 3, "its header says 3"),
        (128, "<Q", 1 << 40, "a page of its tree lies outside of the file"),
        (136, "<Q", 1 << 50, "its header says that it has"),
        (136, "<Q", 1 << 30, "data.mdb is truncated"),
    ],
)
def test_headers(tmp_path: Path, offset: int, form: str, value: int, words: str) -> None:
    path = make(tmp_path / "db", *SHAPES["small"])
    for start in (0, PAGE):
        change(path, start + offset, form, value)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert str(path) in caught.value.text
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (0, "<Q", 12345, "is not a branch page"),
        (10, "<H", 2, "is not a branch page"),
        (12, "<H", 18, "is not a branch page"),  # one child
        (12, "<H", 17, "is not a branch page"),
        (14, "<H", 9000, "is not a branch page"),
        (16, "<H", 4094, "an entry of page"),
        (16, "<H", 17, "an entry of page"),
    ],
)
def test_the_root_page(tmp_path: Path, offset: int, form: str, value: int, words: str) -> None:
    path = make(tmp_path / "db", *SHAPES["small"])
    change(path, root_of(path) * PAGE + offset, form, value)
    with pytest.raises(DataError, match=words):
        read(path)


def root_of(path: Path) -> int:
    data = (path / "data.mdb").read_bytes()
    newest = max((0, PAGE), key=lambda at: struct.unpack_from("<Q", data, at + 144)[0])
    return int(struct.unpack_from("<Q", data, newest + 128)[0])


def test_circles_and_values(tmp_path: Path) -> None:
    path = make(tmp_path / "db", *SHAPES["small"])
    whole = (path / "data.mdb").read_bytes()
    root = root_of(path) * PAGE
    first, second = (root + struct.unpack_from("<H", whole, root + at)[0] for at in (16, 18))
    change(path, first, "<I", struct.unpack_from("<I", whole, second)[0])
    with pytest.raises(DataError, match="goes round in circles"):
        read(path)
    (path / "data.mdb").write_bytes(whole)
    leaf = struct.unpack_from("<I", whole, second)[0] * PAGE
    node = leaf + struct.unpack_from("<H", whole, leaf + 16)[0]
    for at, words in ((node, "a value of page"), (node + 6, "a key of page")):
        (path / "data.mdb").write_bytes(whole)
        change(path, at, "<H", 60000)
        with pytest.raises(DataError, match=words):
            read(path)
    path = make(tmp_path / "big", *SHAPES["large"])
    whole = (path / "data.mdb").read_bytes()
    leaf = next(p for p in range(2, len(whole) // PAGE) if whole[p * PAGE + 10] & 2) * PAGE
    node = leaf + struct.unpack_from("<H", whole, leaf + 16 + 2 * 20)[0]  # a large value has a page of its own
    change(path, node + 2, "<H", 0x7000)
    with pytest.raises(DataError, match="lies outside of the file"):
        read(path)


# --- random damage ----------------------------------------------------------------------------------------------------
def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or a few bytes changed: in the heads of pages, in pages of the tree, anywhere."""
    kind, changed = rng.randrange(4), bytearray(data)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    pages = range(len(data) // PAGE)
    own = [p for p in pages if data[p * PAGE : p * PAGE + 8] == p.to_bytes(8, "little")]
    tree = [p for p in own if p < 2 or data[p * PAGE + 10] & 3]
    for _ in range(rng.choice([1, 1, 2, 8])):
        page = rng.choice(tree if kind < 3 else pages)
        at = page * PAGE + rng.randrange((160 if page < 2 else 16) if kind == 1 else PAGE)
        changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1 << rng.randrange(8)])
    return bytes(changed)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("lmdb")
    return [(make(folder / name, *SHAPES[name]) / "data.mdb").read_bytes() for name in ("small", "large", "mixed")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_random_damage_ends_in_a_sentence_or_in_nothing(tmp_path: Path, bases: list[bytes], seed: int) -> None:
    """Read in a child, which may not die, hang or raise anything else."""
    rng = random.Random(seed)
    path = tmp_path / "db"
    path.mkdir(exist_ok=True)
    (path / "data.mdb").write_bytes(damaged(rng.choice(bases), rng))
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(20)
            read(path)
            code = 0
        except DataError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 3), f"seed {seed}"
