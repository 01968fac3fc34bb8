"""How errors look on a terminal."""

from __future__ import annotations

import pytest

from caffejacinto_py.errors import InputError, LayerError, Loc, ManyErrors, PrototxtError, near, raise_all, render


def test_render_shows_place_line_caret_and_hint(tmp_path):
    file = tmp_path / "net.prototxt"
    file.write_text('name: "n"\n\tbottom: "conv1x"\n')
    shown = render(LayerError("no such bottom", loc=Loc(str(file), 2, 10), hint="did you mean 'conv1'?"))
    assert shown.splitlines() == [
        f"{file}:2:10: error: no such bottom",
        '   bottom: "conv1x"',
        "           ^",
        "hint: did you mean 'conv1'?",
    ]


def test_render_does_without_place_or_file(tmp_path):
    assert render(InputError("bad")) == "error: bad"
    assert render(InputError("bad", loc=Loc("gone.prototxt", 3, 1))) == "gone.prototxt:3:1: error: bad"
    assert render(InputError("bad", loc=Loc("gone.prototxt"))) == "gone.prototxt: error: bad"


def test_many_errors_are_cut_at_twenty():
    errors = [PrototxtError(f"e{i}") for i in range(25)]
    with pytest.raises(ManyErrors) as caught:
        raise_all(errors)
    shown = render(caught.value).splitlines()
    assert len(shown) == 21
    assert shown[-1] == "... and 5 more errors"
    assert caught.value.exit_code == 3
    with pytest.raises(PrototxtError, match="e0"):
        raise_all(errors[:1])
    raise_all([])


def test_near_finds_the_closest_name():
    assert near("Convolutoin", ["Convolution", "Pooling"]) == "did you mean 'Convolution'?"
    assert near("relu", ["ReLU"]) == "did you mean 'ReLU'?"
    assert near("zzz", ["ReLU"]) is None
