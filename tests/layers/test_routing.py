"""Tile, BatchReindex, Filter, Permute, Parameter, Embed: values, gradients, refusals, Filter and Parameter in a net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import DataError, LayerError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from tests.layers.harness import Case, build, check_layer, layer_of

S = (2, 3, 4, 5)
KEEP = np.array([1, 0, 0, -2, 0.5])
EMBED = 'type: "Embed" embed_param { num_output: 4 input_dim: 6'

CASES = {
    "tile": Case('type: "Tile" tile_param { tiles: 3 }', [S], lambda b, _: [np.tile(b[0], (1, 3, 1, 1))]),
    "tile_last": Case(
        'type: "Tile" tile_param { axis: -1 tiles: 2 }', [S], lambda b, _: [np.tile(b[0], 2)], compiled=True
    ),
    "tile_once": Case('type: "Tile" tile_param { axis: 0 tiles: 1 }', [S], lambda b, _: b),
    "reindex": Case(
        'type: "BatchReindex"',
        [(4, 2, 3), (6,)],
        lambda b, _: [b[0][b[1].astype(int)]],
        labels={1: 4},
        rebatch=False,
        compiled=True,
    ),
    "permute": Case(
        'type: "Permute" permute_param { order: 0 order: 2 order: 3 order: 1 }',
        [S],
        lambda b, _: [b[0].transpose(0, 2, 3, 1)],
        compiled=True,
    ),
    "permute_rest": Case(
        'type: "Permute" permute_param { order: 2 }', [S], lambda b, _: [b[0].transpose(2, 0, 1, 3)], rebatch=True
    ),
    "permute_nothing": Case('type: "Permute"', [S], lambda b, _: b),
    "parameter": Case('type: "Parameter" parameter_param { shape { dim: 2 dim: 3 } }', [], lambda _, p: p),
    "embed": Case(EMBED + " }", [(2, 3)], lambda b, p: [p[0][b[0].astype(int)] + p[1]], labels={0: 6}, compiled=True),
    "embed_no_bias": Case(EMBED + " bias_term: false }", [(5,)], lambda b, p: [p[0][b[0].astype(int)]], labels={0: 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    check_layer(CASES[name])


def test_filter() -> None:
    """Values and gradients of the kept items; tops shorter than inferred; none kept."""
    built = build('type: "Filter"', [(5, 2), (5, 3, 1), (5, 1, 1)], tops=2)
    assert built.shapes == [(5, 2), (5, 3, 1)]
    a, b = (torch.randn(5, 2, requires_grad=True), torch.randn(5, 3, 1, requires_grad=True))
    selector = torch.tensor(KEEP).view(5, 1, 1)
    x, y = built(a, b, selector)
    rows = [0, 3, 4]
    torch.testing.assert_close(x, a[rows])
    torch.testing.assert_close(y, b[rows])
    (x.sum() + 2 * y.sum()).backward()
    assert a.grad is not None
    assert a.grad[:, 0].tolist() == [1, 0, 0, 1, 1]
    assert b.grad is not None
    assert b.grad[:, 0, 0].tolist() == [2, 0, 0, 2, 2]
    assert [t.shape[0] for t in built(a, b, torch.zeros(5))] == [0, 0]
    assert [built.layer.differentiable(i) for i in range(3)] == [True, True, False]


def _net(text: str, **options: object) -> Net:
    return Net(prepare(text_format.Parse(text, pb.NetParameter()), **options))  # type: ignore[arg-type]


FILTER_NET = """
layer { name: "in" type: "Input" top: "x" top: "sel"
        input_param { shape { dim: 5 dim: 3 } shape { dim: 5 } } }
layer { name: "label" type: "Input" top: "t" input_param { shape { dim: 5 dim: 2 } } }
layer { name: "keep" type: "Filter" bottom: "x" bottom: "t" bottom: "sel" top: "few" top: "targets" }
layer { name: "ip" type: "InnerProduct" bottom: "few" top: "y" inner_product_param { num_output: 2
        weight_filler { type: "gaussian" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "y" bottom: "targets" top: "loss" }
"""


def test_filter_in_a_net() -> None:
    """Shapes are inferred for all items; a pass works with those that are left, and may have another number next."""
    net = _net(FILTER_NET)
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    weight, bias = net.params["ip"]
    for kept in ([0, 2], [1, 2, 3, 4]):
        sel = torch.zeros(5)
        sel[kept] = 1
        net.zero_grad()
        loss = net({"x": x, "sel": sel, "t": t}).loss
        loss.backward()
        d = x[kept] @ weight.T + bias - t[kept]
        torch.testing.assert_close(loss.detach(), (d.detach() ** 2).sum() / 2 / len(kept))
        torch.testing.assert_close(weight.grad, (d.T @ x[kept] / len(kept)).detach())


PARAMETER_NET = """
layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "p" type: "Parameter" top: "p" parameter_param { shape { dim: 2 dim: 3 } } param { lr_mult: 2 } }
layer { name: "relu" type: "ReLU" bottom: "p" top: "p" }
layer { name: "loss" type: "EuclideanLoss" bottom: "x" bottom: "p" top: "loss" }
"""


def test_parameter_in_a_net() -> None:
    """It learns; a layer in place behind it leaves the blob alone."""
    net = _net(PARAMETER_NET)
    (blob,) = net.params["p"]
    assert [(p.lr_mult, p.node) for p in net.learnable] == [(2.0, "p")]
    assert not blob.any()
    with torch.no_grad():
        blob.copy_(torch.tensor([[-1.0, 2, 3], [4, -5, 6]]))
    net({"x": torch.zeros(2, 3)}).loss.backward()
    assert blob[0, 0] == -1
    assert blob.grad is not None
    assert blob.grad.tolist() == [[0, 1, 1.5], [2, 0, 3]]


def test_bad_numbers_in_the_data() -> None:
    embed = build(f'name: "e" {EMBED} }}', [(2,)])
    with pytest.raises(DataError, match=r"layer 'e'.*blob 'b0' holds 6, but only 0..5 exist"):
        embed(torch.tensor([0.0, 6.0]))
    reindex = build('type: "BatchReindex"', [(4, 2), (1,)])
    with pytest.raises(DataError, match=r"blob 'b1' holds -1, but only 0..3"):
        reindex(torch.zeros(4, 2), torch.tensor([-1.0]))


Shapes = list[tuple[int, ...]]


@pytest.mark.parametrize(
    ("text", "ins", "tops", "match"),
    [
        ('type: "Tile"', [S], 1, "tiles must be given and positive"),
        ('type: "Tile" tile_param { axis: 4 tiles: 2 }', [S], 1, "out of range"),
        ('type: "BatchReindex"', [S, (2, 1)], 1, "one axis"),
        ('type: "Filter"', [S, (2,)], 2, "2 bottoms, 2 tops"),
        ('type: "Filter"', [S, (2, 3)], 1, "one number an item"),
        ('type: "Filter"', [S, (3,)], 1, "selector has 3 items"),
        ('type: "Permute" permute_param { order: 1 order: 1 }', [S], 1, "named twice"),
        ('type: "Permute" permute_param { order: 4 }', [S], 1, "out of range"),
        ('type: "Parameter"', [], 1, "needs a shape"),
        ('type: "Parameter" parameter_param { shape { dim: 2 dim: 0 } }', [], 1, "must be positive"),
        ('type: "Embed" embed_param { num_output: 2 }', [S], 1, "input_dim"),
    ],
)
def test_refusals(text: str, ins: Shapes, tops: int, match: str) -> None:
    with pytest.raises(LayerError, match=match):
        layer_of(text, bottoms=len(ins), tops=tops).shapes(ins)


def test_expected_shapes() -> None:
    assert layer_of('type: "BatchReindex"', bottoms=2).expects(1, [S, None]) == (2,)
    assert layer_of('type: "Filter"', bottoms=3, tops=2).expects(2, [S, S, None]) == (2,)
