from __future__ import annotations

import click
import pytest

from caffejacinto_py.cli.group import VERBS
from caffejacinto_py.cli.spelling import canonical, move_verb_first, normalise
from caffejacinto_py.errors import UsageError


@click.command()
@click.option("--solver")
@click.option("--gpu")
@click.option("--sigint-effect")
@click.option("--pair", nargs=2)
@click.option("--shuffle/--no-shuffle")
@click.option("--gray", is_flag=True)
@click.option("-o", "--output")
@click.argument("files", nargs=-1)
def command(**given: object) -> None:
    """A command with every kind of option."""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["-solver", "x"], ["--solver", "x"]),
        (["--solver", "x"], ["--solver", "x"]),
        (["-solver=x"], ["--solver", "x"]),
        (["--solver=x=y"], ["--solver", "x=y"]),
        (["--SOLVER=x"], ["--solver", "x"]),
        (["--solver="], ["--solver", ""]),
        (["-gpu", "-1"], ["--gpu", "-1"]),
        (["-gpu=-1"], ["--gpu", "-1"]),
        (["-gpu", "all", "x.prototxt"], ["--gpu", "all", "x.prototxt"]),
        (["-sigint_effect", "stop"], ["--sigint-effect", "stop"]),
        (["--sigint-effect=stop"], ["--sigint-effect", "stop"]),
        (["--solver", "--gpu"], ["--solver", "--gpu"]),
        (["--pair", "-1", "-2", "-gpu=0"], ["--pair", "-1", "-2", "--gpu", "0"]),
        (["-gray"], ["--gray"]),
        (["--gray=true"], ["--gray"]),
        (["--gray=false"], []),
        (["--shuffle=0"], ["--no-shuffle"]),
        (["--noshuffle"], ["--no-shuffle"]),
        (["-noshuffle"], ["--no-shuffle"]),
        (["--nogray"], []),
        (["-o", "f"], ["-o", "f"]),
        (["-output", "f"], ["--output", "f"]),
        (["a_b.prototxt", "-", "-5", "dir/-x"], ["a_b.prototxt", "-", "-5", "dir/-x"]),
        (["--", "-solver"], ["--", "-solver"]),
        (["--unknown_thing=1"], ["--unknown_thing=1"]),
        (["-help"], ["--help"]),
    ],
)
def test_every_spelling_becomes_clicks(given: list[str], wanted: list[str]) -> None:
    assert normalise(given, command) == wanted


def test_a_switch_with_a_strange_value_is_refused() -> None:
    with pytest.raises(UsageError, match="neither true nor false"):
        normalise(["--gray=maybe"], command)


def test_canonical() -> None:
    assert canonical("--Sigint_Effect") == "sigint-effect"


def test_flags_may_stand_before_the_verb() -> None:
    verbs = list(VERBS)
    assert move_verb_first(["-solver", "s.prototxt", "train"], verbs) == ["train", "-solver", "s.prototxt"]
    assert move_verb_first(["train", "--solver", "test"], verbs) == ["train", "--solver", "test"]
    assert move_verb_first(["--help"], verbs) == ["--help"]
