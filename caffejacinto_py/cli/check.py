"""`caffejacinto check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from caffejacinto_py.cli import options


@click.command()
@click.argument("files", nargs=-1, required=True, type=options.FILE)
@options.phases("both", default="both")
@options.state
@options.data_shape
@options.python_layers
@options.as_json
def command(
    files: tuple[Path, ...],
    phase: str,
    level: int,
    stage: tuple[str, ...],
    data_shape: tuple[int, ...] | None,
    python_layers: bool,
    as_json: bool,
) -> int:
    """Check nets and solvers without data or weights.

    FILES are nets or solvers, text. A solver is checked with the nets it names, where they are there. With --phase
    both, a net is checked in every phase in which a layer feeds it. Python layers count as unknown types unless they
    may run.

    JSON: a list of {"path", "kind" (net or solver), "phase", "status" (ok, unknown_fields, unknown_types, error),
    "layers", "params", "macs", "precision" (lines, where a net asks for other types than FLOAT), "unknown_types",
    "unknown_fields", "errors": [{"file", "line", "column", "text", "hint"}], "nets": the same for the nets of a
    solver}. Exit code 3 unless all are ok.
    """
    from caffejacinto_py import checking
    from caffejacinto_py.solver import logs

    logs.setup("warning")
    reports: list[checking.Report] = []
    state: dict[str, Any] = {
        "data_shape": data_shape, "level": level, "stages": stage, "python_layers": python_layers
    }  # fmt: skip
    for file in files:
        if phase == "both":
            reports += checking.check_phases(file, **state)
        else:
            reports.append(checking.check(file, phase=phase, **state))
    if as_json:
        options.print_json([r.as_dict() for r in reports])
    else:
        for report in reports:
            click.echo(checking.describe(report))
        if len(reports) > 1:
            good = sum(r.ok for r in reports)
            click.echo(f"{good} of {len(reports)} checks passed")
    return 0 if all(r.ok for r in reports) else 3
