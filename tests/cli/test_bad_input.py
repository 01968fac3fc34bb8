"""Every kind of bad input, through the program: one clear error with its place and a hint, an exit code, no traceback,
and nothing half-written."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.schema import pb
from tests.cli.damage import SIZE, Change, cut, datum, edit, empty_db, flip, into, jpeg, net, put, record, without_db

Capture = pytest.CaptureFixture[str]
RECORDS, CLASSES = 16, 5
NET = """name: "small"
layer { name: "data" type: "Data" top: "data" top: "label"
  data_param { source: "db" batch_size: 4 backend: LMDB } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SOLVER = """net: "net.prototxt"
base_lr: 0.01
lr_policy: "fixed"
momentum: 0.9
max_iter: 4
snapshot: 2
snapshot_prefix: "snap"
solver_mode: CPU
random_seed: 3
"""
LENGTH_2G = b"\xff\xff\xff\xff\x07"
TRAIN = ["train", "--solver", "solver.prototxt"]
WEIGHTS = [*TRAIN, "--weights", "old_iter_2.caffemodel"]
RESUME = [*TRAIN, "--snapshot", "old_iter_2.solverstate"]
TEST = ["test", "--model", "net.prototxt", "--weights", "old_iter_2.caffemodel"]


@dataclass(frozen=True)
class Case:
    args: list[str]
    change: Change
    error: str  # pattern: what the line with `error:` must say, place included
    hint: str
    code: int = 3


NO_CHANGE: Change = lambda folder: None  # noqa: E731
CASES = {
    "unknown layer type": Case(
        TRAIN, net('"Convolution"', '"Convolutoin"'), r"net.prototxt:4:22: .*'Convolutoin'", "'Convolution'"
    ),
    "unknown field": Case(
        TRAIN, net("kernel_size", "kernel_sise"), r"net.prototxt:5:37: .*'kernel_sise'", "'kernel_size'"
    ),
    "unknown solver field": Case(
        TRAIN, edit("solver.prototxt", "momentum", "momentun"), r"solver.prototxt:4:1: .*'momentun'", "'momentum'"
    ),
    "missing brace": Case(
        TRAIN,
        net('"xavier" } } }\nlayer { name: "ip"', '"xavier" } }\nlayer { name: "ip"'),
        r"net.prototxt:6:1: ",
        "opened at line 4",
    ),
    "brace too many": Case(
        TRAIN, net('top: "loss" }', 'top: "loss" } }'), r"net.prototxt:8:\d+: .*closes nothing", "}"
    ),
    "open string": Case(TRAIN, net('"conv" top', '"conv top'), r"net.prototxt:\d+:\d+: .*not closed", "quote"),
    "bytes that are no text": Case(
        TRAIN,
        lambda f: (f / "net.prototxt").write_bytes(b"\x9b" + NET.encode()),
        r"net.prototxt:1:1: .*byte 0x9b",
        "field",
    ),
    "web page": Case(TRAIN, put("net.prototxt", b"<!DOCTYPE html>\n"), r"net.prototxt:1:1: ", "starts with a field"),
    "empty net": Case(TRAIN, put("net.prototxt", b""), r"net.prototxt: .*empty", "interrupted"),
    "bottom not produced": Case(
        TRAIN, net('bottom: "conv"', 'bottom: "comv"'), r"net.prototxt:6:41: .*'comv'", "'conv'"
    ),
    "only a TRAIN source": Case(
        TEST, net("data_param", "include { phase: TRAIN } data_param"), r"net.prototxt:4:\d+: .*'data'", "phase"
    ),
    "shapes of weights": Case(
        WEIGHTS, net("num_output: 5", "num_output: 6"), r"old_iter_2.caffemodel.*'ip', blob 0: shape \(5, ", "rename"
    ),
    "shapes of a state": Case(
        RESUME, net("num_output: 5", "num_output: 6"), r"old_iter_2.solverstate.*'ip', blob 0", "--weights"
    ),
    "label beyond the classes": Case(
        TRAIN, net("num_output: 5", "num_output: 3"), r"'loss' .*label 3, .*3 classes", "num_output"
    ),
    "label in test": Case(TEST, record(1, datum(label=7)), r"'loss' .*label 7, .*5 classes", "num_output"),
    "negative label": Case(TRAIN, record(1, datum(label=-1)), r"'loss' .*label -1, .*5 classes", "ignore_label"),
    "truncated caffemodel": Case(
        WEIGHTS, cut("old_iter_2.caffemodel"), r"old_iter_2.caffemodel: .*byte \d+", "cut short"
    ),
    "bit-flipped caffemodel": Case(WEIGHTS, flip("old_iter_2.caffemodel", 1), r"old_iter_2.caffemodel: ", "damaged"),
    "empty caffemodel": Case(WEIGHTS, put("old_iter_2.caffemodel", b""), r"old_iter_2.caffemodel: .*empty", "disk"),
    "truncated state": Case(RESUME, cut("old_iter_2.solverstate"), r"old_iter_2.solverstate: .*byte \d+", "cut short"),
    "bit-flipped state": Case(RESUME, flip("old_iter_2.solverstate", 2), r"old_iter_2.solverstate: ", "damaged"),
    "weights of a state are gone": Case(
        RESUME, lambda f: (f / "old_iter_2.caffemodel").unlink(), r"old_iter_2.solverstate: .*not found", "beside"
    ),
    "2 GiB in 100 bytes, weights": Case(
        WEIGHTS,
        put("old_iter_2.caffemodel", b"\x0a\x03net\xa2\x06" + LENGTH_2G + bytes(88)),
        r"old_iter_2.caffemodel: .*2147483647 bytes where 88 are left \(at byte 5 of 100\)",
        "cut short",
    ),
    "2 GiB in 100 bytes, state": Case(
        RESUME,
        put("old_iter_2.solverstate", b"\x08\x02\x12\x03abc\x1a" + LENGTH_2G + bytes(87)),
        r"old_iter_2.solverstate: .*2147483647 bytes where 87 are left \(at byte 7 of 100\)",
        "cut short",
    ),
    "state as weights": Case(
        [*TRAIN, "--weights", "old_iter_2.solverstate"], NO_CHANGE, "seems to be a solver state", "wanted"
    ),
    "weights as state": Case(
        [*TRAIN, "--snapshot", "old_iter_2.caffemodel"], NO_CHANGE, "seems to be a net", "--weights"
    ),
    "directory as weights": Case([*TRAIN, "--weights", "db"], NO_CHANGE, "db: .*directory", "name a file"),
    "missing state": Case([*TRAIN, "--snapshot", "old_iter_3.solverstate"], NO_CHANGE, "no such", "did you mean"),
    "missing weights": Case([*TRAIN, "--weights", "old_iter_3.caffemodel"], NO_CHANGE, "no such", "did you mean"),
    "missing mean file": Case(
        TRAIN, net("data_param", 'transform_param { mean_file: "no.mean" } data_param'), "no.mean", "working directory"
    ),
    "truncated record": Case(TRAIN, record(1, lambda v: v[:40]), r"db: record '00000001': .*Datum", "again"),
    "bit-flipped record": Case(
        TRAIN, record(1, lambda v: bytes([v[0] ^ 0x80]) + v[1:]), r"db: record '00000001': .*Datum", "again"
    ),
    "first record damaged": Case(
        TRAIN, record(0, lambda v: v[:40]), r"net.prototxt:3:16: .*db: record '00000000'", "again"
    ),
    "record without data": Case(TRAIN, record(1, lambda v: b""), r"db: record '00000001': .*no data", "again"),
    "record of a huge size": Case(
        TRAIN,
        record(0, datum(height=2**31 - 1, width=2**31 - 1)),
        r"net.prototxt:3:16: .*announces .*holds 100",
        "again",
    ),
    "record of another size": Case(
        TRAIN, record(1, datum(height=5, width=20)), r"db: record '00000001' is 1x5x20, .*1x10x10", "crop_size"
    ),
    "cut JPEG": Case(
        TRAIN, record(1, jpeg(lambda d: d[: len(d) // 2])), r"db: record '00000001': .*truncated", "again"
    ),
    "corrupt JPEG": Case(TRAIN, record(1, jpeg(lambda d: bytes(len(d)))), r"db: record '00000001': .*damaged", "again"),
    "empty JPEG": Case(TRAIN, record(1, jpeg(lambda d: b"")), r"db: record '00000001': .*no bytes", "again"),
    "missing LMDB": Case(TRAIN, without_db(), r"net.prototxt:3:16: .*db: no such database", "working directory"),
    "empty LMDB": Case(TRAIN, without_db(empty_db), r"net.prototxt:3:16: .*db: the LMDB is empty", "interrupted"),
    "LMDB of no bytes": Case(TRAIN, cut("db/data.mdb", 0), r"net.prototxt:3:16: .*data.mdb is empty", "interrupted"),
    "truncated LMDB": Case(TRAIN, cut("db/data.mdb"), r"net.prototxt:3:16: .*truncated", "again"),
    "no LMDB": Case(TRAIN, put("db/data.mdb", b"hello" * 4000), r"net.prototxt:3:16: .*not a readable LMDB", "LMDB"),
    "file as LMDB": Case(TRAIN, without_db(put("db", b"x")), r"net.prototxt:3:16: .*directory", "data.mdb"),
    "solver as net": Case(
        [*TEST[:2], "solver.prototxt", *TEST[3:]], NO_CHANGE, r"solver.prototxt:1:1: .*'net'", "--solver"
    ),
    "net as solver": Case([*TRAIN[:2], "net.prototxt"], NO_CHANGE, r"net.prototxt:1:1: .*'name'", "--model"),
    "weights as net": Case(["summary", "old_iter_2.caffemodel"], NO_CHANGE, "binary file", "--weights"),
    "net beside the solver": Case(
        [*TRAIN[:2], "sub/solver.prototxt"],
        into("sub"),
        r"sub/solver.prototxt:1:1: .*'net.prototxt'",
        "start the program in 'sub'",
    ),
    "data beside the net": Case(
        [*TRAIN[:2], "sub/solver.prototxt", "--set", 'net="sub/net.prototxt"'],
        into("sub"),
        r"sub/net.prototxt:3:16: .*db: no such database",
        "'sub/db' exists",
    ),
    "snapshots into a file": Case(
        [*TRAIN, "--set", 'snapshot_prefix="net.prototxt/x"'],
        NO_CHANGE,
        r"solver.prototxt:7:1: .*directory",
        "name a directory",
        1,
    ),
    "snapshots into a folder that nobody can make": Case(
        [*TRAIN, "--set", 'snapshot_prefix="/proc/self/x/y"'],
        NO_CHANGE,
        r"solver.prototxt:7:1: .*/proc/self/x",
        "folder",
        1,
    ),
    "no prefix": Case(
        [*TRAIN, "--set", "snapshot_prefix="], NO_CHANGE, r"solver.prototxt:6:1: .*snapshot_prefix", "add:", 1
    ),
    "metrics into nowhere": Case(
        [*TRAIN, "--metrics", "no/m.jsonl"], NO_CHANGE, "'no/m.jsonl': No such", "--metrics", 1
    ),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a net, a solver, and the snapshot of a short run."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "net.prototxt").write_text(NET)
    (folder / "solver.prototxt").write_text(SOLVER)
    rng = np.random.default_rng(0)
    env = lmdb.open(str(folder / "db"), map_size=1 << 24)
    with env.begin(write=True) as txn:
        for i in range(RECORDS):
            pixels = rng.integers(0, 256, SIZE * SIZE, np.uint8).tobytes()
            value = pb.Datum(channels=1, height=SIZE, width=SIZE, data=pixels, label=i % CLASSES)
            txn.put(f"{i:08d}".encode(), value.SerializeToString())
    env.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        args = ["--set", 'snapshot_prefix="old"', "--iterations", "2", "--metrics", "none", "--log-level", "error"]
        assert main([*TRAIN, *args]) == 0
    return folder


@pytest.fixture
def place(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(old, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("lock.mdb")}


def judge(err: str, case: Case) -> None:
    assert "Traceback" not in err
    assert "internal error" not in err
    lines = [line for line in err.splitlines() if not re.match(r"[IW]\d{4} ", line)]
    errors = [line for line in lines if re.search(r"(^|: )error: ", line)]
    assert errors, err
    assert re.search(case.error, errors[0].replace(" error: ", " ") + "\n" + errors[0]), errors[0]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert hints, err
    assert any(case.hint in line for line in hints), hints


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, place: Path, capsys: Capture) -> None:
    case = CASES[name]
    case.change(place)
    before = contents(place)
    assert main(case.args) == case.code
    judge(capsys.readouterr().err, case)
    after = contents(place)
    after.pop("snap_metrics.jsonl", None)  # a log of what happened, whole lines: it may start before the error
    assert after == before


def test_a_locked_database_is_read(place: Path) -> None:
    """Another program that has the LMDB open, even writing, keeps nobody from training."""
    code = (
        "import lmdb, sys; env = lmdb.open('db', map_size=1 << 24); txn = env.begin(write=True); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert main(TRAIN) == 0
        holder.communicate(b"")


def test_a_disk_that_fills_up_leaves_no_half_snapshot(place: Path, capsys: Capture) -> None:
    """A limit on the size of files stands in for the full disk: both refuse while the file is written."""
    size = (place / "old_iter_2.caffemodel").stat().st_size
    before = contents(place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        assert main([*TRAIN, "--metrics", "none"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert "error: cannot write 'snap_iter_2.caffemodel': File too large" in err
    assert "Traceback" not in err
    assert contents(place) == before


def test_a_damaged_newest_snapshot_is_passed_over(place: Path, capsys: Capture) -> None:
    assert main(TRAIN) == 0
    cut("snap_iter_4.caffemodel")(place)
    capsys.readouterr()
    assert main([*TRAIN, "--snapshot", "auto"]) == 0
    err = capsys.readouterr().err
    assert "skipping snapshot 'snap_iter_4.solverstate'" in err
    assert "Restoring previous solver status from snap_iter_2.solverstate" in err


def test_metrics_on_a_full_disk(place: Path, capsys: Capture) -> None:
    assert main([*TRAIN, "--metrics", "/dev/full"]) == 1
    err = capsys.readouterr().err
    assert "error: cannot write '/dev/full': No space left on device" in err
    assert "hint: --metrics names another file" in err


def test_metrics_are_checked_first_and_kept_when_nothing_runs(place: Path, capsys: Capture) -> None:
    before = contents(place)
    assert main([*TRAIN, "--metrics", "no/m.jsonl"]) == 1
    assert "error: cannot write 'no/m.jsonl': No such file" in capsys.readouterr().err
    assert contents(place) == before
    (place / "snap_metrics.jsonl").write_text("of an earlier run\n")
    record(1, lambda v: v[:40])(place)
    assert main(TRAIN) == 3
    assert (place / "snap_metrics.jsonl").read_text() == "of an earlier run\n"


@pytest.mark.parametrize(("args", "words"), [(["-foo", "3"], "'--foo'"), (["--weights", ","], "names no file")])
def test_usage(args: list[str], words: str, place: Path, capsys: Capture) -> None:
    assert main([*TRAIN, *args]) == 2
    assert words in capsys.readouterr().err


def test_files_as_windows_writes_them(place: Path) -> None:
    """A byte order mark, and lines that end in CRLF."""
    for name in ("net.prototxt", "solver.prototxt"):
        text = (place / name).read_text().replace("\n", "\r\n")
        (place / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main([*TRAIN, "--log-level", "error"]) == 0
    cv2.imwrite("a.png", np.zeros((SIZE, SIZE), np.uint8))
    (place / "list.txt").write_bytes(b"\xef\xbb\xbfa.png 0\r\na.png 1\r\n")
    assert main(["convert_imageset", "--gray", "./", "list.txt", "out"]) == 0


def test_layers_of_one_name_train(place: Path, capsys: Capture) -> None:
    """Caffe allows it, and nets in the wild have it."""
    with (place / "net.prototxt").open("a") as f:
        f.write('layer { name: "ip" type: "Silence" bottom: "conv" }\n')
    assert main(TRAIN) == 0
    assert "net.prototxt:9:1: a second layer is named 'ip': it is called 'ip_2' here" in capsys.readouterr().err


def test_output_to_a_full_disk(place: Path) -> None:
    command = [sys.executable, "-m", "caffejacinto_py", "summary", "net.prototxt"]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("error: cannot write the output: No space left on device\n")
