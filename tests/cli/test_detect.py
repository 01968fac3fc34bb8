"""detect: scores of windows, on a net whose scores are the mean of each channel."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.schema.blobs import write_blob
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, write_model

Capture = pytest.CaptureFixture[str]
HEAD = "filename,ymin,xmin,ymax,xmax\n"
DEPLOY = """name: "d" input: "data" input_dim: 2 input_dim: 3 input_dim: 8 input_dim: 8
layer { name: "pool" type: "Pooling" bottom: "data" top: "pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip"
  inner_product_param { num_output: 4 bias_term: false } }
"""
NET = ["--model_def", "deploy.prototxt", "--pretrained_model", "w.caffemodel", "--log-level", "error"]


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.png is black, its right half blue; b.png is (10, 20, 60) everywhere. 40 high, 60 wide."""
    monkeypatch.chdir(tmp_path)
    Path("deploy.prototxt").write_text(DEPLOY)
    weights = np.eye(4, 3, dtype=np.float32)
    write_model("w.caffemodel", ModelFile("d", [LayerBlobs("ip", "InnerProduct", [weights])]))
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = (200, 0, 0)
    cv2.imwrite("a.png", picture)
    picture[:] = (10, 20, 60)
    cv2.imwrite("b.png", picture)


def detect(windows: str, *args: str, out: str = "out.csv") -> int:
    Path("in.csv").write_text(windows)
    return main(["detect", "in.csv", out, *NET, *args])


def rows(path: str = "out.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scores(path: str = "out.csv") -> list[list[float]]:
    return [[float(row[f"class{i}"]) for i in range(4)] for row in rows(path)]


def test_windows_to_csv(capsys: Capture) -> None:
    """Columns in any order, more columns, empty lines; windows of an image stay together."""
    text = "note,xmin,ymin,xmax,ymax,filename\nx,0,0,30,40,a.png\n\nx,0,0,60,40,b.png\nx,30,5,60,35.5,a.png\n"
    assert detect(text) == 0
    assert capsys.readouterr().out == "Wrote out.csv: 3 windows\n"
    lines = Path("out.csv").read_text().splitlines()
    assert lines[0] == "filename,ymin,xmin,ymax,xmax,class0,class1,class2,class3"
    assert [line.split(",")[:5] for line in lines[1:]] == [
        ["a.png", "0", "0", "40", "30"], ["a.png", "5", "30", "35.5", "60"], ["b.png", "0", "0", "40", "60"],
    ]  # fmt: skip
    want = [[0, 0, 0, 0], [200, 0, 0, 0], [10, 20, 60, 0]]
    np.testing.assert_allclose(scores(), want, atol=1e-4)


def test_windows_to_hdf5() -> None:
    assert detect(HEAD + "b.png,0,0,40,60\na.png,0,30,40,60\n", out="out.h5") == 0
    with h5py.File("out.h5") as file:
        assert list(file["filename"].asstr()) == ["b.png", "a.png"]
        assert file["window"][:].tolist() == [[0, 0, 40, 60], [0, 30, 40, 60]]
        np.testing.assert_allclose(file["prediction"][:], [[10, 20, 60, 0], [200, 0, 0, 0]], atol=1e-4)


def test_more_windows_than_are_held_at_once() -> None:
    right = [k % 3 == 0 for k in range(600)]
    assert detect(HEAD + "".join(f"a.png,0,{30 * r:d},40,{30 + 30 * r:d}\n" for r in right)) == 0
    assert [s[0] > 100 for s in scores()] == right


def test_scales_mean_and_channels() -> None:
    window = HEAD + "b.png,0,0,40,60\n"
    image = np.stack([np.full((4, 4), v, np.float32) for v in (1, 2, 3)])
    image[:, 0] += 4  # the average of each channel is 1 more
    np.save("mean.npy", image)
    write_blob("mean.binaryproto", image[None])
    for name in ("mean.npy", "mean.binaryproto"):
        assert detect(window, "--mean_file", name) == 0
        assert scores()[0] == pytest.approx([8, 17, 56, 0], abs=1e-4)
    np.save("values.npy", np.array([0.1, 0.2, 0.3]))
    args = ["--mean-file", "values.npy", "--raw_scale", "1", "--input_scale", "2", "--channel_swap", "0,1,2"]
    assert detect(window, *args) == 0
    want = [2 * (60 / 255 - 0.1), 2 * (20 / 255 - 0.2), 2 * (10 / 255 - 0.3), 0]
    assert scores()[0] == pytest.approx(want, abs=1e-5)


def test_context() -> None:
    """2 of 8 pixels on each side: half the side of what the net sees is surroundings."""
    window = HEAD + "a.png,10,30,29,49\n"
    assert detect(window) == 0
    assert scores()[0][0] == pytest.approx(200, abs=1e-3)
    assert detect(window, "--context_pad", "2") == 0
    assert 130 < scores()[0][0] < 165  # a quarter of it is left of the blue half


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("filename,ymin,xmin\na.png,1,2\n", 3, "in.csv:1:1: error: the first line names no column ymax, xmax"),
        ("", 3, "names no column filename"),
        (HEAD, 3, "no windows"),
        (HEAD + "a.png,0,0,10,10\na.png,1,x,3,4\n", 3, "in.csv:3:1: error: xmin 'x' is not a number"),
        (HEAD + "a.png,0,0,nan,10\n", 3, "in.csv:2:1: error: ymax 'nan' is not a place"),
        (HEAD + "a.png,0,0,10\n", 3, "in.csv:2:1: error: 4 values under 5 columns"),
        (HEAD + " ,0,0,10,10\n", 3, "the filename is empty"),
        (HEAD + "\nno.png,0,0,10,10\n", 3, "in.csv:3:1: error: there is no image 'no.png'"),
        (HEAD + "deploy.prototxt,0,0,10,10\n", 3, "cannot read 'deploy.prototxt' as an image"),
        (HEAD + "a.png,0,0,41,10\n", 3, "lies outside of its image: a.png is 40 high and 60 wide"),
        (HEAD + "a.png,-1,0,10,10\n", 3, "lies outside"),
        (HEAD + "a.png,5,5,5,10\n", 3, "window 5,5,5,10 is empty"),
        (HEAD + "a.png,5,10,8,6\n", 3, "the order is ymin,xmin,ymax,xmax"),
    ],
)
def test_bad_windows(text: str, code: int, words: str, capsys: Capture) -> None:
    Path("out.csv").write_text("before")
    assert detect(text) == code
    assert words in capsys.readouterr().err
    assert Path("out.csv").read_text() == "before"


def test_all_bad_lines_are_named(capsys: Capture) -> None:
    assert detect(HEAD + "no.png,0,0,1,1\na.png,?,0,1,1\na.png,0,0,99,1\n") == 3
    err = capsys.readouterr().err
    assert err.index("in.csv:2:1") < err.index("in.csv:3:1") < err.index("in.csv:4:1")
    assert not Path("out.csv").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--channel_swap", "0,1"], 2, "0, 1, 2 in some order"),
        (["--raw_scale", "0"], 2, "above 0"),
        (["--input_scale", "nan"], 2, "above 0"),
        (["--context_pad", "4"], 2, "leaves nothing"),
        (["--mean_file", "no.npy"], 3, "no.npy"),
        (["--mean_file", "no.binaryproto"], 3, "no.binaryproto"),
        (["--mean_file", "five.npy"], 3, "a mean of shape (5,)"),
        (["--crop_mode", "edges"], 2, "selective_search"),
        (["--pretrained_model", "no.caffemodel"], 3, "no.caffemodel"),
        (["--model_def", "gray.prototxt"], 2, "color images"),
        (["--model_def", "wide.prototxt", "--context_pad", "1"], 2, "square"),
        (["--model_def", "data.prototxt"], 2, "deploy.prototxt"),
        (["--model_def", "python.prototxt"], 3, "--allow-python-layers"),
    ],
)
def test_bad_options(args: list[str], code: int, words: str, capsys: Capture) -> None:
    np.save("five.npy", np.ones(5))
    Path("gray.prototxt").write_text(DEPLOY.replace("input_dim: 3", "input_dim: 1"))
    Path("wide.prototxt").write_text(DEPLOY.replace("input_dim: 8\n", "input_dim: 9\n"))
    shape = "shape { dim: 2 dim: 3 dim: 8 dim: 8 }"
    data = f'layer {{ name: "data" type: "DummyData" top: "data" dummy_data_param {{ {shape} }} }}'
    Path("data.prototxt").write_text(data + DEPLOY.partition("\n")[2])
    python = 'layer { name: "p" type: "Python" bottom: "ip" top: "p" python_param { module: "m" layer: "L" } }'
    Path("python.prototxt").write_text(DEPLOY + python)
    assert detect(HEAD + "a.png,0,0,10,10\n", *args) == code
    assert words in capsys.readouterr().err
    assert not Path("out.csv").exists()


def test_output_is_checked_first(capsys: Capture) -> None:
    assert detect(HEAD, out="out.txt") == 2
    assert "ending is .csv or .h5" in capsys.readouterr().err
    assert detect(HEAD, out="no/out.csv") == 1
    assert "does not exist" in capsys.readouterr().err


def test_selective_search(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package an error; with one (ours, for the test), its windows."""
    Path("in.txt").write_text("a.png\n\nb.png\n")
    args = ["detect", "in.txt", "out.csv", *NET, "--crop_mode", "selective_search"]
    assert main(args) == 2
    assert "selective_search_ijcv_with_python" in capsys.readouterr().err
    assert not Path("out.csv").exists()
    Path("selective_search_ijcv_with_python.py").write_text(
        "import numpy as np\ndef get_windows(files, cmd):\n    return [np.array([[0, 30, 40, 60]])] * len(files)\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(args) == 0
    sys.modules.pop("selective_search_ijcv_with_python")
    assert [row["filename"] for row in rows()] == [str(Path("a.png").resolve()), str(Path("b.png").resolve())]
    np.testing.assert_allclose(scores(), [[200, 0, 0, 0], [10, 20, 60, 0]], atol=1e-4)
    Path("in.txt").write_text("a.png\nno.png\n")
    assert main(args) == 3
    assert "in.txt:2:1: error: there is no image 'no.png'" in capsys.readouterr().err


def test_the_old_program() -> None:
    tool = Path(__file__).parents[2] / "tools" / "detect.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--pretrained-model" in done.stdout
