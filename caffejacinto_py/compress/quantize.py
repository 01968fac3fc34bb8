"""Quantization simulation of a net: a Hook that replaces weights and blobs by what fixed-point numbers can express."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caffejacinto_py.compress.binary import Binary
from caffejacinto_py.compress.qparams import Table, read_table, write_qparams
from caffejacinto_py.compress.simulation import Simulation
from caffejacinto_py.compress.sound import Sound
from caffejacinto_py.engine.hooks import Hooks
from caffejacinto_py.passes.quantize import plan

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

__all__ = ["Simulation", "Table", "attach", "dump", "find", "read_table", "write_qparams"]


def attach(net: Net) -> Simulation | None:
    """Give a net the hook that its prototxt asks for, with `quantize: true` or stored qparams; None: it asks for none.

    `dialect.compat.quantization` decides between the sound simulation and the binary's. A net that has a hook keeps it,
    the simulation comes first; one that has a simulation keeps that.
    """
    found = find(net)
    if found is not None:
        return found
    scheme = plan(net.graph)
    if scheme is None:
        return None
    hook = Sound(net.graph, scheme) if scheme.sound else Binary(net.graph, scheme)
    net.hook = hook if net.hook is None else Hooks(hook, net.hook)
    return hook


def find(net: Net) -> Simulation | None:
    """The simulation of a net, if it has one."""
    hooks = net.hook.hooks if isinstance(net.hook, Hooks) else (net.hook,)
    return next((h for h in hooks if isinstance(h, Simulation)), None)


def dump(net: Net, *, fixed: bool = False) -> Any:
    """The net as a NetParameter that carries its qparams, or None where nothing is simulated.

    fixed: with update_quantization_param: false, so that a net made from it and from this net's weights gives the same
    outputs as this net's next pass.
    """
    hook = find(net)
    return None if hook is None else hook.dump(net, fixed=fixed)
