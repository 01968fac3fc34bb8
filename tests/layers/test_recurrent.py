"""RNN, LSTM, LSTMUnit: a numpy oracle for any cont, both roads, state between passes, hidden blobs, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.modules import recurrent as m
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

T, N, D, H = 5, 3, 4, 2
X, CONT, STATE = (T, N, D), (T, N), (1, N, H)
FILL = "weight_filler { type: 'uniform' } bias_filler { type: 'uniform' }"


def _text(kind: str, extra: str = "") -> str:
    return f'type: "{kind}" recurrent_param {{ num_output: {H} {FILL} {extra} }}'


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def lstm(x: np.ndarray, cont: np.ndarray, blobs: Arrays, *, static: np.ndarray | None = None, state: Arrays) -> Arrays:
    """h of every step, then h and c of the last one."""
    wx, b, *ws, wh = blobs
    h, c = state
    out = []
    for xt, k in zip(x.reshape(*x.shape[:2], -1), cont[:, :, None]):
        gates = xt @ wx.T + b + (k * h) @ wh.T
        if static is not None:
            gates = gates + static.reshape(len(static), -1) @ ws[0].T
        i, f, o, g = np.split(gates, 4, 1)
        c = sigmoid(f) * k * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return [np.stack(out), h[None], c[None]]


def rnn(x: np.ndarray, cont: np.ndarray, blobs: Arrays, *, static: np.ndarray | None = None, state: Arrays) -> Arrays:
    wx, b, *ws, wh, wo, bo = blobs
    h = state[0]
    out = []
    for xt, k in zip(x.reshape(*x.shape[:2], -1), cont[:, :, None]):
        z = xt @ wx.T + b + (k * h) @ wh.T
        h = np.tanh(z if static is None else z + static.reshape(len(static), -1) @ ws[0].T)
        out.append(np.tanh(h @ wo.T + bo))
    return [np.stack(out), h[None]]


ORACLES = {"LSTM": (lstm, 2), "RNN": (rnn, 1)}


def _bottoms(kind: str, *, static: bool = False, expose: bool = False, starts: bool = True) -> Arrays:
    """Random bottoms; the first step starts sequences unless the states come in."""
    rng = np.random.default_rng(3)
    cont = (rng.random(CONT) < 0.6).astype(float) if starts else np.ones(CONT)
    cont[0] = [1, 0, 1] if expose else 0
    parts = [rng.normal(size=X), cont]
    if static:
        parts.append(rng.normal(size=(N, 2, 2)))
    return parts + [rng.normal(size=STATE) for _ in range(ORACLES[kind][1] * expose)]


def _case(
    kind: str, *, static: bool = False, expose: bool = False, compiled: bool = False, waits: bool = False
) -> Case:
    run, states = ORACLES[kind]
    bottoms = _bottoms(kind, static=static, expose=expose)

    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        given = [s[0] for s in ins[-states:]] if expose else [np.zeros((N, H))] * states
        tops = run(ins[0], ins[1], blobs, static=ins[2] if static else None, state=given)
        return tops if expose else tops[:1]

    rng = np.random.default_rng(4)
    shapes = [b.shape for b in bottoms]
    text = _text(kind, "expose_hidden: true" if expose else "")
    tops = 1 + states * expose
    declared = layer_of(text, bottoms=len(shapes), tops=tops).blobs(shapes)
    blobs = [rng.uniform(-1, 1, b.shape) for b in declared]
    return Case(
        text,
        shapes,
        oracle,
        tops=tops,
        bottoms=bottoms,
        blobs=blobs,
        rebatch=False,
        compiled=compiled and not expose,
        waits=waits,
    )


@pytest.mark.parametrize("expose", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_sequence(kind: str, static: bool, expose: bool) -> None:
    check_layer(_case(kind, static=static, expose=expose, compiled=static, waits=not static))


def test_unit() -> None:
    def oracle(ins: Arrays, _: Arrays) -> Arrays:
        i, f, o, g = np.split(ins[1], 4, 2)
        c = sigmoid(f) * ins[2][:, :, None] * ins[0] + sigmoid(i) * np.tanh(g)
        return [c, sigmoid(o) * np.tanh(c)]

    shapes = [(1, 3, 2), (1, 3, 8), (1, 3)]
    check_layer(Case('type: "LSTMUnit"', shapes, oracle, tops=2, rebatch=False, compiled=True))


def test_blobs_in_caffes_order() -> None:
    ins = [X, CONT, (N, 7)]
    assert [b.shape for b in layer_of(_text("LSTM")).blobs(ins)] == [(8, 4), (8,), (8, 7), (8, 2)]
    assert [b.shape for b in layer_of(_text("RNN")).blobs(ins)] == [(2, 4), (2,), (2, 7), (2, 2), (2, 2), (2,)]
    assert layer_of(_text("LSTM")).macs(ins, [(T, N, H)]) == T * N * (32 + 16) + N * 56
    assert layer_of(_text("RNN")).macs(ins, [(T, N, H)]) == T * N * (8 + 4 + 4) + N * 14


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_both_roads_agree(kind: str, starts: bool) -> None:
    """torch's kernels between the starts of sequences against the loop; state of an earlier pass flows in."""
    built = [build(_text(kind), [X, CONT], dtype=torch.float32) for _ in range(2)]
    x, cont = (torch.tensor(b, dtype=torch.float32) for b in _bottoms(kind, starts=False))
    cont[0] = torch.tensor([1.0, 0.0, 0.5])
    if starts:
        cont[3] = torch.tensor([0.0, 1.0, 1.0])
    results = []
    for b, fused_on in zip(built, [("cpu",), ()]):
        b.module.fused_on = fused_on
        bottom = x.clone().requires_grad_()
        assert (b.module.cuts(bottom, cont) is None) == (not fused_on)
        b(bottom, cont)
        (y,) = b(bottom, cont)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append([y.detach(), bottom.grad, *(p.grad for p in b.blobs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_stretches() -> None:
    cont = torch.ones(8, 2)
    cont[0] = 0
    assert m.stretches(cont) == [0, 8]
    cont[3, 1] = 0
    cont[5, 0] = 0.5
    assert m.stretches(cont) == [0, 3, 5, 8]
    cont[6] = 0
    assert m.stretches(cont) is None
    assert m.stretches(torch.zeros(1, 2)) == [0, 1]


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_state_flows_from_pass_to_pass(kind: str) -> None:
    """Two halves of a sequence one after the other are the whole; in both phases; cont 0 cuts."""
    x, _ = (torch.tensor(b) for b in _bottoms(kind))
    x = torch.cat([x, x.flip(0)])
    cont = torch.ones(2 * T, N, dtype=torch.float64)
    cont[0] = 0
    whole = build(_text(kind), [(2 * T, N, D), (2 * T, N)])
    halves = build(_text(kind), [X, CONT], phase="TEST")
    (want,) = whole(x, cont)
    got = torch.cat([halves(x[:T], cont[:T])[0], halves(x[T:], cont[T:])[0]])
    torch.testing.assert_close(got, want)
    again = halves(x[:T], cont[:T])[0]
    torch.testing.assert_close(again, want[:T])
    assert not any(b.requires_grad for b in halves.module.buffers())
    assert [tuple(b.shape) for b in halves.module.buffers()] == [(N, H)] * ORACLES[kind][1]


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_another_number_of_sequences_starts_afresh(kind: str) -> None:
    built = build(_text(kind), [X, CONT])
    x, cont = torch.randn(T, N + 2, D, dtype=torch.float64), torch.ones(T, N + 2, dtype=torch.float64)
    built(*(torch.tensor(b) for b in _bottoms(kind)))
    (got,) = built(x, cont)
    cont[0] = 0
    torch.testing.assert_close(build(_text(kind), [X, CONT])(x, cont)[0], got)


def test_no_gradient_reaches_the_pass_before() -> None:
    built = build(_text("LSTM"), [X, CONT])
    x, cont = (torch.tensor(b) for b in _bottoms("LSTM", starts=False))
    first = x.clone().requires_grad_()
    built(first, cont)
    cont[0] = 1
    built(x.clone().requires_grad_(), cont)[0].sum().backward()
    assert first.grad is None


def test_traits() -> None:
    for kind in ORACLES:
        layer = layer_of(_text(kind))
        assert layer.stateful_forward, "a pass changes the state"
        assert layer.saves_output, "backward reads h: nothing behind may overwrite it"


@pytest.mark.parametrize(
    ("text", "ins", "tops", "match"),
    [
        ('type: "LSTM"', [X, CONT], 1, "num_output"),
        ('type: "RNN"', [X, CONT], 1, "num_output"),
        (_text("LSTM"), [(T, N), CONT], 1, r"must be \(T, N, \.\.\)"),
        (_text("LSTM"), [X, (T, N, 1)], 1, "continuation marks"),
        (_text("RNN"), [X, CONT, (N + 1, 4)], 1, "static input"),
        (_text("LSTM"), [X, CONT, (N, 4), STATE], 1, "expose_hidden false takes 2 bottoms, or 3"),
        (_text("LSTM", "expose_hidden: true"), [X, CONT, STATE], 3, "expose_hidden true takes 4 bottoms, or 5"),
        (_text("RNN", "expose_hidden: true"), [X, CONT, STATE], 1, "makes 2 tops"),
        (_text("RNN", "expose_hidden: true"), [X, CONT, (1, N, 9)], 2, "state at the start"),
        ('type: "LSTMUnit"', [(2, 3, 2), (1, 3, 8), (1, 3)], 2, r"\(1, N, H\)"),
        ('type: "LSTMUnit"', [(1, 3, 2), (1, 3, 6), (1, 3)], 2, "four gates"),
        ('type: "LSTMUnit"', [(1, 3, 2), (1, 3, 8), (3,)], 2, "continuation"),
    ],
)
def test_refusals(text: str, ins: list[tuple[int, ...]], tops: int, match: str) -> None:
    with pytest.raises(LayerError, match=match):
        layer_of(text, bottoms=len(ins), tops=tops).shapes(ins)


def test_expected_shapes() -> None:
    layer = layer_of(_text("LSTM", "expose_hidden: true"), bottoms=5, tops=3)
    assert [layer.expects(i, [X, None, None, None, None]) for i in (1, 2, 3, 4)] == [CONT, None, STATE, STATE]
    assert layer_of('type: "LSTMUnit"', bottoms=3, tops=2).expects(2, [(1, 3, 2), None, None]) == (1, 3)


CAPTION_NET = """
layer { name: "in" type: "Input" top: "words" top: "cont" top: "image" top: "target"
  input_param { shape { dim: 6 dim: 4 } shape { dim: 6 dim: 4 } shape { dim: 4 dim: 5 } shape { dim: 6 dim: 4 } } }
layer { name: "embed" type: "Embed" bottom: "words" top: "vectors" embed_param {
  num_output: 8 input_dim: 7 bias_term: false weight_filler { type: "uniform" min: -0.5 max: 0.5 } } }
layer { name: "lstm" type: "LSTM" bottom: "vectors" bottom: "cont" bottom: "image" top: "h" recurrent_param {
  num_output: 16 weight_filler { type: "uniform" min: -0.3 max: 0.3 } } }
layer { name: "scores" type: "InnerProduct" bottom: "h" top: "scores" inner_product_param {
  num_output: 7 axis: 2 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "scores" bottom: "target" top: "loss"
  softmax_param { axis: 2 } loss_param { ignore_label: -1 } }
"""


def test_a_captioning_net_learns() -> None:
    """Embed, LSTM with a static input, a loss over time: the whole road, and a state that counts as the net's."""
    net = Net(prepare(text_format.Parse(CAPTION_NET, pb.NetParameter())), seed=1)
    assert [p.node for p in net.learnable] == ["embed", *["lstm"] * 4, *["scores"] * 2]
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(0, 7, (6, 4), generator=rng).float()
    cont = torch.ones(6, 4)
    cont[0] = cont[3, 1] = 0
    target = words.roll(-1, 0)
    target[5] = -1
    feed = {"words": words, "cont": cont, "image": torch.randn(4, 5, generator=rng), "target": target}
    optimizer = torch.optim.Adam([p.param for p in net.learnable], 0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = net(feed).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    state = dict(net.named_buffers())
    assert {n.rsplit(".", 1)[1] for n in state} == {"h", "c"}
    assert all(b.any() for b in state.values())
