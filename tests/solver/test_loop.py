"""The loop: order of events, logs that Caffe's parsers read, several test nets, NaN, debug_info, bad solvers."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import CaffeError, PrototxtError, UsageError, WeightsError
from caffejacinto_py.solver import Solver, logs
from tests.solver.helpers import assert_equal, document, make_files, make_solver, params, solver_text

# what tools/extra/parse_log.py and extract_seconds.py look for
ITERATION = re.compile(r"Iteration (\d+)")
TRAIN = re.compile(r"Train net output #(\d+): (\S+) = ([\.\deE+-]+)")
TEST = re.compile(r"Test net output #(\d+): (\S+) = ([\.\deE+-]+)")
RATE = re.compile(r"lr = ([-+]?[0-9]*\.?[0-9]+([eE]?[-+]?[0-9]+)?)")
HEAD = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \w+\.py:\d+\] ")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logs.setup("info", stream=stream)
    yield stream
    logger = logging.getLogger(logs.LOGGER)
    logger.removeHandler(handler)
    logger.propagate = True


def messages(log: io.StringIO) -> list[str]:
    return [HEAD.sub("", line) for line in log.getvalue().splitlines()]


def test_log_and_order(tmp_path: Path, log: io.StringIO) -> None:
    extra = "display: 2\ntest_iter: 2\ntest_interval: 4\nsnapshot: 3\nmax_iter: 4\nsnapshot_after_train: true"
    make_solver(tmp_path, extra, metrics=tmp_path / "m.jsonl").solve()
    assert all(HEAD.match(line) for line in log.getvalue().splitlines())
    lines = messages(log)
    keys = ("Solving", "Iteration", "Snapshotting to", "Optimization", "Performance", "    T")
    shape = [
        re.sub(r"(?<![A-Za-z])[\d.e+-]{2,}|\(.*?\)|= \S+", "", line).strip() for line in lines if line.startswith(keys)
    ]
    named = [line.split(tmp_path.name)[-1] for line in shape]
    order = [re.sub(r"\W+", " ", line).strip() for line in named]
    assert [o for o in order if o.startswith(("Iteration", "Train", "Test", "Optim", "Solving"))] == [
        "Solving tiny",
        "Iteration 0 Testing net",
        "Test net output 0 accuracy",
        "Test net output 1 loss",
        "Iteration 0 loss",
        "Train net output 0 loss",
        "Iteration 0 lr",
        "Iteration 2 loss",
        "Train net output 0 loss",
        "Iteration 2 lr",
        "Iteration 4 loss",
        "Iteration 4 Testing net",
        "Test net output 0 accuracy",
        "Test net output 1 loss",
        "Optimization Done",
    ]
    text = log.getvalue()
    assert {int(n) for n in ITERATION.findall(text)} == {0, 2, 4}
    assert len(TRAIN.findall(text)) == 2
    assert len(TEST.findall(text)) == 4
    assert RATE.search(text)
    assert sum("Solving" in line for line in lines) == 1
    assert re.search(r"Performance: [\d.]+ img/s \(4 iterations, 16 images", text)
    assert (tmp_path / "snap_iter_3.caffemodel").exists()
    assert (tmp_path / "snap_iter_4.solverstate").exists()
    events = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["test", "train", "train", "snapshot", "snapshot", "test", "end"]
    assert events[1]["lr"] == pytest.approx(0.05)
    assert set(events[0]) >= {"accuracy", "loss", "net", "iter", "time"}


def test_metrics_grow_on_resume(tmp_path: Path) -> None:
    make_solver(tmp_path, "snapshot: 2\ndisplay: 1\nmax_iter: 2", metrics=tmp_path / "m.jsonl").solve()
    count = len((tmp_path / "m.jsonl").read_text().splitlines())
    again = make_solver(tmp_path, "display: 1\nmax_iter: 4", metrics=tmp_path / "m.jsonl")
    again.solve(resume=tmp_path / "snap_iter_2.solverstate")
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert len(lines) > count
    assert json.loads(lines[count])["event"] == "resume"


def test_smoothed_loss(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "average_loss: 3")
    single = make_solver(tmp_path)
    seen = []
    torch.manual_seed(0)
    for _ in range(5):
        single.step(1)
        seen += single.losses.values()
    torch.manual_seed(0)
    solver.step(5)
    assert solver.losses.values() == seen[-3:]
    assert solver.losses.smoothed() == pytest.approx(float(np.mean(seen[-3:])))


def test_iter_size_is_a_larger_batch(tmp_path: Path) -> None:
    make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    # without what depends on the batch or is random
    text = re.sub(r'layer \{ name: "(bn|drop)".*\n', "", net.read_text()).replace('"bn"', '"conv"')
    net.write_text(text.replace("mirror: true", "").replace("crop_size: 8", ""))
    small = make_solver(tmp_path, "iter_size: 2")
    small.step(3)
    net.write_text(net.read_text().replace("batch_size: 4", "batch_size: 8"))
    large = make_solver(tmp_path)
    large.net.load(make_solver(tmp_path).net.model())
    large.step(3)
    for a, b in zip(params(small).values(), params(large).values()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_test_nets(tmp_path: Path, log: io.StringIO) -> None:
    make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text().replace("top: \"accuracy\" include { phase: TEST }",
                                           "top: \"accuracy\" include { phase: TEST stage: \"score\" }"))  # fmt: skip
    states = 'test_state { stage: "score" }\ntest_state { level: 1 }'
    solver = make_solver(tmp_path, f"test_iter: 3\ntest_iter: 1\ntest_interval: 5\n{states}")
    first, second = solver.test_all()
    assert [o.name for o in first.outputs] == ["accuracy", "loss"]
    assert [o.name for o in second.outputs] == ["loss"]
    assert len(first.outputs[0].per_iteration) == 3
    assert first.outputs[0].value == pytest.approx(np.mean(first.outputs[0].per_iteration))
    assert solver.test_nets[0].params["ip"][0] is solver.net.params["ip"][0]
    assert "Testing net (#1)" in log.getvalue()


def test_test_initialization(tmp_path: Path) -> None:
    extra = "test_iter: 3\ntest_interval: 2\nmax_iter: 1"
    for dialect, field, batches in (
        ("bvlc", "", 3),
        ("bvlc", "\ntest_initialization: false", 0),
        ("nvcaffe", "\ntest_initialization: false", 1),
    ):
        solver = make_solver(tmp_path, extra + field, dialect=dialect)
        solver.step(1)
        assert solver.test_feeds[0].positions() == {"data": batches}


def test_embedded_nets(tmp_path: Path) -> None:
    make_files(tmp_path)
    text = (tmp_path / "net.prototxt").read_text()
    one = make_solver(tmp_path, f"net_param: {{ {text} }}\ntest_iter: 1\ntest_interval: 9")
    assert len(one.test_nets) == 1
    plain = make_solver(tmp_path)
    assert_equal(params(one), params(plain))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('train_net: "{0}/net.prototxt"\nnet: "{0}/net.prototxt"', "only one train net"),
        ('net: "{0}/nothing.prototxt"', "does not exist"),
        ("test_iter: 3", "test_interval is not set"),
        ("test_iter: 3\ntest_interval: 2\ntest_state {{ }}\ntest_state {{ }}", "2 test_state entries for 1"),
        ('test_net: "{0}/net.prototxt"\ntest_interval: 2', "1 test nets but 0 test_iter"),
        ('type: "Sgd"', "unknown solver type 'Sgd'"),
        ('type: "Adm"', "unknown solver type 'Adm'"),
        ('regularization_type: "L3"', "unknown regularization_type"),
        ("iter_size: 0", "iter_size must be at least 1"),
        ("average_loss: 0", "average_loss must be at least 1"),
        ('type: "AdaGrad"', "AdaGrad has no momentum"),
        ('type: "RMSProp"\nmomentum: 0\nrms_decay: 1', "rms_decay must be"),
        ('lr_policy: "stp"', "unknown lr_policy"),
        ('larc: true\nlarc_policy: "x"', "unknown larc_policy"),
    ],
)
def test_bad_solver(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(PrototxtError, match=message) as error:
        make_solver(tmp_path, extra.format(tmp_path))
    assert error.value.loc is not None
    assert error.value.loc.file == "solver.prototxt"


def test_no_train_net(tmp_path: Path) -> None:
    doc = document(tmp_path)
    doc.message.ClearField("net")
    with pytest.raises(PrototxtError, match="names no train net"):
        Solver(doc, device="cpu")


def test_near_match_of_type(tmp_path: Path) -> None:
    with pytest.raises(PrototxtError) as error:
        make_solver(tmp_path, 'type: "nestrov"')
    assert "Nesterov" in str(error.value.hint)
    assert error.value.loc is not None
    assert "nestrov" in solver_text(tmp_path, 'type: "nestrov"').splitlines()[error.value.loc.line - 1]


def test_settings_without_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_solver(tmp_path, 'snapshot_log: true\nmomentum_policy: "opt"\ntype: "Adam"\nlayer_wise_reduce: true')
    assert re.search(r"solver.prototxt:\d+:\d+: 'snapshot_log' has no effect", caplog.text)
    assert "'momentum_policy' has no effect: only SGD" in caplog.text
    assert "layer_wise_reduce" not in caplog.text  # its default


def test_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = make_solver(tmp_path), make_solver(tmp_path)
    assert_equal(params(a), params(b))
    caplog.set_level(logging.INFO)
    drawn = make_solver(tmp_path, "random_seed: -1")
    assert f"random_seed: {drawn.seed}" in caplog.text
    again = make_solver(tmp_path, f"random_seed: {drawn.seed}")
    assert_equal(params(drawn), params(again))
    assert any((x != y).any() for x, y in zip(params(a).values(), params(drawn).values()))


# --- weights ---------------------------------------------------------------------------------------------------------
def test_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_solver(tmp_path, "snapshot: 1")
    first.step(2)
    names = f"{tmp_path}/snap_iter_1.caffemodel, {tmp_path}/snap_iter_2.caffemodel"
    assert_equal(params(make_solver(tmp_path, "random_seed: 9", weights=names)), params(first))
    assert_equal(params(make_solver(tmp_path, f'random_seed: 9\nweights: "{names}"')), params(first))
    with pytest.raises(WeightsError, match="no such"):
        make_solver(tmp_path, weights=tmp_path / "nothing.caffemodel")
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text().replace("num_output: 5", "num_output: 4"))
    with pytest.raises(WeightsError, match="layer 'ip', blob 0"):
        make_solver(tmp_path, weights=tmp_path / "snap_iter_2.caffemodel")
    make_solver(tmp_path, "ignore_shape_mismatch: true", weights=tmp_path / "snap_iter_2.caffemodel")
    assert "skipped" in caplog.text
    make_solver(tmp_path, weights=tmp_path / "snap_iter_2.caffemodel", dialect="jacinto")


def test_weights_of_another_net(tmp_path: Path) -> None:
    make_solver(tmp_path, "snapshot: 1").step(1)
    net = tmp_path / "net.prototxt"
    net.write_text(re.sub(r'name: "(\w+)"', r'name: "my_\1"', net.read_text()))
    with pytest.raises(CaffeError, match="has no layer of this net"):
        make_solver(tmp_path, weights=tmp_path / "snap_iter_1.caffemodel")


# --- NaN -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("poison", "first"),
    [
        ("weight", "parameter 0 of layer 'conv' \\(Convolution\\)"),
        ("huge", "'loss', a top of layer 'loss'|'ip', a top of layer 'ip'"),
    ],
)
def test_nan_stops(tmp_path: Path, poison: str, first: str) -> None:
    solver = make_solver(tmp_path, "snapshot: 4")
    solver.step(2)
    with torch.no_grad():
        if poison == "weight":
            solver.net.params["conv"][0][0, 0, 0, 0] = float("nan")
        else:
            solver.net.params["ip"][0].fill_(3e38)
    before = params(solver)
    with pytest.raises(CaffeError, match=f"iteration 2: the loss is (nan|inf).*(first bad blob is {first})") as error:
        solver.step(5)
    assert error.value.exit_code == 1
    assert solver.iter == 2
    np.testing.assert_array_equal(params(solver)["ip/0"], before["ip/0"])  # the bad update was not made
    assert not list(tmp_path.glob("*.caffemodel"))


def test_nan_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = make_solver(tmp_path, on_nan="warn")
    with torch.no_grad():
        solver.net.params["conv"][0].fill_(float("nan"))
    solver.step(2)
    assert solver.iter == 2
    assert "iteration 0: the loss is nan" in caplog.text
    with pytest.raises(UsageError):
        make_solver(tmp_path, on_nan="ignore")


# --- debug_info ------------------------------------------------------------------------------------------------------
def test_debug_info(tmp_path: Path, log: io.StringIO) -> None:
    plain = make_solver(tmp_path)
    plain.step(3)
    solver = make_solver(tmp_path, "debug_info: true\ndisplay: 2")
    solver.step(3)
    assert_equal(params(solver), params(plain))  # looking changes nothing
    text = "\n".join(messages(log))
    assert re.search(r"^    \[Forward\] Layer conv, top blob conv data: [\d.e-]+$", text, re.M)
    assert re.search(r"^    \[Forward\] Layer ip, param blob 0 data: [\d.e-]+$", text, re.M)
    assert re.search(r"^    \[Backward\] Layer loss, bottom blob ip diff: [\d.e-]+$", text, re.M)
    assert re.search(r"^    \[Backward\] Layer conv, param blob 1 diff: [\d.e-]+$", text, re.M)
    assert re.search(r"\[Backward\] All net params \(data, diff\): L1 norm = \(\S+, \S+\); L2 norm", text)
    assert re.search(r"^    \[Update\] Layer ip, param 0 data: \S+; diff: \S+$", text, re.M)
    assert text.count("[Update] Layer ip, param 0") == 2
