"""The transform against a slow reference written from Caffe's description, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from caffejacinto_py.data.random_resize import RandomResize
from caffejacinto_py.data.transform import Transform, from_param
from caffejacinto_py.errors import CaffeError, DataError, LayerError
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import BVLC, DIALECTS

from .helpers import images, write_mean

NV = DIALECTS["nvcaffe"]


def reference(t: Transform, image: np.ndarray, draw: np.ndarray, *, decoded: bool = False) -> np.ndarray:
    """One image, one pixel at a time, in float64."""
    channels, height, width = image.shape
    h, w = t.crop or (height, width)
    y0, x0 = (height - h) // 2, (width - w) // 2
    if t.crop and t.train:
        y0, x0 = int(np.floor(draw[1] * (height - h + 1))), int(np.floor(draw[2] * (width - w + 1)))
    flip = t.mirror and draw[0] < 0.5
    out = np.empty((channels, h, w))
    for c in range(channels):
        for y in range(h):
            for x in range(w):
                value = float(image[c, y0 + y, x0 + x])
                if t.mean is not None and t.mean_centered and decoded:
                    value -= t.mean[c, (t.mean.shape[1] - h) // 2 + y, (t.mean.shape[2] - w) // 2 + x]
                elif t.mean is not None:
                    value -= t.mean[c, y0 + y, x0 + x]
                if t.mean_values:
                    value -= t.mean_values[c if len(t.mean_values) > 1 else 0]
                out[c, y, w - 1 - x if flip else x] = value * t.scale
    return out


MEAN = np.random.default_rng(9).random((3, 8, 9)).astype(np.float32) * 255
CASES = {
    "plain": {},
    "scale": {"scale": 0.00390625},
    "mirror": {"mirror": True},
    "crop": {"crop": (5, 6)},
    "crop mirror values scale": {"crop": (5, 5), "mirror": True, "mean_values": (104.0, 117.0, 123.0), "scale": 0.017},
    "one value": {"mean_values": (128.0,)},
    "mean": {"mean": MEAN},
    "mean mirror": {"mean": MEAN, "mirror": True, "scale": 0.5},
    "mean crop mirror": {"mean": MEAN, "mirror": True, "crop": (4, 7)},
    "full-size crop": {"crop": (8, 9), "mean": MEAN},
}


@pytest.mark.parametrize("train", [True, False], ids=["TRAIN", "TEST"])
@pytest.mark.parametrize("centered", [False, True], ids=["bvlc", "nv"])
@pytest.mark.parametrize("decoded", [False, True], ids=["raw", "decoded"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, train: bool, centered: bool, decoded: bool) -> None:
    t = Transform(train=train, mean_centered=centered, **CASES[name])  # type: ignore[arg-type]
    batch = images(6)
    draws = t.draws(6, np.random.default_rng(4))
    want = np.stack([reference(t, x, d, decoded=decoded) for x, d in zip(batch, draws)])
    for given in (batch, list(batch), batch.astype(np.float32)):
        out = np.full((6, *t.shape((3, 8, 9))), np.nan, np.float32)
        t.apply(given, draws, out, decoded=decoded)
        np.testing.assert_allclose(out, want, rtol=2e-6, atol=2e-5)
    assert t.random or not (t.mirror or (t.crop and t.train))


def test_random_crops_and_mirrors_are_uniform() -> None:
    t = Transform(crop=(6, 6), mirror=True)
    image = np.arange(72, dtype=np.uint8).reshape(1, 8, 9)
    draws = t.draws(4000, np.random.default_rng(0))
    out = np.empty((4000, 1, 6, 6), np.float32)
    t.apply([image] * 4000, draws, out)
    corners = np.minimum(out[:, 0, 0, 0], out[:, 0, 0, -1]).astype(int)
    found, counts = np.unique(corners, return_counts=True)
    assert sorted(found) == [9 * y + x for y in range(3) for x in range(4)]  # every place
    assert counts.min() > 4000 / 12 * 0.75
    assert 0.45 < np.mean(out[:, 0, 0, 0] > out[:, 0, 0, -1]) < 0.55


def test_nv_takes_the_centre_of_a_larger_mean_for_decoded_images() -> None:
    mean = np.random.default_rng(1).random((3, 12, 14)).astype(np.float32)
    t = Transform(crop=(4, 4), mean=mean, mean_centered=True)
    image, draws = images(1), t.draws(1, np.random.default_rng(0))
    out = np.empty((1, 3, 4, 4), np.float32)
    t.apply([image[0]], draws, out, decoded=True)
    np.testing.assert_allclose(out[0], reference(t, image[0], draws[0], decoded=True), atol=1e-4)
    with pytest.raises(DataError, match=r"mean file is 3x12x14, the images are 3x8x9"):
        t.apply([image[0]], draws, out, decoded=False)


def param(text: str) -> object:
    from google.protobuf import text_format

    return text_format.Parse(text, pb.TransformationParameter())


def test_from_param_reads_every_field(tmp_path: Path) -> None:
    path = write_mean(tmp_path / "mean.binaryproto", MEAN)
    t = from_param(param(f'scale: 0.5 mirror: true crop_size: 7 mean_file: "{path}" force_gray: true'), phase="TEST")
    assert (t.train, t.scale, t.mirror, t.crop, t.color) == (False, 0.5, True, (7, 7), False)
    np.testing.assert_array_equal(t.mean, MEAN)
    assert from_param(param("force_color: true"), phase="TRAIN").color is True
    assert from_param(param(""), phase="TRAIN").color is None
    both = param("crop_size: 7 crop_h: 5 crop_w: 6")
    assert from_param(both, phase="TRAIN", dialect=BVLC).crop == (7, 7)
    assert from_param(both, phase="TRAIN", dialect=NV).crop == (5, 6)
    assert from_param(param("crop_h: 5 crop_w: 6"), phase="TRAIN", dialect=DIALECTS["ssd"]).crop == (5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mean_file: "x" mean_value: 1', "exclude each other"),
        ("force_color: true force_gray: true", "exclude each other"),
        ("crop_h: 5", "given together"),
        ("img_rand_resize_lower: 5", "no range"),
        ("img_rand_resize_lower: 9 img_rand_resize_upper: 5", "no range"),
        ("distort_param { brightness_prob: 0.5 }", "not supported"),
        ('mean_file: "missing.binaryproto"', "missing.binaryproto"),
    ],
)
def test_contradictions_are_refused(text: str, message: str) -> None:
    with pytest.raises(CaffeError, match=message):
        from_param(param(text), phase="TRAIN")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayerError, match="crop of 9x9 from an image of 8x9"):
        Transform(crop=(9, 9)).shape((3, 8, 9))
    with pytest.raises(LayerError, match="2 mean_value entries for images of 3 channels"):
        Transform(mean_values=(1.0, 2.0)).shape((3, 8, 9))
    with pytest.raises(LayerError, match="needs a crop_size"):
        Transform(random_resize=RandomResize(short=(5, 9))).shape((3, 8, 9))


def test_random_resize_ranges() -> None:
    rng = np.random.default_rng(0)
    keep = RandomResize(short=(20, 40), upscale=True)
    sizes = [keep.size(60, 90, rng.random(5), (16, 16)) for _ in range(300)]
    assert {min(s) for s in sizes} == set(range(20, 41))
    assert all(abs(w / h - 1.5) < 0.05 for h, w in sizes)
    ratio = RandomResize(short=(20, 20), ratio=(1.0, 2.0), upscale=True)
    square = [ratio.size(60, 60, rng.random(5), None) for _ in range(300)]
    assert any(h > w for h, w in square) and any(w > h for h, w in square)  # noqa: PT018
    assert all(min(s) == 20 and 20 <= max(s) <= 40 for s in square)
    assert RandomResize(short=(5, 5)).size(60, 90, rng.random(5), (16, 18)) == (16, 18)  # not below the crop
    assert RandomResize(short=(200, 200)).size(60, 90, rng.random(5), None) == (60, 90)  # not above the original
    stretch = RandomResize(vertical=(0.5, 0.5))
    assert stretch.size(60, 90, rng.random(5), None) == (30, 90)


def test_random_resize_interpolates_as_told() -> None:
    resize = RandomResize.from_param(
        param("img_rand_resize_lower: 4 img_rand_resize_upper: 4 interpolation_algo_down: INTER_AREA")
    )
    assert resize is not None
    image = images(1)[0].transpose(1, 2, 0).copy()
    out = resize.apply(image, np.zeros(5), None)
    np.testing.assert_array_equal(out, cv2.resize(image, (out.shape[1], 4), interpolation=cv2.INTER_AREA))
    assert RandomResize.from_param(param("")) is None


@pytest.mark.parametrize("crop", [None, (90, 101)])
def test_large_images_agree_with_the_reference(crop: tuple[int, int] | None) -> None:
    """They are finished one by one."""
    t = Transform(crop=crop, mirror=True, mean_values=(1.0, 2.0, 3.0), scale=0.3)
    batch = images(3, height=96, width=107)
    draws = t.draws(3, np.random.default_rng(4))
    draws[:2, 0] = 0.2, 0.8  # one flipped, one not
    out = np.empty((3, *t.shape((3, 96, 107))), np.float32)
    t.apply(batch, draws, out)
    np.testing.assert_allclose(out[:2], [reference(t, x, d) for x, d in zip(batch[:2], draws)], rtol=2e-6, atol=2e-5)
