from __future__ import annotations

import subprocess
import sys

import click
import pytest

from caffejacinto_py.cli import explain, group, main
from caffejacinto_py.cli.group import VERBS, cli
from caffejacinto_py.errors import ComparisonError, InputError, Loc, ManyErrors, PrototxtError

PROGRAM = [sys.executable, "-m", "caffejacinto_py"]


def test_help_lists_every_verb() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True)  # bench/startup.py times it
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from caffejacinto_py.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'google.protobuf', 'cv2', 'lmdb') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_table_help_and_command_agree(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.help
    assert command.help.splitlines()[0] == VERBS[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert main([verb.replace("_", "-"), "-help"]) == 0
    out = capsys.readouterr()
    assert out.out.count("Usage: caffejacinto") == 2
    assert out.err == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["zzzzz"], ["unknown command 'zzzzz'", "--help"]),
        (["summary", "--phas", "TEST", "x"], ["unknown option '--phas'", "did you mean '--phase'", "summary --help"]),
        (["summary", "-phase", "TRIAN", "x"], ["'TRIAN' is not one of"]),
        (["train"], ["--solver"]),
        (["test", "--iterations", "-3"], ["--iterations"]),
        (["summary"], ["error: "]),
    ],
)
def test_usage_errors(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert all(word in out.err for word in words), out.err


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main([]) == 0
    assert "Usage: caffejacinto" in capsys.readouterr().out


def test_exit_codes_of_exceptions() -> None:
    assert explain(InputError("bad", loc=Loc("f.prototxt", 3, 4))) == ("f.prototxt:3:4: error: bad", 3)
    assert explain(ComparisonError("differs"))[1] == 4
    text, code = explain(ManyErrors([PrototxtError("a"), PrototxtError("b")]))
    assert (text, code) == ("error: a\nerror: b", 3)
    assert explain(FileNotFoundError(2, "No such file or directory", "x"))[0] == "error: x: No such file or directory"
    text, code = explain(ZeroDivisionError("division\nby zero"))
    assert text == "internal error: ZeroDivisionError: division by zero (run with --debug for the traceback)"
    assert code == 1


def failing(error: BaseException) -> click.Command:
    def run() -> None:
        raise error

    return click.Command("failing", callback=run)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("odd"), 1, "internal error: RuntimeError: odd"),
        (PrototxtError("bad net", hint="mend it"), 3, "hint: mend it"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_failures_inside_a_verb(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(group.Lazy, "get_command", lambda self, ctx, name: failing(error))
    monkeypatch.setattr("caffejacinto_py.cli._silence_stdout", lambda: None)
    assert main(["failing"]) == code
    err = capfd.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(group.Lazy, "get_command", lambda self, ctx, name: failing(RuntimeError("odd")))
    assert main(["failing", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    """`caffejacinto ... | head -0`: quiet."""
    code = (
        "import os, sys; from caffejacinto_py.cli import main;"
        "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w); sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode == 1


def test_ctrl_c_while_the_program_is_imported() -> None:
    code = """
import os, signal, sys
from caffejacinto_py.__main__ import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "caffejacinto_py.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
