"""Every layer type that runs in float16 and bfloat16, against itself in float32: values, and gradients through it."""

from __future__ import annotations

import pytest
import torch

from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers import registry
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.precision import AS_BOTTOMS, resolve
from caffejacinto_py.schema.text import parse

LAYERS = {
    "Convolution": ["convolution_param { num_output: 4 kernel_size: 3 pad: 2 dilation: 2 }", "GROUPS"],
    "DepthwiseConvolution": ["convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"],
    "ConvolutionDepthwise": ["convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"],
    "Deconvolution": ["convolution_param { num_output: 4 kernel_size: 4 stride: 2 pad: 1 }"],
    "InnerProduct": ["inner_product_param { num_output: 6 }", "inner_product_param { num_output: 6 transpose: true }"],
    "Pooling": [
        "pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 }",
        "pooling_param { pool: MAX kernel_size: 2 stride: 3 }",
        "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }",
        "pooling_param { pool: AVE global_pooling: true }",
    ],
    "BatchNorm": ["", "batch_norm_param { use_global_stats: true eps: 0.1 }"],
    "Scale": ["scale_param { bias_term: true }", "scale_param { axis: 0 num_axes: 0 }"],
    "Bias": [""],
    "Dropout": [""],
    "ReLU": ["relu_param { negative_slope: 0.1 }"],
    "PReLU": [""],
    "ELU": [""],
    "Sigmoid": [""],
    "TanH": [""],
    "Clip": ["clip_param { min: -50 max: 50 }"],
    "ReLU6": [""],
    "Eltwise": [
        "bottom: 'c' eltwise_param { operation: MAX }",
        "bottom: 'c' eltwise_param { operation: PROD }",
        "bottom: 'c' eltwise_param { coeff: 1 coeff: -0.5 }",
    ],
    "Concat": ["bottom: 'c'"],
    "Slice": [""],
    "Split": [""],
    "Flatten": [""],
    "Reshape": ["reshape_param { shape { dim: 0 dim: -1 } }"],
    "Permute": ["permute_param { order: 0 order: 2 order: 3 order: 1 }"],
    "ShuffleChannel": ["shuffle_channel_param { group: 2 }"],
    "Silence": [],
}
CASES = [(kind, fields) for kind, several in LAYERS.items() for fields in several]
TEXT = """
layer {{ name: 'in' type: 'Input' top: 'data' input_param {{ shape {{ dim: 2 dim: 4 dim: 7 dim: 7 }} }} }}
layer {{ name: 'c' type: 'Convolution' bottom: 'data' top: 'c'
  convolution_param {{ num_output: 4 kernel_size: 1 weight_filler {{ type: 'xavier' }} }} }}
layer {{ name: 'x' type: '{kind}' bottom: 'c' top: 'x' {fields} }}
layer {{ name: 'p' type: 'Power' bottom: 'x' top: 'p' power_param {{ power: 3 shift: 0.5 }} }}
layer {{ name: 'l' type: 'Reduction' bottom: 'p' top: 'l' loss_weight: 1 }}
"""


def run(
    kind: str, fields: str, precision: str, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Loss, gradient of the first layer's weights, what the layer ran in."""
    fields = fields.replace("GROUPS", "convolution_param { num_output: 4 group: 4 kernel_size: 3 pad: 1 }")
    for name in ("convolution_param {", "inner_product_param {"):
        fields = fields.replace(name, name + " weight_filler { type: 'xavier' }")
    graph = prepare(parse(TEXT.format(kind=kind, fields=fields), "NetParameter"), phase="TRAIN")
    table = resolve(graph, precision)
    net = Net(graph, seed=1, types=table, device=device)
    torch.manual_seed(0)
    data = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(2))
    loss = net({"data": data}).loss
    loss.backward()
    grad = net.params["c"][0].grad
    assert grad is not None
    return loss.detach(), grad, table.rows["x"].runs


@pytest.mark.parametrize(("precision", "loss_off", "grad_off"), [("fp16", 0.005, 0.02), ("bf16", 0.05, 0.1)])
@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_as_in_float32(kind: str, fields: str, precision: str, loss_off: float, grad_off: float) -> None:
    loss, grad, runs = run(kind, fields, precision)
    want, want_grad, _ = run(kind, fields, "fp32")
    assert runs in ("FLOAT16" if precision == "fp16" else "BFLOAT16", AS_BOTTOMS)
    assert float((loss - want).abs() / want.abs()) < loss_off
    assert float((grad - want_grad).norm() / want_grad.norm()) < grad_off


def test_every_type_that_may_is_here() -> None:
    """Pooling says so per layer: STOCHASTIC stays in float32."""
    assert {t for t in registry.types() if registry.find(t).narrows is not None} | {"Pooling"} == set(LAYERS)


def test_sums_of_a_window_do_not_overflow() -> None:
    text = TEXT.format(kind="Pooling", fields="pooling_param { pool: AVE kernel_size: 5 stride: 3 pad: 2 }")
    text = text[: text.index("layer { name: 'p'")].replace("'xavier'", "'constant' value: 5000")
    graph = prepare(parse(text, "NetParameter"), phase="TEST")
    top = Net(graph, types=resolve(graph, "fp16"))({"data": torch.ones(2, 4, 7, 7)}).outputs["x"]
    assert float(top.max()) == 20000.0


def test_stochastic_pooling_stays() -> None:
    text = TEXT.format(kind="Pooling", fields="pooling_param { pool: STOCHASTIC kernel_size: 2 }")
    assert resolve(prepare(parse(text, "NetParameter"), phase="TEST"), "fp16").rows["x"].runs == "FLOAT"
