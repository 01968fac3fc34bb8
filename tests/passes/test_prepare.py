"""Shapes, params, need-backward, in-place and splits on real layers."""

from __future__ import annotations

import pytest
from google.protobuf import text_format

from caffejacinto_py.errors import LayerError, ManyErrors
from caffejacinto_py.ir.graph import Value
from caffejacinto_py.ir.verify import verify
from caffejacinto_py.passes import prepare, splits
from caffejacinto_py.passes.shapes import reshape
from caffejacinto_py.schema import pb

DATA = "layer { name: 'in' type: 'Input' top: 'data' input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } } }"
LABEL = "layer { name: 'lab' type: 'Input' top: 'label' input_param { shape { dim: 2 } } }"
LOSS = "layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'ip' bottom: 'label' top: 'loss' }"


def conv(name: str, bottom: str, more: str = "") -> str:
    return f"""layer {{ name: '{name}' type: 'Convolution' bottom: '{bottom}' top: '{name}' {more}
        convolution_param {{ num_output: 4 kernel_size: 3 weight_filler {{ type: 'xavier' }} }} }}"""


def ip(bottom: str, more: str = "") -> str:
    return f"""layer {{ name: 'ip' type: 'InnerProduct' bottom: '{bottom}' top: 'ip' {more}
        inner_product_param {{ num_output: 5 }} }}"""


def relu(bottom: str, top: str | None = None) -> str:
    return f"layer {{ name: 'relu_{bottom}' type: 'ReLU' bottom: '{bottom}' top: '{top or bottom}' }}"


def graph(*texts: str, **options):
    g = prepare(text_format.Parse("\n".join(texts), pb.NetParameter()), phase="TRAIN", **options)
    verify(g)
    return g


def test_shapes_and_params_of_a_small_net():
    g = graph(DATA, LABEL, conv("c", "data"), relu("c"), ip("c"), LOSS)
    assert g.shapes[Value("c", 1)] == (2, 4, 6, 6)
    assert g.shapes[Value("loss")] == ()
    assert [(p.node, p.index, p.shape) for p in g.params] == [
        ("c", 0, (4, 3, 3, 3)),
        ("c", 1, (4,)),
        ("ip", 0, (5, 144)),
        ("ip", 1, (5,)),
    ]


def test_every_shape_error_is_collected():
    bad = "layer { name: 'b1' type: 'Convolution' bottom: 'data' top: 'b1' convolution_param { num_output: 4 } }"
    also = "layer { name: 'b2' type: 'Concat' bottom: 'data' bottom: 'label' top: 'b2' }"
    with pytest.raises(ManyErrors) as caught:
        graph(DATA, LABEL, bad, also, relu("b1"))
    assert ["'b1'" in str(caught.value.errors[0]), "'b2'" in str(caught.value.errors[1])] == [True, True]
    assert len(caught.value.errors) == 2


def test_reshape_follows_the_inputs():
    g = graph(DATA, conv("c", "data"))
    assert reshape(g, {"data": (7, 3, 10, 12)}).shapes[Value("c")] == (7, 4, 8, 10)


def test_a_label_takes_the_shape_its_consumer_expects():
    source = """layer { name: 'd' type: 'HDF5Data' top: 'data' top: 'target'
            hdf5_data_param { source: 'x' batch_size: 6 } }
        layer { name: 'l' type: 'EuclideanLoss' bottom: 'data' bottom: 'target' top: 'l' }"""
    g = graph(source, data_shape=(3, 4, 5))
    assert g.shapes[Value("target")] == g.shapes[Value("data")] == (6, 3, 4, 5)


def test_data_without_labels_are_what_their_reader_expects_else_an_image():
    source = """layer { name: 'a' type: 'Data' top: 'data' data_param { source: 'x' batch_size: 6 } }
        layer { name: 'b' type: 'Data' top: 'scores' data_param { source: 'y' batch_size: 6 } }
        layer { name: 'l' type: 'DistillSoftmaxLoss' bottom: 'c' bottom: 'scores' top: 'l' }"""
    first, second, loss = (f"layer {part}" for part in source.split("layer ")[1:])
    g = graph(first, second, conv("c", "data"), loss, data_shape=(3, 9, 9))
    assert g.shapes[Value("data")] == (6, 3, 9, 9)
    assert g.shapes[Value("scores")] == g.shapes[Value("c")] == (6, 4, 7, 7)


# --- params ----------------------------------------------------------------------------------------------------------
def shared(a: str, b: str, second: str = "data2") -> tuple[str, ...]:
    other = "layer { name: 'in2' type: 'Input' top: 'data2' input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } } }"
    return (
        DATA,
        other,
        conv("c1", "data", f"param {{ name: 'w' {a} }}"),
        conv("c2", second, f"param {{ name: 'w' {b} }}"),
    )


def test_named_params_are_shared_and_inherit_multipliers():
    g = graph(*shared("", "lr_mult: 3 decay_mult: 0"))
    w = g.params[0]
    assert w.users == (("c1", 0), ("c2", 0))
    assert (w.lr_mult, w.decay_mult, w.name) == (3, 0, "w")
    assert [(p.node, p.index, p.name) for p in g.params] == [("c1", 0, "w"), ("c1", 1, "1"), ("c2", 1, "1")]


def test_sharers_must_agree():
    with pytest.raises(LayerError, match="lr_mult 3 differs from the owner's 2"):
        graph(*shared("lr_mult: 2", "lr_mult: 3"))
    with pytest.raises(LayerError, match=r"STRICT|PERMISSIVE"):
        graph(*shared("", "", second="c1"))
    with pytest.raises(LayerError, match="values where the owner has"):
        graph(*shared("", "share_mode: PERMISSIVE", second="c1"))


def test_too_many_param_entries_are_refused():
    with pytest.raises(LayerError, match="3 param entries for 2 learnable blobs"):
        graph(DATA, conv("c", "data", "param { } param { } param { }"))


# --- backward --------------------------------------------------------------------------------------------------------
def needs(g) -> dict[str, tuple[bool, ...]]:
    return {n.name: n.needs for n in g.nodes if n.inputs}


def test_data_and_labels_need_no_gradient():
    g = graph(DATA, LABEL, conv("c", "data"), relu("c"), ip("c"), LOSS)
    assert needs(g) == {"c": (False,), "relu_c": (True,), "ip": (True,), "loss": (True, False)}


def test_frozen_layers_and_what_is_below_them_are_skipped():
    frozen = "param { lr_mult: 0 } param { lr_mult: 0 }"
    g = graph(DATA, LABEL, conv("c", "data", frozen), relu("c"), ip("c"), LOSS)
    assert needs(g)["ip"] == (False,)
    assert [n.name for n in g.nodes if n.backward] == ["ip", "loss"]


def test_propagate_down_overrides_and_no_loss_means_no_backward():
    g = graph(DATA, LABEL, conv("c", "data"), ip("c", "propagate_down: false"), LOSS)
    assert needs(g)["ip"] == (False,)
    assert not g.node("c").backward
    assert not any(n.backward for n in graph(DATA, conv("c", "data")).nodes)


def test_force_backward_reaches_the_data():
    g = graph("force_backward: true", DATA, LABEL, conv("c", "data"), ip("c"), LOSS)
    assert needs(g) == {"c": (True,), "ip": (True,), "loss": (True, False)}


# --- in place --------------------------------------------------------------------------------------------------------
def test_in_place_only_where_nobody_else_looks():
    g = graph(DATA, LABEL, conv("c", "data"), relu("c"), ip("c"), LOSS)
    assert g.node("relu_c").inplace == 0
    drop = "layer { name: 'drop' type: 'Dropout' bottom: 'c' top: 'c' }"
    g = graph(DATA, LABEL, conv("c", "data"), relu("c"), drop, ip("c"), LOSS)
    assert g.node("relu_c").inplace == 0
    assert g.node("drop").inplace is None, "ReLU keeps its output for backward"
    assert graph(DATA, relu("data")).node("relu_data").inplace is None, "a source's blob belongs to the feeder"
    second = "layer { name: 's' type: 'Sigmoid' bottom: 'c' top: 's' }"
    g = graph(DATA, LABEL, conv("c", "data"), second, relu("c"), ip("c"), LOSS)
    assert g.node("relu_c").inplace is None, "s reads the same value"


def test_a_sum_overwrites_the_branch_that_nobody_needs():
    total = "layer { name: 'sum' type: 'Eltwise' bottom: 'r' bottom: 'd' top: 'sum' }"
    third = conv("d", "r", "").replace("kernel_size: 3", "kernel_size: 1")
    g = graph(DATA, LABEL, conv("c", "data"), relu("c", "r"), third, total, ip("sum"), LOSS)
    assert g.node("relu_c").inplace == 0, "another name, but nobody else reads c"
    assert g.node("sum").inplace == 1, "r is read by d"


# --- fuse ------------------------------------------------------------------------------------------------------------
NORM = "layer { name: 'bn' type: 'BatchNorm' bottom: 'c' top: 'bn' }"
SCALE = "layer { name: 'sc' type: 'Scale' bottom: 'bn' top: 'sc' scale_param { bias_term: true } }"


def test_scale_behind_batch_norm_is_absorbed():
    g = graph(DATA, LABEL, conv("c", "data"), NORM, SCALE, ip("sc"), LOSS)
    assert [n.name for n in g.nodes if n.absorbed] == ["sc"]


@pytest.mark.parametrize(
    "change",
    [
        ("scale_param { ", "scale_param { num_axes: 2 "),
        ("layer { name: 'sc'", "layer { name: 'other' type: 'Power' bottom: 'bn' top: 'p' } layer { name: 'sc'"),
    ],
)
def test_other_scales_stay(change):
    g = graph(DATA, LABEL, conv("c", "data"), NORM, SCALE.replace(*change), ip("sc"), LOSS)
    assert not any(n.absorbed for n in g.nodes)


# --- splits ----------------------------------------------------------------------------------------------------------
def test_split_names_are_caffes():
    accuracy = "layer { name: 'acc' type: 'Accuracy' bottom: 'ip' bottom: 'label' top: 'acc' }"
    g = splits.insert(graph(DATA, LABEL, ip("data"), relu("ip"), LOSS, accuracy))
    verify(g)
    assert [n.name for n in g.nodes] == [
        "in", "lab", "label_lab_0_split", "ip", "relu_ip", "ip_relu_ip_0_split", "loss", "acc",
    ]  # fmt: skip
    assert [v.name for v in g.node("acc").inputs] == ["ip_relu_ip_0_split_1", "label_lab_0_split_1"]


def test_a_loss_weight_counts_as_a_reader():
    weighted = "layer { name: 'l2' type: 'EuclideanLoss' bottom: 'data' bottom: 'data' top: 'l2' loss_weight: 2 }"
    g = splits.insert(graph(DATA, weighted, "layer { name: 'p' type: 'Power' bottom: 'l2' top: 'p' }"))
    split = g.node("l2_l2_0_split")
    assert split.loss_weights == (2, 0)
    assert g.node("l2").loss_weights == (0,)
    assert [v.name for v in g.node("p").inputs] == ["l2_l2_0_split_1"]


def test_group_lasso_fields_are_named(caplog):
    more = "param { kernel_shape_decay_mult: 2 block_group_lasso { xdimen: 5 ydimen: 1 } } param { }"
    with caplog.at_level("WARNING"):
        graph(DATA, conv("c", "data", more))
    assert len(caplog.records) == 2
    assert all("of param has no effect" in r.getMessage() and "layer 'c'" in r.getMessage() for r in caplog.records)
