"""Sources: shapes from the fields, from the data, and what is missing."""

from __future__ import annotations

import pytest

from caffejacinto_py.errors import LayerError
from tests.layers.harness import layer_of

DATA = 'type: "Data" data_param {{ source: "db" batch_size: 4 }} {}'
IMAGES = 'type: "ImageData" image_data_param {{ source: "list" {} }} {}'
WINDOWS = 'type: "WindowData" window_data_param {{ source: "w" batch_size: 8 {} }} transform_param {{ {} }}'
DUMMY = 'type: "DummyData" dummy_data_param {{ {} }}'


@pytest.mark.parametrize(
    ("text", "tops", "shapes"),
    [
        (DATA.format(""), 1, [None]),  # without labels: whatever its reader says, see tests/passes
        (DATA.format(""), 2, [(4, 3, 224, 224), None]),
        (DATA.format("transform_param { crop_size: 28 force_gray: true }"), 1, [(4, 1, 28, 28)]),
        (DATA.format("transform_param { crop_h: 20 crop_w: 30 crop_size: 28 }"), 1, [(4, 3, 20, 30)]),
        (DATA.format("transform_param { resize_param { height: 20 width: 30 } }"), 1, [(4, 3, 20, 30)]),
        (DATA.format("transform_param { mean_value: 1 mean_value: 2 mean_value: 3 }"), 1, [(4, 3, 224, 224)]),
        (IMAGES.format("", ""), 2, [(1, 3, 224, 224), None]),
        (IMAGES.format("batch_size: 2 new_height: 20 new_width: 30 is_color: false", ""), 2, [(2, 1, 20, 30), None]),
        (IMAGES.format("new_height: 20 new_width: 30", "transform_param { crop_size: 16 }"), 2, [(1, 3, 16, 16), None]),
        (WINDOWS.format("context_pad: 16", "crop_size: 227 mirror: true"), 2, [(8, 3, 227, 227), (8,)]),
        ('type: "HDF5Data" hdf5_data_param { source: "l" batch_size: 5 }', 3, [(5, 3, 224, 224), None, None]),
        (
            'type: "MemoryData" memory_data_param { batch_size: 2 channels: 3 height: 4 width: 5 }',
            2,
            [(2, 3, 4, 5), (2,)],
        ),
        ('type: "Input" input_param { shape { dim: 2 dim: 3 } }', 2, [(2, 3), (2, 3)]),
        ('type: "Input" input_param { shape { dim: 2 dim: 3 } shape { dim: 2 } }', 2, [(2, 3), (2,)]),
        (DUMMY.format("shape { dim: 2 } data_filler {} data_filler {}"), 2, [(2,), (2,)]),
        (DUMMY.format("shape { dim: 2 } shape { dim: 3 dim: 1 }"), 2, [(2,), (3, 1)]),
        (DUMMY.format("num: 2 num: 3 channels: 4 height: 5 width: 6"), 2, [(2, 4, 5, 6), (3, 4, 5, 6)]),
    ],
)
def test_shapes_from_the_fields(text: str, tops: int, shapes: list) -> None:
    layer = layer_of(text, bottoms=0, tops=tops)
    assert layer.assumed(tops) == shapes
    assert layer.shapes([]) == [s or layer.fallback() or (shapes[0][0],) for s in shapes]


def test_data_shape_of_the_context() -> None:
    layer = layer_of(DATA.format("transform_param { crop_size: 24 }"), bottoms=0, data_shape=(1, 28, 28))
    assert layer.shapes([]) == [(4, 1, 24, 24)]


def test_probe_decides_where_files_do() -> None:
    seen = []

    def probe(layer):
        seen.append(layer.source)
        return [(7, 1, 2, 3), (7,)]

    for text, kind in (
        (DATA.format(""), "database"),
        (IMAGES.format("", ""), "images"),
        (WINDOWS.format("", "crop_size: 9"), "windows"),
    ):
        assert layer_of(text, bottoms=0, tops=2, probe=probe).shapes([]) == [(7, 1, 2, 3), (7,)]
        assert seen.pop() == kind
    layer = layer_of('type: "Input" input_param { shape { dim: 2 } }', bottoms=0, probe=probe)
    assert layer.shapes([]) == [(2,)]
    assert (layer.source, seen) == ("input", [])


@pytest.mark.parametrize(
    ("text", "tops", "field", "says"),
    [
        ('type: "Data" data_param { batch_size: 4 }', 1, ("data_param", "source"), "needs source"),
        ('type: "Data" data_param { source: "x" }', 1, ("data_param", "batch_size"), "needs batch_size"),
        ('type: "Data" data_param { source: "x" batch_size: 0 }', 1, ("data_param", "batch_size"), "at least 1"),
        (
            DATA.format('transform_param { mean_file: "m" mean_value: 1 }'),
            1,
            ("transform_param", "mean_value", 0),
            "not both",
        ),
        (DATA.format("transform_param { crop_h: 3 }"), 1, ("transform_param", "crop_h"), "crop_h and crop_w"),
        (
            DATA.format("transform_param { force_color: true force_gray: true }"),
            1,
            ("transform_param", "force_gray"),
            "not both",
        ),
        ('type: "ImageData"', 2, ("image_data_param", "source"), "needs source"),
        (IMAGES.format("new_width: 3", ""), 2, ("image_data_param", "new_width"), "or neither"),
        ('type: "HDF5Data" hdf5_data_param { source: "l" }', 1, ("hdf5_data_param", "batch_size"), "needs batch_size"),
        (
            'type: "HDF5Data" hdf5_data_param { source: "l" batch_size: 1 } transform_param { scale: 2 }',
            1,
            ("transform_param",),
            "remove transform_param",
        ),
        ('type: "MemoryData" memory_data_param { batch_size: 1 }', 2, ("memory_data_param", "channels"), "channels"),
        ('type: "Input"', 1, ("input_param",), "no shape"),
        (
            'type: "Input" input_param { shape { dim: 1 } shape { dim: 1 } }',
            3,
            ("input_param", "shape", 0),
            "2 shapes for 3 tops",
        ),
        (
            'type: "Input" input_param { shape { dim: 1 dim: 0 } }',
            1,
            ("input_param", "shape", 0, "dim", 1),
            "at least 1",
        ),
        (DUMMY.format(""), 1, ("dummy_data_param",), "no shape"),
        (DUMMY.format("shape { dim: 1 } num: 1"), 1, ("dummy_data_param", "num", 0), "not both"),
        (DUMMY.format("num: 1"), 1, ("dummy_data_param", "channels"), "0 channels"),
        (
            DUMMY.format("shape { dim: 1 } data_filler {} data_filler {}"),
            3,
            ("dummy_data_param", "data_filler", 0),
            "2 data_filler for 3 tops",
        ),
        (
            DUMMY.format("num: 0 channels: 1 height: 1 width: 1"),
            1,
            ("dummy_data_param", "num", 0),
            "at least 1",
        ),
    ],
)
def test_refusals(text: str, tops: int, field: tuple, says: str) -> None:
    layer = layer_of(text, bottoms=0, tops=tops)
    for ask in (lambda: layer.shapes([]), lambda: layer.assumed(tops)):
        with pytest.raises(LayerError, match=says) as e:
            ask()
        assert e.value.field == field
