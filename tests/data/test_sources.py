"""Databases, image lists, HDF5 lists and images that are missing, damaged or something else: an error that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.data import make_feeder, probe
from caffejacinto_py.data.decode import decode
from caffejacinto_py.data.sources import Database, ImageList
from caffejacinto_py.errors import CaffeError, DataError, LayerError
from caffejacinto_py.schema.datum import make_datum

from .helpers import data_layer, encoded_lmdb, images, picture, raw_lmdb, source_layer


def test_database_in_key_order(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 20) as env:
        with env.begin(write=True) as txn:
            for key in (b"b", b"a10", b"a2"):
                txn.put(key, b"value " + key)
    database = Database(str(tmp_path / "db"))
    assert [database.key(i) for i in range(len(database))] == ["a10", "a2", "b"]
    with database.read([2, 0, 2]) as values:
        assert [bytes(v) for v in values] == [b"value b", b"value a10", b"value b"]


def test_database_is_readable_while_another_program_writes_to_it(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 3)
    code = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1]).begin(write=True) as txn:\n"
        "    txn.put(b'z', b'new'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        assert len(Database(str(tmp_path / "db"))) == 3
        writer.communicate()
    assert len(Database(str(tmp_path / "db"))) == 4


def test_database_is_readable_without_a_lock_file(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 3)
    (tmp_path / "db" / "lock.mdb").unlink()
    os.chmod(tmp_path / "db", 0o500)
    try:
        assert len(Database(str(tmp_path / "db"))) == 3
        assert os.listdir(tmp_path / "db") == ["data.mdb"]
    finally:
        os.chmod(tmp_path / "db", 0o700)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_database_opens_again_after_a_fork(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 3)
    database = Database(str(tmp_path / "db"))
    assert database.key(0) == "00000000"
    child = os.fork()
    if not child:
        with database.read([1]) as values:
            os._exit(7 if len(values) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def make_bad(path: Path, kind: str) -> None:
    if kind == "empty directory":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind == "leveldb":
        path.mkdir()
        for name in ("CURRENT", "MANIFEST-000002", "000005.ldb"):
            (path / name).write_bytes(b"x")
    elif kind == "garbage":
        path.mkdir()
        (path / "data.mdb").write_bytes(os.urandom(20000))
    elif kind == "zero bytes":
        path.mkdir()
        (path / "data.mdb").write_bytes(b"")
    elif kind == "no records":
        lmdb.open(str(path)).close()
    elif kind == "truncated":
        raw_lmdb(path, 200)
        os.truncate(path / "data.mdb", 20480)
    elif kind == "header only":
        raw_lmdb(path, 200)
        os.truncate(path / "data.mdb", 100)


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("missing", "no such database", "working directory"),
        ("empty directory", "no data.mdb inside", "interrupted"),
        ("file", "a database is a directory", None),
        ("leveldb", "this is a LevelDB", "--backend=lmdb"),
        ("garbage", "not a readable LMDB", "LMDB"),
        ("zero bytes", "data.mdb is empty", "interrupted"),
        ("no records", "is empty", None),
        ("truncated", "data.mdb is truncated: 20480 bytes, its header says", "again"),
        ("header only", "not a readable LMDB|truncated", None),
    ],
)
def test_bad_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str, hint: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    make_bad(tmp_path / "some_db", kind)
    layer = data_layer("some_db")
    for attempt in (lambda: probe(layer), lambda: make_feeder(layer, shapes=[(4, 3, 8, 9), (4,)], seed=0)):
        with pytest.raises(DataError, match=message) as info:
            attempt()
        assert "some_db" in str(info.value)
        assert hint is None or hint in (info.value.hint or "")
        assert info.value.exit_code == 3


def test_the_message_of_a_damaged_record_names_its_key(tmp_path: Path) -> None:
    good = make_datum(images(1)[0])
    for kind, bad in {"cut": good[:100], "bits": b"\xff" * 50, "short": make_datum(images(1)[0][:, :4])[:20]}.items():
        path = tmp_path / kind
        with lmdb.open(str(path), map_size=1 << 20) as env:
            with env.begin(write=True) as txn:
                txn.put(b"a", good)
                txn.put(b"key_b", bad)
        feeder = make_feeder(data_layer(path, 2), shapes=[(2, 3, 8, 9), (2,)], seed=0)
        with pytest.raises(DataError, match=r"record 'key_b': "):
            feeder.next()
        feeder.close()


_SEEDS = (make_datum(images(1)[0], label=3), make_datum(cv2.imencode(".jpg", picture())[1].tobytes()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_record_gives_a_batch_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    """Mutated records: bytes changed, inserted, cut. Never a crash, never another kind of exception."""
    record = bytearray(data.draw(st.sampled_from(_SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(record) - 1, 0)))
        action = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if action == "flip" and record:
            record[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del record[at:]
        else:
            record[at:at] = data.draw(st.binary(max_size=9))
    path = tmp_path / f"db{len(list(tmp_path.iterdir()))}"
    with lmdb.open(str(path), map_size=1 << 20, sync=False) as env:
        with env.begin(write=True) as txn:
            txn.put(b"k", bytes(record))
    layer = data_layer(path, 1)
    try:
        shapes = probe(layer)
        batch = make_feeder(layer, shapes=shapes, seed=0, workers=0).next()
        assert [b.shape for b in batch] == shapes
    except (DataError, LayerError) as error:
        assert "record 'k'" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a.png 1\nb.png\n", "expected 'path label'", 2),
        ("a.png 1\n\nb.png x\n", "expected 'path label'", 3),
        ("a.png 1.5\n", "expected 'path label'", 1),
        ("\n \n", "is empty", 0),
    ],
)
def test_bad_image_lists(tmp_path: Path, text: str, message: str, line: int) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as info:
        ImageList(str(path))
    if line:
        assert info.value.loc is not None
        assert info.value.loc.line == line


def image_layer(folder: Path, **more: str):  # type: ignore[no-untyped-def]
    fields = " ".join(f"{k}: {v}" for k, v in more.items())
    return source_layer(
        f'name: "d" type: "ImageData" top: "data" top: "label" '
        f'image_data_param {{ source: "{folder}/list.txt" root_folder: "{folder}/" batch_size: 2 {fields} }}'
    )


def test_bad_images_name_their_line(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "good.png"), picture())
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    jpeg = cv2.imencode(".jpg", picture())[1].tobytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "deep.png").write_bytes(cv2.imencode(".png", picture().astype(np.uint16) * 200)[1].tobytes())
    cv2.imwrite(str(tmp_path / "small.png"), picture(height=5))
    for name, message in {
        "gone.png": "No such file",
        "text.jpg": "not an image",
        "empty.jpg": "0 bytes",
        "cut.jpg": "JPEG is truncated",
        "small.png": "is 3x5x24, but .*good.png",
    }.items():
        (tmp_path / "list.txt").write_text(f"good.png 0\n\n{name} 1\n")
        layer = image_layer(tmp_path)
        feeder = make_feeder(layer, shapes=probe(layer), seed=0)
        with pytest.raises(DataError, match=message) as info:
            feeder.next()
        assert f"list.txt:3: image '{tmp_path}/{name}'" in str(info.value)
        feeder.close()
    with pytest.raises(DataError, match="uint16"):
        decode((tmp_path / "deep.png").read_bytes(), color=None, where=lambda: "deep.png")
    (tmp_path / "list.txt").write_text("good.png 0\n")
    with pytest.raises(DataError, match=r"No such file") as info:
        probe(
            source_layer(
                'name: "d" type: "ImageData" top: "a" top: "b" '
                f'image_data_param {{ source: "{tmp_path}/list.txt" root_folder: "{tmp_path}" batch_size: 1 }}'
            )
        )
    assert "does not end in '/'" in str(info.value.hint)
    with pytest.raises(CaffeError, match="new_width"):
        probe(image_layer(tmp_path, new_height="5"))


def test_trailing_bytes_after_a_jpeg_are_harmless() -> None:
    jpeg = cv2.imencode(".jpg", picture())[1].tobytes()
    plain = decode(jpeg, color=True, where=str)
    np.testing.assert_array_equal(decode(jpeg + b"\0" * 7, color=True, where=str), plain)


def test_bad_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")

    def check(message: str, **datasets: object) -> DataError:
        with h5py.File(tmp_path / "a.h5", "w") as f:
            for name, value in datasets.items():
                f[name] = value
        layer = source_layer(
            'name: "d" type: "HDF5Data" top: "data" top: "label" '
            f'hdf5_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 }}'
        )
        with pytest.raises(DataError, match=message) as info:
            probe(layer)
        return info.value

    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.h5\n")
    rows = np.zeros((4, 2), np.float32)
    assert "label" in str(check("no dataset 'data'", label=rows).hint)
    check("one common row count", data=rows, label=rows[:3])
    check("numbers in rows", data=rows, label=[b"x"] * 4)
    check("numbers in rows", data=rows, label=1.0)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.h5 {tmp_path}/b.h5\n")
    check("no such HDF5 file", data=rows, label=rows)
    with h5py.File(tmp_path / "b.h5", "w") as f:
        f["data"], f["label"] = rows[:, :1], rows
    check("rows have shapes", data=rows, label=rows)
    (tmp_path / "b.h5").write_bytes(b"nothing")
    check("not a readable HDF5 file", data=rows, label=rows)
    (tmp_path / "list.txt").write_text("")
    check("is empty", data=rows, label=rows)
    (tmp_path / "list.txt").unlink()
    check("cannot read the list", data=rows, label=rows)
    (tmp_path / "a.h5").rename(tmp_path / "list.txt")
    check("lists HDF5 files", data=rows, label=rows)


def test_the_data_room_does_not_load_torch(tmp_path: Path) -> None:
    encoded_lmdb(tmp_path / "db", 2)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.data.helpers import data_layer\n"
        "from caffejacinto_py.data import make_feeder, probe\n"
        "layer = data_layer(sys.argv[2], 2); make_feeder(layer, shapes=probe(layer), seed=0).next()\n"
        "assert 'torch' not in sys.modules"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, root, str(tmp_path / "db")], check=True, timeout=60)
