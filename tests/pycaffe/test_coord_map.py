"""Coordinate maps through layers, and the crops made of them; numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import UsageError
from caffejacinto_py.pycaffe.coord_map import (
    AxisMismatchException,
    UndefinedMapException,
    compose,
    coord_map_from_to,
    crop,
    inverse,
)

L, P = caffe.layers, caffe.params


def spec(ks: Any = 3, stride: Any = 1, pad: Any = 0, pool: int = 2, dstride: int = 2, dpad: int = 0) -> caffe.NetSpec:
    """data -> conv -> relu -> pool -> deconv, which undoes the pooling."""
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[2, 1, 100, 100]))
    n.aux = L.Input(shape=dict(dim=[2, 1, 20, 20]))
    n.conv = L.Convolution(n.data, num_output=10, kernel_size=ks, stride=stride, pad=pad)
    n.relu = L.ReLU(n.conv, in_place=True)
    n.pool = L.Pooling(n.relu, pool=P.Pooling.MAX, kernel_size=pool, stride=pool, pad=0)
    n.deconv = L.Deconvolution(
        n.pool, convolution_param=dict(num_output=10, kernel_size=dstride, stride=dstride, pad=dpad)
    )
    return n


def test_there_and_back_is_nothing() -> None:
    n = spec(pad=1)
    axis, a, b = coord_map_from_to(n.deconv, n.data)
    assert (axis, a, b) == (1, 1, 0)
    axis, a, b = coord_map_from_to(n.pool, n.conv)
    assert (axis, a, b) == (1, 2, 0.5)
    axis, a, b = coord_map_from_to(n.conv, n.pool)
    assert (axis, a, b) == (1, 0.5, -0.25)


def test_padding_shifts() -> None:
    for pad in range(4):
        n = spec(pad=pad)
        assert coord_map_from_to(n.conv, n.data) == (1, 1, 1 - pad)


def test_dilation_and_lists() -> None:
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1, 1, 9, 9, 9]))
    n.a = L.Convolution(n.data, num_output=1, kernel_size=[3, 5, 1], stride=[1, 2, 1], dilation=2)
    axis, a, b = coord_map_from_to(n.a, n.data)
    assert axis == 1
    np.testing.assert_array_equal(a, [1, 2, 1])
    np.testing.assert_array_equal(b, [2, 4, 0])


def test_an_axis_of_its_own() -> None:
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1, 1, 9, 9]))
    n.a = L.Convolution(n.data, num_output=1, kernel_size=3, axis=0)
    n.b = L.Convolution(n.a, num_output=1, kernel_size=3)
    assert coord_map_from_to(n.a, n.data)[0] == 0
    with pytest.raises(AxisMismatchException):
        coord_map_from_to(n.b, n.data)


def test_crop() -> None:
    n = spec(pad=0)
    n.crop = crop(n.data, n.conv)
    made = n.to_proto().layer[-1]
    assert (made.type, list(made.bottom)) == ("Crop", ["data", "conv"])
    assert made.crop_param.axis == 2
    assert list(made.crop_param.offset) == [1]
    n.again = L.Crop(n.crop, n.conv, crop_param=dict(axis=2, offset=3))
    assert coord_map_from_to(n.again, n.crop) == (1, 1, 3)
    assert coord_map_from_to(n.again, n.data) == (1, 1, 4)


def test_the_crop_fits(tmp_path: Any) -> None:
    """A skip connection as in FCN: what crop says is what the layers need."""
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1, 1, 20, 20]))
    n.conv = L.Convolution(n.data, num_output=1, kernel_size=3, pad=10)
    n.pool = L.Pooling(n.conv, kernel_size=2, stride=2)
    n.up = L.Deconvolution(n.pool, convolution_param=dict(num_output=1, kernel_size=4, stride=2))
    n.out = crop(n.up, n.data)
    (tmp_path / "n.prototxt").write_text(str(n.to_proto()))
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    assert net.blobs["out"].shape == (1, 1, 20, 20)
    assert list(n.to_proto().layer[-1].crop_param.offset) == [10]


@pytest.mark.parametrize(
    ("change", "tops", "words"),
    [
        ({}, ("pool", "conv"), "differ in scale"),
        ({"ks": 4}, ("data", "conv"), "not a whole number"),
        ({"pad": 3}, ("data", "conv"), "negative"),
    ],
)
def test_crops_that_cannot_be(change: dict[str, int], tops: tuple[str, str], words: str) -> None:
    n = spec(**change)
    with pytest.raises(AssertionError, match=words):
        crop(n[tops[0]], n[tops[1]])


def test_no_connection() -> None:
    n = spec()
    n.ip = L.InnerProduct(n.data, num_output=1)
    for pair in ((n.data, n.aux), (n.ip, n.data)):
        with pytest.raises(RuntimeError, match="no chain"):
            coord_map_from_to(*pair)
    n.rect = L.Pooling(n.data, kernel_h=2, kernel_w=3)
    with pytest.raises(UndefinedMapException, match="kernel_h, kernel_w"):
        caffe.coord_map.coord_map(n.rect.fn)
    assert issubclass(UndefinedMapException, UsageError)


def test_algebra() -> None:
    f = (1, 2.0, 3.0)
    axis, a, b = compose(f, inverse(f))
    assert (axis, a, b) == (1, 1, 0)
    assert compose((None, 1, 0), f) == f
