from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import UsageError
from caffejacinto_py.solver.logs import LOGGER, GlogFormatter


def test_timer() -> None:
    timer = caffe.Timer()
    assert timer.ms == 0
    timer.start()
    time.sleep(0.02)
    timer.stop()
    found = timer.ms
    assert 15 < found < 2000
    time.sleep(0.01)
    assert timer.ms == found


def test_log(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate
    try:
        caffe.init_log(0)
        caffe.log("hello %d")
        caffe.init_log(2)
        caffe.log("silence")
        caffe.init_log(0, False)
        caffe.log("more silence")
    finally:
        for handler in [h for h in logger.handlers if isinstance(h.formatter, GlogFormatter)]:
            logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("I")
    assert lines[0].endswith("] hello %d")
    with pytest.raises(UsageError):
        caffe.init_log(4)


def test_one_process() -> None:
    assert (caffe.solver_count(), caffe.solver_rank(), caffe.has_nccl()) == (1, 0, False)
    caffe.set_solver_count(1)
    caffe.set_solver_rank(0)
    caffe.set_multiprocess(False)
    for call in (
        lambda: caffe.set_solver_count(2),
        lambda: caffe.set_solver_rank(1),
        lambda: caffe.set_multiprocess(True),
    ):
        with pytest.raises(UsageError, match="one process"):
            call()


def test_names() -> None:
    assert {"Convolution", "Python", "HDF5Output"} <= set(caffe.layer_type_list())
    for name in caffe.__all__:
        assert hasattr(caffe, name), name
    from caffejacinto_py.pycaffe.proto import caffe_pb2

    assert caffe.io.caffe_pb2 is caffe_pb2
    assert caffe_pb2.DESCRIPTOR.name == "caffe.proto"
    assert "NetParameter" in dir(caffe_pb2)
    with pytest.raises(AttributeError):
        caffe_pb2.NoSuchMessage  # noqa: B018


def test_means() -> None:
    """set_mean takes one value a channel, or an image that is brought to the input's size."""
    t = caffe.io.Transformer({"data": (1, 3, 4, 6)})
    t.set_mean("data", np.array([1, 2, 3]))
    assert t.mean["data"].shape == (3, 1, 1)
    t.set_mean("data", np.full((3, 8, 8), 7.0))
    np.testing.assert_allclose(t.mean["data"], np.full((3, 4, 6), 7.0))
    ramp = np.broadcast_to(np.linspace(-5, 300, 12), (3, 8, 12)).astype(np.float32)
    t.set_mean("data", ramp)
    assert t.mean["data"].shape == (3, 4, 6)
    assert (np.diff(t.mean["data"][0, 0]) > 0).all()
    gray = caffe.io.Transformer({"data": (1, 1, 4, 6)})
    gray.set_mean("data", np.ones((4, 6)))
    assert gray.mean["data"].shape == (1, 4, 6)
    for bad in (np.zeros(2), np.zeros((2, 4, 6)), np.zeros((1, 3, 4, 6)), np.zeros((4, 6, 3))):
        with pytest.raises(UsageError):
            t.set_mean("data", bad)


def test_deprocess_is_the_inverse() -> None:
    t = caffe.io.Transformer({"data": (1, 3, 4, 6)})
    t.set_transpose("data", (2, 0, 1))
    t.set_channel_swap("data", (1, 2, 0))
    t.set_raw_scale("data", 255)
    t.set_mean("data", np.random.default_rng(0).random((3, 4, 6)))
    t.set_input_scale("data", 0.25)
    image = np.random.default_rng(1).random((4, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(t.deprocess("data", t.preprocess("data", image)[None]), image, atol=1e-5)
