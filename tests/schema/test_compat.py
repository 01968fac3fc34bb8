"""Compat switches: parsing, errors, and that every switch is described."""

from __future__ import annotations

from dataclasses import fields

import pytest

from caffejacinto_py.errors import UsageError
from caffejacinto_py.schema.compat import SWITCHES, Compat, parse_compat
from caffejacinto_py.schema.dialect import resolve_dialect


def test_every_switch_has_a_field_and_starts_at_its_first_value() -> None:
    assert {f.name: f.default for f in fields(Compat)} == {name: s.values[0] for name, s in SWITCHES.items()}


def test_switches_travel_in_the_dialect() -> None:
    compat = parse_compat(["quantization=cpu,elu=binary"])
    assert compat.changed() == {"quantization": "cpu", "elu": "binary"}
    assert resolve_dialect(compat=compat).compat.quantization == "cpu"
    assert resolve_dialect().compat == Compat()


@pytest.mark.parametrize(
    ("text", "match"), [("quantisation=cpu", "unknown compat"), ("elu=cpu", "no value 'cpu'"), ("elu", "no value")]
)
def test_wrong_switches(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        parse_compat([text])
    assert caught.value.hint
