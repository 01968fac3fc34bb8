"""BatchNorm blobs of other forks' files, brought into the net's layout."""

from __future__ import annotations

import numpy as np
import pytest

from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.base import Context
from caffejacinto_py.layers.registry import make
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import DIALECTS

MEAN, VAR, SCALE, SHIFT = (np.array(v, np.float32) for v in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [-1, -2, -3]))
ONE = np.ones(1, np.float32)
THREE, FIVE = [(3,), (3,), (1,)], [(3,), (3,), (1,), (3,), (3,)]


def batch_norm(dialect: str, scale_bias: bool = False):
    proto = pb.LayerParameter(name="bn", type="BatchNorm")
    if scale_bias:
        proto.batch_norm_param.scale_bias = True
    return make(proto, Context(dialect=DIALECTS[dialect]), 1)


def test_bvlc_sums_are_divided_in_an_nv_net():
    layer = batch_norm("nvcaffe")
    mean, var, factor = layer.adapt([MEAN * 4, VAR * 4, ONE * 4], THREE)
    assert np.array_equal(mean, MEAN)
    assert np.array_equal(var, VAR)
    assert factor == 1


def test_bvlc_nets_keep_the_factor():
    blobs = batch_norm("bvlc").adapt([MEAN * 4, VAR * 4, ONE * 4], THREE)
    assert np.array_equal(blobs[0], MEAN * 4)
    assert blobs[2] == 4


def test_an_untrained_factor_is_left_alone():
    assert np.array_equal(batch_norm("jacinto").adapt([MEAN, VAR, ONE * 0], THREE)[0], MEAN)


def test_digits_order_and_four_axis_shapes_are_recognized():
    wide = [a.reshape(1, -1, 1, 1) for a in (SCALE, SHIFT, MEAN, VAR, ONE)]
    blobs = batch_norm("nvcaffe", True).adapt(wide, FIVE)
    assert [b.shape for b in blobs] == FIVE
    for got, want in zip(blobs, (MEAN, VAR, ONE, SCALE, SHIFT), strict=True):
        assert np.array_equal(got, want)


def test_five_blobs_do_not_fit_a_bvlc_net():
    with pytest.raises(LayerError, match=r"five blobs.*dialect is bvlc") as caught:
        batch_norm("bvlc").adapt([MEAN, VAR, ONE, SCALE, SHIFT], THREE)
    assert "--dialect" in caught.value.hint
