"""YAML with places."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffejacinto_py.errors import Loc
from caffejacinto_py.recipes.document import RecipeError, Scalar, Sequence, Table, Variables, parse, read


def test_scalars_stay_as_they_are_written() -> None:
    table = parse("a: 1e-5\nb: on\nc: '007'\nd: ~\ne: [1, \"x\"]\nf:\n  g: true\n", "r.yaml")
    assert [table.values[k].text for k in "abcd"] == ["1e-5", "on", "007", ""]
    assert table.values["c"].quoted
    assert [s.text for s in table.values["e"].items] == ["1", "x"]
    inner = table.table("f")
    assert inner is not None
    assert inner.values["g"] == Scalar("true", Loc("r.yaml", 7, 6))
    assert inner.keys["g"] == Loc("r.yaml", 7, 3)


@pytest.mark.parametrize(
    ("text", "line", "col", "words"),
    [
        ("a: 1\n b: 2\n", 2, 3, "no YAML"),
        ("a: [1, 2\n", 2, 1, "no YAML"),
        ("a: 'x\n", 2, 1, "no YAML"),
        ("a:\n\t- b\n", 2, 1, "no YAML"),
        ("- a\n", 1, 1, "a recipe is a table"),
        ("", 1, 1, "a recipe is a table"),
        ("a: 1\nb: 2\na: 3\n", 3, 1, "'a' is given twice; first in line 1"),
        ("a: 1\n[b]: 2\n", 2, 1, "a key must be a word"),
        ("a: &x\n  b: *x\n", 1, 4, "inside its own anchor"),
        ("a: &x 1\nb:\n  <<: *x\n", 1, 4, "takes over tables only"),
        ("a: *gone\n", 1, 4, "no YAML"),
    ],
)
def test_errors_have_places(text: str, line: int, col: int, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert words in str(caught.value)
    assert caught.value.loc == Loc("r.yaml", line, col)
    assert caught.value.exit_code == 3


def test_merge_keys_take_over_what_is_not_given() -> None:
    table = parse("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\nc:\n  <<: [{x: 5}, *base]\n", "r.yaml")
    b, c = table.table("b"), table.table("c")
    assert b is not None
    assert {k: v.text for k, v in b.values.items()} == {"x": "1", "y": "3"}
    assert b.keys["x"].line == 1
    assert c is not None
    assert {k: v.text for k, v in c.values.items()} == {"x": "5", "y": "2"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"did you mean 'digits\.yaml'"):
        read(tmp_path / "digit.yaml")
    with pytest.raises(RecipeError, match="no UTF-8"):
        read(tmp_path / "digits.yaml")
    with pytest.raises(RecipeError, match="directory"):
        read(tmp_path)


def test_tables_check_their_values() -> None:
    table = parse("word: [1]\ncount: 1.5\ntable: x\nnothing:\n", "r.yaml")
    with pytest.raises(RecipeError, match="single value"):
        table.text("word")
    with pytest.raises(RecipeError, match="whole number"):
        table.count("count")
    with pytest.raises(RecipeError, match="must be a table"):
        table.table("table")
    assert table.table("nothing") is None
    with pytest.raises(RecipeError, match="a recipe has no 'word'") as caught:
        table.only(["words", "count", "table", "nothing"], "a recipe")
    assert caught.value.hint == "did you mean 'words'?"


def test_variables() -> None:
    values = Variables({"a": "1", "b": "x y"})
    table = parse("p: ${a}/${b}.txt\nq:\n- ${a}\nr: {s: '${b}'}\n", "r.yaml")
    filled = values.fill(table)
    assert isinstance(filled, Table)
    assert filled.values["p"].text == "1/x y.txt"
    assert isinstance(filled.values["q"], Sequence)
    assert filled.values["q"].items[0].text == "1"
    assert filled.values["r"].values["s"].text == "x y"
    with pytest.raises(RecipeError, match="there is no variable 'bb'") as caught:
        values.fill(parse("p: ${bb}\n", "r.yaml"))
    assert (caught.value.loc, caught.value.hint) == (Loc("r.yaml", 1, 4), "did you mean 'b'?")
