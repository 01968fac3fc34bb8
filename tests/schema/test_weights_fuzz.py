"""Damaged files: a clear error or a result, never a crash, never more memory or time than the file is worth."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.errors import CaffeError, DataError, WeightsError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.blobs import read_blob
from caffejacinto_py.schema.datum import make_datum, parse_datum
from caffejacinto_py.schema.state import read_state
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model
from tests.conftest import SHARED
from tests.schema.weights_helpers import net_of

QUICK = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
REAL = [
    SHARED / "golden" / name
    for name in (
        "jacinto/optimize/conv_bn_scale.after.caffemodel",
        "jacinto/quantization/plain_w8a8_wnooffset.final.caffemodel",
        "bvlc_solvers/adadelta/snap_iter_10.solverstate",
        "ssd/head/head.caffemodel",
    )
]


def survives(path: Path, data: bytes) -> None:
    """Every reader on these bytes: a result or the right error, in bounded memory; results can be used and written."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        for read in (read_state, read_blob, read_model):
            try:
                found = read(path)
            except WeightsError as e:
                if e.loc is None:
                    raise
                continue
            if isinstance(found, ModelFile):
                _use(found, path)
        try:
            parse_datum(data)
        except DataError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 60 * len(data) + (8 << 20)
    finally:
        tracemalloc.stop()


def _use(model: ModelFile, path: Path) -> None:
    for layer in model.layers:
        for blob in layer.blobs:
            if blob is not None:
                np.array(blob)
        try:
            _ = layer.proto
        except WeightsError:
            return
    try:
        write_model(path.with_suffix(".again"), model)
    except CaffeError:
        return
    again = read_model(path.with_suffix(".again"))
    assert len(again.layers) == len(model.current_layers())


@QUICK
@given(data=st.binary(max_size=300))
def test_random_bytes(data: bytes, tmp_path: Path) -> None:
    survives(tmp_path / "a", data)


@QUICK
@given(data=st.binary(max_size=120))
def test_random_blob(data: bytes, tmp_path: Path) -> None:
    survives(tmp_path / "a", net_of(data))


@QUICK
@given(
    data=st.binary(max_size=120), number=st.sampled_from([2, 100]), kind=st.sampled_from(["LPx", "FcRistretto", "L"])
)
def test_random_layer(data: bytes, number: int, kind: str, tmp_path: Path) -> None:
    survives(tmp_path / "a", wire.block(number, wire.string(2 if number == 100 else 4, kind) + data))


@QUICK
@given(which=st.sampled_from(REAL), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
       cut=st.floats(0.01, 1))  # fmt: skip
def test_damaged_real_files(which: Path, flips: list[tuple[float, int]], cut: float, tmp_path: Path) -> None:
    if not which.exists():
        pytest.skip("no reference data (set CAFFEJACINTO_SHARED)")
    data = bytearray(which.read_bytes())
    for at, value in flips:
        data[min(int(at * len(data)), len(data) - 1)] = value
    survives(tmp_path / "a", bytes(data[: int(cut * len(data))] if cut < 0.9 else data))


@QUICK
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_hdf5(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    whole = tmp_path / "whole.h5"
    if not whole.exists():
        layers = [LayerBlobs("a", blobs=[np.ones((3, 4), np.float32), np.ones(4)]), LayerBlobs("b")]
        write_model(whole, ModelFile("n", layers), format="hdf5")
    data = bytearray(whole.read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    survives(tmp_path / "a", bytes(data))


@given(data=st.binary(max_size=60), at=st.integers(0, 30))
def test_damaged_datum(data: bytes, at: int) -> None:
    record = make_datum(np.zeros((1, 4, 4), np.uint8), label=-3)
    with contextlib.suppress(DataError):
        parse_datum(record[:at] + data + record[at:])


@pytest.mark.parametrize(
    "piece",
    [
        wire.tag(5, wire.I32) + bytes(4) + wire.tag(6, wire.I32) + bytes(4),  # a new run at every value
        wire.block(5, b""),
        wire.block(7, b""),
        wire.uint(1, 1),
        b"\xad\x00" + bytes(4),
    ],
)
def test_hostile_repetition_takes_linear_time(piece: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(net_of(piece * (200_000 // len(piece))))
    start = time.process_time()
    with contextlib.suppress(WeightsError):
        read_model(tmp_path / "a")
    assert time.process_time() - start < 20
