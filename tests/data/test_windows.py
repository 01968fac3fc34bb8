"""WindowData: the window file, where windows land in the crop, and the batches; numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from caffejacinto_py.data import make_feeder, probe
from caffejacinto_py.data.order import Share
from caffejacinto_py.data.windows import Place, Warp, WindowFile
from caffejacinto_py.errors import DataError, LayerError

from .helpers import source_layer, write_mean

BOXES = [(0, 0, 3, 3), (2, 1, 5, 4), (4, 4, 7, 7), (6, 6, 9, 9)]


def window_layer(source: object, window: str = "", transform: str = "crop_size: 4", **options):  # type: ignore[no-untyped-def]
    return source_layer(
        f"""name: "data" type: "WindowData" top: "data" top: "label" transform_param {{ {transform} }}
        window_data_param {{ source: "{source}" batch_size: 4 {window} }}""",
        **options,
    )


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Two images of 10 x 12 (the second with a blank in its name), in each two foreground and two background
    windows and one between the thresholds 0.3 and 0.6.
    """
    text = ""
    for i, name in enumerate(("first.png", "the second.png")):
        cv2.imwrite(str(tmp_path / name), image(i))
        text += f"# {i}\n{tmp_path / name}\n3\n10\n12\n5\n"
        for n, box in enumerate(BOXES):
            overlap = (1, 0.6, 0.25, 0)[n]
            text += f"{10 * i + n + 1} {overlap} {' '.join(map(str, box))}\n"
        text += "9 0.5 0 0 1 1\n"
    path = tmp_path / "windows.txt"
    path.write_text(text)
    return path


def feed(layer, n: int, **options) -> list[list[np.ndarray]]:  # type: ignore[no-untyped-def]
    feeder = make_feeder(layer, shapes=probe(layer), **{"seed": 7, **options})
    try:
        return [feeder.next() for _ in range(n)]
    finally:
        feeder.close()


def crops(boxes: list[tuple[int, int, int, int]]) -> list[np.ndarray]:
    """The 4 x 4 windows of both images as they stand: channels first."""
    return [
        image(i)[y1 : y2 + 1, x1 : x2 + 1].transpose(2, 0, 1).astype(np.float32)
        for i in range(2)
        for x1, y1, x2, y2 in boxes
    ]


def test_the_file_is_divided_by_the_thresholds(windows: Path) -> None:
    file = WindowFile(str(windows), fg=0.6, bg=0.3)
    assert [Path(p).name for p in file.images] == ["first.png", "the second.png"]
    assert file.foreground.label.tolist() == [1, 2, 11, 12]
    assert file.foreground.image.tolist() == [0, 0, 1, 1]
    assert file.background.label.tolist() == [0, 0, 0, 0]
    assert file.background.box.tolist() == [[4, 4, 7, 7], [6, 6, 9, 9]] * 2
    assert file.background.line.tolist() == [9, 10, 20, 21]
    every = WindowFile(str(windows), fg=0.5, bg=0.5)  # the defaults leave nothing out
    assert (len(every.foreground), len(every.background)) == (6, 4)


def test_a_batch_has_background_first_and_exact_pixels(windows: Path) -> None:
    layer = window_layer(windows, "fg_threshold: 0.6 bg_threshold: 0.3 fg_fraction: 0.25")
    assert layer.assumed(2) == probe(layer) == [(4, 3, 4, 4), (4,)]
    foreground, background = crops(BOXES[:2]), crops(BOXES[2:])
    seen = set()
    for data, labels in feed(layer, 40):
        assert labels[:3].tolist() == [0, 0, 0]
        for crop in data[:3]:
            seen.add(next(i for i, b in enumerate(background) if np.array_equal(crop, b)))
        assert np.array_equal(data[3], foreground[[1, 2, 11, 12].index(int(labels[3]))])
        seen.add(int(labels[3]) + 100)
    assert seen == {0, 1, 2, 3, 101, 102, 111, 112}  # every window comes up


def test_mean_scale_and_mirror(windows: Path, tmp_path: Path) -> None:
    mean = np.arange(3 * 6 * 6, dtype=np.float32).reshape(3, 6, 6)
    write_mean(tmp_path / "mean", mean)
    text = f'crop_size: 4 mirror: true mean_file: "{tmp_path / "mean"}"'
    layer = window_layer(windows, "fg_threshold: 0.6 bg_threshold: 0.3 fg_fraction: 1 scale: 0.5", text)
    plain = crops(BOXES[:2])
    flips = set()
    for data, labels in feed(layer, 10):
        for crop, label in zip(data, labels):
            want = plain[[1, 2, 11, 12].index(int(label))]
            both = [(w - mean[:, 1:5, 1:5]) * 0.5 for w in (want, want[:, :, ::-1])]  # the mean is not mirrored
            flips.add(next(i for i, w in enumerate(both) if np.array_equal(crop, w)))
    assert flips == {0, 1}
    layer = window_layer(windows, "fg_fraction: 0", "crop_size: 4 mean_value: 1 mean_value: 2 mean_value: 3")
    values = np.array([1, 2, 3], np.float32)[:, None, None]
    background = [c - values for c in crops(BOXES[2:])]
    assert all(any(np.array_equal(c, b) for b in background) for c in feed(layer, 1)[0][0])


def test_places_by_hand() -> None:
    # without context the window itself is warped
    assert Warp(8).place((1, 2, 4, 3), 10, 12, mirror=False) == Place(1, 2, 4, 2, 8, 8)
    assert Warp(8).place((1, 2, 12, 3), 10, 12, mirror=False) is None
    # context 2 of 8: grows by 8 / (8 - 4) = 2 around (2, 2): -2..6, 9 pixels; 2 are outside; 7 * 8 / 9 = 6.2 -> 6
    assert Warp(8, 2).place((0, 0, 3, 3), 10, 12, mirror=False) == Place(0, 0, 7, 7, 6, 6, 2, 2)
    # mirrored: the empty border is on the right, where nothing of the image is missing: 0 on the left
    assert Warp(8, 2).place((0, 0, 3, 3), 10, 12, mirror=True) == Place(0, 0, 7, 7, 6, 6, 0, 2)
    # at the right end of 12 columns: center 10, 6..14, 3 outside: 6 pixels -> 5.3 -> 5; rows 2..10, 1 of 10 outside
    assert Warp(8, 2).place((8, 4, 11, 7), 10, 12, mirror=False) == Place(6, 2, 6, 8, 5, 7, 0, 0)
    assert Warp(8, 2).place((8, 4, 11, 7), 10, 12, mirror=True) == Place(6, 2, 6, 8, 5, 7, 3, 0)  # 3 * 8 / 9 -> 3
    # square: 6 x 2 around (6, 5) becomes 6 x 6: 3..9 and 2..8
    assert Warp(7, square=True).place((3, 4, 8, 5), 10, 12, mirror=False) == Place(3, 2, 7, 7, 7, 7)
    # 2 x 1 around (4, 3.5): 3..5 and 2.5..4.5, halves away from zero: 3..5
    assert Warp(5, square=True).place((3, 3, 4, 3), 10, 12, mirror=False) == Place(3, 3, 3, 3, 5, 5)
    assert Warp(8, 2).place((30, 0, 33, 3), 10, 12, mirror=False) is None


def test_context_is_painted_with_a_border_of_zeros(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), image(3))
    path = tmp_path / "windows.txt"
    path.write_text("# 0\na.png\n3 10 12\n1\n\n4 1.0 0 0 3 3\n")  # blank lines and joined numbers do no harm
    window = f'fg_fraction: 1 context_pad: 2 root_folder: "{tmp_path}/" cache_images: true'
    layer = window_layer(path, window, "crop_size: 8 mean_value: 50")
    ((data, labels),) = feed(layer, 1)
    want = np.zeros((3, 8, 8), np.float32)
    want[:, 2:, 2:] = cv2.resize(image(3)[:7, :7], (6, 6)).transpose(2, 0, 1).astype(np.float32) - 50
    assert labels.tolist() == [4] * 4
    assert all(np.array_equal(crop, want) for crop in data)


@pytest.mark.parametrize("options", [{"workers": 3}, {"workers": 2, "workers_kind": "process"}, {"workers": 0}])
def test_batches_do_not_depend_on_the_workers(windows: Path, options: dict) -> None:  # type: ignore[type-arg]
    layer = window_layer(windows, "context_pad: 1", "crop_size: 6 mirror: true")
    once = feed(layer, 6)
    for a, b in zip(feed(layer, 6, **options), once, strict=True):
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])
    later = feed(layer, 2, start=4, **options)
    assert np.array_equal(later[0][0], once[4][0])
    assert np.array_equal(later[1][0], once[5][0])
    assert not np.array_equal(feed(layer, 1, seed=8)[0][0], once[0][0])
    assert not np.array_equal(feed(layer, 1, share=Share(1, 2))[0][0], once[0][0])


HEAD = "# 0\na.png\n3\n10\n12\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "is empty"),
        ("a.png\n", 1, "expected '# number'"),
        ("# x\na.png\n", 1, "expected '# number'"),
        ("# 0\n", 1, "ends inside a block"),
        ("# 0\na.png\n3\nten\n12\n1\n", 4, "'ten'"),
        (HEAD + "-1\n", 6, "a count of -1"),
        (HEAD + "2\n1 1 0 0 1 1\n", 7, "ends after 1 of 2"),
        (HEAD + "2000000000\n1 1 0 0 1 1\n", 7, "ends after 1 of"),
        (HEAD + "2\n1 1 0 0 1 1\n1 1 0 0 1\n", 8, "expected 'class overlap"),
        (HEAD + "2\n1 1 0 0 1 1\n1 high 0 0 1 1\n", 8, "expected 'class overlap"),
        (HEAD + "1\n1 nan 0 0 1 1\n", 7, "expected 'class overlap"),
        (HEAD + "1\n1 1 0 0.5 1 1\n", 7, "whole numbers"),
        (HEAD + "1\n1 1 0 0 99999999999 1\n", 7, "whole numbers"),
        (HEAD + "2\n1 1 0 0 1 1\n0 0.9 0 0 1 1\n", 8, "class above 0"),
        (HEAD + "1\n1 1 3 0 2 1\n", 7, "x2 must be"),
        (HEAD + "1\n1 1 0 0 1 1\n1 1 0 0 1 1\n", 8, "expected '# number'"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, text: str, line: int | None, says: str) -> None:
    path = tmp_path / "windows.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        WindowFile(str(path), fg=0.5, bg=0.5)
    if line:
        assert caught.value.loc is not None
        assert caught.value.loc[:2] == (str(path), line)


def test_what_cannot_be_read_says_where(windows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the window file"):
        probe(window_layer(tmp_path / "none.txt"))
    (tmp_path / "first.png").unlink()
    (tmp_path / "the second.png").write_bytes(b"no image")
    only = "fg_threshold: 0.6 bg_threshold: 0.3 fg_fraction: 1"
    with pytest.raises(DataError, match=r"windows.txt:\d+: window of image .* cannot read|not an image OpenCV"):
        feed(window_layer(windows, only), 1)
    cv2.imwrite(str(tmp_path / "first.png"), image(0)[:3])
    cv2.imwrite(str(tmp_path / "the second.png"), image(0)[:3])
    with pytest.raises(DataError, match=r"is not inside the image of 12 x 3"):
        feed(window_layer(windows, only), 1)
    with pytest.raises(DataError, match="needs 3 windows whose overlap is below bg_threshold 0"):
        feed(window_layer(windows, "bg_threshold: 0"), 1)
    with pytest.raises(DataError, match="needs 1 windows whose overlap reaches fg_threshold 2"):
        feed(window_layer(windows, "fg_threshold: 2"), 1)
    write_mean(tmp_path / "mean", np.zeros((3, 3, 3), np.float32))
    with pytest.raises(DataError, match="mean file is 3x3x3"):
        feed(window_layer(windows, "", f'crop_size: 4 mean_file: "{tmp_path / "mean"}"'), 1)


@pytest.mark.parametrize(
    ("window", "transform", "field", "says"),
    [
        ("", "", ("transform_param",), "size of the warped windows"),
        ("", "crop_size: 4 crop_h: 3 crop_w: 3", ("transform_param", "crop_h"), "square images"),
        ("", "crop_size: 4 force_gray: true", ("transform_param", "force_gray"), "in color"),
        ("", "crop_size: 4 mean_value: 1 mean_value: 2", ("transform_param", "mean_value", 0), "1 or 3"),
        ("context_pad: 2", "crop_size: 4", ("window_data_param", "context_pad"), "leaves nothing"),
        ('crop_mode: "round"', "crop_size: 4", ("window_data_param", "crop_mode"), "'round'"),
        ("fg_fraction: 1.5", "crop_size: 4", ("window_data_param", "fg_fraction"), "0..1"),
    ],
)
def test_refusals(window: str, transform: str, field: tuple, says: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(LayerError, match=says) as caught:
        window_layer("w.txt", window, transform).shapes([])
    assert caught.value.field == field


def test_fields_of_the_other_message_are_named_as_without_effect(
    windows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feed(window_layer(windows, "mirror: true", "crop_size: 4 scale: 2"), 1)
    assert [r.getMessage() for r in caplog.records] == [
        "layer 'data': transform_param.scale has no effect, window_data_param { scale } has",
        "layer 'data': window_data_param.mirror has no effect, transform_param { mirror } has",
    ]
