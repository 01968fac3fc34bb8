"""PriorBoxClustered against the loops of its source; refusals."""

from __future__ import annotations

import numpy as np
import pytest

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, check_layer, layer_of

INS = [(2, 4, 2, 3), (2, 3, 40, 60)]


def priors(boxes, image, step, offset=0.5, clip=False, variance=(0.1,) * 4) -> np.ndarray:
    out = []
    for y, x in np.ndindex(2, 3):
        for h, w in boxes:
            cx, cy = (x + offset) * step[1], (y + offset) * step[0]
            out += [(cx - w / 2) / image[1], (cy - h / 2) / image[0], (cx + w / 2) / image[1], (cy + h / 2) / image[0]]
    rows = np.array([out, list(variance) * (len(out) // 4)])
    if clip:
        rows[0] = rows[0].clip(0, 1)
    return rows[None]


def case(fields: str, want: np.ndarray, **kw) -> Case:
    text = f'type: "PriorBoxClustered" prior_box_param {{ width: 10 width: 30 height: 20 height: 5 {fields} }}'
    return Case(text, INS, lambda *_: [want], gradient=False, **kw)


B = [(20, 10), (5, 30)]
CASES = {
    "from_the_image": case("", priors(B, (40, 60), (20, 20)), compiled=True),
    "explicit": case(
        "img_h: 50 img_w: 100 step_h: 25 step_w: 32 offset: 0.25 variance: 0.5 variance: 1 variance: 2 variance: 4",
        priors(B, (50, 100), (25, 32), 0.25, variance=(0.5, 1, 2, 4)),
    ),
    "clip": case(
        "img_size: 64 step: 16 clip: true variance: 0.25",
        priors(B, (64, 64), (16, 16), clip=True, variance=(0.25,) * 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ("", ("width",), "go in pairs"),
        ("width: 1", ("width",), "1 and 0"),
        ("width: 1 height: 0", ("height", 0), "positive"),
        ("width: 1 height: 1 variance: 1 variance: 2", ("variance",), "1 or 4"),
        ("width: 1 height: 1 step: 1 step_h: 1 step_w: 1", ("step_h",), "not both"),
        ("width: 1 height: 1 img_size: 0", ("img_size",), "positive"),
        ("width: 1 height: 1 img_h: 3", ("img_h",), "positive"),
    ],
)
def test_refusals(fields: str, field: tuple, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "PriorBoxClustered" prior_box_param {{ {fields} }}', bottoms=2).shapes(INS)
    assert e.value.field == ("prior_box_param", *field)
    assert words in e.value.text
