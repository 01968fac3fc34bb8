"""What the Python and HDF5Output classes say without running anything; tests/pycaffe/ runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.base import Context
from caffejacinto_py.layers.registry import UnknownLayer, make
from caffejacinto_py.schema import pb
from tests.layers.harness import layer_of

OUTPUT = 'type: "HDF5Output" hdf5_output_param { file_name: "x.h5" }'


def python(**fields: str) -> pb.LayerParameter:
    return pb.LayerParameter(name="p", type="Python", top=["y"], python_param=pb.PythonParameter(**fields))


def test_refused_without_importing() -> None:
    layer = layer_of('type: "Python" python_param { module: "this" layer: "C" }', bottoms=0)
    with pytest.raises(UnknownLayer, match="class 'C' in Python module 'this', which is not allowed") as e:
        layer.shapes([])
    assert e.value.type == "Python"
    assert e.value.field == ("type",)
    assert "this" not in sys.modules
    assert layer.instance is None


@pytest.mark.parametrize("fields", [{}, {"module": "m"}, {"layer": "C"}])
def test_module_and_class_are_required(fields: dict[str, str]) -> None:
    for allowed in (True, False):
        with pytest.raises(LayerError, match="python_param needs"):
            make(python(**fields), Context(python_layers=allowed), 1).shapes([])


def test_blobs_carry_the_values_of_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caffejacinto_py.layers.modules.python import PythonLayer

    class Shaped(PythonLayer):
        def setup(self, bottom, top):  # type: ignore[no-untyped-def]
            self.blobs.add_blob(2, 1)
            self.blobs[0].data[...] = 3

        def reshape(self, bottom, top):  # type: ignore[no-untyped-def]
            top[0].reshape(bottom[0].num, 7)

    (tmp_path / "shaped_by_test.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import shaped_by_test

    shaped_by_test.Shaped = Shaped
    proto = python(module="shaped_by_test", layer="Shaped")
    proto.bottom.append("x")
    layer = make(proto, Context(python_layers=True), 1)
    (blob,) = layer.blobs([(5, 2)])
    assert blob.shape == (2, 1)
    assert blob.value.tolist() == [[3], [3]]
    assert layer.shapes([(5, 2)]) == [(5, 7)]
    assert layer.shapes([(4, 2)]) == [(4, 7)]
    del sys.modules["shaped_by_test"]


def test_hdf5_output() -> None:
    layer = layer_of(OUTPUT, bottoms=2, tops=0)
    assert layer.shapes([(4, 3), (4,)]) == []
    assert not layer.differentiable(0)
    for ins in ([(4, 3), (3,)], [(), ()]):
        with pytest.raises(LayerError, match="same number of items"):
            layer.shapes(ins)
    with pytest.raises(LayerError, match="needs file_name"):
        layer_of('type: "HDF5Output"', bottoms=2, tops=0).shapes([(1,), (1,)])
