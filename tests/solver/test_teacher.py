"""Teachers: what they hand on, that they change nothing else, resume, files of scores, and refusals with places."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.checking import check
from caffejacinto_py.cli import main
from caffejacinto_py.compress import quantize
from caffejacinto_py.data.sources import Database
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, LayerError, PrototxtError, WeightsError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.datum import parse_datum
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.weights import read_model, write_model
from caffejacinto_py.solver import Solver
from tests.solver.helpers import assert_equal, make_db, make_solver, params

TEACHER = """
name: "big"
layer { name: "data" type: "Data" top: "data" top: "label" transform_param { crop_size: 8 }
  data_param { source: "nowhere" batch_size: 7 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 9 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "bn" }
layer { name: "scale" type: "Scale" bottom: "bn" top: "bn" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "bn" top: "bn" }
layer { name: "drop" type: "Dropout" bottom: "bn" top: "drop" }
layer { name: "tip" type: "InnerProduct" bottom: "drop" top: "ip"
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "relu2" type: "ReLU" bottom: "conv" top: "conv2" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
DATA = """layer {{ name: "data" type: "Data" top: "data" top: "label"
  transform_param {{ {transform} scale: 0.01 }} data_param {{ source: "{folder}/db" batch_size: 4 }} }}
"""
STUDENT = """
layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param {{ num_output: 3 kernel_size: 3 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "relu" type: "ReLU" bottom: "conv" top: "conv" }}
layer {{ name: "drop" type: "Dropout" bottom: "conv" top: "conv" }}
layer {{ name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
layer {{ name: "soft" type: "DistillSoftmaxLoss" bottom: "ip" bottom: "{logits}" top: "soft"
  include {{ phase: TRAIN }} }}
"""
READ = 'layer { name: "t" type: "Teacher" top: "teacher/ip" include { phase: TRAIN } }\n'
RANDOM = "mirror: true crop_size: 8"
ENTRY = 'teacher: { net: "FOLDER/teacher.prototxt" weights: "FOLDER/teacher.caffemodel" MORE }'


def make_teacher(folder: Path, text: str = TEACHER) -> Net:
    """teacher.prototxt and teacher.caffemodel; the net itself, in phase TEST, for batches of 4."""
    (folder / "teacher.prototxt").write_text(text)
    shapes = {"data": (4, 3, 8, 8), "label": (4,)}
    doc = parse(text, "NetParameter", file="teacher.prototxt")
    graph = prepare(doc, phase="TEST", probe=lambda layer: [shapes[top] for top in layer.proto.top])
    net = Net(graph, seed=3)
    rng = np.random.default_rng(0)
    for blob in net.params["bn"]:
        blob.data.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, blob.shape).astype(np.float32)))
    write_model(folder / "teacher.caffemodel", net.model())
    return net


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A database, a teacher, and net.prototxt: a student that reads it."""
    torch.set_num_threads(1)
    make_db(tmp_path / "db")
    make_teacher(tmp_path)
    student(tmp_path)
    return tmp_path


def student(
    folder: Path, *, read: str = READ, logits: str = "teacher/ip", transform: str = RANDOM, more: str = ""
) -> None:
    text = 'name: "small"\n' + DATA.format(folder=folder, transform=transform) + read
    (folder / "net.prototxt").write_text(text + STUDENT.format(logits=logits) + more)


def entry(folder: Path, more: str = "") -> str:
    return ENTRY.replace("FOLDER", str(folder)).replace("MORE", more)


def solver(folder: Path, more: str = "", fields: str = "", **options: Any) -> Solver:
    return make_solver(folder, f"{fields}\n{entry(folder, more)}\n", **options)


# --- what it hands on ------------------------------------------------------------------------------------------------
def test_blobs_are_those_of_the_net_in_phase_test(folder: Path) -> None:
    """Also one that a layer overwrites in place, and one that others read; the loss and its labels are not run."""
    tops = " ".join(f'top: "teacher/{b}"' for b in ("ip", "conv", "bn", "conv2", "data"))
    student(folder, read=f'layer {{ name: "t" type: "Teacher" {tops} include {{ phase: TRAIN }} }}\n')
    run = solver(folder)
    batch = run.feed.next()
    direct = make_teacher(folder)
    blobs = {"data": batch["data"], "label": batch["label"]}
    with torch.no_grad():
        for _ in direct.run(blobs):
            pass
    for blob in ("ip", "conv", "bn", "conv2", "data"):
        torch.testing.assert_close(batch[f"teacher/{blob}"], blobs[blob], rtol=1e-5, atol=1e-6)
        assert not batch[f"teacher/{blob}"].requires_grad
    assert (blobs["conv"] < 0).any()


def test_only_the_student_learns_and_is_saved(folder: Path) -> None:
    run = solver(folder)
    assert run.feed.derive is not None
    before = {k: v.clone() for k, v in run.feed.derive.parts["teacher"].net.state_dict().items()}  # type: ignore[attr-defined]
    run.step(3)
    after = run.feed.derive.parts["teacher"].net.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[k], after[k]) for k in before)
    model, _ = run.snapshot()
    assert {layer.name for layer in read_model(model).layers if layer.blobs} == {"conv", "ip"}
    assert run.feed.positions() == {"data": 3}


def test_it_pulls_the_student_towards_the_teacher(folder: Path) -> None:
    def distance(weight: float) -> float:
        student(folder, more="")
        text = (folder / "net.prototxt").read_text()
        (folder / "net.prototxt").write_text(text.replace('top: "soft"', f'top: "soft" loss_weight: {weight}'))
        run = solver(folder, fields="base_lr: 0.01")
        run.step(60)
        with torch.no_grad():
            return float(sum(run.net(run.feed.next()).outputs["soft"] for _ in range(5)))

    assert distance(1) < 0.5 * distance(0)


def test_resume_is_bit_for_bit(folder: Path) -> None:
    """With mirror, crop, dropout and iter_size; the test net reads the teacher too, in another batch size."""
    more = 'layer { name: "far" type: "EuclideanLoss" bottom: "ip" bottom: "teacher/ip" top: "far" }'
    student(folder, read=READ.replace("include { phase: TRAIN }", ""), more=more)
    fields = "iter_size: 2\ntest_iter: 2\ntest_interval: 3\ntest_initialization: false"
    whole = solver(folder, fields=fields)
    whole.step(8)
    half = solver(folder, fields=fields)
    half.step(4)
    _, state = half.snapshot()
    again = solver(folder, fields=fields)
    again.restore(state)
    again.step(4)
    assert_equal(params(whole), params(again))
    assert whole.test_all()[0].outputs[0].value == again.test_all()[0].outputs[0].value


def test_a_test_net_without_a_teacher_layer_runs_none(folder: Path) -> None:
    run = solver(folder, fields="test_iter: 2\ntest_interval: 1")
    assert run.test_feeds[0].derive is None
    run.test_all()


def test_two_teachers_and_other_names(folder: Path) -> None:
    """Names of blobs are connected by `feed`, names of teachers by `teacher_param`."""
    text = TEACHER.replace('"data"', '"image"').replace('name: "image"', 'name: "data"')
    (folder / "other.prototxt").write_text(text)
    read = 'layer { name: "a" type: "Teacher" top: "x" teacher_param { teacher: "one" blob: "ip" } }\n'
    read += 'layer { name: "b" type: "Teacher" top: "two/ip" teacher_param { teacher: "two" } }\n'
    more = 'layer { name: "h" type: "FeatureHintLoss" bottom: "ip" bottom: "two/ip" top: "h" }'
    student(folder, read=read, logits="x", more=more)
    two = f'teacher: {{ name: "two" net: "{folder}/other.prototxt" weights: "{folder}/teacher.caffemodel" '
    run = solver(folder, 'name: "one"', two + 'feed { from: "data" to: "image" } }')
    batch = run.feed.next()
    assert torch.equal(batch["x"], batch["two/ip"])
    run.step(2)


def test_number_types(folder: Path) -> None:
    wide, narrow = solver(folder, 'precision: "fp64"'), solver(folder)
    a, b = (s.feed.next()["teacher/ip"] for s in (wide, narrow))
    assert a.dtype == torch.float64
    torch.testing.assert_close(a.float(), b)
    wide.step(2)
    assert all(p.dtype == torch.float32 for ps in wide.net.params.values() for p in ps)


def test_a_quantized_teacher_with_stored_ranges(folder: Path) -> None:
    """It simulates its integers, and gives the same for the same batch whatever came before."""
    plain = solver(folder).feed.next()
    net = make_teacher(folder, "quantize: true\n" + TEACHER)
    quantize.attach(net)
    for k in range(3):
        net({"data": plain["data"] * (1 + k / 10), "label": plain["label"]})
    (folder / "teacher.prototxt").write_text(dumps(quantize.dump(net, fixed=True)))
    run = solver(folder)
    batch = run.feed.next()
    assert not torch.equal(batch["teacher/ip"], plain["teacher/ip"])
    torch.testing.assert_close(batch["teacher/ip"], plain["teacher/ip"], rtol=0, atol=0.1)
    run.step(2)
    assert run.feed.derive is not None
    assert torch.equal(run.feed.derive(batch)["teacher/ip"], batch["teacher/ip"])


def test_a_teacher_that_nobody_reads_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    student(folder, read="", logits="ip2", more="")
    text = (folder / "net.prototxt").read_text().split('layer { name: "soft"')[0]
    (folder / "net.prototxt").write_text(text)
    with caplog.at_level(logging.WARNING, logger="caffejacinto_py"):
        solver(folder)
    assert "Teacher 'teacher' does nothing" in caplog.text


def test_pycaffe(folder: Path) -> None:
    """Layer by layer (the last iteration) as in whole passes."""
    from caffejacinto_py.pycaffe import SGDSolver

    student(folder, transform="crop_size: 8")
    (folder / "net.prototxt").write_text(
        (folder / "net.prototxt").read_text().replace('type: "Dropout"', 'type: "ReLU"')
    )
    write_solver(folder, entry(folder))
    whole = Solver(f"{folder}/solver.prototxt", device="cpu", layout="nchw", workers=0)
    whole.step(4)
    looked = SGDSolver(f"{folder}/solver.prototxt")
    for _ in range(4):
        looked.step(1)
    np.testing.assert_allclose(looked.net.blobs["teacher/ip"].data, whole.feed.last["teacher/ip"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        looked.net.params["ip"][0].data, whole.net.params["ip"][0].detach(), rtol=1e-4, atol=1e-6
    )


# --- refusals --------------------------------------------------------------------------------------------------------
def refused(folder: Path, kind: type[CaffeError], more: str = "", fields: str = "") -> CaffeError:
    with pytest.raises(kind) as e:
        solver(folder, more, fields)
    assert e.value.exit_code == 3
    return e.value


def test_a_blob_that_the_teacher_does_not_have(folder: Path) -> None:
    student(folder, read=READ.replace("teacher/ip", "teacher/ip2"), logits="teacher/ip2")
    error = refused(folder, PrototxtError)
    assert "has no blob 'ip2' in phase TEST" in error.text
    assert "did you mean 'ip'?" in str(error.hint)
    assert error.loc is not None
    assert (Path(error.loc.file).name, error.loc.line) == ("net.prototxt", 4)


def test_shapes_that_do_not_fit_the_student_s(folder: Path) -> None:
    student(folder, read=READ.replace("teacher/ip", "teacher/conv"), logits="teacher/conv")
    error = refused(folder, LayerError)
    assert "the student's blob 'ip' is (4, 5), the teacher's 'teacher/conv' (4, 9, 6, 6)" in error.text
    assert error.loc is not None
    assert error.loc.line > 4


def test_data_that_do_not_fit_the_teacher(folder: Path) -> None:
    student(folder, transform="crop_size: 9")
    error = refused(folder, WeightsError)
    assert "layer 'tip', blob 0" in error.text
    assert error.loc is not None
    assert error.loc.file == "solver.prototxt"


@pytest.mark.parametrize(
    ("fields", "words", "hint"),
    [
        ('teacher: { net: "no.prototxt" weights: "x" }', "net file 'no.prototxt' does not exist", "relative"),
        ('teacher: { weights: "x" }', "has no net", "net:"),
        ('teacher: { net: "FOLDER/teacher.prototxt" }', "has no weights", "weights:"),
        ('teacher: { net: "FOLDER/teacher.prototxt" weights: "FOLDER/no.caffemodel" }', "no.caffemodel", ""),
        ('teacher: { net: "FOLDER/teacher.prototxt" weights: "FOLDER/db/data.mdb" }', "data.mdb", ""),
        (ENTRY.replace("MORE", 'precision: "fp8"'), "precision 'fp8'", "bf16"),
        (ENTRY.replace("MORE", 'feed { from: "imgae" to: "data" }'), "'imgae', which no data layer has", "data blobs"),
        (ENTRY.replace("MORE", 'feed { from: "dat" to: "data" }'), "'dat', which no data layer has", "'data'?"),
        (ENTRY.replace("MORE", 'feed { from: "data" to: "dtaa" }'), "has no blob 'dtaa'", "'data'?"),
        (ENTRY.replace("MORE", 'feed { from: "data" }'), "feed needs from and to", "feed {"),
        (ENTRY.replace("MORE", 'name: "big"'), "", ""),
        (ENTRY.replace("MORE", "") * 2, "two teachers are called 'teacher'", "name"),
        ("", "reads a teacher, and the solver has none", "--teacher"),
    ],
)
def test_entries(folder: Path, fields: str, words: str, hint: str) -> None:
    fields = fields.replace("FOLDER", str(folder))
    if not words:  # one teacher needs no name
        student(folder, read=READ.replace("teacher/ip", "big/ip"), logits="big/ip")
        make_solver(folder, fields)
        return
    with pytest.raises(CaffeError) as e:
        make_solver(folder, fields)
    assert words in e.value.text
    assert hint in str(e.value.hint)
    assert e.value.exit_code == 3
    assert e.value.loc is not None


def test_weights_that_lack_a_layer(folder: Path) -> None:
    model = read_model(folder / "teacher.caffemodel")
    model.layers = [layer for layer in model.layers if layer.name != "tip"]
    write_model(folder / "part.caffemodel", model)
    text = entry(folder).replace("teacher.caffemodel", "part.caffemodel")
    with pytest.raises(WeightsError, match="have no layer 'tip'"):
        make_solver(folder, text)


def test_names_of_teachers(folder: Path) -> None:
    student(folder, read=READ.replace(" include", ' teacher_param { teacher: "teecher" } include'))
    assert "did you mean 'teacher'?" in str(refused(folder, PrototxtError).hint)
    two = entry(folder, 'name: "two"')
    student(folder)
    assert "which teacher" in refused(folder, PrototxtError, fields=two).text


def test_a_teacher_layer_before_the_data(folder: Path) -> None:
    student(folder)
    text = (folder / "net.prototxt").read_text().replace(READ, "")
    (folder / "net.prototxt").write_text(READ + text)
    assert "before the data layer 'data'" in refused(folder, PrototxtError).text


def test_running_ranges_are_refused(folder: Path) -> None:
    (folder / "teacher.prototxt").write_text("quantize: true\n" + TEACHER)
    error = refused(folder, PrototxtError)
    assert "quantization ranges" in error.text
    assert "calibrate" in str(error.hint)


# --- commands --------------------------------------------------------------------------------------------------------
def write_solver(folder: Path, fields: str = "") -> str:
    path = folder / "solver.prototxt"
    text = (
        f'net: "{folder}/net.prototxt" base_lr: 0.01 lr_policy: "fixed" max_iter: 3 random_seed: 1 solver_mode: CPU\n'
    )
    path.write_text(text + f'snapshot_prefix: "{folder}/s"\n' + fields)
    return str(path)


def test_train_with_a_teacher_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, two = write_solver(folder), f"{folder}/teacher.prototxt,{folder}/teacher.caffemodel"
    quiet = ["--log-level", "error", "--threads", "1"]
    assert main(["train", "--solver", path, "--teacher", two, *quiet]) == 0
    given = read_model(folder / "s_iter_3.caffemodel")
    assert main(["train", "--solver", write_solver(folder, entry(folder)), *quiet]) == 0
    for a, b in zip(given.layers, read_model(folder / "s_iter_3.caffemodel").layers, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.blobs, b.blobs, strict=True))
    capsys.readouterr()
    path = write_solver(folder)
    assert main(["train", "--solver", path, "--dry-run", "--teacher", two, *quiet]) == 0
    assert "Teacher " in capsys.readouterr().out
    for dry in ([], ["--dry-run"]):
        assert main(["train", "--solver", path, *dry, *quiet]) == 3
        assert "net.prototxt:4:1: error: layer 't' reads a teacher" in capsys.readouterr().err
    assert main(["train", "--solver", path, "--teacher", "a.prototxt", *quiet]) == 2
    assert main(["train", "--solver", path, "--teacher", "a.prototxt,b", *quiet]) == 3
    assert "'a.prototxt' does not exist" in capsys.readouterr().err


def test_check(folder: Path) -> None:
    assert check(write_solver(folder, entry(folder))).ok
    student(folder, read=READ.replace("teacher/ip", "teacher/ip2"), logits="teacher/ip2")
    report = check(write_solver(folder, entry(folder)))
    assert [e.text for e in report.errors] == [
        f"teacher 'teacher' ({folder}/teacher.prototxt) has no blob 'ip2' in phase TEST"
    ]


def test_a_file_of_scores_teaches_as_the_teacher_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """22 records in batches of 4: the second epoch begins in the middle of a batch."""
    student(folder, transform="crop_size: 8")
    text = (folder / "net.prototxt").read_text().replace("crop_size: 8", "")  # 10 x 10: no random crops
    (folder / "net.prototxt").write_text(text)
    (folder / "teacher.prototxt").write_text(POOLED)
    pooled(folder)
    live = solver(folder)
    live.step(9)
    read = (
        f'layer {{ name: "l" type: "Data" top: "logits" data_param {{ source: "{folder}/logits" batch_size: 4 }} }}\n'
    )
    (folder / "net.prototxt").write_text(text.replace(READ, read).replace("teacher/ip", "logits"))
    args = ["teacher_dump", "--model", f"{folder}/teacher.prototxt", "--weights", f"{folder}/teacher.caffemodel"]
    args += ["--data", f"{folder}/net.prototxt", "--blobs", "ip", "--threads", "1", "--log-level", "error"]
    assert main([*args, "--output", f"{folder}/logits"]) == 0
    assert capsys.readouterr().out == f"Wrote {folder}/logits: 22 records of blob 'ip', (5,) each\n"
    filed = make_solver(folder)
    filed.step(9)
    assert_equal(params(live), params(filed))
    assert main([*args, "--output", f"{folder}/logits"]) == 3  # never overwritten
    assert main([*args, "--output", f"{folder}/few", "--iterations", "2"]) == 0
    with Database(f"{folder}/few").read([7]) as few, Database(f"{folder}/logits").read([7]) as all_of_them:
        assert np.array_equal(parse_datum(few[0]).array(), parse_datum(all_of_them[0]).array())


POOLED = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 10 dim: 10 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
"""


def pooled(folder: Path) -> None:
    """A deploy net as the teacher."""
    doc = parse(POOLED, "NetParameter", file="teacher.prototxt")
    write_model(folder / "teacher.caffemodel", Net(prepare(doc, phase="TEST"), seed=4).model())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--blobs", "ipp"], 3, "did you mean 'ip'"),
        (["--blobs", "ip,conv"], 2, "2 blobs but 1 databases"),
        (["--blobs", "ip,conv", "--output", "x,./x"], 2, "one database"),
        (["--weights", "no.caffemodel"], 3, "no.caffemodel"),
        (["--data", "no.prototxt"], 3, "no.prototxt"),
    ],
)
def test_dump_refuses(folder: Path, args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    student(folder, transform="crop_size: 8")
    usual = {"--model": f"{folder}/teacher.prototxt", "--weights": f"{folder}/teacher.caffemodel", "--blobs": "ip"}
    usual |= {"--output": f"{folder}/out", "--data": f"{folder}/net.prototxt"}
    usual |= dict(zip(args[::2], args[1::2], strict=True))
    assert main(["teacher_dump", *(w for pair in usual.items() for w in pair), "--log-level", "error"]) == code
    assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_dump_refuses_shuffled_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student(folder)
    text = (folder / "net.prototxt").read_text()
    (folder / "net.prototxt").write_text(text.replace("batch_size: 4", "batch_size: 4 shuffle: true"))
    args = ["--model", f"{folder}/teacher.prototxt", "--weights", f"{folder}/teacher.caffemodel", "--blobs", "ip"]
    args += ["--data", f"{folder}/net.prototxt", "--output", f"{folder}/out"]
    assert main(["teacher_dump", *args]) == 2
    assert "shuffled" in capsys.readouterr().err
    (folder / "net.prototxt").write_text(text)
    assert main(["teacher_dump", *args]) == 0
    assert "other pictures (mirror, crop_size at random)" in capsys.readouterr().err


def test_the_examples_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    for name in ("solver", "solver_lmdb"):
        report = check(f"examples/distillation/{name}.prototxt")
        assert report.ok, report
        assert len(report.nets) == 2
