"""Quantization as caffe-jacinto's binary does it: its blobs, parameters and qparams, pass by pass, through pycaffe and
through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import caffejacinto_py.pycaffe as caffe
from caffejacinto_py.compress import quantize
from caffejacinto_py.compress.binary import Binary
from caffejacinto_py.compress.numerics import QParams
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model
from tests.conftest import shared

FOLDER = shared("golden/jacinto/quantization")
CASES = sorted(p.name.removesuffix(".npz") for p in FOLDER.glob("*.npz") if ".rint" not in p.name)
RINT = sorted(p.name.removesuffix(".rint.npz") for p in FOLDER.glob("*.rint.npz"))
RUNS = [(case, "cpu") for case in CASES] + [(case, "gpu") for case in RINT]
# values within rounding noise of a tie may come out one step apart: here none does, other BLAS libraries may have some
RARE = 1e-3
ENGINE = ("plain_default", "plain_stored_w8a8_wnooffset", "dyadic_default", "residual_default", "plain_start3")


@pytest.fixture(autouse=True)
def _compat() -> Iterator[None]:
    yield
    caffe.set_compat()


def load(case: str, mode: str) -> dict[str, np.ndarray]:
    arrays = dict(np.load(FOLDER / f"{case}.npz"))
    if mode == "gpu":
        arrays.update({k: v for k, v in np.load(FOLDER / f"{case}.rint.npz").items() if k != "differing"})
    return arrays


def weights(case: str) -> Path:
    if "_stored_" in case:
        return FOLDER / f"{case.replace('_stored_', '_')}.final.caffemodel"
    return FOLDER / f"{case.split('_')[0]}.caffemodel"


def row(q: QParams) -> list[float]:
    """The columns of `qparams`."""
    return [q.quantize, q.bits, 0, q.positive, q.unsigned, q.scale, q.applied, q.shift, q.offset, q.min, q.max]


def check_qparams(hook: Any, rows: np.ndarray, want: np.ndarray, *, splits: bool) -> int:
    """Compares one pass; returns how many rows were there."""
    seen = 0
    for name, values in zip(rows, want, strict=True):
        layer, kind, index = str(name).split("|")
        if layer not in hook.tables:
            assert np.isnan(values).all() or hook.scheme.fixed or not splits, name
            continue
        q = hook.tables[layer][("in", "w", "out").index(kind)][int(index)]
        np.testing.assert_allclose(np.array(row(q), float), values, rtol=1e-5, atol=1e-7, err_msg=str(name))
        seen += 1
    return seen


def check_blob(got: np.ndarray, want: np.ndarray, step: float, name: str) -> None:
    """Equal to float precision, but for rare values one step away."""
    off = ~np.isclose(got, want, rtol=1e-5, atol=1e-5 * max(np.abs(want).max(), 1e-3), equal_nan=True)
    assert off.mean() <= RARE, f"{name}: {off.sum()} of {off.size} values differ"
    assert (np.abs(got - want)[off] <= 1.01 * step).all(), name


def step_of(hook: Any, memory: str) -> float:
    """The coarsest step of the tops in a piece of memory."""
    tops = [
        q
        for n in hook.graph.nodes
        for v, q in zip(n.outputs, hook.tables.get(n.name, ((), (), ()))[2], strict=False)
        if hook.memory[v.name] == memory and q.quantize
    ]
    return max((1 / q.scale for q in tops), default=0.0)


def check_params(params: Any, arrays: dict[str, np.ndarray]) -> None:
    for key, want in arrays.items():
        if key.startswith("param/"):
            layer, index = key.removeprefix("param/").rsplit("/", 1)
            got = params(layer, int(index))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_through_pycaffe(case: str, mode: str) -> None:
    arrays = load(case, mode)
    caffe.set_compat(quantization=mode)
    net = caffe.Net(str(FOLDER / f"{case}.prototxt"), str(weights(case)), caffe.TEST)
    hook = quantize.find(net._net)
    assert isinstance(hook, Binary)
    seen = 0
    for k, frame in enumerate(arrays["frames"]):
        net.blobs["data"].data[...] = frame
        net.forward()
        seen += check_qparams(hook, arrays["qparam_rows"], arrays["qparams"][k], splits=True)
        for key in (k for k in arrays if k.startswith("blob/")):
            name = key.removeprefix("blob/")
            # in the binary the first bottom of a plain sum shows the sum; here every name has memory of its own
            last = [b for b in net.blobs if hook.memory[b] == hook.memory[name]][-1]
            check_blob(net.blobs[last].data, arrays[key][k], step_of(hook, hook.memory[name]), f"{name}, pass {k}")
    assert seen
    check_params(lambda layer, i: net.params[layer][i].data, arrays)


@pytest.mark.parametrize(("case", "mode"), [run for run in RUNS if run[0] in ENGINE])
@pytest.mark.parametrize("road", ["forward", "run"])
def test_through_the_engine(case: str, mode: str, road: str) -> None:
    """The fast road too, which reuses memory: outputs, parameters and qparams."""
    arrays = load(case, mode)
    doc = load_net(FOLDER / f"{case}.prototxt")
    dialect = resolve_dialect(doc.message, compat=Compat(quantization=mode))
    net = Net(prepare(doc, phase="TEST", dialect=dialect), seed=0)
    hook = quantize.attach(net)
    net.load(read_model(weights(case)))
    seen = 0
    for k, frame in enumerate(arrays["frames"]):
        data = {"data": torch.from_numpy(frame.copy())}
        with torch.no_grad():
            if road == "forward":
                outputs = net(data).outputs
            else:
                for _ in net.run(data):
                    pass
                outputs = {v.name: data[v.name] for v in net.graph.outputs}
        seen += check_qparams(hook, arrays["qparam_rows"], arrays["qparams"][k], splits=False)
        for name, value in outputs.items():
            check_blob(value.numpy(), arrays[f"blob/{name}"][k], step_of(hook, hook.memory[name]), f"{name}, pass {k}")
    assert seen
    check_params(lambda layer, i: net.params[layer][i].detach().numpy(), arrays)


@pytest.mark.parametrize("case", ["dyadic_default"])
def test_the_two_builds_really_differ(case: str) -> None:
    """Otherwise the `rint` runs would prove nothing."""
    assert any(
        not np.array_equal(load(case, "cpu")[k], load(case, "gpu")[k], equal_nan=True) for k in load(case, "cpu")
    )


def test_the_library_s_printed_net_is_what_ours_prints() -> None:
    """quantization_param of every layer, fields of the net, and the name."""
    case = "plain_w8a8_wnooffset"
    arrays = load(case, "cpu")
    caffe.set_compat(quantization="cpu")
    net = caffe.Net(str(FOLDER / f"{case}.prototxt"), str(weights(case)), caffe.TEST)
    for frame in arrays["frames"]:
        net.blobs["data"].data[...] = frame
        net.forward()
    want = load_net(FOLDER / f"{case}.final.prototxt").message
    got = quantize.dump(net._net)
    assert got.name == want.name
    assert got.quantize
    assert got.net_quantization_param == want.net_quantization_param
    for mine, theirs in zip(got.layer, want.layer, strict=True):
        a, b = mine.quantization_param, theirs.quantization_param
        assert (a.precision, a.rounding_scheme, a.quantized_infer_count) == (b.precision, b.rounding_scheme, 2)
        for field in ("qparam_in", "qparam_w", "qparam_out"):
            for p, q in zip(getattr(a, field), getattr(b, field), strict=True):
                assert {f.name for f, _ in p.ListFields()} == {f.name for f, _ in q.ListFields()}, mine.name
                for f, value in q.ListFields():
                    assert getattr(p, f.name) == pytest.approx(value, rel=1e-5, abs=1e-6), (mine.name, f.name)
