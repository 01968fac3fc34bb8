"""`caffejacinto export_nullhop`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    import numpy as np

    from caffejacinto_py.engine.net import Net


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net, text: plain or low-precision layers.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated.")
@click.option("--output", required=True, type=options.FILE, help="The .cnn file.")
@click.option("--pixels", type=options.FILE, metavar="FILE.npy", help="The input image (C, H, W) to put into the file.")
@click.option("--own-format", is_flag=True, help="Low-precision layers keep their own bits behind the point.")
@click.option("--compressed-input", is_flag=True, help="The accelerator gets the image compressed.")
@options.phases(default="TEST")
@options.state
@options.gpu
@options.dialect
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(
    model: Path,
    weights: tuple[str, ...],
    output: Path,
    pixels: Path | None,
    own_format: bool,
    compressed_input: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Write convolutions as the NullHop accelerator reads them (.cnn).

    The file holds the chain of convolutions at the beginning of the net, each with the ReLU and the 2x2 max pooling
    behind it; the first layer that is none of these, and what follows it, is left out (said so). Weights, biases and
    the image are whole numbers, value * 256 without what is behind the point (Q7.8); with --own-format the weights and
    biases of low-precision layers are value * 2^ad, which the file itself does not say: the table does. The image is
    --pixels (as the first layer sees it: scaled, mean subtracted), else the first one of the net's data, else zeros.

    JSON: {"output", "left_out", "pixels" (where the image is from), "layers": [{"name", "kernel", "pad", "channels",
    "height", "width", "outputs", "relu", "pooling", "fraction"}]}.
    """
    from caffejacinto_py.cli.outputs import keep_inputs
    from caffejacinto_py.cli.running import open_net, prepare_run
    from caffejacinto_py.export.nullhop import render, stages
    from caffejacinto_py.schema.files import atomic_write

    log = prepare_run(given)
    keep_inputs([output], [model, *weights], said=f"--output {output}")
    net = open_net(model, weights, given, log)
    found, left_out = stages(net, own_format=own_format)
    image, origin = _image(net, pixels)
    text = render(found, image, compressed_input=compressed_input)
    with atomic_write(output, "w") as file:
        file.write(text)
    rows = [{"name": s.layer, "kernel": s.kernel, "pad": s.pad, "channels": s.channels, "height": s.height,
             "width": s.width, "outputs": len(s.biases), "relu": s.relu, "pooling": s.pooling,
             "fraction": s.fraction} for s in found]  # fmt: skip
    if as_json:
        options.print_json({"output": str(output), "left_out": left_out, "pixels": origin, "layers": rows})
        return 0
    table = [("layer", "input", "outputs", "kernel", "pad", "relu", "pooling", "fraction")]
    for r in rows:
        relu, pooling = ("yes" if r[k] else "no" for k in ("relu", "pooling"))
        size = f"{r['channels']}x{r['height']}x{r['width']}"
        numbers = (str(r["outputs"]), str(r["kernel"]), str(r["pad"]))
        table.append((str(r["name"]), size, *numbers, relu, pooling, str(r["fraction"])))
    click.echo(options.table(table, "llrrrllr"))
    click.echo(f"Wrote {output}; image: {origin}" + (f"; left out: '{left_out}' and what follows" if left_out else ""))
    return 0


def _image(net: Net, pixels: Path | None) -> tuple[np.ndarray, str]:
    """The input image and where it is from."""
    import numpy as np

    from caffejacinto_py.errors import DataError, Loc
    from caffejacinto_py.solver.feed import Feed

    source = net.sources[0]
    if pixels is not None:
        try:
            return np.asarray(np.load(pixels), np.float64), str(pixels)
        except (OSError, ValueError, TypeError) as e:
            text = f"no array of numbers can be read: {e}"
            raise DataError(text, loc=Loc(str(pixels)), hint="make it with numpy.save, shape (C, H, W)") from e
    if source.layer.source in ("input", "memory"):
        return np.zeros(source.shapes[0][1:]), "zeros"
    feed = Feed(net, seed=0, workers=0)
    try:
        return feed.next()[source.tops[0]][0].double().cpu().numpy(), "the first of the net's data"
    finally:
        feed.close()
