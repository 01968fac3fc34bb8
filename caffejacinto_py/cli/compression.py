"""What `train --dry-run` says of a sparse stage and of simulated quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.solver.lr import Where


def sparse_lines(param: Any, graph: Graph, where: Where) -> list[str]:
    """The schedule of a solver's sparse stage; [] where it has none. Raises what the training would raise."""
    if not param.sparse_mode and not param.display_sparsity:
        return []
    import torch

    from caffejacinto_py.compress import sparsity
    from caffejacinto_py.solver.sparse import check_types

    also = tuple(param.sparsity_layer_type)
    check_types(graph, also, where)
    shapes = {n.name: n.layer.blobs([graph.shapes[v] for v in n.inputs]) for n in graph.nodes}
    found = sparsity.find(graph, {n: torch.empty(b[0].shape, device="meta") for n, b in shapes.items() if b}, also=also)
    counted = [w for w in found if w.counted]
    able = [w for w in counted if w.kind is not None]
    lines = []
    if param.sparse_mode:
        mode = param.DESCRIPTOR.fields_by_name["sparse_mode"].enum_type.values_by_number[param.sparse_mode].name
        lines.append(f"{mode}: zero weights stay zero" + ("" if param.sparsity_target > 0 else "; no more are made"))
    if param.sparse_mode and param.sparsity_target > 0:
        limit = min(param.sparsity_target + 0.15, 0.95)
        lines += [
            f"target: {param.sparsity_target:g} of {sum(w.param.numel() for w in counted):,} counted weights zero; "
            f"{len(able)} of {len(counted)} layers can be thresholded",
            f"every {param.sparsity_step_iter} iterations from {param.sparsity_start_iter} on the smallest "
            f"{param.sparsity_start_factor:g} of each channel (half of that with few channels), each time "
            f"{param.sparsity_step_factor:g} more, until the target or {limit:g} is reached",
            f"no threshold above {param.sparsity_threshold_maxratio:g} of the largest weight, "
            f"or above {param.sparsity_threshold_value_max:g}",
        ]
    if param.display_sparsity:
        lines.append(f"a table of zeros every {param.display_sparsity} iterations")
    return lines


def quantized_lines(graph: Graph) -> list[str]:
    """How a net is simulated; [] where it is not."""
    from caffejacinto_py.passes.quantize import plan

    scheme = plan(graph)
    if scheme is None:
        return []
    s = scheme.settings
    if scheme.fixed:
        layers = sum(p.stored is not None for p in scheme.parts.values())
        return [f"quantized: stored parameters of {layers} layers, from the first pass on"]
    if s.float_only:
        return ["quantized: ranges are measured, numbers stay float (precision FLOAT)"]
    weights = _numbers("weights", s.bits_weights, s.power2_weights, s.offset_weights, f" (biases {s.bits_bias})")
    activations = _numbers("activations", s.bits_activations, s.power2_activations, s.offset_activations)
    words = [weights if s.weights else "weights float", activations if s.activations else "activations float"]
    rounding = "stochastic" if s.stochastic else "nearest"
    lines = [f"quantized from pass {s.start} on: {'; '.join(words)}; rounding {rounding}"]
    if s.ignored:
        lines.append(f"not quantized: {', '.join(s.ignored)}")
    return lines


def _numbers(what: str, bits: int, power2: bool, offset: bool, more: str = "") -> str:
    return f"{what} {bits} bits{more}{', powers of two' * power2}{', with offset' * offset}"
