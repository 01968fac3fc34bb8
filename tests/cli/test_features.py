"""extract_features and classify."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.sources import Database
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.blobs import write_blob
from caffejacinto_py.schema.datum import make_datum, parse_datum
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, write_model
from tests.conftest import shared

Capture = pytest.CaptureFixture[str]
NET = """name: "f"
layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "db" batch_size: 2 backend: LMDB } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
  inner_product_param { num_output: 3 bias_term: false } }
layer { name: "relu" type: "ReLU" bottom: "ip" top: "ip" }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
WEIGHT = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 1]], np.float32)


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A net, its weights and five records in the working directory; returns the records."""
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(NET)
    images = np.arange(20, dtype=np.uint8).reshape(5, 1, 2, 2)
    with LmdbWriter("db") as db:
        for i, image in enumerate(images):
            db.put(b"%08d" % i, make_datum(image, label=i))
    write_model("w.caffemodel", ModelFile("f", [LayerBlobs("ip", "InnerProduct", [WEIGHT])]))
    return images


def test_features(features: np.ndarray, capsys: Capture) -> None:
    args = ["w.caffemodel", "net.prototxt", "ip,data", "a,b", "3", "lmdb", "CPU", "0"]
    assert main(["extract_features", *args, "--log-level", "error"]) == 0
    assert capsys.readouterr().out == "Wrote a: 6 features of blob 'ip'\nWrote b: 6 features of blob 'data'\n"
    with lmdb.open("a", readonly=True, lock=False) as env, env.begin() as txn:
        records = list(txn.cursor())
    assert [key for key, _ in records] == [b"%010d" % i for i in range(6)]
    for i, (_, value) in enumerate(records):
        datum = pb.Datum.FromString(value)
        image = features[i % 5].reshape(-1).astype(np.float32)
        assert (datum.channels, datum.height, datum.width) == (3, 1, 1)
        assert not datum.data
        assert list(datum.float_data) == np.maximum(WEIGHT @ image, 0).tolist()  # behind the ReLU in place
    with Database("b").read([1]) as found:
        assert np.array_equal(parse_datum(found[0]).array(), features[1])


def test_features_feed_a_net_again(features: np.ndarray) -> None:
    assert main(["extract_features", "w.caffemodel", "net.prototxt", "ip", "a", "2", "--log-level=error"]) == 0
    Path("next.prototxt").write_text(NET.replace('"db"', '"a"').replace("num_output: 3", "num_output: 1"))
    assert main(["check", "next.prototxt", "--phase", "TEST", "--data-shape", "3,1,1"]) == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["ip", "a,b", "1"], 2, "1 blobs but 2 databases"),
        (["ip,data", "a,./a", "1"], 2, "one database"),
        (["ipp", "a", "1"], 2, "did you mean 'ip'"),
        (["ip", "a", "0"], 2, "BATCHES"),
        (["ip", "a", "1", "leveldb"], 2, "leveldb"),
        (["ip", "a", "1", "lmdb", "TPU"], 2, "TPU"),
        (["ip", "db", "1"], 3, "exists already"),
        pytest.param(
            ["ip", "a", "1", "lmdb", "GPU"],
            1,
            "no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_features_refused(args: list[str], code: int, words: str, features: np.ndarray, capsys: Capture) -> None:
    assert main(["extract_features", "w.caffemodel", "net.prototxt", *args]) == code
    assert words in capsys.readouterr().err
    assert {p.name for p in Path().iterdir()} == {"db", "net.prototxt", "w.caffemodel"}
    assert main(["extract_features", "absent.caffemodel", "net.prototxt", "ip", "a", "1"]) == 3
    assert not Path("a").exists()


DEPLOY = """name: "c" input: "data" input_dim: 1 input_dim: 3 input_dim: 2 input_dim: 4
layer { name: "pool" type: "Pooling" bottom: "data" top: "pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip"
  inner_product_param { num_output: 3 bias_term: false } }
"""


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net whose scores are the mean of each channel, and images that tell everything that can go wrong."""
    monkeypatch.chdir(tmp_path)
    Path("deploy.prototxt").write_text(DEPLOY)
    write_model("w.caffemodel", ModelFile("c", [LayerBlobs("ip", "InnerProduct", [np.eye(3, dtype=np.float32)])]))
    image = np.zeros((2, 4, 3), np.uint8)
    image[:] = (10, 20, 60)  # blue, green, red
    cv2.imwrite("plain.png", image)
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[1:3, 2:6] = 200  # the center of 2 x 4
    cv2.imwrite("wide.png", wide)


def scores(capsys: Capture, *args: str) -> list[list[float]]:
    assert main(["classify", "deploy.prototxt", "w.caffemodel", *args, "--json", "--log-level=error"]) == 0
    found = json.loads(capsys.readouterr().out)
    return [[c["probability"] for c in sorted(e["classes"], key=lambda c: c["class"])] for e in found]


def test_what_the_net_sees(pictures: None, capsys: Capture) -> None:
    """BGR, 0 to 255, unless told otherwise."""
    assert scores(capsys, "plain.png") == [pytest.approx([10, 20, 60])]
    assert scores(capsys, "plain.png", "--channel-swap", "0,1,2") == [pytest.approx([60, 20, 10])]
    assert scores(capsys, "plain.png", "-channel-swap=1,2,0") == [pytest.approx([20, 10, 60])]
    assert scores(capsys, "plain.png", "--raw-scale", "1")[0] == pytest.approx([10 / 255, 20 / 255, 60 / 255])
    assert scores(capsys, "plain.png", "--mean", "1,2,3") == [pytest.approx([9, 18, 57])]
    assert scores(capsys, "plain.png", "--mean", "5.5") == [pytest.approx([4.5, 14.5, 54.5])]
    args = ["--mean", "0.1,0.2,0.3", "--raw-scale", "1", "--input-scale", "2"]
    want = [(10 / 255 - 0.1) * 2, (20 / 255 - 0.2) * 2, (60 / 255 - 0.3) * 2]
    assert scores(capsys, "plain.png", *args)[0] == pytest.approx(want, abs=1e-6)


def test_crops_and_mean_files(pictures: None, capsys: Capture) -> None:
    assert scores(capsys, "wide.png", "--image-dims", "4,8") == [pytest.approx([200] * 3)]
    corners = scores(capsys, "wide.png", "--image-dims", "4,8", "--crop", "ten")[0]
    assert corners == pytest.approx([(200 + 4 * 50) / 5] * 3)  # a corner holds a quarter of it
    mean = np.zeros((3, 4, 8), np.float32)
    mean[:, 1:3, 2:6] = 50
    np.save("mean.npy", mean)
    write_blob("mean.binaryproto", mean[None])
    for name in ("mean.npy", "mean.binaryproto"):
        assert scores(capsys, "wide.png", "--image-dims=4x8", "--mean", name) == [pytest.approx([150] * 3)]
    np.save("values.npy", np.array([1, 2, 3], np.float32))
    assert scores(capsys, "plain.png", "--mean", "values.npy") == [pytest.approx([9, 18, 57])]


def test_text_labels_and_many_images(pictures: None, capsys: Capture) -> None:
    Path("names").write_text("n01 blue\nn02 green\nn03 red\n\n")
    args = ["classify", "deploy.prototxt", "w.caffemodel", "plain.png", "--labels", "names", "--top", "2"]
    assert main(args) == 0
    out = capsys.readouterr()
    assert out.out == "plain.png:\n  60.0000  2  n03 red\n  20.0000  1  n02 green\n"
    assert "not probabilities" in out.err
    many = ["plain.png"] * 17 + ["wide.png"]
    found = scores(capsys, *many)
    assert found[16] == found[0] != found[17]
    assert len(found) == 18


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["absent.png"], 3, "absent.png: error: cannot read this image"),
        (["deploy.prototxt"], 3, "not an image"),
        (["plain.png", "--mean", "1,2"], 2, "2 numbers for 3 channels"),
        (["plain.png", "--mean", "absent.npy"], 3, "absent.npy"),
        (["plain.png", "--mean", "absent.binaryproto"], 3, "absent.binaryproto"),
        (["plain.png", "--mean", "small.npy"], 3, "the mean file is 3x1x1"),
        (["plain.png", "--image-dims", "1,1"], 2, "at least the net's 2,4"),
        (["plain.png", "--image-dims", "big"], 2, "numbers with commas"),
        (["plain.png", "--channel-swap", "0,1"], 2, "0, 1, 2 in some order"),
        (["plain.png", "--raw-scale", "0"], 2, "above 0"),
        (["plain.png", "--labels", "two"], 2, "names 2 classes, the net has 3"),
        (["plain.png", "--labels", "absent"], 3, "labels"),
        (["plain.png", "--blob", "prob"], 2, "no output 'prob'"),
        ([], 2, "IMAGES"),
    ],
)
def test_classify_refused(args: list[str], code: int, words: str, pictures: None, capsys: Capture) -> None:
    Path("two").write_text("a\nb\n")
    np.save("small.npy", np.ones((3, 1, 1), np.float32))
    assert main(["classify", "deploy.prototxt", "w.caffemodel", *args]) == code
    out = capsys.readouterr()
    assert words in out.err
    assert out.out == ""


def test_a_training_net_is_refused(features: np.ndarray, capsys: Capture) -> None:
    assert main(["classify", "net.prototxt", "w.caffemodel", "x.png"]) == 2
    err = capsys.readouterr().err
    assert "'data' (Data)" in err
    assert "deploy.prototxt" in err


def test_lenet_reads_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Weights of C++ Caffe, the first images of the MNIST test set."""
    mnist, folder = shared("data/mnist"), shared("caffemodels/lenet_mnist")
    monkeypatch.chdir(tmp_path)
    pixels = np.frombuffer(gzip.decompress((mnist / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, 50 * 784, 16)
    labels = np.frombuffer(gzip.decompress((mnist / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, 50, 8)
    for i, image in enumerate(pixels.reshape(50, 28, 28)):
        cv2.imwrite(f"{i:02d}.png", image)
    names = [f"{i:02d}.png" for i in range(50)]
    net, weights = str(folder / "lenet.prototxt"), str(folder / "lenet_iter_10000.caffemodel")
    args = ["--input-scale", "0.00390625", "--top", "1", "--json"]
    assert main(["classify", net, weights, *names, *args]) == 0
    out = capsys.readouterr()
    assert "not probabilities" not in out.err
    found = [e["classes"][0] for e in json.loads(out.out)]
    assert sum(int(c["class"] == want) for c, want in zip(found, labels, strict=True)) >= 49
    assert all(0.3 < c["probability"] <= 1 for c in found)
