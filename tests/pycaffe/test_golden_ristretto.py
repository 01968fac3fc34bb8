"""Every vector of Ristretto's binary, through the pycaffe interface, with the CPU's numbers switched on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from tests.conftest import SHARED, shared

FOLDER = SHARED / "golden/ristretto"
CASES = sorted(p.stem for p in FOLDER.glob("*.npz"))


def part(data: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in data.items() if k.startswith(kind + "/")}


def close(what: str, got: np.ndarray, want: np.ndarray) -> None:
    """Within 1e-5 of the largest value, as the vectors' description has it."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), what


@pytest.fixture(autouse=True)
def _sound_again() -> Iterator[None]:
    yield
    caffe.set_compat()


def run(case: str, **compat: str) -> tuple[caffe.Net, dict[str, np.ndarray], bool]:
    path = FOLDER / f"{case}.prototxt"
    with np.load(FOLDER / f"{case}.npz") as z:
        data = {k: z[k] for k in z.files}
    train = re.search(r"phase: TRAIN", path.read_text()) is not None
    caffe.set_compat(**compat)
    net = caffe.Net(str(path), caffe.TRAIN if train else caffe.TEST)
    assert len(net.params["layer"]) == len(part(data, "param"))
    for i, value in part(data, "param").items():
        net.params["layer"][int(i)].data[...] = value
    net.forward(**part(data, "bottom"))
    return net, data, not train and "POWER_OF_2" not in path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_layer_agrees_with_the_binary(case: str) -> None:
    net, data, exact = run(case, ristretto="cpu")
    after = part(data, "bottom_after") or part(data, "bottom")
    np.testing.assert_array_equal(net.blobs["x_in"].data, after["x_in"])
    got, want = net.blobs["y_out"].data, data["top/y_out"]
    np.testing.assert_array_equal(got, want) if exact else close("top", got, want)
    for i, value in part(data, "param").items():
        np.testing.assert_array_equal(net.params["layer"][int(i)].data, value)
    net.clear_param_diffs()
    net.backward(**part(data, "top_diff"))
    close("bottom_diff", net.blobs["x_in"].diff, data["bottom_diff/x_in"])
    for i, want in part(data, "param_diff").items():
        close(f"param_diff {i}", net.params["layer"][int(i)].diff, want)


@pytest.mark.parametrize("case", [c for c in CASES if "pow2" not in c and "carry" not in c])
def test_by_default_only_the_layer_sees_its_rounded_bottom(case: str) -> None:
    net, data, exact = run(case)
    np.testing.assert_array_equal(net.blobs["x_in"].data, data["bottom/x_in"])
    if exact:
        np.testing.assert_array_equal(net.blobs["y_out"].data, data["top/y_out"])


def test_the_vectors_are_here() -> None:
    shared("golden/ristretto")
    assert len(CASES) == 14


SHARING = """
name: "n" force_backward: true
layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "fc" type: "FcRistretto" bottom: "x" top: "y" inner_product_param { num_output: 2 }
        quantization_param { bw_layer_in: 8 fl_layer_in: 1 } }
layer { name: "other" type: "Power" bottom: "x" top: "z" power_param { scale: 1 } }
"""


@pytest.mark.parametrize(("compat", "seen"), [({}, 0.3), ({"ristretto": "cpu"}, 0.5), ({"ristretto": "gpu"}, 0.5)])
def test_other_readers_see_the_rounded_blob_only_where_the_binary_is_asked_for(tmp_path, compat, seen) -> None:
    (tmp_path / "n.prototxt").write_text(SHARING)
    caffe.set_compat(**compat)
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    for _ in range(2):
        net.blobs["x"].data[...] = 0.3
        net.forward()
        np.testing.assert_allclose(net.blobs["z"].data, seen, rtol=1e-6)
        np.testing.assert_allclose(net.blobs["x"].data, seen, rtol=1e-6)
