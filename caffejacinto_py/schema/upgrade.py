"""Bring nets and solvers of every age to one form, and read them from files.

Each step is one function, message to message, and takes the source map along: `locs.find` answers for the upgraded
paths with the place in the original text. Source: bvlc util/upgrade_proto.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.read import read_text
from caffejacinto_py.schema.ristretto import ristretto_names
from caffejacinto_py.schema.scan import Field, Locs
from caffejacinto_py.schema.text import Document, parse
from caffejacinto_py.schema.upgrade_v0 import fold_padding, v0_to_v1
from caffejacinto_py.schema.upgrade_v1 import data_transform, v1_to_v2

_SOLVER_TYPES = {
    "SGD": "SGD",
    "NESTEROV": "Nesterov",
    "ADAGRAD": "AdaGrad",
    "RMSPROP": "RMSProp",
    "ADADELTA": "AdaDelta",
    "ADAM": "Adam",
    "SAG": "SAG",
}


def load_net(path: str | Path, *, unknown: str = "error") -> Document:
    """Read a net of any age; its message then has only `layer`. PrototxtError or ManyErrors with places and hints."""
    doc = parse(read_text(path, "net"), "NetParameter", file=str(path), unknown=unknown)
    doc.notices += upgrade_net(doc.message, doc.locs)
    return doc


def load_solver(path: str | Path, *, unknown: str = "error") -> Document:
    """Read a solver; nets inside it are upgraded too. Values such as lr_policy are not checked here."""
    doc = parse(read_text(path, "solver"), "SolverParameter", file=str(path), unknown=unknown)
    doc.notices += upgrade_solver(doc.message, doc.locs, path=path)
    return doc


def upgrade_net(message: Any, locs: Locs | None = None) -> list[str]:
    """All upgrades a NetParameter needs, in place. Returns notices for the log; none where nothing was old."""
    locs = Locs() if locs is None else locs
    notices: list[str] = []
    for step in (fold_padding, v0_to_v1, data_transform, v1_to_v2, input_layer, batch_norm_params, ristretto_names):
        notices += step(message, locs)
    return notices


def upgrade_solver(message: Any, locs: Locs | None = None, *, path: str | Path | None = None) -> list[str]:
    """All upgrades a SolverParameter needs, in place. `path`: its file, which gives an unset snapshot_prefix."""
    locs = Locs() if locs is None else locs
    notices = solver_type(message, locs)
    if path is not None:
        notices += snapshot_prefix(message, Path(path))
    for name in ("net_param", "train_net_param"):
        if message.HasField(name):
            notices += upgrade_net(getattr(message, name), _Below(locs, name, 0))
    for index, net in enumerate(message.test_net_param):
        notices += upgrade_net(net, _Below(locs, "test_net_param", index))
    return notices


class _Below(Locs):
    """The source map of a net inside a solver file."""

    def __init__(self, outer: Locs, name: str, index: int) -> None:
        super().__init__(file=outer.file)
        group = outer.root.children.get(name, [])
        self._root = group[index] if index < len(group) else Field()
        self._outer = outer

    def loc(self, field: Field) -> Any:
        return self._outer.loc(field)


def input_layer(message: Any, locs: Locs) -> list[str]:
    """`input`, `input_shape`, `input_dim` become one Input layer at the front."""
    if not message.input:
        return []
    shapes = [pb.BlobShape(dim=s.dim) for s in message.input_shape]
    root = locs.root
    if not shapes:
        dims = message.input_dim
        axes = _axes(dims, message.input)
        if len(dims) not in (0, axes * len(message.input)):
            wanted = 4 * len(message.input)
            text = f"{len(message.input)} inputs need {wanted} 'input_dim' values, but there are {len(dims)}"
            raise PrototxtError(text, loc=locs.find(("input_dim", 0)), hint="or write 'input_shape { dim: ... }'")
        shapes = [pb.BlobShape(dim=dims[i : i + axes]) for i in range(0, len(dims), axes)]
    elif len(shapes) not in (1, len(message.input)):
        text = f"{len(message.input)} inputs but {len(shapes)} 'input_shape'"
        raise PrototxtError(text, loc=locs.find(("input_shape", 0)), hint="one input_shape for each input")
    if not shapes:
        _clear_inputs(message, root)
        return ["'input' without a shape ignored"]
    layer = pb.LayerParameter(name="input", type="Input", top=message.input)
    layer.input_param.shape.extend(shapes)
    rest = list(message.layer)
    del message.layer[:]
    message.layer.extend([layer, *rest])
    places = root.children.get("layer", [])
    if "input" in root.children:
        root.children["layer"] = [_input_place(root), *places]
    elif places:
        root.children["layer"] = [Field("layer"), *places]
    _clear_inputs(message, root)
    return ["'input' fields upgraded to an Input layer"]


def _axes(dims: Any, inputs: Any) -> int:
    """How many `input_dim` one input has: 4, in C3D's nets 5 (N, C, L, H, W)."""
    return 5 if dims and len(dims) == 5 * len(inputs) else 4


def _clear_inputs(message: Any, root: Field) -> None:
    for name in ("input", "input_shape", "input_dim"):
        message.ClearField(name)
        root.children.pop(name, None)


def _input_place(root: Field) -> Field:
    inputs = root.children["input"]
    first = inputs[0]
    place = Field("layer", first.start, first.at, first.end)
    place.children["top"] = inputs
    shapes = root.children.get("input_shape", [])
    if not shapes:
        dims = root.children.get("input_dim", [])
        axes = _axes(dims, inputs)
        for i in range(0, len(dims), axes):
            shape = Field("shape", dims[i].start, dims[i].at, dims[i].end)
            shape.children["dim"] = dims[i : i + axes]
            shapes = [*shapes, shape]
    if shapes:
        param = Field("input_param", shapes[0].start, shapes[0].at, shapes[0].end)
        param.children["shape"] = shapes
        place.add(param)
    return place


def batch_norm_params(message: Any, locs: Locs) -> list[str]:
    """Old BatchNorm layers spell three `param`s for the statistics: they must not learn (names are kept).

    Not for nvcaffe's form with scale and bias inside, where two more parameters do learn.
    """
    changed = 0
    for layer in message.layer:
        param = layer.batch_norm_param
        learns = param.scale_bias or param.HasField("scale_filler") or param.HasField("bias_filler")
        if layer.type != "BatchNorm" or len(layer.param) != 3 or learns:
            continue
        if any(not _frozen(spec) for spec in layer.param):
            for spec in layer.param:
                spec.lr_mult = spec.decay_mult = 0
            changed += 1
    return [f"lr_mult and decay_mult of {changed} BatchNorm layers set to 0"] if changed else []


def _frozen(spec: Any) -> bool:
    return spec.lr_mult == 0 and spec.decay_mult == 0


def solver_type(message: Any, locs: Locs) -> list[str]:
    """The enum `solver_type` becomes the string `type`."""
    if not message.HasField("solver_type"):
        return []
    place = locs.find(("solver_type",))
    if message.HasField("type"):
        raise PrototxtError("a solver has both 'solver_type' and 'type'", loc=place, hint="keep 'type'")
    name = pb.SolverParameter.SolverType.Name(message.solver_type)
    message.type = _SOLVER_TYPES[name]
    message.ClearField("solver_type")
    group = locs.root.children.pop("solver_type", [])
    if group:
        locs.root.children["type"] = [g.moved("type") for g in group]
    return [f'solver_type: {name} upgraded to type: "{message.type}"']


def snapshot_prefix(message: Any, path: Path) -> list[str]:
    """Unset: the solver file without its extension. A directory: that name inside it."""
    old = message.snapshot_prefix
    if not old:
        message.snapshot_prefix = str(path.with_suffix(""))
    elif Path(old).is_dir():
        message.snapshot_prefix = str(Path(old) / path.with_suffix("").name)
    if message.snapshot_prefix == old:
        return []
    return [f"snapshot_prefix is '{old}', a directory; using '{message.snapshot_prefix}'" if old
            else f"snapshot_prefix is not set; using '{message.snapshot_prefix}'"]  # fmt: skip
