"""Classifier and Detector on a net whose scores can be worked out by hand: the mean of each channel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import UsageError

NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "mean" type: "Pooling" bottom: "data" top: "mean" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "mean" top: "prob"
  inner_product_param { num_output: 3 bias_term: false } }
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    net, weights = tmp_path / "n.prototxt", tmp_path / "w.caffemodel"
    net.write_text(NET)
    made = caffe.Net(str(net), caffe.TEST)
    made.params["ip"][0].data[...] = np.eye(3)
    made.save(str(weights))
    return str(net), str(weights)


def images(n: int, size: tuple[int, int]) -> list[np.ndarray]:
    return list(np.random.default_rng(0).random((n, *size, 3), dtype=np.float32))


def test_center_crops(files: tuple[str, str]) -> None:
    c = caffe.Classifier(*files, image_dims=(12, 10), mean=np.array([1, 2, 3]), raw_scale=255, channel_swap=(2, 1, 0))
    given = images(6, (12, 10))
    want = [255 * im[2:10, 1:9, ::-1].mean((0, 1)) - [1, 2, 3] for im in given]
    np.testing.assert_allclose(c.predict(given, oversample=False), want, rtol=1e-4)


def test_ten_crops(files: tuple[str, str]) -> None:
    c = caffe.Classifier(*files, image_dims=(12, 12), input_scale=2)
    given = images(3, (12, 12))
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    want = [2 * np.mean([im[y : y + 8, x : x + 8].mean((0, 1)) for y, x in corners], 0) for im in given]
    np.testing.assert_allclose(c.predict(given), want, rtol=1e-4)


def test_images_are_resized(files: tuple[str, str]) -> None:
    c = caffe.Classifier(*files)
    flat = [np.full((20, 30, 3), 0.25, np.float32), np.full((5, 5, 3), 0.5, np.float32)]
    np.testing.assert_allclose(c.predict(flat), [[0.25] * 3, [0.5] * 3], rtol=1e-5)


def test_windows(files: tuple[str, str], tmp_path: Path) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, 20:] = (255, 0, 0)  # the right half is blue
    names = [str(tmp_path / f"{k}.png") for k in range(2)]
    for name in names:
        cv2.imwrite(name, picture)
    d = caffe.Detector(*files)
    windows = [np.array([0, 0, 10, 20]), np.array([5, 20, 35, 40]), np.array([0, 0, 40, 40])]
    found = d.detect_windows([(names[0], windows), (names[1], windows[:2])])
    assert [f["filename"] for f in found] == [names[0]] * 3 + [names[1]] * 2
    blue = [f["prediction"][2] for f in found]
    np.testing.assert_allclose(blue, [0, 1, 0.5, 0, 1], atol=0.02)
    assert (found[1]["window"] == windows[1]).all()
    assert d.detect_windows([]) == []


def test_context(files: tuple[str, str]) -> None:
    """Where the window with its surroundings leaves the image, the mean stands."""
    mean = np.array([0.5, 0.25, 0.75], np.float32)
    d = caffe.Detector(*files, mean=mean, channel_swap=(2, 1, 0), context_pad=2)
    np.testing.assert_allclose(d.crop_mean[0, 0], mean[::-1])
    inside = d.crop(np.ones((40, 40, 3), np.float32), np.array([10, 10, 20, 20]))
    np.testing.assert_allclose(inside, np.ones((8, 8, 3)))
    corner = d.crop(np.ones((40, 40, 3), np.float32), np.array([0, 0, 19, 19]))
    assert corner.shape == (8, 8, 3)
    np.testing.assert_allclose(corner[:2], np.broadcast_to(mean[::-1], (2, 8, 3)))
    np.testing.assert_allclose(corner[:, :2], np.broadcast_to(mean[::-1], (8, 2, 3)))
    np.testing.assert_allclose(corner[2:, 2:], 1)
    with pytest.raises(UsageError, match="outside"):
        d.crop(np.ones((40, 40, 3), np.float32), np.array([100, 100, 120, 120]))
    with pytest.raises(UsageError, match="leaves nothing"):
        d.configure_crop(4)


def test_selective_search_needs_its_package(files: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="detect_windows"):
        caffe.Detector(*files).detect_selective_search(["x.jpg"])
