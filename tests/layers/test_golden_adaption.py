"""Every single-layer vector of the ADaPTION binary (CPU), through whole nets: forward, gradients, rewritten blobs.

Rounded values must be equal; sums agree to 1e-5 of the largest value, as they add up in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.upgrade import load_net
from tests.conftest import SHARED

FOLDER = SHARED / "golden/adaption"
CASES = sorted(p.stem for p in FOLDER.glob("*.prototxt"))
BINARY = replace(DIALECTS["adaption"], compat=Compat(adaption="cpu", lp_param="physical"))


def close(name: str, got: Any, want: np.ndarray) -> None:
    a = np.zeros_like(want) if got is None else got.detach().numpy()
    assert a.shape == want.shape, name
    worst = np.abs(a - want).max() / max(float(np.abs(want).max()), 1e-30)
    assert worst <= 1e-5, f"{name}: {worst} of the largest value"


@pytest.mark.parametrize("case", CASES or [pytest.param("", marks=pytest.mark.skip(reason="no reference data here"))])
def test_agrees_with_adaption(case: str) -> None:
    with np.load(FOLDER / f"{case}.npz") as z:
        data = {k: z[k] for k in z.files}
    net = Net(prepare(load_net(FOLDER / f"{case}.prototxt"), dialect=BINARY), seed=0)
    blobs = net.params.get("layer", [])
    for i, param in enumerate(blobs):
        param.data.copy_(torch.from_numpy(data[f"param/{i}"]))
    sums = bool(blobs)
    inputs = {k[7:]: torch.from_numpy(v).requires_grad_() for k, v in data.items() if k.startswith("bottom/")}
    outputs = net(inputs).outputs
    for key, want in data.items():
        kind, _, name = key.partition("/")
        if kind == "top" and sums:
            close(key, outputs[name], want)
        elif kind == "top":
            np.testing.assert_array_equal(outputs[name].detach().numpy(), want, err_msg=key)
    for i, param in enumerate(blobs):  # a copy without `param_after` is left as it was
        want = data.get(f"param_after/{i}", data[f"param/{i}"])
        np.testing.assert_array_equal(param.detach().numpy(), want, err_msg=f"blob {i}")
    seeds = {k[9:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("top_diff/")}
    if not seeds:
        return
    torch.autograd.backward([outputs[n] for n in seeds], list(seeds.values()))
    for key, want in data.items():
        kind, _, name = key.partition("/")
        if kind == "param_diff":
            close(key, blobs[int(name)].grad, want)
        elif kind == "bottom_diff" and case.startswith("chain_relu"):
            # ADaPTION's ReLU looks at the blob that LPAct has overwritten; ours lets values through that became 0
            lost = (inputs[name] > 0) & (outputs[name] == 0)
            close(key, inputs[name].grad, want + np.where(lost, data[f"top_diff/{name}"], 0))
            assert lost.any()
            assert not want[lost.numpy()].any()
        elif kind == "bottom_diff":
            close(key, inputs[name].grad, want)
