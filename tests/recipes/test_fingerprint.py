"""What makes a finished stage run again: changed data, mean files, lists, code, teachers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lmdb
import pytest

from caffejacinto_py.recipes import fingerprint
from caffejacinto_py.recipes.measure import bits
from caffejacinto_py.schema.text import parse
from tests.recipes.test_run import actions, runner


def net(text: str) -> Any:
    return parse(text, "NetParameter").message


def of(text: str) -> dict[str, str]:
    return fingerprint.of_nets([net(text)])


def test_changed_data_run_their_stages_again(folder: Path) -> None:
    runner().run()
    assert actions() == ["keep"] * 4
    os.utime("digits_train_lmdb/data.mdb")  # small: the content counts
    assert actions() == ["keep"] * 4
    for part in ("train", "test"):
        name = f"digits_{part}_lmdb"
        real = Path(name).resolve()
        Path(name).unlink()
        shutil.copytree(real, name)
    assert actions() == ["keep"] * 4  # a copy is the same
    with lmdb.open("digits_test_lmdb", map_size=1 << 24) as env, env.begin(write=True) as txn:
        key = next(iter(txn.cursor().iternext(values=False)))
        txn.put(key, bytes(txn.get(key))[:-1] + b"\x05")
    assert actions() == ["run"] * 4  # every stage tests
    runner().run()
    assert actions() == ["keep"] * 4


def test_files_that_nets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mean.bin", "a.h5", "b.h5", "pictures.txt"):
        Path(name).write_bytes(name.encode())
    Path("list.txt").write_text("a.h5\n\nb.h5\ngone.h5\n")
    text = """
    layer { name: "mean.bin" type: "Data" transform_param { mean_file: "mean.bin" } data_param { source: "nowhere" } }
    layer { type: "HDF5Data" hdf5_data_param { source: "list.txt" } }
    layer { type: "ImageData" image_data_param { source: "pictures.txt" root_folder: "." } }
    """
    first = of(text)
    assert set(first) == {"mean.bin", "nowhere", "list.txt", "a.h5", "b.h5", "gone.h5", "pictures.txt"}
    assert {name for name, known in first.items() if not known} == {"nowhere", "gone.h5"}
    for name in ("mean.bin", "b.h5", "pictures.txt"):
        Path(name).write_bytes(b"other")
        second = of(text)
        assert {k for k in first if first[k] != second[k]} == {name}
        first = second


def test_large_files_by_time_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE", 1000)
    path = tmp_path / "large"
    path.write_bytes(bytes(500_000))
    os.utime(path, ns=(1, 1))
    first = fingerprint.of_file(str(path))
    assert fingerprint.of_file(str(path)) == first
    os.utime(path, ns=(1, 2))
    assert fingerprint.of_file(str(path)) != first
    path.write_bytes(bytes(499_999) + b"x")
    os.utime(path, ns=(1, 1))
    fingerprint._content.cache_clear()  # same size and time: known already
    assert fingerprint.of_file(str(path)) != first


def test_modules_of_python_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("raise SystemExit")  # is not run
    (tmp_path / "pack" / "mine.py").write_text("a = 1")
    text = 'layer { type: "Python" python_param { module: "%s" layer: "L" } }'
    first = of(text % "pack.mine")
    assert first["module pack.mine"]
    (tmp_path / "pack" / "mine.py").write_text("a = 2")
    assert of(text % "pack.mine") != first
    assert of(text % "pack.other") == {"module pack.other": ""}
    assert of(text % "..") == {"module ..": ""}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('layer { type: "ReLU" }', (32, 32)),
        ('layer { type: "LPConvolution" lpfp_param { bd: 2 ad: 6 } }', (8, 32)),
        ('layer { type: "LPInnerProduct" lpfp_param { bd: 2 ad: 14 } } '
         'layer { type: "LPConvolution" lpfp_param { bd: 2 ad: 6 } } '
         'layer { type: "LPAct" lpfp_param { bd: 4 ad: 6 } }',
         (16, 10)),
        ('layer { type: "FcRistretto" quantization_param { bw_params: 4 bw_layer_in: 8 bw_layer_out: 6 } }', (4, 8)),
        ('layer { type: "ConvolutionRistretto" quantization_param { precision: MINIFLOAT mant_bits: 5 exp_bits: 4 } }',
         (10, 10)),
        ('layer { type: "ConvolutionRistretto" quantization_param { precision: INTEGER_POWER_OF_2_WEIGHTS '
         "exp_min: -8 exp_max: -1 bw_layer_in: 8 bw_layer_out: 8 } }", (4, 8)),
    ],
)  # fmt: skip
def test_bits_of_short_words(text: str, want: tuple[int, int]) -> None:
    assert bits(net(text)) == want
