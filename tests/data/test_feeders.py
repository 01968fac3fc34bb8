"""Feeders: the same batches for every number and kind of workers, exact positions, errors, nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from caffejacinto_py.data import make_feeder, probe
from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.order import Share
from caffejacinto_py.errors import CaffeError, DataError, LayerError, UsageError
from caffejacinto_py.layers.fillers import fill
from caffejacinto_py.schema.datum import make_datum

from .helpers import data_layer, encoded_lmdb, images, picture, raw_lmdb, source_layer, write_mean

TRANSFORM = "crop_size: 5 mirror: true mean_value: 100 scale: 0.5"


def feed(layer, n: int, **options):  # type: ignore[no-untyped-def]
    """n batches of a source layer."""
    feeder = make_feeder(layer, shapes=probe(layer), **{"seed": 7, **options})
    try:
        return [feeder.next() for _ in range(n)]
    finally:
        feeder.close()


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return all(np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.fixture
def helpers_running() -> set[int]:
    return {t.ident for t in threading.enumerate() if t.ident}


def test_plain_batches_are_the_records_in_order(tmp_path: Path) -> None:
    stored = raw_lmdb(tmp_path / "db", 10)
    layer = data_layer(tmp_path / "db", 4)
    assert probe(layer) == [(4, 3, 8, 9), (4,)]
    batches = feed(layer, 4)
    for data, label in batches:
        assert data.dtype == label.dtype == np.float32
        assert data.flags.c_contiguous
        assert data.flags.owndata
    labels = np.concatenate([b[1] for b in batches])
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]  # wraps inside batch 2
    np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), stored[labels.astype(int)])


def test_one_top_has_no_labels(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 3)
    layer = source_layer(f'name: "d" type: "Data" top: "data" data_param {{ source: "{tmp_path}/db" batch_size: 2 }}')
    assert probe(layer) == [(2, 3, 8, 9)]
    assert len(feed(layer, 1)[0]) == 1


@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_batches_do_not_depend_on_the_workers(tmp_path: Path, kind: str) -> None:
    if kind == "raw":
        raw_lmdb(tmp_path / "db", 11)
    else:
        encoded_lmdb(tmp_path / "db", 11)
    layer = data_layer(tmp_path / "db", 4, TRANSFORM, "shuffle: true")
    want = feed(layer, 9, workers=0)
    assert same(want, feed(layer, 9, workers=1))
    assert same(want, feed(layer, 9, workers=2))
    assert same(want, feed(layer, 9, workers=4))
    assert same(want, feed(layer, 9, workers=2, workers_kind="process"))
    assert not same(want, feed(layer, 9, seed=8))
    assert not same(want, feed(source_layer_named(layer, "other"), 9))


def source_layer_named(layer, name: str):  # type: ignore[no-untyped-def]
    proto = type(layer.proto).FromString(layer.proto.SerializeToString())
    proto.name = name
    return type(layer)(proto, layer.context, layer.ntop)


@pytest.mark.parametrize("workers", [0, 3])
def test_start_resumes_exactly(tmp_path: Path, workers: int) -> None:
    raw_lmdb(tmp_path / "db", 10)
    layer = data_layer(tmp_path / "db", 4, TRANSFORM, "shuffle: true")
    whole = feed(layer, 12, workers=workers)
    for k in (1, 5, 11):
        feeder = make_feeder(layer, shapes=probe(layer), seed=7, workers=workers, start=k)
        assert feeder.position == k
        assert same([feeder.next() for _ in range(12 - k)], whole[k:])
        assert feeder.position == 12
        feeder.close()


def test_train_and_test_nets_share_one_database(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 8)
    train = data_layer(tmp_path / "db", 4, TRANSFORM)
    test = data_layer(tmp_path / "db", 2, TRANSFORM.replace("mirror: true", ""), phase="TEST")
    feeders = [make_feeder(x, shapes=probe(x), seed=1, workers=2) for x in (train, test, train)]
    batches = [[f.next() for _ in range(5)] for f in feeders]
    for f in feeders:
        f.close()
    assert same(batches[0], batches[2])
    assert same(batches[1], feed(test, 5, seed=99))  # nothing random in TEST without mirror


def test_ranks_get_disjoint_batches(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 12)
    layer = data_layer(tmp_path / "db", 2)
    parts = [feed(layer, 3, share=Share(r, 2)) for r in range(2)]
    assert [[b[1].tolist() for b in p] for p in parts] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


def test_encoded_records_in_color_gray_and_as_stored(tmp_path: Path) -> None:
    stored = encoded_lmdb(tmp_path / "db", 4)
    data = feed(data_layer(tmp_path / "db", 4), 1)[0][0]
    np.testing.assert_array_equal(data, np.stack(stored).transpose(0, 3, 1, 2))
    gray = feed(data_layer(tmp_path / "db", 4, "force_gray: true"), 1)[0][0]
    want = np.stack([cv2.imdecode(cv2.imencode(".png", x)[1], cv2.IMREAD_GRAYSCALE) for x in stored])
    np.testing.assert_array_equal(gray[:, 0], want)
    with LmdbWriter(str(tmp_path / "gray")) as db:
        db.put(b"0", make_datum(cv2.imencode(".png", want[0])[1].tobytes()))
    as_stored, as_color = (feed(data_layer(tmp_path / "gray", 1, t), 1)[0][0] for t in ("", "force_color: true"))
    np.testing.assert_array_equal(as_stored[0, 0], want[0])
    np.testing.assert_array_equal(as_color[0], np.broadcast_to(want[0], (3, *want[0].shape)))


def test_float_records_and_odd_layouts(tmp_path: Path) -> None:
    """float_data, negative labels, and records whose fields stand in another order take the general way."""
    from caffejacinto_py.schema import pb

    values = images(3).astype(np.float32) / 7
    with LmdbWriter(str(tmp_path / "floats")) as db:
        for i, v in enumerate(values):
            db.put(b"%d" % i, make_datum(v, label=-i))
    data, label = feed(data_layer(tmp_path / "floats", 3), 1)[0]
    np.testing.assert_array_equal(data, values)
    assert label.tolist() == [0, -1, -2]
    stored = images(3)
    with LmdbWriter(str(tmp_path / "odd")) as db:
        db.put(b"0", make_datum(stored[0], label=300))
        odd = pb.Datum(channels=3, height=8, width=9, data=stored[1].tobytes())  # no label at all
        db.put(b"1", odd.SerializeToString())
        swapped = pb.Datum(label=5).SerializeToString() + make_datum(stored[2])[:-2]
        db.put(b"2", swapped)
    for batch in (1, 3):
        got = feed(data_layer(tmp_path / "odd", batch), 3)
        assert np.concatenate([b[1] for b in got])[:3].tolist() == [300, 0, 5]
        np.testing.assert_array_equal(np.concatenate([b[0] for b in got])[:3], stored)


def test_mixed_sizes_need_a_crop(tmp_path: Path) -> None:
    with LmdbWriter(str(tmp_path / "db")) as db:
        for i, size in enumerate([8, 8, 10, 12]):
            db.put(b"key%d" % i, make_datum(images(1, height=size, width=size)[0]))
    with pytest.raises(DataError, match=r"record 'key2' is 3x10x10, but .*record 'key0' gave the net 3x8x8") as info:
        feed(data_layer(tmp_path / "db", 2), 2)
    assert "crop_size" in str(info.value.hint)
    assert feed(data_layer(tmp_path / "db", 4, "crop_size: 6"), 1)[0][0].shape == (4, 3, 6, 6)


def test_image_list(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / "with blank").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"with blank/{i}.png"), picture(i))
    (tmp_path / "list.txt").write_text("".join(f"with blank/{i}.png {i}\n" for i in range(5)) + "\n")
    base = f'name: "d" type: "ImageData" top: "data" top: "label" image_data_param {{ source: "{tmp_path}/list.txt"'
    base += f' root_folder: "{tmp_path}/" batch_size: 2'
    layer = source_layer(base + " }")
    assert probe(layer) == [(2, 3, 20, 24), (2,)]
    got = feed(layer, 3)
    assert np.concatenate([b[1] for b in got]).tolist() == [0, 1, 2, 3, 4, 0]
    np.testing.assert_array_equal(got[0][0][1], picture(1).transpose(2, 0, 1))
    small = feed(source_layer(base + " new_height: 10 new_width: 6 is_color: false }"), 1)[0][0]
    gray = cv2.imread(str(tmp_path / "with blank/0.png"), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(small[0, 0], cv2.resize(gray, (6, 10)))
    short = feed(source_layer(base + " short_side: 10 }", dialect="nvcaffe"), 1)[0][0]
    assert short.shape == (2, 3, 10, 12)
    shuffled = source_layer(base + " shuffle: true }")
    want = feed(shuffled, 10, workers=0)
    assert sorted(np.concatenate([b[1] for b in want]).tolist()) == sorted([*range(5)] * 4)
    assert same(want, feed(shuffled, 10, workers=3))
    assert same(want, feed(shuffled, 10, workers=1, workers_kind="process"))


def hdf5(path: Path, start: int, rows: int) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as f:
        f["data"] = np.arange(start, start + rows, dtype=np.float64)[:, None] * np.ones((1, 2))
        f["label"] = np.arange(start, start + rows, dtype=np.int32)


@pytest.mark.parametrize("workers", [0, 2])
def test_hdf5_rows_run_across_files(tmp_path: Path, workers: int) -> None:
    hdf5(tmp_path / "a.h5", 0, 3)
    hdf5(tmp_path / "b.h5", 3, 4)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.h5\n{tmp_path}/b.h5\n")
    text = f'name: "d" type: "HDF5Data" top: "data" top: "label" hdf5_data_param {{ source: "{tmp_path}/list.txt"'
    layer = source_layer(text + " batch_size: 5 }")
    assert probe(layer) == [(5, 2), (5,)]
    got = feed(layer, 3, workers=workers)
    assert np.concatenate([b[1] for b in got]).tolist() == [*range(7), *range(7), 0]
    np.testing.assert_array_equal(got[0][0], np.arange(5)[:, None] * np.ones((1, 2)))
    shuffled = feed(source_layer(text + " batch_size: 7 shuffle: true }"), 4, workers=workers)
    for data, label in shuffled:
        assert sorted(label) == list(range(7))
        assert len({x < 3 for x in label[:3]}) == 1 or len({x < 3 for x in label[:4]}) == 1  # a file in one piece
        np.testing.assert_array_equal(data[:, 0], label)
    assert same(feed(source_layer(text + " batch_size: 7 shuffle: true }"), 4, workers=1), shuffled)


def test_dummy_data(tmp_path: Path) -> None:
    text = 'name: "d" type: "DummyData" top: "a" top: "b" dummy_data_param { shape { dim: 2 dim: 3 }'
    layer = source_layer(text + ' data_filler { value: 3 } data_filler { type: "gaussian" std: 2 } }')
    feeder = make_feeder(layer, shapes=[(2, 3), (2, 3)], seed=1)
    (a0, b0), (a1, b1) = feeder.next(), feeder.next()
    assert (a0 == 3).all()
    assert (a1 == 3).all()
    assert not np.array_equal(b0, b1)
    again = make_feeder(layer, shapes=[(2, 3), (2, 3)], seed=1, start=1)
    np.testing.assert_array_equal(again.next()[1], b1)
    xavier = source_layer(text + ' data_filler { type: "xavier" } }')
    made = make_feeder(xavier, shapes=[(2, 3), (2, 3)], seed=1, fill=fill).next()
    assert np.abs(made[0]).max() <= 1
    with pytest.raises(LayerError, match="needs make_feeder"):
        make_feeder(xavier, shapes=[(2, 3), (2, 3)], seed=1).next()
    assert (make_feeder(source_layer(text + " }"), shapes=[(2, 3)], seed=1).next()[0] == 0).all()


def test_memory_data_steps_and_wraps() -> None:
    layer = source_layer(
        'name: "m" type: "MemoryData" top: "d" top: "l" '
        "memory_data_param { batch_size: 2 channels: 1 height: 2 width: 2 }"
    )
    feeder = make_feeder(layer, shapes=[(2, 1, 2, 2), (2,)], seed=0)
    with pytest.raises(UsageError, match="no data yet"):
        feeder.next()
    data = np.arange(16).reshape(4, 1, 2, 2)
    feeder.reset(data, np.arange(4).reshape(4, 1, 1, 1))
    assert [feeder.next()[1].tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
    for bad in [(data[:3], np.arange(3)), (data, np.arange(2)), (data,), (data[:, :, :1], np.arange(4))]:
        with pytest.raises(UsageError):
            feeder.reset(*bad)
    assert feeder.position == 3


def test_input_repeats_what_was_given() -> None:
    layer = source_layer('name: "i" type: "Input" top: "x" input_param { shape { dim: 2 } }')
    feeder = make_feeder(layer, shapes=[(2,)], seed=0)
    assert feeder.next()[0].tolist() == [0, 0]
    feeder.reset([1, 2])
    assert [feeder.next()[0].tolist() for _ in range(2)] == [[1, 2], [1, 2]]
    with pytest.raises(UsageError, match=r"array 0 is \(3,\)"):
        feeder.reset([1, 2, 3])


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"workers": 1, "workers_kind": "process"}])
def test_errors_of_workers_arrive_at_their_batch(tmp_path: Path, options: dict) -> None:  # type: ignore[type-arg]
    with LmdbWriter(str(tmp_path / "db")) as db:
        for i in range(6):
            good = cv2.imencode(".jpg", picture(i))[1].tobytes()
            db.put(b"key%d" % i, make_datum(good[: len(good) // 2] if i == 3 else good))
    layer = data_layer(tmp_path / "db", 2)
    feeder = make_feeder(layer, shapes=probe(layer), seed=1, **options)
    feeder.next()
    for _ in range(2):  # and again, not a hang or the batch after it
        with pytest.raises(DataError, match=r"record 'key3': the JPEG is truncated") as info:
            feeder.next()
        assert info.value.hint
        assert feeder.position == 1
    feeder.close()


def test_closing_leaves_no_thread_and_no_process(tmp_path: Path, helpers_running: set[int]) -> None:
    raw_lmdb(tmp_path / "db", 10)
    layer = data_layer(tmp_path / "db", 4)
    feeder = make_feeder(layer, shapes=probe(layer), seed=1, workers=2, workers_kind="process")
    feeder.next()
    children = [r._child for r in feeder._finish.peek()[2][2]]
    feeder.close()
    feeder.close()
    assert all(c.poll() == 0 for c in children)
    with pytest.raises(UsageError, match="closed"):
        feeder.next()
    forgotten = make_feeder(layer, shapes=probe(layer), seed=1, workers=3)
    forgotten.next()
    del forgotten
    gc.collect()
    assert {t.ident for t in threading.enumerate()} <= helpers_running


def test_a_killed_worker_process_is_reported(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 10)
    layer = data_layer(tmp_path / "db", 4)
    feeder = make_feeder(layer, shapes=probe(layer), seed=1, workers=1, workers_kind="process")
    feeder.next()
    feeder._finish.peek()[2][2][0]._child.kill()
    with pytest.raises(DataError, match="killed by signal 9"):
        [feeder.next() for _ in range(20)]
    feeder.close()


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize("ending", ["end", "error", "interrupt"])
def test_a_script_that_forgets_to_close_ends(tmp_path: Path, kind: str, ending: str) -> None:
    raw_lmdb(tmp_path / "db", 10)
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.data.helpers import data_layer
        from caffejacinto_py.data import make_feeder, probe
        layer = data_layer({str(tmp_path / "db")!r}, 4)
        feeder = make_feeder(layer, shapes=probe(layer), seed=1, workers=2, workers_kind={kind!r})
        feeder.next()
        print(*[r._child.pid for r in feeder._finish.peek()[2][2]], flush=True)
        if {ending!r} == "error":
            raise SystemExit(5)
        if {ending!r} == "interrupt":
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            signal.signal(signal.SIGALRM, lambda *a: os.kill(os.getpid(), signal.SIGINT))
            feeder._line.taken = 10 ** 9  # a batch that never comes
            feeder.next()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    codes = {"end": (0,), "error": (5,), "interrupt": (-2, 130)}  # Python ends by the signal itself
    assert done.returncode in codes[ending], done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (ending == "interrupt"), done.stderr
    time.sleep(0.1)
    for pid in map(int, done.stdout.split()):
        assert not os.path.exists(f"/proc/{pid}")


def test_workers_do_not_run_far_ahead(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 10)
    layer = data_layer(tmp_path / "db", 2, data="prefetch: 2")
    feeder = make_feeder(layer, shapes=probe(layer), seed=1, workers=2)
    feeder.next()
    time.sleep(0.2)
    assert feeder._line.claimed <= 1 + 2
    feeder.close()


def test_mean_file_through_the_layer(tmp_path: Path) -> None:
    stored = raw_lmdb(tmp_path / "db", 4)
    mean = stored.mean(0).astype(np.float32)
    path = write_mean(tmp_path / "mean.binaryproto", mean)
    got = feed(data_layer(tmp_path / "db", 4, f'mean_file: "{path}"'), 1)[0][0]
    np.testing.assert_allclose(got, stored - mean, atol=1e-4)
    wrong = write_mean(tmp_path / "wrong.binaryproto", mean[:, :4])
    with pytest.raises(CaffeError, match="mean file is 3x4x9, the images are 3x8x9"):
        feed(data_layer(tmp_path / "db", 4, f'mean_file: "{wrong}"'), 1)
