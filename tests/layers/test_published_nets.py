"""Small nets in the manner of published models: built whole, trained a step, saved and loaded, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import caffejacinto_py
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.weights import read_model, write_model

PSPNET = """
name: "pspnet in small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 17 dim: 17 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 dim: 1 dim: 17 dim: 17 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 8 kernel_size: 3 stride: 2 pad: 1 bias_term: false weight_filler { type: "msra" } } }
layer { name: "conv1/bn" type: "BN" bottom: "conv1" top: "conv1/bn"
  param { lr_mult: 1 decay_mult: 0 } param { lr_mult: 1 decay_mult: 0 } param { lr_mult: 0 } param { lr_mult: 0 }
  bn_param { slope_filler { type: "constant" value: 1 } bias_filler { type: "constant" value: 0 } momentum: 0.95 } }
layer { name: "conv1/relu" type: "ReLU" bottom: "conv1/bn" top: "conv1/bn" }
layer { name: "conv2" type: "Convolution" bottom: "conv1/bn" top: "conv2"
  convolution_param { num_output: 8 kernel_size: 3 pad: 2 hole: 2 weight_filler { type: "msra" } } }
layer { name: "pool" type: "Pooling" bottom: "conv2" top: "pool" pooling_param { pool: AVE kernel_size: 5 stride: 4 } }
layer { name: "up" type: "Interp" bottom: "pool" top: "up" interp_param { height: 9 width: 9 } }
layer { name: "both" type: "Concat" bottom: "conv2" bottom: "up" top: "both" }
layer { name: "score" type: "Convolution" bottom: "both" top: "score"
  convolution_param { num_output: 3 kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "full" type: "Interp" bottom: "score" top: "full" interp_param { zoom_factor: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "full" bottom: "label" top: "loss" }
"""
SEGNET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 10 dim: 12 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 dim: 1 dim: 10 dim: 12 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BN" bottom: "conv" top: "conv" param { lr_mult: 1 } param { lr_mult: 1 }
  bn_param { scale_filler { type: "constant" value: 1 } shift_filler { type: "constant" value: 0.001 } } }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" top: "mask"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layer { name: "up" type: "Upsample" bottom: "pool" bottom: "mask" top: "up" upsample_param { scale: 2 } }
layer { name: "score" type: "Convolution" bottom: "up" top: "score"
  convolution_param { num_output: 3 kernel_size: 3 pad: 1 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "score" bottom: "label" top: "loss" }
"""
MOBILE = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 4 dim: 9 dim: 9 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 } } }
layer { name: "dw" type: "ConvolutionDepthwise" bottom: "data" top: "dw"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 bias_term: false weight_filler { type: "msra" } } }
layer { name: "relu6" type: "ReLU6" bottom: "dw" top: "dw" }
layer { name: "shuffle" type: "ShuffleChannel" bottom: "dw" top: "shuffle" shuffle_channel_param { group: 2 } }
layer { name: "pool" type: "Pooling" bottom: "shuffle" top: "pool"
  pooling_param { kernel_size: 2 stride: 2 ceil_mode: false } }
layer { name: "reorg" type: "Reorg" bottom: "pool" top: "reorg" reorg_param { stride: 2 } }
layer { name: "selu" type: "SELU" bottom: "reorg" top: "reorg" }
layer { name: "flip" type: "Flip" bottom: "reorg" top: "flip" }
layer { name: "fc" type: "InnerProduct" bottom: "flip" top: "fc"
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
FACE = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 6 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 } } }
layer { name: "fc5" type: "InnerProduct" bottom: "data" top: "fc5"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "fc6" type: "MarginInnerProduct" bottom: "fc5" bottom: "label" top: "fc6" top: "lambda"
  margin_inner_product_param { num_output: 3 type: QUADRUPLE weight_filler { type: "xavier" }
    base: 1000 gamma: 0.12 power: 1 lambda_min: 5 iteration: 0 } }
layer { name: "margin" type: "LabelSpecificAdd" bottom: "fc6" bottom: "label" top: "margin"
  label_specific_add_param { bias: -0.01 } }
layer { name: "quiet" type: "Silence" bottom: "lambda" }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "margin" bottom: "label" top: "loss" }
layer { name: "center" type: "CenterLoss" bottom: "fc5" bottom: "label" top: "center" loss_weight: 0.008
  center_loss_param { num_output: 3 center_filler { type: "xavier" } } }
"""
C3D = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 8 dim: 8 } } }
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 } } }
layer { name: "conv1a" type: "NdConvolution" bottom: "data" top: "conv1a"
  convolution_param { num_output: 4 kernel_shape { dim: 3 dim: 3 dim: 3 } stride_shape { dim: 1 dim: 1 dim: 1 }
    pad_shape { dim: 1 dim: 1 dim: 1 } weight_filler { type: "gaussian" std: 0.01 } } }
layer { name: "pool1" type: "NdPooling" bottom: "conv1a" top: "pool1"
  pooling_param { pool: MAX kernel_shape { dim: 1 dim: 2 dim: 2 } stride_shape { dim: 1 dim: 2 dim: 2 } } }
layer { name: "conv2a" type: "Convolution3D" bottom: "pool1" top: "conv2a"
  convolution3d_param { num_output: 4 kernel_size: 3 kernel_depth: 3 pad: 1 temporal_pad: 1
    weight_filler { type: "xavier" } } }
layer { name: "pool2" type: "Pooling3D" bottom: "conv2a" top: "pool2"
  pooling3d_param { pool: MAX kernel_size: 2 kernel_depth: 2 stride: 2 temporal_stride: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "pool2" top: "fc"
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""
NETS = {"pspnet": PSPNET, "segnet": SEGNET, "mobile": MOBILE, "face": FACE, "c3d": C3D}


def net_of(text: str) -> Net:
    return Net(prepare(parse(text, "NetParameter", file="net.prototxt"), phase="TRAIN"), seed=3)


def batch(net: Net) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    out = {}
    for source in net.sources:
        for name, shape in zip(source.tops, source.shapes, strict=True):
            value = rng.integers(0, 3, shape) if name == "label" else rng.normal(size=shape)
            out[name] = torch.from_numpy(value.astype(np.float32))
    return out


@pytest.mark.parametrize("name", NETS)
def test_train_save_load(name: str, tmp_path: Path) -> None:
    net = net_of(NETS[name])
    inputs = batch(net)
    losses = []
    for _ in range(4):
        result = net(inputs)
        result.loss.backward()
        with torch.no_grad():
            for learnable in net.learnable:
                if learnable.lr_mult and learnable.param.grad is not None:
                    assert torch.isfinite(learnable.param.grad).all()
                    learnable.param.sub_(0.01 * learnable.lr_mult * learnable.param.grad)
                    learnable.param.grad = None
        losses.append(float(result.loss.detach()))
    assert losses[-1] < losses[0]
    path = tmp_path / "net.caffemodel"
    write_model(path, net.model())
    other = net_of(NETS[name])
    other.load(read_model(path))
    for mine, theirs in zip(net.learnable, other.learnable, strict=True):
        assert torch.equal(mine.param, theirs.param)


@pytest.mark.parametrize("name", NETS)
def test_check_is_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(NETS[name])
    found = caffejacinto_py.check(str(path), phase="TRAIN")
    assert found.status == "ok", found
