"""DetectNetTransformation against OpenCV (which the original calls) and grids counted by hand."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError
from caffejacinto_py.layers.modules.detectnet import (
    Augment,
    Chances,
    Coverage,
    move,
    recolor,
    resize_crop,
    resize_rotate_crop,
)
from tests.layers.harness import build, layer_of

TYPE = 'type: "DetectNetTransformation" {}'
SMALL = "detectnet_groundtruth_param {{ image_size_x: 32 image_size_y: 16 stride: 8 {} }} {}"
STILL = "detectnet_augmentation_param { hue_rotation_prob: 0 desaturation_prob: 0 flip_prob: 0 scale_prob: 0 "


def text(groundtruth: str = "", other: str = "") -> str:
    return TYPE.format(SMALL.format(groundtruth, other))


def augment(n: int = 1, **given) -> Augment:  # type: ignore[no-untyped-def]
    """The same changes for n images of 20 x 30, by default none."""
    plain = Chances.none(n, (20, 30))._asdict()
    return Augment(**{k: torch.full_like(v, given.get(k, v[0].item())) for k, v in plain.items()})


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def label(*boxes: tuple[float, ...], rows: int = 4) -> np.ndarray:
    """A label blob of one image; boxes: x, y, width, height, class."""
    out = np.zeros((1, 1, rows, 16))
    out[0, 0, 0, :2] = len(boxes), 16
    for i, (x, y, w, h, kind) in enumerate(boxes):
        out[0, 0, i + 1, [0, 1, 2, 3, 5]] = x, y, w, h, kind
    return out


def cropped(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    out = np.zeros((height, width, 3), image.dtype)
    for y in range(height):
        for x in range(width):
            if 0 <= y + top < image.shape[0] and 0 <= x + left < image.shape[1]:
                out[y, x] = image[y + top, x + left]
    return out


@pytest.mark.parametrize(("hue", "saturation"), [(0, 0.4), (25, 1), (-170, 0.7), (180, 0)])
def test_colors_as_opencv(hue: float, saturation: float) -> None:
    image = picture()
    image[0, :5] = 77  # grey has no hue
    hsv = cv2.cvtColor(image / 255, cv2.COLOR_BGR2HSV)
    hsv[..., 0] = np.mod(hsv[..., 0] + hue, 360)
    hsv[..., 1] *= saturation
    want = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR) * 255
    a = augment(hue=hue, saturation=saturation)
    got = recolor(tensor(image), a.hue, a.saturation)
    assert np.abs(got[0].numpy().transpose(1, 2, 0) - want).max() < 2e-3


def test_small_color_changes_are_none() -> None:
    x = tensor(picture())
    assert torch.equal(recolor(x, *augment(saturation=0.997)[:2]), x)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (27, 33), (14, 21), (16, 32)])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (-3, 4), (5, -2)])
def test_resize_and_crop_as_opencv(height: int, width: int, top: int, left: int) -> None:
    image = picture()
    want = cropped(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), top, left, 16, 32)
    a = augment(height=height, width=width, top=top, left=left)
    for got in (resize_crop(tensor(image), a, (16, 32)), resize_rotate_crop(tensor(image), a, (16, 32), (27, 33))):
        assert np.abs(got[0].numpy().transpose(1, 2, 0) - want).max() < 1e-3


def corners(height: int, width: int, angle: float) -> np.ndarray:
    """OpenCV's affine matrix that turns an image into its bounding rectangle, from three of its corners."""
    before = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    middle = np.array([width / 2, height / 2])
    turned = [
        cv2.transform((p - middle).reshape(1, 1, 2), cv2.getRotationMatrix2D((0, 0), -angle, 1)).reshape(2)
        for p in [*before.astype(float), np.array([width, height], float)]
    ]
    low = np.floor((np.min(turned, 0) + middle).astype(np.float32))
    after = np.array([t + middle - low for t in turned[:3]], np.float32)
    return cv2.getAffineTransform(before, after)


@pytest.mark.parametrize("angle", [5.0, -7.5, 90.0, 33.0])
def test_rotation_as_opencv(angle: float) -> None:
    image = picture()
    matrix = corners(20, 30, angle)
    size = (48, 48)
    want = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR)
    # where all four pixels under a pixel exist; newer versions of OpenCV blend the others with the border, older do not
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]])) @ np.stack([*np.indices(size)[::-1], np.ones(size)], 1)
    column, row = back[:, :2].transpose(1, 0, 2).round(6)
    inside = (column >= 0) & (column < 29) & (row >= 0) & (row < 19)
    got = resize_rotate_crop(tensor(image), augment(angle=angle), size, (20, 30))[0].numpy().transpose(1, 2, 0)
    assert inside.sum() > 450
    assert np.array_equal(np.abs(got).max(2) > 0, inside)
    # OpenCV before 5 rounds places to 1/32 pixel
    steepest = 255 * 2 / 32 if int(cv2.__version__.split(".")[0]) < 5 else 2e-2
    assert np.abs(want - got)[inside].max() < steepest
    # a box of 4 x 2 keeps its size, its middle goes where the pixels go
    box = move(torch.tensor([[[10.0, 6, 4, 2]]]), augment(angle=angle), (20, 30))[0, 0].numpy()
    middle = matrix @ [12, 7, 1]
    assert np.allclose(box, [middle[0] - 2, middle[1] - 1, 4, 2], atol=1e-4)


def test_boxes_by_hand() -> None:
    a = augment(flip=True, height=10, width=60, top=2, left=-5)
    # 30 - 3 - 4 - 1 = 22; twice as wide, half as high; 5 to the right and 2 up
    assert move(torch.tensor([[[3.0, 8, 4, 6]]]), a, (20, 30)).tolist() == [[[49, 2, 8, 3]]]


def by_hand(boxes: list, *, size=(16, 32), stride=8, classes=1, kinds=None, **o) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    """The grid, cell by cell and box by box."""
    rows, columns = size[0] // stride, size[1] // stride
    out = np.zeros((8 + classes, rows, columns))
    for x, y, w, h, kind in boxes:
        if kind not in (kinds or {1: 0}):
            continue
        if o.get("crop", True):
            x2, y2, x, y = min(x + w, size[1]), min(y + h, size[0]), max(x, 0), max(y, 0)
            w, h = x2 - x, y2 - y
        if w <= 0 or h <= 0:
            continue
        cw, ch = (
            min(v, max(o["least"], v * o["shrink"])) if "least" in o else min(o["most"], v * o["shrink"])
            for v in (w, h)
        )
        left, top = x + w / 2 - cw / 2, y + h / 2 - ch / 2
        for r in range(rows):
            for c in range(columns):
                ox = min(left + cw, (c + 1) * stride) - max(left, c * stride)
                oy = min(top + ch, (r + 1) * stride) - max(top, r * stride)
                if ox > 0 and oy > 0 and ox * oy / stride**2 > 1.2e-7:
                    cx, cy = c * stride, r * stride
                    norm = max(o.get("norm", 1), stride**2 / (cw * ch))
                    out[:8, r, c] = 1, x - cx, y - cy, x + w - cx, y + h - cy, 1 / w, 1 / h, norm
                    out[8:, r, c] = 0
                    out[8 + (kinds or {1: 0})[kind], r, c] = 1
    return out


def grid(boxes: list, **o) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    values = torch.tensor(boxes, dtype=torch.float64)[None]
    coverage = Coverage(**{"size": (16, 32), "stride": 8, "classes": {1: 0}, **o})
    return coverage.grid(values[..., :4], values[..., 4], torch.ones(values.shape[:2], dtype=torch.bool))[0].numpy()


def test_one_box_by_hand() -> None:
    # 12 x 8 at (6, 2), half of it: 6 x 4 around (12, 6): x 9..15, y 4..8: the cell in row 0, column 1 and no other
    out = grid([[6, 2, 12, 8, 1]])
    assert out[:, 0, 1].tolist() == [1, -2, 2, 10, 10, 1 / 12, 1 / 8, 64 / 24, 1]
    out[:, 0, 1] = 0
    assert not out.any()


def test_random_boxes_cell_by_cell() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes = np.column_stack([rng.uniform(-8, 30, (90, 2)), rng.uniform(0, 20, (90, 2)), rng.integers(0, 4, 90)])
        boxes = boxes[: rng.integers(1, 90)].tolist()
        kinds = {1: 2, 3: 0}
        for norm, crop in ((0.0, True), (1.0, False)):
            plain = {"classes": 3, "kinds": kinds, "norm": norm, "crop": crop}
            options = {"classes": kinds, "least_norm": norm, "crop": crop}
            want = by_hand(boxes, shrink=0.4, least=5, **plain)
            assert np.allclose(grid(boxes, shrink=0.4, shortest=5, **options), want, rtol=1e-9)
            want = by_hand(boxes, shrink=0.7, most=6, **plain)
            assert np.allclose(grid(boxes, shrink=0.7, longest=6, **options), want, rtol=1e-9)


def test_test_phase_resizes_and_takes_the_mean_off() -> None:
    built = build(
        text("scale_cvg: 1", "transform_param { mean_value: 10 mean_value: 20 mean_value: 30 }"),
        [(1, 3, 20, 30), (1, 1, 4, 16)],
        tops=2,
        phase="TEST",
        dtype=torch.float32,
    )
    image = picture()
    labels = label((3, 5, 15, 10, 1), (0, 0, 9, 9, 2))  # class 2 is not wanted
    x, out = built(tensor(image), torch.from_numpy(labels).float())
    want = cv2.resize(image - np.float32([10, 20, 30]), (32, 16), interpolation=cv2.INTER_CUBIC)
    assert [x.shape, out.shape] == built.shapes == [(1, 3, 16, 32), (1, 9, 2, 4)]
    assert x.dtype == out.dtype == torch.float32
    assert np.abs(x[0].numpy().transpose(1, 2, 0) - want).max() < 1e-3
    right, down = 32 / 30, 16 / 20
    want = by_hand([(3 * right, 5 * down, 15 * right, 10 * down, 1)], shrink=1, most=50)
    assert np.allclose(out[0].numpy(), want, rtol=1e-6)


def test_train_phase_crops_and_mean_file_is_resized(tmp_path: Path) -> None:
    from caffejacinto_py.schema.blobs import write_blob

    mean = picture(10, 15, seed=1)
    write_blob(str(tmp_path / "mean"), mean.transpose(2, 0, 1)[None])
    other = f'{STILL} rotation_prob: 0 crop_prob: 0 }} transform_param {{ mean_file: "{tmp_path / "mean"}" }}'
    built = build(text("", other), [(1, 3, 20, 30), (1, 64)], tops=2, dtype=torch.float32)
    image = picture()
    x, _ = built(tensor(image), torch.from_numpy(label()).float().reshape(1, 64))
    want = cropped(image - cv2.resize(mean, (30, 20), interpolation=cv2.INTER_CUBIC), 2, -1, 16, 32)
    assert np.abs(x[0].numpy().transpose(1, 2, 0) - want).max() < 1e-3  # the middle: 4 rows cut, 2 columns added


def test_training_draws_from_torch_within_the_bounds() -> None:
    chances = Chances((0.5, 30), (1, 0.8), 0.25, (1, 0.8, 1.2), (0.5, 5), (1, 8, 4))
    torch.manual_seed(0)
    a = chances.draw(4000, (200, 300), (100, 120))
    assert 0.47 < (a.hue != 0).float().mean() < 0.53
    assert 29 < a.hue.abs().max() <= 30
    assert 0.2 <= a.saturation.min() < 0.21
    assert 0.22 < a.flip.float().mean() < 0.28
    assert (a.height.min(), a.height.max()) == (160, 240)
    assert (a.width - a.height * 1.5).abs().max() <= 1
    still = a.angle == 0
    assert 4.9 < a.angle.abs().max() <= 5
    room = (a.height - 100)[still]
    assert (a.top[still] >= -4).all()
    assert (a.top[still] <= room + 4).all()
    assert (a.left[still] <= (a.width - 120)[still] + 2).all()
    torch.manual_seed(0)
    assert all(torch.equal(p, q) for p, q in zip(a, chances.draw(4000, (200, 300), (100, 120)), strict=True))


def test_images_and_boxes_go_the_same_way() -> None:
    """A bright square in a dark image is where its box is, whatever was drawn."""
    other = """detectnet_augmentation_param { hue_rotation_prob: 1 desaturation_prob: 1 flip_prob: 0.5 scale_prob: 1
    scale_min: 0.8 scale_max: 1.3 rotation_prob: 0.5 max_rotate_degree: 20 shift_x: 10 shift_y: 10 }"""
    groundtruth = "image_size_x: 96 image_size_y: 64 stride: 8 scale_cvg: 0.5 crop_bboxes: false"
    built = build(
        f'type: "DetectNetTransformation" detectnet_groundtruth_param {{ {groundtruth} }} {other}',
        [(64, 3, 64, 96), (64, 1, 4, 16)],
        tops=2,
        dtype=torch.float32,
    )
    image = np.zeros((64, 96, 3), np.float32)
    image[20:36, 30:46] = (200, 220, 240)
    torch.manual_seed(1)
    labels = torch.from_numpy(np.repeat(label((30, 20, 16, 16, 1)), 64, 0)).float()
    x, out = built(tensor(image).repeat(64, 1, 1, 1), labels)
    seen = 0
    for bright, cells in zip(x.amax(1).numpy(), out.numpy()):
        if not cells[0].any() or (bright[[0, -1]] > 100).any() or (bright[:, [0, -1]] > 100).any():
            continue  # cut
        row, column = np.argwhere(cells[0])[0]
        x1, y1, x2, y2 = cells[1:5, row, column] + [column * 8, row * 8, column * 8, row * 8]
        ys, xs = np.nonzero(bright > 100)
        assert abs(ys.mean() + 0.5 - (y1 + y2) / 2) < 1.6
        assert abs(xs.mean() + 0.5 - (x1 + x2) / 2) < 1.6
        seen += 1
    assert seen > 30


def test_batch_size_and_compile() -> None:
    built = build(text(), [(1, 3, 20, 30), (1, 1, 4, 16)], tops=2, phase="TEST", dtype=torch.float32)
    x = torch.cat([tensor(picture()), tensor(picture(seed=2))])
    labels = torch.from_numpy(np.concatenate([label((1, 1, 20, 12, 1)), label()])).float()
    both = built(x, labels)
    assert torch.equal(both[1][1], torch.zeros(9, 2, 4))
    assert torch.equal(both[0][1:], built(x[1:], labels[1:])[0])
    compiled = torch.compile(built.module, backend="eager", fullgraph=True)
    assert all(torch.equal(p, q) for p, q in zip(compiled(x, labels), both, strict=True))


def test_no_tensor_is_made_on_another_device_than_the_images() -> None:
    """The device "meta" refuses to be mixed with the CPU, as a GPU does, and gives shapes only."""
    for other in ("", "detectnet_augmentation_param { rotation_prob: 0 hue_rotation: 0 desaturation_max: 0 }"):
        other += " transform_param { mean_value: 7 }"
        built = build(text("", other), [(2, 3, 20, 30), (2, 1, 4, 16)], tops=2, dtype=torch.float32)
        built.module.to("meta")
        tops = built(torch.zeros(2, 3, 20, 30, device="meta"), torch.zeros(2, 1, 4, 16, device="meta"))
        assert [tuple(t.shape) for t in tops] == built.shapes


def test_a_label_without_room_for_boxes() -> None:
    built = build(text(), [(1, 3, 20, 30), (1, 16)], tops=2, phase="TEST", dtype=torch.float32)
    assert not built(tensor(picture()), torch.tensor([[0.0, 16] + [0] * 14]))[1].any()


@pytest.mark.parametrize("head", [(1, 15), (5, 16), (-1, 16), (math.nan, 16)])
def test_damaged_labels(head: tuple[float, float]) -> None:
    built = build(text(), [(1, 3, 20, 30), (1, 1, 4, 16)], tops=2, phase="TEST", dtype=torch.float32)
    labels = torch.zeros(1, 1, 4, 16)
    labels[0, 0, 0, :2] = torch.tensor(head)
    with pytest.raises(DataError, match="image 0 of the batch"):
        built(tensor(picture()), labels)


@pytest.mark.parametrize(
    ("extra", "ins", "field", "says"),
    [
        ("stride: 0", None, ("detectnet_groundtruth_param", "stride"), "at least 1"),
        ("stride: 17", None, ("detectnet_groundtruth_param", "stride"), "larger than"),
        ("object_class { src: 1 }", None, ("detectnet_groundtruth_param", "object_class", 0), "src and dst"),
        ("} detectnet_augmentation_param { scale_min: 0", None, ("detectnet_augmentation_param", "scale_min"), "above"),
        ("} transform_param { mean_value: 1 mean_value: 2", None, ("transform_param", "mean_value", 0), "1 or 3"),
        ("", [(1, 1, 20, 30), (1, 64)], ("bottom", 0), "images of shape"),
        ("", [(1, 3, 20, 30), (2, 64)], ("bottom", 1), "one label an image"),
        ("", [(1, 3, 20, 30), (1, 12)], ("bottom", 1), "16 are needed"),
    ],
)
def test_refusals(extra: str, ins: list, field: tuple, says: str) -> None:  # type: ignore[type-arg]
    layer = layer_of(
        f'type: "DetectNetTransformation" detectnet_groundtruth_param {{ image_size_x: 32 image_size_y: 16 {extra} }}',
        bottoms=2,
        tops=2,
    )
    with pytest.raises(LayerError, match=says) as caught:
        layer.shapes(ins or [(1, 3, 20, 30), (1, 64)])
    assert caught.value.field == field
