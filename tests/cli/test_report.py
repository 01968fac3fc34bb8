"""`test` with its options of compression: top-k, sparsity, absorbing, dumps and the report."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.compress.report import Report, Row, decibels, rebin
from caffejacinto_py.compress.report_html import html
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import heads, prepare
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model
from caffejacinto_py.solver.feed import Feed

Capture = pytest.CaptureFixture[str]
NET = """
name: "small <&>"
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 12 dim: 3 dim: 8 dim: 8 } shape { dim: 12 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 2 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 7 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
QUANTIZED = (
    NET + "quantize: true net_quantization_param { bitwidth_weights: 8 bitwidth_activations: 8 quantization_start: 1 }"
)
ARGS = ["test", "--model", "net.prototxt", "--weights", "net.caffemodel", "--iterations", "3", "--log-level", "error"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "quantized.prototxt").write_text(QUANTIZED)
    net = Net(prepare(load_net("net.prototxt"), phase="TEST"), seed=0)
    net.params["conv"][0].data[2] = 0
    for name in ("conv", "ip"):
        net.params[name][1].data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    for i, p in enumerate(net.params["bn"]):
        p.data.copy_(torch.linspace(0.5, 1.5, p.numel()) if i != 2 else torch.ones(1))
    write_model("net.caffemodel", net.model())
    return tmp_path


def run(capsys: Capture, *args: str) -> dict:  # type: ignore[type-arg]
    assert main([*ARGS, *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def blobs(file: str = "net") -> dict[str, np.ndarray]:
    """Every top of the three batches, by layer."""
    net = Net(prepare(load_net("net.prototxt"), phase="TEST"))
    net.load(read_model(f"{file}.caffemodel"))
    feed, found = Feed(net, seed=0), {}
    for _ in range(3):
        batch = feed.next()
        found.setdefault("data", []).append(batch["data"].numpy().copy())
        for node, outs in net.run(dict(batch)):
            found.setdefault(node.name, []).append(outs[0].detach().numpy().copy())
    return {name: np.stack(values) for name, values in found.items()}


def test_ranks_that_the_net_does_not_count(small: Path, capsys: Capture) -> None:
    """Against a sort of the scores; the label is always 2."""
    found = run(capsys)
    scores = blobs()["ip"].reshape(-1, 7)
    place = (scores > scores[:, 2:3]).sum(1)
    assert [(r["k"], r["scores"], r["output"]) for r in found["ranks"]] == [(1, "ip", None), (5, "ip", None)]
    assert [r["value"] for r in found["ranks"]] == pytest.approx([(place < k).mean() for k in (1, 5)])
    assert [o["name"] for o in found["outputs"]] == ["loss"]
    assert not found["simulated"]
    assert main(ARGS) == 0
    out = capsys.readouterr().out
    assert re.search(r"^top-5 = 0\.\d+$", out, re.MULTILINE)


def test_which_ranks_are_added() -> None:
    """An Accuracy counts its own rank; auxiliary losses are left out then; few classes have no top-5; pixels none."""
    head = NET[: NET.index('layer { name: "loss"')]
    accuracy = 'layer {{ name: "a{0}" type: "Accuracy" bottom: "ip" bottom: "label" top: "a{0}" '
    accuracy += "accuracy_param {{ top_k: {0} }} }}"
    aux = 'layer { name: "x" type: "InnerProduct" bottom: "conv" top: "x" inner_product_param { num_output: 9 } }'
    aux += 'layer { name: "xl" type: "SoftmaxWithLoss" bottom: "x" bottom: "label" top: "xl" }'

    def ranks(text: str) -> list[tuple[str, int, str, bool]]:
        graph, found = heads.score(prepare(parse(text, "NetParameter"), phase="TEST"))
        assert {t.output for t in found} <= {v.name for v in graph.outputs}
        return [(t.scores, t.k, t.output, t.added) for t in found]

    assert ranks(NET) == [("ip", 1, "top-1", True), ("ip", 5, "top-5", True)]
    assert ranks(head + accuracy.format(1) + aux) == [("ip", 1, "a1", False), ("ip", 5, "top-5", True)]
    assert ranks(head + accuracy.format(5)) == [("ip", 1, "top-1", True), ("ip", 5, "a5", False)]
    assert ranks(NET + aux) == [("ip", 1, "ip top-1", True), ("ip", 5, "ip top-5", True),
                                ("x", 1, "x top-1", True), ("x", 5, "x top-5", True)]  # fmt: skip
    assert ranks(NET.replace("num_output: 7", "num_output: 5")) == [("ip", 1, "top-1", True)]
    taken = NET.replace('top: "ip"', 'top: "top-1"').replace('"ip" bottom: "label"', '"top-1" bottom: "label"')
    assert ranks(taken) == [
        ("top-1", 1, "top-1'", True), ("top-1", 5, "top-5", True)]  # fmt: skip
    assert ranks(head) == []
    label = 'layer { name: "map" type: "DummyData" top: "map" dummy_data_param { shape { dim: 12 dim: 6 dim: 6 } } }'
    assert (
        ranks(head + label + NET[NET.index('layer { name: "loss"') :].replace('"ip"', '"conv"').replace("label", "map"))
        == []
    )


def test_sparsity(small: Path, capsys: Capture) -> None:
    found = run(capsys, "--display_sparsity")["sparsity"]
    assert found == {"zeros": 27, "count": 162, "fraction": 27 / 162,
                     "layers": [{"name": "conv", "zeros": 27, "count": 162}]}  # fmt: skip
    assert main([*ARGS[:-1], "info", "--display_sparsity"]) == 0
    out = capsys.readouterr()
    for line in (
        "Sparsity of the test net:",
        "conv_param_0(0.167)",
        "Total Sparsity (zero_weights/count) =  (27/162) 0.167",
    ):
        assert line in out.err
    assert "Zero weights: 27 of 162 (16.7 %)" in out.out


def test_absorbing_and_the_dump(small: Path, capsys: Capture) -> None:
    plain = run(capsys)
    found = run(capsys, "--optimize_net", "--output_model", "opt")
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    net = load_net("opt.prototxt").message
    assert [x.name for x in net.layer] == ["data", "conv", "relu", "ip", "loss"]
    again = run(capsys, "--model", "opt.prototxt", "--weights", "opt.caffemodel")
    assert again["loss"] == found["loss"]
    assert main([*ARGS, "--output_model", "net"]) == 2
    assert "would replace net.prototxt" in capsys.readouterr().err


class _Page(HTMLParser):
    """Tags and addresses of a page; complains about tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle"):
            assert self.open.pop() == tag


def check_page(text: str) -> None:
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.addresses == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in text
    assert "http" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for element in ET.fromstring(svg).iter():
            assert all(np.isfinite(float(element.get(k, 0))) for k in ("x", "y", "x1", "x2", "width", "cx"))
            assert float(element.get("width", 0)) >= 0


def test_report_of_a_float_net(small: Path, capsys: Capture) -> None:
    run(capsys, "--report", "out/of/it")
    found = json.loads((small / "out/of/it/report.json").read_text())
    values = blobs()
    tops = {r["layer"]: r for r in found["tops"] if r["name"] != "label"}
    assert list(tops) == ["data", "conv", "bn", "relu", "ip", "loss"]
    for name, row in tops.items():
        x = values[name]
        assert row["count"] == x.size
        assert row["zeros"] == pytest.approx((x == 0).mean())
        assert [row["min"], row["max"]] == pytest.approx([x.min(), x.max()], rel=1e-5)
        assert row["rms"] == pytest.approx(np.sqrt((x.astype(float) ** 2).mean()), rel=1e-5)
        assert sum(row["hist"]) in (0, (x != 0).sum())
        assert row["sqnr"] is None
        assert row["bits"] is None
    assert tops["relu"]["zeros"] > 0.1
    weight = next(r for r in found["weights"] if r["layer"] == "conv" and r["kind"] == "weight")
    assert weight["zeros"] == pytest.approx(27 / 162)
    assert weight["counted"]
    assert found["sparsity"]["zeros"] == 27
    assert found["ranks"][1]["k"] == 5
    page = (small / "out/of/it/report.html").read_text()
    check_page(page)
    assert "small &lt;&amp;&gt;: test report" in page
    assert "simulated" not in page


@pytest.mark.parametrize("compat", ["sound", "cpu"])
def test_report_of_a_quantized_net(small: Path, capsys: Capture, compat: str) -> None:
    """Float numbers are those of the float net, and the noise of the weights is what 8 bits make of them."""
    plain = run(capsys)
    found = run(capsys, "--model", "quantized.prototxt", "--report", "out", "--compat", f"quantization={compat}")
    assert found["simulated"]
    assert found["float"]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert 0 < abs(found["loss"] - plain["loss"]) < 0.3
    report = json.loads((small / "out/report.json").read_text())
    tops = {r["layer"]: r for r in report["tops"] if r["name"] != "label"}
    # the binary does not quantize what a DummyData layer makes
    for name in ("data", "relu", "ip") if compat == "sound" else ("relu", "ip"):
        assert tops[name]["bits"] == 8
        assert 15 < tops[name]["sqnr"] < 60, name
        assert tops[name]["low"] <= tops[name]["min"] + 1 / tops[name]["scale"]
    assert compat != "sound" or tops["relu"]["sqnr"] < tops["data"]["sqnr"]
    assert tops["relu"]["float_zeros"] == pytest.approx((blobs()["relu"] == 0).mean())
    weight = next(r for r in report["weights"] if r["layer"] == "conv" and r["kind"] == "weight")
    exact = read_model("net.caffemodel").layer("conv").blobs[0].astype(float)
    n = np.round(exact * weight["scale"] + weight["offset"])
    used = (n - weight["offset"]) / weight["scale"]
    assert weight["sqnr"] == pytest.approx(10 * np.log10((exact**2).sum() / ((exact - used) ** 2).sum()), abs=0.1)
    page = (small / "out/report.html").read_text()
    check_page(page)
    for words in ("Noise in activations", "<th>SQNR dB</th>", "simulated", "difference"):
        assert words in page


def test_dump_of_a_quantized_net(small: Path, capsys: Capture) -> None:
    """Its ranges are fixed: the files are simulated from the first pass, and weights stay float."""
    run(capsys, "--model", "quantized.prototxt", "--output_model", "q", "--optimize_net")
    net = load_net("q.prototxt").message
    assert net.quantize
    assert not net.net_quantization_param.update_quantization_param
    assert all(x.quantization_param.qparam_out for x in net.layer if x.name in ("conv", "relu", "ip"))
    assert not any(x.blobs for x in net.layer)
    again = [run(capsys, "--model", "q.prototxt", "--weights", "q.caffemodel", "--report", "r") for _ in range(2)]
    assert again[0]["loss"] == again[1]["loss"] != again[0]["float"]["loss"]


def test_a_report_that_cannot_be_written(small: Path, capsys: Capture) -> None:
    (small / "file").write_text("")
    assert main([*ARGS, "--report", "file"]) == 1
    assert "--report file" in capsys.readouterr().err
    assert main([*ARGS, "--report", "file/below"]) == 1
    assert main([*ARGS, "--model", "none.prototxt", "--report", "folder"]) == 3
    assert not (small / "folder").exists()


def test_pieces() -> None:
    from caffejacinto_py.compress.observe import measure

    assert decibels(100, 1) == 20
    assert decibels(1, 0) == float("inf")
    assert decibels(0, 1) == -float("inf")
    x = torch.tensor([-1.0, -1, 0, 0, 3, 1])
    assert sum(rebin(measure(x))) == 4
    assert rebin(measure(x), 4) == (2, 0, 1, 1)
    assert rebin(measure(torch.zeros(3))) == ()
    odd = Row("l", "X", "top", "b", (2, 3), 6, 0.5, -1.0, 3.0, 1.0, (2, 0), 8, False, [1.0, 2.0], [0.0, 0.0],
              -64.0, 63.0, float("inf"), 0.4, bad=2)  # fmt: skip
    nothing = Row("n", "X", "top", "n", (), 0, 0.0, 0.0, 0.0, 0.0)
    report = Report({"net": "", "compat": {"quantization": "cpu"}}, tops=[odd, nothing], weights=[odd])
    check_page(html(report))
    assert "NaN or infinite: 2 of 6 values of blob b of layer l, the first of 2" in html(report)
    check_page(html(Report({})))
    spoilt = replace(odd, sqnr=float("nan"))
    check_page(html(Report({}, tops=[spoilt], outputs=[{"name": "o", "mean": float("nan"), "float": 1.0}])))
    assert report.as_dict()["tops"][0]["sqnr"] == "inf"
    json.dumps(report.as_dict(), allow_nan=False)
