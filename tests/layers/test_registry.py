"""The table of layer types is complete and consistent, and it loads without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Layer
from caffejacinto_py.schema import pb

TESTED = {
    name
    for path in Path(__file__).parent.glob("test_*.py")
    for name in re.findall(r'type: \\?"(\w+)\\?"', path.read_text())
} | {"SoftmaxWithLoss", "HingeLoss", "Accuracy"}


def test_importing_the_layers_does_not_load_torch() -> None:
    code = "import caffejacinto_py.layers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", registry.types())
def test_type_is_complete(name: str) -> None:
    cls = registry.find(name)
    assert cls.__doc__, "no docstring"
    assert cls.__doc__ != Layer.__doc__
    assert "Source:" in cls.__doc__, "the docstring names no source"
    if cls.field:
        assert cls.field in pb.LayerParameter.DESCRIPTOR.fields_by_name
    if cls.v1:
        assert cls.v1 in pb.V1LayerParameter.LayerType.keys()  # noqa: SIM118  (an enum wrapper, no dict)
    low, high = cls.bottoms
    assert high is None or low <= high
    assert not cls.source or cls.bottoms == (0, 0), "a source has no bottoms"
    assert name in TESTED, "no test builds this type"


def test_every_v1_name_has_one_owner() -> None:
    names = [registry.find(t).v1 for t in registry.types() if registry.find(t).v1]
    assert len(set(names)) == len({registry.find(t) for t in registry.types() if registry.find(t).v1})


def test_unknown_types_get_help() -> None:
    with pytest.raises(registry.UnknownLayer, match="unknown layer type 'Relu'") as e:
        registry.find("Relu", name="x")
    assert e.value.hint == "did you mean 'ReLU'?"
    with pytest.raises(registry.UnknownLayer) as e:
        registry.find("TRT")
    assert "NVCaffe" in str(e.value.hint)


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        registry.layer("ReLU")(type("Other", (Layer,), {}))


def test_types_called_missing_are_missing() -> None:
    named = {name for names in registry._OWNERS.values() for name in names.split()}
    assert not [name for name in named if registry.known(name)]
