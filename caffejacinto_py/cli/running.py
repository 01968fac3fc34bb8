"""What `train`, `test` and `time` do before they run: logging, threads, device, net, weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import devices
from caffejacinto_py.solver.metrics import Metrics

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


class Remember(Metrics):
    """Metrics that keep the last snapshot and the last test of each net, for the result of `train`."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self.snapshot: dict[str, Any] = {}
        self.tests: dict[int, dict[str, Any]] = {}

    def record(self, event: str, iteration: int, values: Mapping[str, Any]) -> None:
        if event == "snapshot":
            self.snapshot = dict(values)
        elif event == "test":
            self.tests[values["net"]] = dict(values)
        super().record(event, iteration, values)


def prepare_run(given: Mapping[str, Any]) -> logging.Logger:
    """Set up logging and CPU threads from the options of a verb; returns the program's logger. Of several ranks only
    the first talks, unless it is about errors."""
    import torch

    from caffejacinto_py.engine.ranks import environment
    from caffejacinto_py.solver import logs

    around = environment()
    logs.setup("error" if around and around[0] else given["log_level"])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    return logging.getLogger(logs.LOGGER)


def open_net(model: Path, weights: Sequence[str], given: Mapping[str, Any], log: logging.Logger) -> Net:
    """A net with its weights, on the device asked for; its data is opened. Raises CaffeError of every kind."""
    import torch

    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver import build
    from caffejacinto_py.solver.nets import NetSource

    device = devices.pick(given["gpu"], log=log)
    log.info("Use %s.", "CPU" if device == "cpu" else device)
    doc = load_net(model)
    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    log.info("Dialect: %s (%s)", dialect.name, dialect.reason)
    source = NetSource(doc, str(model), given["level"], given["stage"])
    options: dict[str, Any] = {"dialect": dialect, "device": torch.device(device), "seed": 0}
    options["precision"] = given.get("precision")  # verbs without the option run what the net says
    net = build.build_net(source, given["phase"], python_layers=given["python_layers"], **options)
    build.load_weights([net], list(weights), tolerant=dialect.ignore_shape_mismatch)
    return net


def print_upgrades(notices: Sequence[str], output: Path) -> None:
    """What an upgrade did, for the programs that upgrade files."""
    for notice in notices:
        click.echo(notice)
    click.echo(f"Wrote {output}" + ("" if notices else ": nothing was old"))
