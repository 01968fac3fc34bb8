"""`caffejacinto train`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options, ranks
from caffejacinto_py.errors import InputError, UsageError

if TYPE_CHECKING:
    from caffejacinto_py.schema.text import Document
    from caffejacinto_py.solver import Solver

_EFFECT = click.Choice(["stop", "snapshot", "none"], case_sensitive=False)
_HISTORY = click.Choice(["float32", "bfloat16", "int8"])  # passes.memory.HISTORY_TYPES


@click.command()
@click.option("--solver", required=True, type=options.FILE, help="The solver, text.")
@click.option("--snapshot", help="Resume from this .solverstate; 'auto': from the newest whole one, if there is one.")
@click.option("--weights", type=options.CommaList(), default=(), help="Weights to start from, comma-separated.")
@click.option("--teacher", type=options.CommaList(), default=(), metavar="NET,WEIGHTS",
              help="A frozen net that Teacher layers read; replaces net and weights of the solver's.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=1), help="Train to this iteration (replaces max_iter).")
@options.gpu
@ranks.options
@options.state
@click.option("--sigint-effect", type=_EFFECT, default="stop", show_default=True, help="What Ctrl-C does.")
@click.option("--sighup-effect", type=_EFFECT, default="snapshot", show_default=True, help="What a hangup does.")
@options.dialect
@options.precision
@options.workers
@options.threads
@options.python_layers
@click.option("--on-nan", type=click.Choice(["stop", "warn"]), default="stop", show_default=True,
              help="At a loss that is NaN or infinite.")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Change a solver field; repeatable.")
@click.option(
    "--metrics",
    type=options.FILE,
    help="Write a JSON line per event to this file; 'none': nowhere.  [default: SNAPSHOT_PREFIX_metrics.jsonl]",
)
@click.option("--memory-budget", metavar="BYTES",
              help="Train within 1.5GiB, 800MB, ...: compute blobs again. 'none': no budget at all.")  # fmt: skip
@click.option("--memory-strategy", metavar="rotor|revolve|sequential[:S]|none",
              help="How to choose what is computed again.  [default: the solver's, or rotor]")  # fmt: skip
@click.option("--history-type", type=_HISTORY,
              help="What the update rule's history is between steps.  [default: the solver's]")  # fmt: skip
@click.option("--deterministic", is_flag=True, help="On a GPU: kernels that give the same bits in every run; slower.")
@click.option("--dry-run", is_flag=True, help="Show the nets and the plan; touch no data, write nothing.")
@options.log_level
@options.as_json
def command(solver: Path, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Train a net as its solver says, from scratch, from a snapshot or from weights.

    Snapshots and --weights exclude each other, except that --snapshot auto falls back to --weights where there is no
    snapshot yet. Exit code 130 when Ctrl-C stopped the training (after its snapshot).

    Several ranks (--ranks, --gpu=0,1, torchrun) share the batches and average gradients; see docs/ranks.md.

    JSON: {"iter", "max_iter", "stopped", "loss" (smoothed, or null), "tests": [{"net", output: mean}], "model", "state"
    (last snapshot, or null), "seconds"}. With --dry-run: {"solver": fields, "dialect", "sparsity": lines, "nets": as
    `summary` gives them, each with "quantization" and "memory": lines}.
    """
    from caffejacinto_py.cli.memory import set_limits
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.schema.edit import set_field
    from caffejacinto_py.schema.upgrade import load_solver

    log = prepare_run(given)
    doc = load_solver(solver)
    set_field(doc.message, *given["assignments"])
    set_teacher(doc.message, given["teacher"])
    set_limits(doc.message, given)
    if given["history_type"]:
        doc.message.history_type = given["history_type"]
    if given["iterations"]:
        doc.message.max_iter = given["iterations"]
    if dry_run:
        return _plan(doc, given, as_json)
    mode = type(doc.message).SolverMode.Name(doc.message.solver_mode)
    place = ranks.place(given, solver_mode=mode, device_id=doc.message.device_id, log=log)
    if place.launch:
        from caffejacinto_py.cli import launch

        log.info("Starting %d ranks", place.world)
        return launch.run(click.get_current_context().obj, place.world, threads=given["threads"])
    resume, weights = _start(doc.message, given, log)
    return _train(doc, place, resume, weights, given, as_json, log)


def set_teacher(param: Any, words: tuple[str, ...]) -> None:
    """--teacher: net and weights of the solver's teacher, which is made where there is none."""
    if not words:
        return
    if len(words) < 2:
        raise UsageError("--teacher needs a net and its weights: NET,WEIGHTS")
    for path in words:
        if not Path(path).is_file():
            raise InputError(f"--teacher: '{path}' does not exist")
    if len(param.teacher) > 1:
        raise UsageError("--teacher: the solver has several teachers", hint="edit the solver instead")
    entry = param.teacher[0] if param.teacher else param.teacher.add()
    entry.net = words[0]
    del entry.weights[:]
    entry.weights.extend(words[1:])


def _start(param: Any, given: dict[str, Any], log: Any) -> tuple[str | None, tuple[str, ...]]:
    """(solverstate to resume from, weights to load)."""
    from caffejacinto_py.solver import find_latest

    snapshot, weights = given["snapshot"], given["weights"]
    if snapshot == "auto":
        found = find_latest(param.snapshot_prefix)
        if found is None:
            log.info("No snapshot '%s_iter_*' yet: starting anew.", param.snapshot_prefix)
            return None, weights
        return found, ()
    if snapshot and weights:
        hint = "a snapshot holds the weights it goes on with"
        raise UsageError("give --snapshot to resume or --weights to fine-tune, not both", hint=hint)
    return snapshot, weights


def _train(
    doc: Document,
    place: ranks.Place,
    resume: str | None,
    weights: tuple[str, ...],
    given: dict[str, Any],
    as_json: bool,
    log: Any,
) -> int:
    from caffejacinto_py.cli.running import Remember
    from caffejacinto_py.engine import gpu
    from caffejacinto_py.solver import Solver

    log.info("Use %s.", "CPU" if place.device == "cpu" else place.device)
    if given["deterministic"]:
        gpu.reproducible()
    together = place.join(given["rank_timeout"])
    resume, weights = together.share((resume, weights))
    run = Solver(
        doc,
        device=place.device,
        dialect=given["dialect"],
        compat=given["compat"],
        weights=weights,
        level=given["level"] or None,
        stages=given["stage"],
        workers=given["workers"],
        on_nan=given["on_nan"],
        sigint=given["sigint_effect"],
        sighup=given["sighup_effect"],
        python_layers=given["python_layers"],
        precision=given["precision"],
        ranks=together,
        sync_bn=given["sync_bn"],
    )

    run.metrics = seen = Remember(_metrics(run.param, given["metrics"]) if together.first else None)
    started = time.perf_counter()
    run.solve(resume)
    together.leave()
    if as_json and together.first:
        options.print_json(
            {
                "iter": run.iter,
                "max_iter": run.param.max_iter,
                "stopped": run.stopped,
                "loss": _loss(run),
                "tests": list(seen.tests.values()),
                "model": seen.snapshot.get("model"),
                "state": seen.snapshot.get("state"),
                "seconds": time.perf_counter() - started,
            }
        )
    return 130 if run.stopped else 0


def _metrics(param: Any, path: Path | None) -> Path | None:
    """Where the JSON lines go: beside the snapshots unless the user says otherwise."""
    if path is not None:
        return None if str(path) == "none" else path
    return Path(f"{param.snapshot_prefix}_metrics.jsonl") if param.snapshot_prefix else None


def _loss(run: Solver) -> float | None:
    return float(run.losses.smoothed()) if run.losses.values() else None


def _plan(doc: Document, given: dict[str, Any], as_json: bool) -> int:
    """`--dry-run`: check the solver, show its nets and what it would do."""
    from google.protobuf.json_format import MessageToDict

    from caffejacinto_py.checking import fit
    from caffejacinto_py.cli import memory
    from caffejacinto_py.cli.compression import quantized_lines, sparse_lines
    from caffejacinto_py.cli.summary import describe, render
    from caffejacinto_py.passes.precision import describe as precise
    from caffejacinto_py.passes.precision import resolve
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.solver import nets, settings
    from caffejacinto_py.solver.teacher import Teachers

    param = doc.message

    def where(*path: str | int) -> Any:
        return doc.locs.find(path)

    files = nets.NetFiles(where)
    train = nets.train_source(param, where, files, level=given["level"] or None, stages=given["stage"])
    dialect = resolve_dialect(train.doc.message, param, given["dialect"], compat=given["compat"])
    settings.check(param, where, dialect)
    world = ranks.asked(given)
    train = nets.divide(train, world) if dialect.global_batch else train
    sources = [(train, "TRAIN"), *((t, "TEST") for t in nets.test_sources(param, where, files))]
    teachers = Teachers(param, where, files)
    found: list[dict[str, Any]] = []
    sparse: list[str] = []
    shared = {"dialect": dialect, "python_layers": given["python_layers"]}
    for source, phase in sources:
        teachers.check(source, phase, dialect)
        graph, shape = fit(source.doc, phase=phase, level=source.level, stages=source.stages, **shared)
        table = resolve(graph, given["precision"])
        lines = [] if table.plain else precise(table)
        quantized = quantized_lines(graph)
        taught = partial(teachers.graphs, source, graph, dialect)
        bytes_ = memory.planned(graph, param, given, taught, shape) if phase == "TRAIN" else []
        more = {"data_shape": shape, "precision": lines, "quantization": quantized, "memory": bytes_}
        found.append({**describe(graph), **more})
        sparse = sparse_lines(param, graph, where) if phase == "TRAIN" else sparse
    if as_json:
        fields = MessageToDict(param, preserving_proto_field_name=True)
        options.print_json({"solver": fields, "dialect": dialect.name, "sparsity": sparse, "nets": found})
        return 0
    for net in found:
        click.echo(render(net))
        if net["data_shape"]:
            click.echo(
                f"Data is taken as {'x'.join(map(str, net['data_shape']))} here; it is opened when training starts."
            )
        click.echo("\n".join([*net["precision"], *net["quantization"], *net["memory"], ""]))
    click.echo("\n".join([*_lines(param, dialect.name), *ranks.lines(train, world), *sparse]))
    return 0


def _lines(param: Any, dialect: str) -> list[str]:
    """What the solver would do, in words."""
    lines = [
        f"{param.type} with lr_policy {param.lr_policy}, base_lr {param.base_lr:g}, momentum {param.momentum:g}, "
        f"weight_decay {param.weight_decay:g} ({param.regularization_type}), dialect {dialect}",
        f"{param.max_iter} iterations of {param.iter_size} pass{'es' * (param.iter_size > 1)}",
    ]
    if param.test_iter and param.test_interval:
        lines.append(f"tests every {param.test_interval} iterations: {', '.join(map(str, param.test_iter))} batches")
    if param.snapshot:
        lines.append(f"snapshots every {param.snapshot} iterations: {param.snapshot_prefix}_iter_*")
    if param.snapshot_after_train:
        lines.append(f"a snapshot after the last iteration: {param.snapshot_prefix}_iter_{param.max_iter}")
    return lines
