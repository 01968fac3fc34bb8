"""`import caffe`, the mode functions, and caffe.io."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import DataError, UsageError
from caffejacinto_py.schema import pb

SCRIPT = """
from caffejacinto_py import pycaffe
pycaffe.install_as_caffe(); pycaffe.install_as_caffe()
import caffe, caffe.io
from caffe.proto import caffe_pb2
import caffe.proto.caffe_pb2 as again
assert caffe.TRAIN == caffe_pb2.TRAIN == 0 and caffe.TEST == again.TEST == 1
assert caffe_pb2.NetParameter(name="x").name == "x"
assert caffe.io.Transformer and caffe.Net and "Convolution" in caffe.layer_type_list()
"""


def test_import_caffe() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_caffe_is_not_replaced() -> None:
    code = "import sys, types; sys.modules['caffe'] = types.ModuleType('caffe')\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another 'caffe' module is imported already" in done.stderr


def test_modes() -> None:
    caffe.set_mode_cpu()
    caffe.set_device(0)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA GPU"):
            caffe.set_mode_gpu()


def test_seed_fixes_the_fillers(tmp_path: Path) -> None:
    text = (
        'layer { name: "i" type: "Input" top: "x" input_param { shape { dim: 1 dim: 2 } } }'
        'layer { name: "p" type: "InnerProduct" bottom: "x" top: "y"'
        ' inner_product_param { num_output: 3 weight_filler { type: "gaussian" std: 1 } } }'
    )
    (tmp_path / "n.prototxt").write_text(text)
    from caffejacinto_py.pycaffe.mode import MODE

    made = []
    try:
        for seed in (5, 5, 6):
            caffe.set_random_seed(seed)
            made.append(caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST).params["p"][0].data)
    finally:
        MODE.seed = None
    assert (made[0] == made[1]).all()
    assert (made[0] != made[2]).any()


def test_blobproto() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    blob = caffe.io.array_to_blobproto(array, diff=-array)
    np.testing.assert_array_equal(caffe.io.blobproto_to_array(blob), array)
    np.testing.assert_array_equal(caffe.io.blobproto_to_array(blob, return_diff=True), -array)
    legacy = pb.BlobProto(num=1, channels=1, height=2, width=3, data=range(6))
    assert caffe.io.blobproto_to_array(legacy).shape == (1, 1, 2, 3)
    assert caffe.io.blobproto_to_array(pb.BlobProto(data=[123])) == 123
    back = caffe.io.blobprotovector_str_to_arraylist(caffe.io.arraylist_to_blobprotovector_str([array, array[0]]))
    assert [b.shape for b in back] == [(2, 3), (3,)]


@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_datum(kind: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    datum = caffe.io.array_to_datum(array, label=7)
    assert datum.label == 7
    assert bool(datum.data) == (kind is np.uint8)
    np.testing.assert_array_equal(caffe.io.datum_to_array(datum), array)
    datum.height = 5
    with pytest.raises(DataError):
        caffe.io.datum_to_array(datum)


def test_transformer_there_and_back(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (6, 5, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    loaded = caffe.io.load_image(str(tmp_path / "x.png"))
    np.testing.assert_allclose(loaded, image[:, :, ::-1] / 255, atol=1e-6)
    t = caffe.io.Transformer({"data": (1, 3, 6, 5)})
    t.set_transpose("data", (2, 0, 1))
    t.set_channel_swap("data", (2, 1, 0))
    t.set_raw_scale("data", 255)
    t.set_mean("data", np.array([10, 20, 30]))
    t.set_input_scale("data", 0.5)
    ready = t.preprocess("data", loaded)
    want = (image.transpose(2, 0, 1) - np.array([10, 20, 30])[:, None, None]) * 0.5
    np.testing.assert_allclose(ready, want, atol=1e-3)
    np.testing.assert_allclose(t.deprocess("data", ready), loaded, atol=1e-5)
    with pytest.raises(UsageError):
        t.set_mean("data", np.zeros(2))
    with pytest.raises(UsageError):
        t.preprocess("dta", loaded)
    assert caffe.io.resize_image(loaded, (12, 10)).shape == (12, 10, 3)
    assert caffe.io.oversample([loaded], (4, 4)).shape == (10, 4, 4, 3)
    with pytest.raises(DataError):
        caffe.io.load_image(str(tmp_path / "absent.png"))
