"""`caffejacinto run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options, ranks
from caffejacinto_py.errors import CaffeError, UsageError

if TYPE_CHECKING:
    from caffejacinto_py.recipes.runner import Runner


@click.command()
@click.argument("recipe", type=options.FILE)
@click.option("--from", "start", metavar="STAGE", help="Run this stage and those after it anew.")
@click.option("--dry-run", is_flag=True, help="Show the plan and every solver; touch no data, write nothing.")
@click.option("--output", metavar="DIR", help="The run's folder, instead of the recipe's.")
@click.option("--set", "assignments", multiple=True, metavar="VAR=VALUE", help="Change a variable; repeatable.")
@options.running
@ranks.options
def command(recipe: Path, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Run a recipe: stages of training and testing, each from the weights of the one before.

    RECIPE is a yaml file, see docs/recipes.md. Every stage gets a folder with its prototxts, log, weights and
    result.json; at the end there is a table. A run goes on where it was: finished stages are kept while nothing that
    decides their outcome has changed, an interrupted one continues from its newest snapshot. Exit code 130 when Ctrl-C
    stopped it. With --gpu=0,1 or --ranks stages train on several ranks (docs/ranks.md) and test on the first device.

    JSON: {"recipe", "output", "stopped", "stages": [{"stage", "kind", "iterations", "seconds", "loss", "top1", "top5",
    "outputs", "zeros", "count", "sparsity", "weight_bits", "activation_bits"}]}. With --dry-run: {"recipe", "output",
    "variables", "stages": [{"stage", "kind", "folder", "action", "weights", "iterations", "files": {name: text}}]}.
    """
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.recipes import recipe as reading
    from caffejacinto_py.recipes import table
    from caffejacinto_py.recipes.resolve import resolve
    from caffejacinto_py.recipes.runner import Runner
    from caffejacinto_py.recipes.runner import as_json as outcome

    log = prepare_run(given)
    found = reading.load(recipe, variables=_variables(given["assignments"]), output=given["output"])
    jobs = resolve(found, dialect=given["dialect"], compat=given["compat"])
    shared = {name: given[name] for name in ("dialect", "workers", "python_layers", "start")}
    runner = Runner(found, jobs, **shared)
    if not dry_run and (given["gpu"] is not None or given["ranks"] is not None):
        place = ranks.place(given, solver_mode=None, log=log)
        runner.device = place.device if given["gpu"] is not None else None
        runner.elsewhere = _launcher(place, given) if place.launch else None
    if dry_run:
        return _plan(runner, as_json)
    runner.run()
    if as_json:
        options.print_json(outcome(runner))
    elif runner.results:
        click.echo(table.text(runner.results))
    return 130 if runner.stopped else 0


def _launcher(place: ranks.Place, given: dict[str, Any]) -> Callable[[Any, Sequence[str], str | None], bool]:
    """Trains a stage on several ranks, as `caffejacinto train` on its solver does."""
    words = ["--ranks", str(place.world), "--rank-timeout", str(given["rank_timeout"])]
    words += ["--workers", str(given["workers"]), "--log-level", given["log_level"]]
    for name in ("gpu", "dialect", "threads"):
        words += [f"--{name}", str(given[name])] if given[name] else []
    words += ["--sync-bn"] * given["sync_bn"] + ["--allow-python-layers"] * given["python_layers"]

    def train(job: Any, weights: Sequence[str], state: str | None) -> bool:
        from caffejacinto_py.cli import launch

        args = ["train", "--solver", job.path("solver.prototxt"), "--metrics", job.path("metrics.jsonl"), *words]
        args += [f"--compat={name}={value}" for name, value in job.dialect.compat.changed().items()]
        args += ["--snapshot", state] if state else ["--weights", ",".join(weights)] if weights else []
        code = launch.run(args, place.world, threads=given["threads"], record=Path(job.path("run.log")))
        if code not in (0, 130):
            raise CaffeError(f"training on {place.world} ranks ended with exit code {code}", hint="see the lines above")
        return code == 0

    return train


def _variables(assignments: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {text}: this is no assignment", hint="write VAR=VALUE")
        found[name.strip()] = value
    return found


def _plan(runner: Runner, as_json: bool) -> int:
    """`--dry-run`."""
    recipe, plan = runner.recipe, runner.plan()
    _check(plan, runner.python_layers)
    if as_json:
        stages = [
            {"stage": job.name, "kind": job.stage.kind, "folder": job.folder, "action": action,
             "weights": runner.weights(job.origin), "iterations": _length(job), "files": job.texts()}
            for job, action in plan
        ]  # fmt: skip
        options.print_json({"recipe": recipe.name, "output": recipe.output, "variables": dict(recipe.variables),
                            "stages": stages})  # fmt: skip
        return 0
    click.echo(f"{recipe.name}: {len(plan)} stages in {recipe.output}")
    for name, value in recipe.variables.items():
        click.echo(f"  {name} = {value}")
    for job, action in plan:
        weights = ", ".join(runner.weights(job.origin)) or "none"
        what = "iterations" if job.stage.kind == "train" else "batches"
        click.echo(f"\nStage {job.name} ({job.stage.kind}, {_length(job)} {what}): {action}")
        click.echo(f"  weights: {weights}")
        for name, source in job.nets.items():
            click.echo(f"  {job.path(name)}.prototxt: {len(source.doc.message.layer)} layers")
        if job.solver is not None:
            click.echo(f"  {job.path('solver.prototxt')}:")
            click.echo("\n".join(f"    {line}" for line in job.texts()["solver.prototxt"].splitlines()))
        for line in _quantized(job):
            click.echo(f"  {line}")
    return 0


def _check(plan: list[tuple[Any, str]], python_layers: bool) -> None:
    """Raises what is wrong with the nets, as far as that can be told without their data."""
    from caffejacinto_py.checking import fit
    from caffejacinto_py.errors import raise_all

    errors: list[CaffeError] = []
    for job, _ in plan:
        for name, source in job.nets.items():
            state: dict[str, Any] = {"level": source.level, "stages": source.stages, "dialect": job.dialect}
            try:
                fit(source.doc, phase="TRAIN" if name == "train" else "TEST", python_layers=python_layers, **state)
            except CaffeError as e:
                errors += getattr(e, "errors", (e,))
    raise_all(list({(e.loc, e.text): e for e in errors}.values()))


def _length(job: Any) -> int:
    return int(job.solver.max_iter) if job.stage.kind == "train" else int(job.iterations)


def _quantized(job: Any) -> list[str]:
    from caffejacinto_py.recipes.measure import FLOAT_BITS, bits

    source = job.nets.get("test") or job.nets["train"]
    weights, activations = bits(source.doc.message)
    if weights == activations == FLOAT_BITS:
        return []
    return [f"quantized: {weights} bits for weights, {activations} for activations"]
