"""`caffejacinto device_query`."""

from __future__ import annotations

import logging
from typing import Any

import click

from caffejacinto_py.cli import options


@click.command()
@options.gpu
@options.as_json
def command(gpu: str | None, as_json: bool) -> int:
    """Show the GPUs that can be used.

    JSON: {"torch", "cuda" (version or null), "cpu_threads", "devices": [{"id", "name", "memory_bytes", "capability",
    "multiprocessors"}]}. Exit code 1 when a GPU given with --gpu is not there.
    """
    import torch

    devices = [_describe(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    if gpu not in (None, "all"):
        from caffejacinto_py.cli.devices import pick

        found = pick(gpu, log=logging.getLogger("caffejacinto"))
        devices = [d for d in devices if found == f"cuda:{d['id']}"]
    if as_json:
        options.print_json({"torch": torch.__version__, "cuda": torch.version.cuda,
                            "cpu_threads": torch.get_num_threads(), "devices": devices})  # fmt: skip
        return 0
    click.echo(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    click.echo(f"CPU threads: {torch.get_num_threads()}")
    if not devices:
        click.echo("No CUDA GPU can be used here.")
    for d in devices:
        click.echo(f"Device id: {d['id']}\n  name: {d['name']}\n  total memory: {d['memory_bytes']:,} bytes\n"
                   f"  compute capability: {d['capability']}\n  multiprocessors: {d['multiprocessors']}")  # fmt: skip
    return 0


def _describe(i: int) -> dict[str, Any]:
    import torch

    p = torch.cuda.get_device_properties(i)
    return {"id": i, "name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count}  # fmt: skip
