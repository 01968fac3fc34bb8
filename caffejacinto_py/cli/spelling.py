"""The one place that knows how options may be spelled.

C++ Caffe's users write `-solver x`, `--solver=x`, `-sigint_effect=stop`, `--noshuffle`, `--gray=true`; click wants
`--sigint-effect`. Everything is turned into click's spelling here, from the options that the command itself declares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from caffejacinto_py.errors import UsageError

_TRUE = ("true", "t", "yes", "y", "1")
_FALSE = ("false", "f", "no", "n", "0")


def canonical(word: str) -> str:
    """An option or verb without its dashes, underscores as hyphens, lower case."""
    return word.lstrip("-").replace("_", "-").lower()


def options(command: click.Command) -> dict[str, tuple[str, click.Option]]:
    """Canonical word -> (the spelling click knows, the option), for every option of a command and `--help`."""
    found: dict[str, tuple[str, click.Option]] = {}
    for param in command.get_params(click.Context(command)):
        if isinstance(param, click.Option):
            for spelled in (*param.opts, *param.secondary_opts):
                found.setdefault(
                    canonical(spelled) if len(spelled.lstrip("-")) > 1 else spelled.lstrip("-"), (spelled, param)
                )
    return found


def normalise(args: Sequence[str], command: click.Command) -> list[str]:
    """The arguments of a verb in click's spelling. What is no known option passes unchanged: file names, numbers."""
    known = options(command)
    out: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return [*out, arg, *rest]
        word, equals, value = arg.partition("=")
        if not word.startswith("-") or not word.strip("-"):
            out.append(arg)
            continue
        key = canonical(word)
        if key not in known and len(word) == 2 and word[1] in known:
            key = word[1]
        if key in known:
            spelled, option = known[key]
            if option.is_flag:
                out.extend(_flag(spelled, option, value if equals else None))
            elif equals:
                out.extend((spelled, value))
            else:  # the next argument is its value whatever it looks like: `-gpu -1`
                out.extend((spelled, *_take(rest, option.nargs)))
        elif key.startswith("no") and key[2:].lstrip("-") in known and not equals:
            spelled, option = known[key[2:].lstrip("-")]
            out.extend(_flag(spelled, option, "false") if option.is_flag else [arg])
        else:
            # `-foo` is a long option here, not a bundle of short ones: say so before click takes it apart
            bundle = len(word) > 2 and word[1] != "-" and word[1:].replace("-", "").replace("_", "").isalpha()
            out.append("-" + arg if bundle else arg)
    return out


def _take(rest: Iterator[str], count: int) -> list[str]:
    return [value for _, value in zip(range(count), rest)]


def _flag(spelled: str, option: click.Option, value: str | None) -> list[str]:
    """A switch given bare, or as gflags allows: `=true`, `=false`."""
    if value is None or value.lower() in _TRUE:
        return [spelled]
    if value.lower() not in _FALSE:
        raise UsageError(f"option '{spelled}' is a switch: '{value}' is neither true nor false")
    if option.secondary_opts and spelled in option.opts:
        return [option.secondary_opts[0]]
    return []


def move_verb_first(args: Sequence[str], verbs: Sequence[str]) -> list[str]:
    """`-solver x train` means `train -solver x`: gflags do not care where the verb stands."""
    if args and args[0].startswith("-"):
        for i, arg in enumerate(args):
            if arg in verbs:
                return [arg, *args[:i], *args[i + 1 :]]
    return list(args)
