"""The `caffejacinto` program: verbs in one file each, loaded when used. No torch at import, so `--help` is quick."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

import click

from caffejacinto_py import errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the program's own) and return its exit code.

    0 done; 1 failed while running; 2 usage; 3 prototxt, weights or data invalid; 4 a comparison found differences;
    5 another rank of the training ended; 130 stopped by Ctrl-C. Never raises: errors go to stderr as one sentence, with
    a traceback only under `--debug`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(args)
    interrupts: list[int] = []
    try:
        with _noticing(interrupts):
            return _run(args, again=(*args, "--debug") if debug else tuple(args))
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:  # the last resort: whatever escapes becomes one line and an exit code
        if debug:
            traceback.print_exc()
        if interrupts and not isinstance(e, errors.CaffeError):  # a library turned Ctrl-C into an error of its own
            print("interrupted", file=sys.stderr)
            return 130
        text, code = explain(e)
        print(text, file=sys.stderr)
        return code


def _run(args: list[str], *, again: Sequence[str]) -> int:
    """again: the command line, for verbs that start more processes with it."""
    try:
        from caffejacinto_py.cli.group import cli

        result = cli.main(args, prog_name="caffejacinto", standalone_mode=False, obj=tuple(again))
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise click.Abort from None
    except SystemExit as e:  # click leaves this way on a broken pipe
        _silence_stdout()
        return e.code if isinstance(e.code, int) else 1
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def _noticing(interrupts: list[int]) -> Iterator[None]:
    """Note every Ctrl-C: some libraries catch KeyboardInterrupt while they are imported, and fail later."""

    def handler(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored (nohup), or somebody else's
        yield
        return
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def explain(error: Exception) -> tuple[str, int]:
    """What the terminal shows for an exception, and the exit code."""
    if isinstance(error, errors.CaffeError):
        return errors.render(error), error.exit_code
    if isinstance(error, click.UsageError):
        from caffejacinto_py.cli.group import explain_usage

        return explain_usage(error), 2
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}", 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"error: cannot write the output: {error.strerror}", 1
    if isinstance(error, MemoryError):
        return "error: out of memory", 1
    from caffejacinto_py.cli import torch_errors

    known = torch_errors.explain(error)
    if known is not None:
        return errors.render(errors.CaffeError(known[0], hint=known[1])), 1
    what = " ".join(str(error).split()) or "no message"
    python = sys.modules.get("caffejacinto_py.layers.modules.python")
    place = python.place(error) if python is not None else None
    if place is not None:
        return f"error: {place}: {type(error).__name__}: {what}\nhint: --debug shows the traceback", 1
    return f"internal error: {type(error).__name__}: {what} (run with --debug for the traceback)", 1


def _take_debug(args: list[str]) -> bool:
    """Remove `--debug` wherever it stands before `--`; True if it was there."""
    end = args.index("--") if "--" in args else len(args)
    places = [i for i in range(end) if args[i] in ("--debug", "-debug")]
    for i in reversed(places):
        del args[i]
    return bool(places)


def _silence_stdout() -> None:
    """Nobody reads stdout any more: let the interpreter's last flush go nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is not a real file (captured, closed)
        return
