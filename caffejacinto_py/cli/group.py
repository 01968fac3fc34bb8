"""The table of verbs and the click group that loads a verb's module only when the verb is used."""

from __future__ import annotations

import importlib
from typing import Any

import click

from caffejacinto_py import __version__
from caffejacinto_py.cli import spelling
from caffejacinto_py.errors import UsageError, near

VERBS: dict[str, str] = {
    "train": "Train a net as its solver says, from scratch, from a snapshot or from weights.",
    "test": "Score a net on its test data.",
    "run": "Run a recipe: stages of training and testing, each from the weights of the one before.",
    "optimize": "Absorb batch norm: write a net with fewer layers that computes the same in phase TEST.",
    "time": "Measure each layer's forward and backward time.",
    "check": "Check nets and solvers without data or weights.",
    "summary": "List the layers of a net with shapes, parameters and MACs.",
    "plan": "Plan training in little memory: what is kept for backward, and what is computed again.",
    "device_query": "Show the GPUs that can be used.",
    "convert_imageset": "Make an LMDB from a list of images.",
    "convert_mnist_data": "Make an LMDB from MNIST's idx files.",
    "convert_cifar_data": "Make LMDBs from CIFAR-10's binary batches.",
    "compute_image_mean": "Compute the mean image of an LMDB.",
    "extract_features": "Write blobs of a net into LMDBs.",
    "teacher_dump": "Write what a teacher makes of its data into LMDBs: a student then learns without it.",
    "classify": "Classify images.",
    "detect": "Score windows of images, as R-CNN does.",
    "calibrate": "Choose the ranges of a quantized net from data and write it with them.",
    "quantize": "Search the shortest words for a net: Ristretto's `quantize`.",
    "threshold": "Set small weights of convolutions to zero, in a weights file.",
    "lowprecision": "Convert a net to the fixed-point layers of ADaPTION.",
    "convert": "Convert weights: caffemodel, HDF5, npz; BatchNorm forms.",
    "export_int": "Write a quantized net as integers, and check a pure-integer run of it against the simulation.",
    "export_nullhop": "Write convolutions as the NullHop accelerator reads them (.cnn).",
    "upgrade_net_proto_text": "Rewrite a net prototxt of any age in today's form.",
    "upgrade_net_proto_binary": "Rewrite a binary net (.caffemodel) of any age in today's form.",
    "upgrade_solver_proto_text": "Rewrite a solver prototxt of any age in today's form.",
    "draw_net": "Draw a net: DOT text, or a picture where Graphviz is installed.",
    "parse_log": "Make tables (CSV) of a training log.",
    "plot": "Plot loss, learning rate and accuracy of training logs.",
    "digits": "Make train and test LMDBs of scikit-learn's handwritten digits.",
}


class Lazy(click.Group):
    """Subcommands are `command` in `caffejacinto_py.cli.<verb>`; listing them imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = spelling.canonical(cmd_name).replace("-", "_")
        if verb not in VERBS:
            return None
        command = importlib.import_module(f"caffejacinto_py.cli.{verb}").command
        command.name = verb
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        return super().parse_args(ctx, spelling.move_verb_first(args, list(VERBS)))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        command = self.get_command(ctx, args[0])
        if command is None:
            hint = near(args[0], VERBS) or "`caffejacinto --help` lists them"
            raise UsageError(f"unknown command '{args[0]}'", hint=hint)
        return command.name, command, spelling.normalise(args[1:], command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def explain_usage(error: click.UsageError) -> str:
    """A click usage error in our words: what is wrong, a near match where there is one, where the help is."""
    command = error.ctx.command if error.ctx else None
    path = error.ctx.command_path if error.ctx else "caffejacinto"
    hint: Any = None
    text = error.format_message()
    if isinstance(error, click.NoSuchOption):
        word = error.option_name
        text = f"unknown option '{word}'"
        hint = _near_option(word, command)
    lines = [f"error: {text[:1].lower()}{text[1:]}".rstrip(".")]
    if hint:
        lines.append(f"hint: {hint}")
    lines.append(f"`{path} --help` explains the options.")
    return "\n".join(lines)


def _near_option(word: str, command: click.Command | None) -> str | None:
    if command is None:
        return None
    known = {spelling.canonical(spelled): spelled for spelled, _ in spelling.options(command).values()}
    return near("--" + spelling.canonical(word), known.values())


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help", "-help"], "max_content_width": 100},
    epilog="Options may be written -name x, --name x or --name=x, with _ or -. --debug shows tracebacks. "
    "Results go to stdout, logs to stderr. Exit codes: 0 done; 1 failed while running; 2 usage; 3 prototxt, weights "
    "or data invalid; 4 a comparison found differences; 130 stopped by Ctrl-C.",
)
@click.version_option(__version__, prog_name="caffejacinto")
def cli() -> None:
    """Train, test and convert Caffe networks (prototxt, solver, caffemodel) on PyTorch."""
