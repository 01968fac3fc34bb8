"""A small net on scikit-learn's digits and a recipe of all kinds of stages, in an empty working directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from caffejacinto_py.data.datasets import make_digits

torch.set_num_threads(1)

NET = """
name: "small"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { scale: 0.0039 mirror: true } data_param { source: "train" batch_size: 8 backend: LMDB } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { scale: 0.0039 } data_param { source: "test" batch_size: 10 backend: LMDB } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 32 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 10 weight_filler { type: "msra" } } }
layer { name: "top1" type: "Accuracy" bottom: "ip" bottom: "label" top: "top1" include { phase: TEST } }
layer { name: "top5" type: "Accuracy" bottom: "ip" bottom: "label" top: "top5" include { phase: TEST }
  accuracy_param { top_k: 5 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
DEPLOY = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 1 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 32 kernel_size: 3 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
SOLVER = """
net: "net.prototxt"
test_iter: 4
test_interval: 5
base_lr: 0.05
lr_policy: "poly"
power: 1
momentum: 0.9
weight_decay: 0.0001
max_iter: 10
snapshot: 4
random_seed: 3
solver_mode: CPU
"""
RECIPE = """\
name: small
output: out
vars:
  train: digits_train_lmdb
  iterations: 10
defaults:
  solver: solver.prototxt
  deploy: deploy.prototxt
  set_train_net:
    layer.data.data_param.source: ${train}
  set_test_net:
    layer.data.data_param.source: digits_test_lmdb
stages:
  - name: initial
    set:
      max_iter: ${iterations}
  - name: sparse
    set:
      regularization_type: L1
      weight_decay: 1e-5
      sparse_mode: SPARSE_UPDATE
      sparsity_target: 0.6
      sparsity_start_factor: 0.7
      sparsity_step_factor: 0.1
      sparsity_step_iter: 3
      sparsity_threshold_maxratio: 1
      sparsity_threshold_value_max: 9
  - name: test
    kind: test
  - name: test_quantize
    kind: test
    set_net:
      quantize: true
      net_quantization_param: {bitwidth_weights: 8, bitwidth_activations: 8}
"""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(str(folder), size=8, test=100)
    return folder


@pytest.fixture
def folder(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("net", NET), ("deploy", DEPLOY), ("solver", SOLVER)):
        (tmp_path / f"{name}.prototxt").write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for part in ("train", "test"):
        (tmp_path / f"digits_{part}_lmdb").symlink_to(digits / f"digits_{part}_lmdb")
    monkeypatch.chdir(tmp_path)
    return tmp_path
