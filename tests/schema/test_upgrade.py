"""Upgrades, text in and text out, with the places that survive; reading files."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffejacinto_py.errors import CaffeError, PrototxtError
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.text import Document, dumps, parse
from caffejacinto_py.schema.upgrade import load_net, load_solver, upgrade_net, upgrade_solver


def upgraded(text: str) -> Document:
    doc = parse(text, "NetParameter", file="f")
    doc.notices = upgrade_net(doc.message, doc.locs)
    return doc


def same(doc: Document, text: str) -> None:
    assert dumps(doc.message) == dumps(parse(text, "NetParameter").message)


def line(doc: Document, *path: str | int) -> int | None:
    loc = doc.locs.find(path)
    return loc.line if loc else None


V0 = """name: "old"
layers {
  layer { name: "d" type: "data" source: "db" batchsize: 3
          scale: 0.5 meanfile: "m" cropsize: 2 mirror: true rand_skip: 4 }
  top: "data" top: "label"
}
layers { layer { name: "pad1" type: "padding" pad: 2 } bottom: "data" top: "padded" }
layers {
  layer {
    name: "conv1" type: "conv" num_output: 4 kernelsize: 5 stride: 2 group: 1 biasterm: false
    weight_filler { type: "gaussian"
                    std: 0.25 }
    blobs_lr: 1 blobs_lr: 2
    weight_decay: 1 weight_decay: 0
    alpha: 3
  }
  bottom: "padded"
  top: "conv1"
}
layers { layer { name: "pool1" type: "pool" pool: AVE kernelsize: 3 stride: 2 pad: 1 } bottom: "conv1" top: "pool1" }
layers { layer { name: "lrn" type: "lrn" local_size: 3 alpha: 2 beta: 0.5 k: 2 } bottom: "pool1" top: "lrn" }
layers { layer { name: "ip" type: "innerproduct" num_output: 7 bias_filler { value: 1 } } bottom: "lrn" top: "ip" }
layers { layer { name: "loss" type: "softmax_loss" } bottom: "ip" bottom: "label" }
"""
V0_NOW = """name: "old"
layer {
  name: "d" type: "Data" top: "data" top: "label"
  transform_param { scale: 0.5 mean_file: "m" crop_size: 2 mirror: true }
  data_param { source: "db" batch_size: 3 rand_skip: 4 }
}
layer {
  name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param {
    num_output: 4 kernel_size: 5 stride: 2 pad: 2 group: 1 bias_term: false
    weight_filler { type: "gaussian" std: 0.25 }
  }
}
layer {
  name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }
}
layer {
  name: "lrn" type: "LRN" bottom: "pool1" top: "lrn"
  lrn_param { local_size: 3 alpha: 2 beta: 0.5 k: 2 }
}
layer {
  name: "ip" type: "InnerProduct" bottom: "lrn" top: "ip"
  inner_product_param { num_output: 7 bias_filler { value: 1 } }
}
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" }
"""


def test_v0_with_padding() -> None:
    doc = upgraded(V0)
    same(doc, V0_NOW)
    assert any("f:15:5: layer 'conv1': 'alpha' means nothing to a 'conv' layer" in n for n in doc.notices)
    assert line(doc, "layer", 0, "data_param", "batch_size") == 3
    assert line(doc, "layer", 0, "transform_param", "crop_size") == 4
    assert line(doc, "layer", 1) == 8
    assert line(doc, "layer", 1, "convolution_param", "kernel_size", 0) == 10
    assert line(doc, "layer", 1, "convolution_param", "weight_filler", "std") == 12
    assert line(doc, "layer", 1, "param", 1, "lr_mult") == 13
    assert line(doc, "layer", 1, "param", 1, "decay_mult") == 14
    assert line(doc, "layer", 1, "bottom", 0) == 17
    assert line(doc, "layer", 2, "pooling_param", "pool") == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('layers { layer { name: "a" type: "nosuch" } }', "unknown V0 layer type 'nosuch'"),
        ('layers { layer { name: "a" type: "relu" } bottom: "x" }', "bottom 'x' is not produced"),
        (
            """input: "d" layers { layer { name: "p" type: "padding" pad: 1 } bottom: "d" top: "e" }
               layers { layer { name: "a" type: "relu" } bottom: "e" top: "f" }""",
            "only conv and pool",
        ),
        ('layers { name: "a" } layer { name: "b" }', "both 'layer' and 'layers'"),
        ('input: "a" input_dim: 1 input_dim: 2', "1 inputs need 4 'input_dim' values, but there are 2"),
        ('input: "a" input: "b" input: "c" input_shape { } input_shape { }', "3 inputs but 2 'input_shape'"),
    ],
)
def test_what_cannot_be_upgraded(text: str, words: str) -> None:
    with pytest.raises(PrototxtError, match=words) as caught:
        upgraded(text)
    assert caught.value.loc is not None


def test_v1() -> None:
    doc = upgraded("""layers {
  name: "d" type: DATA top: "data" include { phase: TRAIN }
  data_param { source: "db" backend: LMDB
               scale: 2 mean_file: "m" batch_size: 3 crop_size: 5 mirror: true }
}
layers {
  name: "c" type: CONVOLUTION bottom: "data" top: "c"
  blobs_lr: 1
  blobs_lr: 2
  weight_decay: 1 param: "w" param: "b" blob_share_mode: PERMISSIVE
  convolution_param { num_output: 3 kernel_size: 1 }
}
layers { name: "l" type: SOFTMAX_LOSS bottom: "c" bottom: "x" loss_weight: 0.5 loss_param { ignore_label: 1 } }
""")
    same(
        doc,
        """layer {
  name: "d" type: "Data" top: "data" include { phase: TRAIN }
  transform_param { scale: 2 mean_file: "m" crop_size: 5 mirror: true }
  data_param { source: "db" backend: LMDB batch_size: 3 }
}
layer {
  name: "c" type: "Convolution" bottom: "data" top: "c"
  param { name: "w" share_mode: PERMISSIVE lr_mult: 1 decay_mult: 1 } param { name: "b" lr_mult: 2 }
  convolution_param { num_output: 3 kernel_size: 1 }
}
layer {
  name: "l" type: "SoftmaxWithLoss" bottom: "c" bottom: "x" loss_weight: 0.5 loss_param { ignore_label: 1 }
}
""",
    )
    assert line(doc, "layer", 0, "transform_param", "mirror") == 4
    assert line(doc, "layer", 0, "data_param", "backend") == 3
    assert line(doc, "layer", 1, "param", 1, "lr_mult") == 9
    assert line(doc, "layer", 1, "param", 0, "name") == 10
    assert line(doc, "layer", 2, "loss_weight", 0) == 13


def test_every_v1_type_has_a_string() -> None:
    for value in pb.V1LayerParameter.LayerType.values():
        message = pb.NetParameter(layers=[pb.V1LayerParameter(name="x", type=value, bottom=["a"])])
        upgrade_net(message)
        assert bool(message.layer[0].type) == bool(value)


@pytest.mark.parametrize(
    "shapes",
    [
        "input_dim: 1 input_dim: 3 input_dim: 4 input_dim: 5 input_dim: 2 input_dim: 1 input_dim: 1 input_dim: 1",
        "input_shape { dim: 1 dim: 3 dim: 4 dim: 5 } input_shape { dim: [2, 1, 1, 1] }",
    ],
)
def test_input_fields(shapes: str) -> None:
    doc = upgraded(
        f'name: "n"\ninput: "a"\ninput: "b"\n{shapes}\nlayer {{ name: "r" type: "ReLU" bottom: "a" top: "r" }}'
    )
    same(
        doc,
        """name: "n" layer { name: "input" type: "Input" top: "a" top: "b" input_param {
             shape { dim: 1 dim: 3 dim: 4 dim: 5 } shape { dim: 2 dim: 1 dim: 1 dim: 1 } } }
           layer { name: "r" type: "ReLU" bottom: "a" top: "r" }""",
    )
    assert line(doc, "layer", 0) == 2
    assert line(doc, "layer", 0, "top", 1) == 3
    assert line(doc, "layer", 0, "input_param", "shape", 1, "dim", 0) == 4
    assert line(doc, "layer", 1, "bottom", 0) == 5


def test_input_without_shape_is_dropped() -> None:
    doc = upgraded('input: "a" layer { name: "r" }')
    same(doc, 'layer { name: "r" }')
    assert doc.notices == ["'input' without a shape ignored"]


def test_batch_norm_statistics_do_not_learn() -> None:
    doc = upgraded("""layer { name: "b" type: "BatchNorm" param { name: "m" lr_mult: 1 } param { } param { } }
layer { name: "n" type: "BatchNorm" param { } param { } param { } batch_norm_param { scale_bias: true } }
layer { name: "o" type: "BatchNorm" param { } }""")
    frozen, nvidia, other = doc.message.layer
    assert [(p.name, p.lr_mult, p.decay_mult) for p in frozen.param] == [("m", 0, 0), ("", 0, 0), ("", 0, 0)]
    assert [p.lr_mult for p in [*nvidia.param, *other.param]] == [1, 1, 1, 1]
    assert len(doc.notices) == 1


def test_a_modern_net_stays_as_it_is() -> None:
    text = 'name: "n" layer { name: "a" type: "Input" top: "a" input_param { shape { dim: 1 } } }'
    doc = upgraded(text)
    assert doc.notices == []
    same(doc, text)
    assert upgraded(dumps(upgraded(V0).message)).notices == []


def test_upgrade_of_a_message_without_text() -> None:
    message = parse(V0, "NetParameter").message
    assert upgrade_net(message)
    assert dumps(message) == dumps(parse(V0_NOW, "NetParameter").message)


def test_solver_type() -> None:
    doc = parse("base_lr: 1\nsolver_type: RMSPROP", "SolverParameter", file="f")
    assert upgrade_solver(doc.message, doc.locs) == ['solver_type: RMSPROP upgraded to type: "RMSProp"']
    assert dumps(doc.message) == 'base_lr: 1.0\ntype: "RMSProp"\n'
    assert line(doc, "type") == 2
    with pytest.raises(PrototxtError, match="both 'solver_type' and 'type'"):
        upgrade_solver(parse('solver_type: SGD type: "Adam"', "SolverParameter").message)


def test_solver_file(tmp_path: Path) -> None:
    path = tmp_path / "my_solver.prototxt"
    path.write_text('solver_type: ADAM\nnet_param {\n layers { name: "r"\n type: RELU bottom: "x" } }\n')
    doc = load_solver(path)
    assert doc.message.snapshot_prefix == str(tmp_path / "my_solver")
    assert doc.message.net_param.layer[0].type == "ReLU"
    assert line(doc, "net_param", "layer", 0, "type") == 4
    path.write_text(f'snapshot_prefix: "{tmp_path}"')
    assert load_solver(path).message.snapshot_prefix == str(tmp_path / "my_solver")
    path.write_text('snapshot_prefix: "else/where"')
    doc = load_solver(path)
    assert doc.message.snapshot_prefix == "else/where"
    assert doc.notices == []


FILES = {
    b"": ("empty", ""),
    b" \n\t\n": ("empty", ""),
    b"\x0a\x05LeNet\xa2\x06\x10\x0a\x04data": ("binary file, not a net text", "looks like a .caffemodel"),
    b"\x08\xe8\x07\x12\x03abc\x00": ("binary file", "looks like a .solverstate"),
    b"\x89HDF\r\n\x1a\n\x00\x00": ("HDF5", "--weights"),
    b"PK\x03\x04\x00": ("zip file", "prototxt"),
    b"\xff\xfel\x00a\x00": ("UTF-16", "save the file as UTF-8"),
    b"base_lr: 0.1": ("a net has no field 'base_lr'", "use --solver"),
    b'name: "caf\xe9"': ("byte 0xe9", "UTF-8"),
}


@pytest.mark.parametrize("data", FILES)
def test_files_that_are_no_net(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "net.prototxt"
    path.write_bytes(data)
    words, hint = FILES[data]
    with pytest.raises(CaffeError, match=words) as caught:
        load_net(path)
    assert hint in (caught.value.hint or "")
    assert caught.value.loc is not None
    assert caught.value.loc.file == str(path)
    assert caught.value.exit_code == 3


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train_val.prototxt").write_text("")
    with pytest.raises(PrototxtError, match="no such file") as caught:
        load_net(tmp_path / "trainval.prototxt")
    assert caught.value.hint == "did you mean 'train_val.prototxt'?"
    with pytest.raises(PrototxtError, match="directory"):
        load_net(tmp_path)
    with pytest.raises(PrototxtError, match="no such directory"):
        load_net(tmp_path / "a" / "b")


def test_comments_in_any_encoding_crlf_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_bytes(b'\xef\xbb\xbfname: "n#\xc3\xa9" # caf\xe9 \xff\r\nlayer { name: "a" }\r\n')
    doc = load_net(path)
    assert doc.message.name == "n#é"
    assert doc.locs.find(("layer", 0, "name")) == (str(path), 2, 9)
