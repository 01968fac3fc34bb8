"""BlobProto <-> numpy and mean files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.errors import WeightsError
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.blobs import array_to_blob, blob_to_array, read_blob, write_blob
from tests.conftest import shared
from tests.schema.weights_helpers import saved


def test_the_real_mean_file_reads_and_rewrites_byte_for_byte(tmp_path: Path) -> None:
    path = shared("golden/e2e/cifar10_quick/mean.binaryproto")
    mean = read_blob(path)
    assert mean.shape == (1, 3, 32, 32)
    assert 100 < mean.mean() < 140
    write_blob(tmp_path / "a", mean)
    assert (tmp_path / "a").read_bytes() == path.read_bytes()
    write_blob(tmp_path / "a", mean[0])
    assert (tmp_path / "a").read_bytes() == path.read_bytes()


def test_messages() -> None:
    arrays: list[np.ndarray] = [np.ones((2, 3), np.float32), np.array(3, np.float32), np.arange(4.0)]
    for array in (*arrays, np.empty((0, 2), np.float32)):
        blob = array_to_blob(array)
        assert isinstance(blob, pb.BlobProto)
        back = blob_to_array(blob)
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert np.array_equal(back, array)
        assert back.flags.writeable
    assert array_to_blob(np.ones((3, 2, 2)), legacy=True).channels == 3
    with pytest.raises(WeightsError, match="needs 2 values"):
        blob_to_array(pb.BlobProto(shape=pb.BlobShape(dim=[2]), data=[1]))


def test_new_shape_on_request(tmp_path: Path) -> None:
    write_blob(tmp_path / "a", np.ones((3, 2), np.float32), legacy=False)
    assert read_blob(tmp_path / "a").shape == (3, 2)
    with pytest.raises(WeightsError, match="4 axes"):
        write_blob(tmp_path / "b", np.ones((1,) * 5))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (wire.string(1, "n") + wire.block(100, wire.string(1, "l")), "a net"),
        (b"layer {\n name: 'a'\n}\n", "net prototxt"),
        (wire.uint(1, 1) + wire.block(5, bytes(8)), "not a whole binaryproto file"),
        (b"\xff" * 20, "not a whole binaryproto file"),
        (b"\xff\xd8\xff\xe0aaa", "JPEG"),
    ],
)
def test_what_is_not_a_mean_file(data: bytes, text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=text):
        read_blob(saved(tmp_path / "mean.binaryproto", data))
