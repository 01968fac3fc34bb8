"""`caffejacinto test`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from caffejacinto_py.cli import options


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net, text.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated.")
@click.option("--iterations", type=click.IntRange(min=1), default=50, show_default=True, help="Batches to score.")
@options.phases(default="TEST")
@options.state
@options.gpu
@options.dialect
@options.workers
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(model: Path, weights: tuple[str, ...], iterations: int, as_json: bool, **given: Any) -> int:
    """Score a net on its test data.

    Prints the mean of every output over the batches; the value of each batch goes to the log.

    JSON: {"model", "weights", "phase", "iterations", "images", "seconds", "loss", "outputs": [{"name", "index", "mean",
    "loss_weight", "per_iteration"}]}; `index` counts the elements of all outputs.
    """
    from caffejacinto_py.cli.running import open_net, prepare_run
    from caffejacinto_py.solver.feed import Feed
    from caffejacinto_py.solver.logs import number

    log = prepare_run(given)
    net = open_net(model, weights, given, log)
    feed = Feed(net, seed=0, workers=given["workers"])
    started = time.perf_counter()
    try:
        loss, outputs = _score(net, feed, iterations, log)
    finally:
        feed.close()
    seconds = time.perf_counter() - started
    images = feed.batch * iterations
    log.info("Performance: %.1f img/s (%d images in %.2f s)", images / seconds, images, seconds)
    if as_json:
        rows = [
            {"name": o.name, "index": o.index, "mean": o.value, "loss_weight": o.loss_weight,
             "per_iteration": o.per_iteration}
            for o in outputs
        ]  # fmt: skip
        options.print_json({"model": str(model), "weights": list(weights), "phase": net.phase, "iterations": iterations,
                            "images": images, "seconds": seconds, "loss": loss, "outputs": rows})  # fmt: skip
        return 0
    click.echo(f"Loss: {number(loss)}")
    for o in outputs:
        weighted = f" (* {number(o.loss_weight)} = {number(o.loss_weight * o.value)} loss)" if o.loss_weight else ""
        click.echo(f"{o.name} = {number(o.value)}{weighted}")
    return 0


def _score(net: Any, feed: Any, iterations: int, log: Any) -> tuple[float, list[Any]]:
    """Mean loss and mean outputs; logs every batch as `caffe test` does."""
    import torch

    from caffejacinto_py.engine.evaluate import loss_weights, summarize
    from caffejacinto_py.solver.logs import number

    weights = loss_weights(net)
    rows: dict[str, list[torch.Tensor]] = {}
    loss = 0.0
    log.info("Running for %d iterations.", iterations)
    for i in range(iterations):
        with torch.no_grad():
            result = net(feed.next())
        loss += float(result.loss) / iterations
        flat = {name: [value.reshape(-1)] for name, value in result.outputs.items()}
        for name, values in flat.items():
            rows.setdefault(name, []).extend(values)
            for value in values[0].tolist():
                log.info("Batch %d, %s = %s", i, name, number(value))
    return loss, summarize(rows, weights)
