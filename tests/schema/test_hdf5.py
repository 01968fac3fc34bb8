"""HDF5 weights in C++ Caffe's layout."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from caffejacinto_py.errors import CaffeError, WeightsError
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model
from tests.conftest import shared
from tests.schema.weights_helpers import saved

F = np.arange(6, dtype=np.float32)


def _write(path: Path, layers: list[LayerBlobs], *, diffs: bool = False) -> Path:
    write_model(path, ModelFile("n", layers), format="hdf5", diffs=diffs)
    return path


def test_a_real_model_goes_through_hdf5(tmp_path: Path) -> None:
    model = read_model(shared("caffemodels/lenet_mnist/lenet_iter_10000.caffemodel"))
    write_model(tmp_path / "a", model, format="hdf5")
    back = read_model(tmp_path / "a")
    assert back.version == "HDF5"
    assert sorted(x.name for x in back.layers) == sorted(x.name for x in model.layers)
    for layer in model.layers:
        for a, b in zip(layer.blobs, back.layer(layer.name).blobs, strict=True):
            assert a.shape == b.shape
            assert np.array_equal(a, b)
    write_model(tmp_path / "b", back)
    assert np.array_equal(read_model(tmp_path / "b").layer("ip2").blobs[1], model.layer("ip2").blobs[1])


def test_layout_shared_blobs_slashes_and_diffs(tmp_path: Path) -> None:
    w = F.reshape(2, 3)
    layers = [
        LayerBlobs("data"),
        LayerBlobs("a", blobs=[w, F], diffs=[w + 1, F + 1]),
        LayerBlobs("twin", blobs=[w, F + 2], diffs=[w + 1, F + 3], shared={0}),
        LayerBlobs("inception/1x1", blobs=[F]),
        LayerBlobs("scalar", blobs=[np.float32(2).reshape(())]),
        LayerBlobs("double", blobs=[F.astype(np.float64)]),
        LayerBlobs("half", blobs=[F.astype(np.float16)]),
    ]
    path = _write(tmp_path / "a.h5", layers, diffs=True)
    with h5py.File(path, "r") as file:
        assert sorted(file["data"]) == ["a", "data", "double", "half", "inception", "scalar", "twin"]
        assert sorted(file["data/twin"]) == ["1"]
        assert sorted(file["diff/twin"]) == ["0", "1"]
        assert file["data/inception/1x1/0"].dtype == np.float32
        assert file["data/double/0"].dtype == np.float64
        assert file["data/half/0"].dtype == np.float32
    back = read_model(path)
    assert [x.name for x in back.layers] == ["a", "data", "double", "half", "inception/1x1", "scalar", "twin"]
    assert np.array_equal(back.layer("a").diffs[0], w + 1)
    assert back.layer("data").blobs == []
    assert back.layer("twin").blobs[0] is None
    assert np.array_equal(back.layer("twin").blobs[1], F + 2)
    assert back.layer("scalar").blobs[0].shape == ()


def test_names_that_clash(tmp_path: Path) -> None:
    with pytest.raises(CaffeError, match="cannot write"):
        _write(tmp_path / "a", [LayerBlobs("a", blobs=[F]), LayerBlobs("a/0", blobs=[F])])
    with pytest.raises(CaffeError, match="without a name"):
        _write(tmp_path / "a", [LayerBlobs("", blobs=[F])])
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d", "w") as file:
        file["data"], file["label"] = F, F
    with pytest.raises(WeightsError, match="no group /data"):
        read_model(tmp_path / "d")
    with h5py.File(tmp_path / "e", "w") as file:
        file.create_group("data")
    with pytest.raises(WeightsError, match="no layers"):
        read_model(tmp_path / "e")
    with h5py.File(tmp_path / "s", "w") as file:
        file["data/a/0"] = "text"
    with pytest.raises(WeightsError, match="not numbers"):
        read_model(tmp_path / "s")


def test_a_dataset_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        file.create_dataset("data/a/0", (1 << 40,), np.float32, chunks=(1024,))  # nothing stored
    with pytest.raises(WeightsError, match="claims"):
        read_model(tmp_path / "a")


def test_cut_files(tmp_path: Path) -> None:
    data = _write(tmp_path / "a", [LayerBlobs("a", blobs=[F] * 3)]).read_bytes()
    for cut in range(8, len(data), 97):
        with pytest.raises(WeightsError):
            read_model(saved(tmp_path / "cut", data[:cut]))


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.h5", [LayerBlobs("a", blobs=[F])])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CaffeError, match="h5py is not installed") as e:
        read_model(path)
    assert e.value.hint is not None
    assert "[hdf5]" in e.value.hint
