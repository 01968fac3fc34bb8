"""`caffejacinto plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.engine.memory.budget import MemoryPlan
    from caffejacinto_py.engine.memory.stages import Chain
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.passes.storages import Numbers

SHARES = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
TABLE = ((1, 224), (8, 224), (1, 500), (8, 500))  # batch, image size


@click.command()
@click.argument("model", required=False, type=options.FILE)
@click.option(
    "--solver", type=options.FILE, help="A solver: its training net is planned, its type and history_type count."
)
@click.option("--memory-budget", metavar="BYTES", help="What training may take, such as 1.5GiB, 512MiB, 800MB.")
@click.option("--strategy", metavar="rotor|revolve|sequential[:S]|none",
              help="How to choose what is computed again.  [default: the solver's, or rotor]")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), help="Batch size, in place of the net's.")
@click.option("--profile", is_flag=True, help="Measure times and bytes of the stages here, on random inputs.")
@click.option("--table", is_flag=True, help="Bytes by batch and image size instead; of ResNet-18 to 152 without MODEL.")
@options.state
@options.data_shape
@options.precision
@options.threads
@options.as_json
def command(
    model: Path | None,
    solver: Path | None,
    memory_budget: str | None,
    strategy: str | None,
    batch: int | None,
    profile: bool,
    table: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Plan training in little memory: what is kept for backward, and what is computed again.

    MODEL is a net, text; its data is not opened. Without --memory-budget (or `memory` of the solver): the stages, and
    what budgets would cost. With it also the schedule: stage numbers, [those in brackets] are run again in backward;
    predicted peak and time. `train --memory-budget` runs that schedule. Exit code 1 where no schedule fits: the message
    names the least budget, the largest batch and the layer that needs most. See docs/memory.md.

    JSON: {"name", "batch", "strategy", "budget", "adds" (iter_size over 1), "fixed" (weights, history; gradients of
    weights where "adds"), "gradients" (of weights, which else come in backward), "update" (bytes while weights are
    updated), "teachers": {"weights" (in "fixed"), "passing" (while they run)}, "plain" and "planned": {"peak"
    (activations and gradients beside "fixed"), "kept", "seconds", "forwards"}, "all": {"plain", "planned"} (at the
    fullest moment), "ratio" (of time), "schedule", "stages": [{"name", "first", "last" (steps), "fixed" (never run
    again), "live", "tape", "forward", "backward"}], "choices": [{"budget", "peak", "ratio"}]}; bytes and seconds,
    estimated ones unless --profile. With --table: {"rows": [{"name", "params", "state", "activations": {"b1@224":
    bytes, ...}}]}.
    """
    if table:
        return _table(model, given, as_json)
    if (model is None) == (solver is None):
        raise UsageError("which net? give MODEL or --solver, not both", hint="caffejacinto plan train_val.prototxt")
    from caffejacinto_py.cli.memory import beside, numbers_here
    from caffejacinto_py.engine.memory import strategies
    from caffejacinto_py.engine.memory.budget import make_plan, parse_bytes
    from caffejacinto_py.passes.memory import with_batch
    from caffejacinto_py.passes.storages import asked
    from caffejacinto_py.solver.memory import limits

    if strategy is not None:
        strategies.parse(strategy)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    graph, param, teachers = _graph(model, solver, given)
    said = limits(param)
    budget = said.budget if budget is None and said is not None else budget
    strategy = strategy or param.memory.strategy or strategies.NAMES[0]
    chosen, kept = strategies.parse(strategy), {"solver": param.type, "history": param.history_type}
    if batch is not None:
        graph = with_batch(graph, batch)
    numbers, refine = asked(graph, given["precision"]), None
    if profile:
        numbers = numbers_here(graph, given["precision"])
        refine = _profiler(graph, numbers, given["threads"])
    kept |= {"numbers": replace(numbers, adds=param.iter_size > 1), "beside": beside(param, teachers)}
    made = make_plan(graph, budget=budget, strategy=chosen, refine=refine, **kept)
    found = describe(made, graph, strategy)
    if as_json:
        options.print_json(found)
    else:
        click.echo(render(found))
    return 0


def _graph(model: Path | None, solver: Path | None, given: dict[str, Any]) -> tuple[Graph, Any, dict[str, Graph]]:
    """The TRAIN graph, the solver's message (of MODEL the default's), and what its teachers run."""
    from caffejacinto_py.checking import fit
    from caffejacinto_py.schema import pb
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net, load_solver
    from caffejacinto_py.solver import settings
    from caffejacinto_py.solver.nets import NetFiles, train_source
    from caffejacinto_py.solver.teacher import Teachers

    state: dict[str, Any] = {"phase": "TRAIN", "level": given["level"], "stages": given["stage"]}
    if model is not None:
        graph, assumed = fit(load_net(model), data_shape=given["data_shape"], **state)
        _say_shape(assumed, given)
        return graph, pb.SolverParameter(), {}
    doc = load_solver(str(solver))
    where = lambda *path: doc.locs.find(path)  # noqa: E731
    files = NetFiles(where)
    source = train_source(doc.message, where, files, level=given["level"] or None, stages=given["stage"])
    dialect = resolve_dialect(source.doc.message, doc.message)
    settings.check(doc.message, where, dialect)
    state |= {"level": source.level, "stages": source.stages, "dialect": dialect}
    graph, assumed = fit(source.doc, data_shape=given["data_shape"], **state)
    _say_shape(assumed, given)
    return graph, doc.message, Teachers(doc.message, where, files).graphs(source, graph, dialect)


def _say_shape(assumed: tuple[int, ...] | None, given: dict[str, Any]) -> None:
    if assumed is not None and given["data_shape"] is None:
        click.echo(f"Data is taken as {'x'.join(map(str, assumed))}; --data-shape says otherwise.", err=True)


def _profiler(graph: Graph, numbers: Numbers, threads: int | None) -> Any:
    import torch

    from caffejacinto_py.cli.time import _random_batch
    from caffejacinto_py.engine.memory.profile import profile
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.engine.precision import DTYPES

    if not numbers.fused:
        hint = "leave --profile out: estimates count what the simulation takes"
        raise UsageError("--profile measures nets without simulated quantization", hint=hint)
    if threads:
        torch.set_num_threads(threads)
    net = Net(graph, dtype=DTYPES[numbers.base], types=numbers.types, seed=0)
    batch = _random_batch(net)
    return lambda chain: profile(net, chain, batch)


def describe(made: MemoryPlan, graph: Graph, strategy: str) -> dict[str, Any]:
    """A plan as JSON knows it."""
    from dataclasses import asdict

    from caffejacinto_py.engine.memory.schedule import text

    chain = made.chain
    stages = [
        {
            "name": s.name,
            "first": s.first,
            "last": s.last,
            "fixed": s.fixed,
            "live": chain.bytes(chain.frontiers[k + 1]),
            "tape": chain.tape(k),
            "forward": s.forward,
            "backward": s.backward,
        }
        for k, s in enumerate(chain.stages)
    ]
    return {
        "name": graph.name,
        "batch": made.batch,
        "strategy": strategy,
        "budget": made.budget,
        "fixed": made.fixed,
        "gradients": made.memory.gradients,
        "adds": made.adds,
        "update": made.update,
        "all": {"plain": replace(made, cost=made.plain).peak, "planned": made.peak},
        "teachers": {"weights": made.beside.weights, "passing": made.beside.passing},
        "plain": asdict(made.plain),
        "planned": asdict(made.cost),
        "ratio": made.ratio,
        "schedule": text(chain, made.schedule),
        "stages": stages,
        "choices": [] if made.budget is not None or strategy != "rotor" or not len(chain) else _choices(made, chain),
    }


def _choices(made: MemoryPlan, chain: Chain) -> list[dict[str, Any]]:
    """What budgets would cost: shares of the activations, and the least."""
    from caffejacinto_py.engine.memory import rotor

    table = rotor.solve(chain)
    floor = max(made.update - made.fixed, made.beside.passing)  # less in a pass saves nothing
    wanted = dict.fromkeys(max(int(made.plain.peak * share), floor) for share in SHARES)
    found = [cost for _, cost in filter(None, (rotor.within(table, count) for count in wanted))]
    least = rotor.least(table)[1]
    if found[-1].peak > max(least.peak, floor):
        found.append(least)
    plain = made.plain.seconds or 1.0
    return [
        {"budget": replace(made, cost=c).peak, "peak": c.peak, "ratio": c.seconds / plain} for c in dict.fromkeys(found)
    ]


def render(found: dict[str, Any]) -> str:
    """The plan as the terminal shows it."""
    rows = [("stage", "last layer", "live behind it", "kept", "forward ms", "backward ms", "")]
    for k, s in enumerate(found["stages"]):
        times = (f"{s['forward'] * 1e3:.2f}", f"{s['backward'] * 1e3:.2f}")
        note = "never run again" if s["fixed"] else ""
        rows.append((str(k), s["name"], options.size(s["live"]), options.size(s["tape"]), *times, note))
    plain, planned, whole = found["plain"], found["planned"], found["all"]
    kind = "activations" if found["adds"] else "activations, gradients"
    lines = [
        f"{found['name'] or 'net'}, batch {found['batch']}",
        options.table(rows, "rlrrrrl"),
        f"{'weights, gradients, history' if found['adds'] else 'weights, history':34}{options.size(found['fixed'])}",
        *_teachers(found),
        f"{kind + ', unplanned':34}{options.size(plain['peak'])} at most, {options.size(plain['kept'])} kept",
        f"{'while weights are updated':34}{options.size(found['update'])}",
        f"{'all, unplanned':34}{options.size(whole['plain'])}",
    ]
    if found["budget"] is not None or found["strategy"] != "rotor":
        lines += [
            f"schedule ({found['strategy']})  {found['schedule']}",
            f"{kind + ', planned':34}{options.size(planned['peak'])} at most, {options.size(planned['kept'])} kept",
            f"{'all, planned':34}{options.size(whole['planned'])}",
            f"{'time of a pass':34}{found['ratio']:.3f} of the unplanned, "
            f"{planned['forwards']} stage forwards for {len(found['stages'])} stages",
        ]
    if found["choices"]:
        cells = [
            (
                options.size(c["budget"]),
                options.size(c["peak"]),
                f"{100 * c['peak'] / plain['peak']:.0f}%",
                f"{c['ratio']:.3f}",
            )
            for c in found["choices"]
        ]
        lines += ["", options.table([("budget", kind, "", "time"), *cells], "rrrr")]
    return "\n".join(lines)


def _teachers(found: dict[str, Any]) -> list[str]:
    sizes = {k: options.size(n) for k, n in found["teachers"].items()}
    text = f"{'of it teachers':34}{sizes['weights']}, and {sizes['passing']} before the pass, while they run"
    return [text] if found["teachers"]["weights"] else []


def _table(model: Path | None, given: dict[str, Any], as_json: bool) -> int:
    """--table: weights, their state and activations for batches and image sizes."""
    from caffejacinto_py.checking import fit
    from caffejacinto_py.engine.memory.resnets import BLOCKS, resnet
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.passes.memory import account, with_batch
    from caffejacinto_py.passes.storages import asked
    from caffejacinto_py.schema.upgrade import load_net

    graphs: dict[str, dict[str, Any]] = {}
    if model is None:
        for depth in BLOCKS:
            made = {f"b{b}@{s}": prepare(resnet(depth, batch=b, size=s), phase="TRAIN") for b, s in TABLE}
            graphs[f"ResNet-{depth}"] = made
    else:
        graph, _ = fit(load_net(model), phase="TRAIN", data_shape=given["data_shape"])
        graphs[graph.name or "net"] = {f"b{b}": with_batch(graph, b) for b in (1, 2, 4, 8, 16, 32, 64)}
    rows: list[dict[str, Any]] = []
    for name, made in graphs.items():
        found = {label: account(g, numbers=asked(g, given["precision"])) for label, g in made.items()}
        first = next(iter(found.values()))
        state = first.params + first.gradients + first.history
        saved = {label: m.saved for label, m in found.items()}
        rows.append({"name": name, "params": first.params, "state": state, "activations": saved})
    if as_json:
        options.print_json({"rows": rows})
        return 0
    labels = list(rows[0]["activations"])
    head = ("net", "weights", "+ gradients, history", *(f"act {x}" for x in labels), *(f"all {x}" for x in labels))
    lines = [head]
    for row in rows:
        acts = list(row["activations"].values())
        cells = [row["params"], row["state"], *acts, *(row["state"] + a for a in acts)]
        lines.append((row["name"], *(f"{c / 2**20:.0f}" for c in cells)))
    click.echo(
        f"MiB, {given['precision'] or 'types as the net says'}, SGD with momentum; act: activations kept for backward\n"
        + options.table(lines, "l" + "r" * (len(head) - 1))
    )
    return 0
