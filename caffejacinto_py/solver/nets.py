"""Which nets a solver file asks for: one train net, any number of test nets, and their states. As Caffe's InitTrainNet
and InitTestNets."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caffejacinto_py.errors import CaffeError, Loc, PrototxtError, misplaced, raise_all
from caffejacinto_py.ir.build import kept
from caffejacinto_py.layers import registry
from caffejacinto_py.schema.upgrade import load_net, upgrade_net
from caffejacinto_py.solver.lr import Where

TRAIN_FIELDS = ("net", "net_param", "train_net", "train_net_param")


@dataclass(frozen=True)
class Embedded:
    """A net inside a solver: what `passes.prepare` needs of a Document."""

    message: Any
    locs: Any
    file: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Below:
    """Locations of a net that stands inside another message."""

    where: Where
    prefix: tuple[str | int, ...]

    def find(self, path: tuple[str | int, ...]) -> Loc | None:
        return self.where(*self.prefix, *path)


@dataclass(frozen=True)
class NetSource:
    """A net to build: its document and the state it is filtered with. label: for logs and errors."""

    doc: Any
    label: str
    level: int = 0
    stages: tuple[str, ...] = ()


class NetFiles:
    """Loads each net file once."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self._loaded: dict[str, Any] = {}

    def load(self, path: str, *place: str | int) -> Any:
        if path not in self._loaded:
            if not Path(path).is_file():
                loc = self.where(*place)
                hint = misplaced(path, loc.file) if loc else None
                hint = hint or "paths in a solver are relative to the directory the program is started in"
                raise PrototxtError(f"net file '{path}' does not exist", loc=loc, hint=hint)
            self._loaded[path] = load_net(path)
        return self._loaded[path]


def train_source(
    param: Any, where: Where, files: NetFiles, *, level: int | None = None, stages: tuple[str, ...] = ()
) -> NetSource:
    """The train net. level and stages: from the command line, on top of what the files say (Caffe: train net only)."""
    given = [f for f in TRAIN_FIELDS if param.HasField(f)]
    if not given:
        raise PrototxtError("the solver names no train net", loc=where(), hint='add: net: "train_val.prototxt"')
    if len(given) > 1:
        text = f"a solver can name only one train net, this one has {' and '.join(given)}"
        raise PrototxtError(text, loc=where(given[1]))
    return _source(param, given[0], None, where, files, [param.train_state], level, stages)


def test_sources(param: Any, where: Where, files: NetFiles) -> list[NetSource]:
    """The test nets in Caffe's order: test_net_param, test_net, then `net` or `net_param` for the rest of test_iter."""
    own: list[tuple[str, int | None]] = [("test_net_param", i) for i in range(len(param.test_net_param))]
    own += [("test_net", i) for i in range(len(param.test_net))]
    generic = [f for f in ("net", "net_param") if param.HasField(f)]
    check_tests(param, len(own), bool(generic), where)
    nets = own + [(f, None) for f in generic] * (len(param.test_iter) - len(own))
    found = []
    for i, (name, index) in enumerate(nets):
        states = [param.test_state[i]] if param.test_state else []
        found.append(_source(param, name, index, where, files, states))
    return found


def batches(train: NetSource) -> list[tuple[int, str, int]]:
    """(index of the layer, its parameter field, batch_size) of every data layer of a train net that has one."""
    found = []
    for i, proto in enumerate(train.doc.message.layer):
        kind = registry.find(proto.type) if registry.known(proto.type) else None
        if kind is None or not kind.source or not kind.field:
            continue
        if not kept(proto, phase="TRAIN", level=train.level, stages=train.stages):
            continue
        param = getattr(proto, kind.field)
        if "batch_size" in param.DESCRIPTOR.fields_by_name:
            found.append((i, kind.field, int(param.batch_size)))
    return found


def divide(source: NetSource, world: int) -> NetSource:
    """A train net for one of `world` ranks whose shares make up the batches of the prototxt (NVCaffe).

    Raises PrototxtError or ManyErrors at every batch_size that cannot be divided.
    """
    if world == 1:
        return source
    message = copy.deepcopy(source.doc.message)
    errors: list[CaffeError] = []
    for i, field, size in batches(source):
        proto = message.layer[i]
        if size % world:
            text = f"layer '{proto.name}': a batch of {size} cannot be divided among {world} ranks"
            hint = "in this dialect batch_size is that of all ranks together: take a multiple, or --dialect bvlc"
            loc = source.doc.locs.find(("layer", i, field, "batch_size")) if source.doc.locs else None
            errors.append(PrototxtError(text, loc=loc, hint=hint))
        getattr(proto, field).batch_size = size // world
    raise_all(errors)
    doc = replace(source.doc, message=message)
    return replace(source, doc=doc)


def check_tests(param: Any, own: int, generic: bool, where: Where) -> None:
    """test_iter, test_state and test_interval must fit the number of test nets."""
    errors: list[CaffeError] = []
    count = len(param.test_iter)
    if count < own or (count > own and not generic):
        errors.append(
            PrototxtError(
                f"{own} test nets but {count} test_iter values",
                loc=where("test_iter", 0),
                hint="give one test_iter for each test net",
            )
        )
    if param.test_state and len(param.test_state) != count:
        text = f"{len(param.test_state)} test_state entries for {count} test nets"
        hint = "leave test_state out or give one for each test net (for each test_iter)"
        errors.append(PrototxtError(text, loc=where("test_state", 0), hint=hint))
    if count and param.test_interval <= 0:
        text = f"test_iter is given but test_interval is {param.test_interval or 'not set'}"
        hint = "set test_interval to the number of iterations between tests, or remove test_iter"
        errors.append(PrototxtError(text, loc=where("test_iter", 0), hint=hint))
    for i, n in enumerate(param.test_iter):
        if n < 0:
            errors.append(PrototxtError(f"test_iter cannot be negative: {n}", loc=where("test_iter", i)))
    raise_all(errors)


def _source(
    param: Any,
    name: str,
    index: int | None,
    where: Where,
    files: NetFiles,
    states: list[Any],
    level: int | None = None,
    stages: tuple[str, ...] = (),
) -> NetSource:
    place = (name,) if index is None else (name, index)
    value = getattr(param, name) if index is None else getattr(param, name)[index]
    doc: Any
    if isinstance(value, str):
        doc, label = files.load(value, *place), value
    else:
        message = type(value)()
        message.CopyFrom(value)
        doc = Embedded(message, _Below(where, place), notices=tuple(upgrade_net(message)))
        label = message.name or name
    states = [doc.message.state, *states]  # later ones override the level and add stages
    found = level if level is not None else next((s.level for s in reversed(states) if s.HasField("level")), 0)
    named = [stage for s in states for stage in s.stage] + list(stages)
    return NetSource(doc, label, found, tuple(dict.fromkeys(named)))
