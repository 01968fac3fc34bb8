"""`caffejacinto export_int`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    import numpy as np

    from caffejacinto_py.compress.integer import Built
    from caffejacinto_py.compress.integer_check import OpCheck, Verification
    from caffejacinto_py.engine.net import Net

_FED_BY_HAND = ("input", "memory")  # kinds of sources that have no data of their own
_HEAD = ("layer", "op", "bits", "scale", "shift or multiplier", "acc bits", "differ", "LSB", "float32")


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net with its quantization parameters, text.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated; float.")
@click.option(
    "--output", required=True, type=options.FILE, metavar="DIR/NAME", help="NAME.json and NAME.npz go to DIR."
)
@click.option("--verify", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
              help="Batches to compare with the simulation; 0: none.")  # fmt: skip
@click.option(
    "--pixels", is_flag=True, help="Inputs without parameters are whole numbers 0 .. 255, times the data layer's scale."
)
@options.phases(default="TEST")
@options.state
@options.dialect
@options.workers
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(model: Path, weights: tuple[str, ...], output: Path, verify: int, pixels: bool, as_json: bool,
            **given: Any) -> int:  # fmt: skip
    """Write a quantized net as integers, and check a pure-integer run of it against the simulation.

    The net carries its quantization parameters (update_quantization_param: false), as `calibrate` writes it, and has no
    batch norm left (see `optimize`); or its layers are those of `lowprecision`. docs/integer.md describes the files;
    `python -m caffejacinto_py.compress.integer_run` runs them. What follows the last integers (Softmax, losses,
    metrics) is left out.

    Verification runs both on the net's data, or on random numbers where it has none (Input layers). With scales that
    are powers of two every number must be equal to the simulation in float64, bit for bit; else each layer, fed with
    the simulation's integers, may be off by one step (LSB). The columns `differ` and `LSB` are of the whole run;
    `float32` counts the numbers that differ from the simulation in float32. `acc bits`: what the accumulator needs in
    the worst case, with sign. Metrics and losses that were left out are computed from the program's outputs too, and
    printed beside those of the simulation. Nothing is written when the verification fails (exit code 4).

    JSON: {"model", "weights", "files", "inputs", "outputs", "layers": [{"layers", "op", "inputs", "tensor", "bits",
    "weight_bits", "signed", "scale", "zero", "gain_kind", "gain", "shift", "accumulator_bits", "sum_bits", "exact",
    "numbers", "differing", "largest", "alone_differing", "alone_largest", "float32_differing", "accumulator"}],
    "left_out", "notes", "batches", "scores": [{"name", "integer", "simulation"}]}; what was not verified is null.
    """
    from caffejacinto_py.cli.outputs import keep_inputs
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.compress.integer import build
    from caffejacinto_py.compress.integer_file import paths_of, write_program
    from caffejacinto_py.errors import ComparisonError
    from caffejacinto_py.schema.files import check_writable

    log = prepare_run(given)
    document, arrays = paths_of(output)
    keep_inputs([document, arrays], [model, *weights], said=f"--output {output}")
    check_writable(document.parent)
    net = _open(model, weights, given, log)
    built = build(net.graph, _blobs(net), pixels=pixels)
    done = _verify(built, net, verify, given["workers"]) if verify else None
    checks = done.checks if done else ()
    rows = _rows(built, checks)
    bad = [c.op["layer"] for c in checks if not c.good]
    files = [] if bad else [str(p) for p in write_program(built.program, output, extra={"verified_batches": verify})]
    if as_json:
        info = built.program.info
        options.print_json({"model": str(model), "weights": list(weights), "files": files, "inputs": info["inputs"],
                            "outputs": info["outputs"], "layers": rows, "left_out": info["left_out"],
                            "notes": list(built.notes), "batches": verify,
                            "scores": [asdict(s) for s in done.scores] if done else []})  # fmt: skip
    else:
        _print(built, rows, done, files)
    if bad:
        text = f"the integer program differs from the simulation at {', '.join(bad)}"
        raise ComparisonError(text, hint="nothing was written; the table shows how much each layer differs")
    return 0


def _open(model: Path, weights: Sequence[str], given: Mapping[str, Any], log: Any) -> Net:
    from caffejacinto_py.cli.running import open_net

    return open_net(model, weights, {**given, "gpu": "-1"}, log)


def _blobs(net: Net) -> dict[str, list[np.ndarray]]:
    return {name: [p.detach().cpu().numpy() for p in params] for name, params in net.params.items()}


def _verify(built: Built, net: Net, count: int, workers: int) -> Verification:
    import torch

    from caffejacinto_py.compress import quantize
    from caffejacinto_py.compress.integer_check import random_batch, verify
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.solver.feed import Feed

    exact = Net(net.graph, dtype=torch.float64, seed=0)
    exact.load(net.model())
    for one in (net, exact):
        if quantize.find(one) is None:
            quantize.attach(one)
    if all(s.layer.source in _FED_BY_HAND for s in net.sources):
        return verify(built, exact, (random_batch(built, net, k) for k in range(count)), net32=net)
    feed = Feed(net, seed=0, workers=workers)
    try:
        return verify(built, exact, (feed.next() for _ in range(count)), net32=net)
    finally:
        feed.close()


def _rows(built: Built, checks: Sequence[OpCheck]) -> list[dict[str, Any]]:
    """One row an op, for JSON and for the table."""
    program, found = built.program, {c.op["output"]: c for c in checks}
    rows = []
    for op in program.info["ops"]:
        tensor, check = program.tensors[op["output"]], found.get(op["output"])
        rows.append({
            "layers": op["layers"], "op": op["op"], "tensor": op["output"], "bits": tensor["bits"],
            "weight_bits": op.get("weight_bits"), "signed": tensor["signed"], "scale": tensor["scale"],
            "zero": tensor["zero"], "gain_kind": op.get("gain_kind"),
            "gain": [program.arrays[name].ravel().tolist() for name in op.get("gain", [])],
            "shift": program.arrays[op["shift"]].ravel().tolist() if "shift" in op else None,
            "accumulator_bits": op.get("accumulator_bits"), "sum_bits": op.get("sum_bits"),
            "exact": op["output"] in built.exact,
            "numbers": check and check.numbers, "differing": check and check.whole.count,
            "largest": check and check.whole.most, "alone_differing": check and check.alone.count,
            "alone_largest": check and check.alone.most, "float32_differing": check and check.in_float32.count,
            "accumulator": check and check.accumulator, "inputs": op["inputs"],
        })  # fmt: skip
    return rows


def _print(built: Built, rows: Sequence[Mapping[str, Any]], done: Verification | None, files: Sequence[str]) -> None:
    table = [_HEAD, *(_cells(built, row) for row in rows)]
    click.echo(options.table(table, "lllrlrrrr"))
    for name in built.program.info["inputs"]:
        click.echo(f"Input {name}: {_type(built.program.tensors[name])}, {_form(built.program.tensors[name])}")
    for name in built.program.info["outputs"]:
        click.echo(f"Output {name}: {_type(built.program.tensors[name])}, {_form(built.program.tensors[name])}")
    left = built.program.info["left_out"]
    if left:
        click.echo("Left out: " + ", ".join(f"{x['layer']} ({x['type']})" for x in left))
    for note in built.notes:
        click.echo(f"note: {note}")
    if done:
        total, off = sum(r["numbers"] for r in rows), sum(r["differing"] for r in rows)
        exact = sum(r["exact"] for r in rows)
        click.echo(f"Verified {done.batches} batches: {off} of {total} numbers differ from the simulation in float64; "
                   f"{exact} of {len(rows)} ops are exact by construction")  # fmt: skip
        for score in done.scores:
            click.echo(f"{score.name}: {score.integer:.6g} of the integers, {score.simulation:.6g} of the simulation")
    for file in files:
        click.echo(f"Wrote {file}")


def _cells(built: Built, row: Mapping[str, Any]) -> tuple[str, ...]:
    tensors = built.program.tensors
    kinds = "+".join(dict.fromkeys(_type(tensors[n]) for n in row["inputs"]))
    if row["weight_bits"]:
        kinds += f" x {row['weight_bits']}"
    return (
        "+".join(row["layers"]), row["op"], f"{kinds} > {_type(tensors[row['tensor']])}", f"{row['scale']:g}",
        _factor(row), str(row["accumulator_bits"] or ""),
        *("" if row[k] is None else str(row[k]) for k in ("differing", "largest", "float32_differing")),
    )  # fmt: skip


def _type(tensor: Mapping[str, Any]) -> str:
    return f"{'s' if tensor['signed'] else 'u'}{tensor['bits']}"


def _form(tensor: Mapping[str, Any]) -> str:
    zero = f"(n - {tensor['zero']})" if tensor["zero"] else "n"
    return f"real = {zero} / {tensor['scale']:g}, shape {tuple(tensor['shape'])}"


def _factor(row: Mapping[str, Any]) -> str:
    if row["shift"] is None:
        return ""
    if row["gain_kind"] == "shift":
        shifts = sorted({s - g for gains in row["gain"] for g, s in _pairs(gains, row["shift"])})
        return f"<< {-shifts[0]}" if len(shifts) == 1 and shifts[0] < 0 else f">> {_span(shifts)}"
    gains = [g for gains in row["gain"] for g in gains]
    return f"x {_span(sorted(set(gains)))} >> {_span(sorted(set(row['shift'])))}"


def _pairs(a: list[int], b: list[int]) -> zip[tuple[int, int]]:
    size = max(len(a), len(b))
    return zip(a * size if len(a) == 1 else a, b * size if len(b) == 1 else b)


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
