"""`caffe.Net`: a net whose blobs and gradients are numpy arrays, and that runs in pieces if the user wants."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from caffejacinto_py.compress import quantize
from caffejacinto_py.engine.layerwise import Tape
from caffejacinto_py.engine.net import Net as Engine
from caffejacinto_py.engine.params import share_buffers
from caffejacinto_py.errors import UsageError, near
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.modules.blob import ParamBlob, ParamMemory, Top
from caffejacinto_py.passes import backward, finish, prepare, shapes, splits
from caffejacinto_py.pycaffe.batches import InBatches
from caffejacinto_py.pycaffe.mode import MODE, phase_name
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model
from caffejacinto_py.solver.feed import Feed


class LayerView(NamedTuple):
    """An entry of `net.layers`; for a Python layer the user's own object stands there."""

    type: str
    blobs: list[ParamBlob]


Callback = Callable[[int], Any]


class Net(InBatches):
    """`Net(prototxt, phase)`, `Net(prototxt, weights, phase)`, or with keywords `level`, `stages`, `weights`.

    Layers run one at a time: data layers deliver a new batch on every forward, `Input` blobs are the user's. Split
    layers stand where Caffe puts them. Parameter gradients accumulate until `clear_param_diffs`; bottom gradients are
    overwritten. Python layers run.
    """

    def __init__(
        self,
        network_file: str | os.PathLike[str],
        *args: Any,
        phase: int | str | None = None,
        level: int | None = None,
        stages: Sequence[str] | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        phase, level, stages, weights = _arguments(args, phase, level, stages, weights)
        from caffejacinto_py.data import probe

        doc = load_net(os.fspath(network_file))
        dialect = resolve_dialect(doc.message, compat=MODE.compat)
        state: dict[str, Any] = {"phase": phase_name(phase), "level": level, "stages": stages, "dialect": dialect}
        graph = prepare(doc, probe=probe, python_layers=True, **state)
        self._open(graph, None, share=None)
        if weights is not None:
            self.copy_from(weights)

    @classmethod
    def of_engine(cls, net: Engine, feed: Feed) -> Net:
        """The view of a net that runs elsewhere (a solver's): same parameters, same data."""
        self = cls.__new__(cls)
        self._open(net.graph, feed, share=net)
        return self

    def _open(self, graph: Graph, feed: Feed | None, *, share: Engine | None) -> None:
        self._blobs: dict[Value | str, Top] = {}
        self._callbacks: dict[str, list[Callback]] = {}
        self._build(graph, share=share)
        if share is None:
            quantize.attach(self._net)
        self._feed = feed or Feed(self._net, seed=MODE.seed or 0)

    def _build(self, graph: Graph, *, share: Engine | None) -> None:
        """Make the net for these shapes; keeps the Blobs (and with `share` the parameters) there already are."""
        self._plain = graph
        self._graph = backward.mark(splits.insert(graph))
        device = share.device if share is not None else MODE.device
        self._net = Engine(self._graph, device=device, share=share, seed=MODE.seed, layout="nchw", inplace=False)
        self._net.hook = share.hook if share is not None else None
        if share is not None:
            share_buffers(share, self._net)
        modules = iter(self._net.layers)
        self._modules = [None if n.layer.source else next(modules) for n in self._graph.nodes]
        self._tape = Tape()
        self._place_blobs()
        self.params = OrderedDict((name, [ParamBlob.of(p) for p in ps]) for name, ps in self._net.params.items())

    def _place_blobs(self) -> None:
        """A Blob for every name (versions of an in-place chain share one), with the loss weight in its diff."""
        named: OrderedDict[str, Top] = OrderedDict()
        for node in self._graph.nodes:
            for v, weight, value in zip(node.outputs, node.loss_weights, _constants(node), strict=True):
                shape = self._graph.shapes[v]
                key = _key(v)
                if key not in self._blobs:
                    self._blobs[key] = Top(shape, weight, value or 0.0)
                self._blobs[key].reshape(*shape)
                named[v.name] = self._blobs[key]
        self.blobs = named

    # --- what is in the net ------------------------------------------------------------------------------------------
    @property
    def inputs(self) -> list[str]:
        """Tops of the Input layers, in layer order."""
        return [v.name for n in self._graph.nodes if n.layer.source == "input" for v in n.outputs]

    @property
    def outputs(self) -> list[str]:
        """Blobs that no layer reads, alphabetical."""
        return [v.name for v in self._graph.outputs]

    @property
    def top_names(self) -> OrderedDict[str, list[str]]:
        return OrderedDict((n.name, [v.name for v in n.outputs]) for n in self._graph.nodes)

    @property
    def bottom_names(self) -> OrderedDict[str, list[str]]:
        return OrderedDict((n.name, [v.name for v in n.inputs]) for n in self._graph.nodes)

    @property
    def blob_loss_weights(self) -> OrderedDict[str, float]:
        weights = {v.name: w for n in self._graph.nodes for v, w in zip(n.outputs, n.loss_weights, strict=True)}
        return OrderedDict((name, weights[name]) for name in self.blobs)

    @property
    def layers(self) -> list[Any]:
        """An object with `type` and `blobs` for each layer: a LayerView, or the user's object of a Python layer."""
        views = (LayerView(n.type, self.params.get(n.name, [])) for n in self._graph.nodes)
        users = (getattr(n.layer, "instance", None) for n in self._graph.nodes)
        return [view if user is None else user for view, user in zip(views, users, strict=True)]

    @property
    def layer_dict(self) -> OrderedDict[str, Any]:
        return OrderedDict(zip(self._layer_names, self.layers, strict=True))

    @property
    def _layer_names(self) -> list[str]:
        return [n.name for n in self._graph.nodes]

    @property
    def _blob_names(self) -> list[str]:
        return list(self.blobs)

    @property
    def _blob_loss_weights(self) -> list[float]:
        return list(self.blob_loss_weights.values())

    @property
    def name(self) -> str:
        return self._graph.name

    # --- running -----------------------------------------------------------------------------------------------------
    def forward(
        self, blobs: Iterable[str] | None = None, start: str | None = None, end: str | None = None, **kwargs: Any
    ) -> dict[str, np.ndarray]:
        """Run from layer `start` to layer `end`. kwargs: arrays for all of `inputs`.

        Returns the outputs (with `end`: that layer's tops) and the blobs named in `blobs`; the arrays are live views.
        """
        self._fill(kwargs, self.inputs, "input", diff=False)
        first = 0 if start is None else self._index(start)
        last = len(self._graph.nodes) - 1 if end is None else self._index(end)
        self._forward(first, last)
        wanted = self.outputs if end is None else self.top_names[end]
        return {name: self._blob(name).data for name in dict.fromkeys([*wanted, *(blobs or [])])}

    def backward(
        self, diffs: Iterable[str] | None = None, start: str | None = None, end: str | None = None, **kwargs: Any
    ) -> dict[str, np.ndarray]:
        """Run backward from layer `start` (default: the last) down to layer `end`. kwargs: gradients of all of
        `outputs`.

        Returns the gradients of the inputs (with `end`: of that layer's bottoms) and of the blobs named in `diffs`.
        """
        self._fill(kwargs, self.outputs, "output", diff=True)
        first = len(self._graph.nodes) - 1 if start is None else self._index(start)
        last = 0 if end is None else self._index(end)
        self._backward(first, last)
        wanted = self.inputs if end is None else self.bottom_names[end]
        return {name: self._blob(name).diff for name in dict.fromkeys([*wanted, *(diffs or [])])}

    def _forward(self, first: int, last: int) -> float:
        """Layers `first` to `last` by number; the loss of that range."""
        self.reshape()
        self._params_to_net()
        values: dict[Value, torch.Tensor] = {}
        loss = 0.0
        hook = self._net.hook
        if hook is not None and first == 0:
            hook.begin(self._net)
        for i in range(first, last + 1):
            node = self._graph.nodes[i]
            self._call("before_forward", i)
            tops = self._source(node) if node.layer.source else self._layer(i, node, values)
            if hook is not None:
                tops = hook.tops(node, tuple(tops))
            for v, top, weight in zip(node.outputs, tops, node.loss_weights, strict=True):
                values[v] = top
                self._blobs[_key(v)].reshape(*top.shape)  # user code may decide on its tops' shapes anew
                self._blobs[_key(v)]._data.put(top)
                if weight:
                    loss += weight * float(top.sum())
            self._call("after_forward", i)
        if hook is not None and last == len(self._graph.nodes) - 1:
            hook.end(self._net)
        self._params_from_net()
        return loss

    def _written_constants(self) -> bool:
        """Whether somebody may have written into a constant top of a DummyData."""
        tops = ((v, c) for n in self._graph.nodes for v, c in zip(n.outputs, _constants(n)))
        return any(c is not None and (self.blobs[v.name].data != c).any() for v, c in tops)

    def _layer(self, i: int, node: Node, values: dict[Value, torch.Tensor]) -> Sequence[torch.Tensor]:
        module = self._modules[i]
        assert module is not None
        if self._callbacks:
            values = {}  # they may have written into blobs
        bottoms = [values[v] if v in values else self._blobs[_key(v)]._data.take(self._net.device) for v in node.inputs]
        hook = self._net.hook
        tops = self._tape.forward(i, node, module if hook is None else hook.module(node, module), bottoms)
        if getattr(module, "overwrites", False):
            self._overwritten(node, bottoms, values)
        return tops

    def _overwritten(self, node: Node, bottoms: Sequence[torch.Tensor], values: Mapping[Value, torch.Tensor]) -> None:
        """Show what a layer left in its bottoms, also under the other names of that memory (Split)."""
        memory = {b.data_ptr() for b in bottoms}
        shown = dict(zip(node.inputs, bottoms, strict=True))
        shown.update((v, t) for v, t in values.items() if t.data_ptr() in memory)
        for v, tensor in shown.items():
            self._blobs[_key(v)]._data.put(tensor)

    def _source(self, node: Node) -> Sequence[torch.Tensor]:
        """The tops of a layer without bottoms: the user's arrays for an Input, else the next batch. Constants of a
        DummyData are the user's too: they are filled once.
        """
        stay = [self._blobs[_key(v)]._data.take(self._net.device) for v in node.outputs]
        if node.layer.source == "input":
            return stay
        if node.layer.source == "teacher":
            return self._feed.taught(
                [v.name for v in node.outputs], lambda b: self.blobs[b]._data.take(self._net.device)
            )
        batch = [torch.from_numpy(a).to(self._net.device) for a in self._feed.feeders[node.name].next()]
        return [old if value is not None else new for old, new, value in zip(stay, batch, _constants(node))]

    def _backward(self, first: int, last: int) -> None:
        self._params_to_net()
        for i in range(first, last - 1, -1):
            node = self._graph.nodes[i]
            if not node.backward:
                continue
            self._call("before_backward", i)
            if i not in self._tape:  # Caffe computes with what stands in the blobs
                self._layer(i, node, {})
            diffs = [self._blobs[_key(v)]._diff.take(self._net.device) for v in node.outputs]
            found = self._tape.backward(i, self._net.params.get(node.name, []), diffs)
            for v, diff in zip(node.inputs, found, strict=True):
                if diff is not None:
                    self._blobs[_key(v)]._diff.put(diff)
            self._call("after_backward", i)
        self._params_from_net()

    # --- callbacks ---------------------------------------------------------------------------------------------------
    def before_forward(self, call: Callback) -> None:
        """Have `call(number of the layer)` called before each layer's forward."""
        self._callbacks.setdefault("before_forward", []).append(call)

    def after_forward(self, call: Callback) -> None:
        """... after each layer's forward, when its tops stand in `blobs`."""
        self._callbacks.setdefault("after_forward", []).append(call)

    def before_backward(self, call: Callback) -> None:
        """... before the backward of each layer that takes part."""
        self._callbacks.setdefault("before_backward", []).append(call)

    def after_backward(self, call: Callback) -> None:
        """... after it, when its gradients stand in `blobs` and `params`."""
        self._callbacks.setdefault("after_backward", []).append(call)

    def _call(self, moment: str, layer: int) -> None:
        for call in self._callbacks.get(moment, ()):
            call(layer)

    def reshape(self) -> None:
        """Adapt all layers to the shapes that the input blobs were given."""
        given = {name: self.blobs[name].shape for name in self.inputs}
        have = {v.name: s for v, s in self._graph.shapes.items() if not v.version}
        if any(have[name] != shape for name, shape in given.items()):
            self._build(finish(shapes.reshape(self._plain, given)), share=self._net)

    def _fill(self, arrays: Mapping[str, Any], names: list[str], word: str, *, diff: bool) -> None:
        if not arrays:
            return
        if set(arrays) != set(names):
            raise UsageError(f"{word} arrays {sorted(arrays)} do not match the net's {word}s {sorted(names)}")
        for name, array in arrays.items():
            blob = self.blobs[name]
            if blob.shape and len(array) != blob.shape[0]:
                raise UsageError(f"{word} '{name}': {len(array)} items, the net's batch size is {blob.shape[0]}")
            (blob.diff if diff else blob.data)[...] = array

    def _index(self, layer: str) -> int:
        try:
            return self._layer_names.index(layer)
        except ValueError:
            raise UsageError(f"the net has no layer '{layer}'", hint=near(layer, self._layer_names)) from None

    def _blob(self, name: str) -> Top:
        if name not in self.blobs:
            raise UsageError(f"the net has no blob '{name}'", hint=near(name, self.blobs))
        return self.blobs[name]

    def set_input_arrays(self, data: np.ndarray, labels: np.ndarray) -> None:
        """What the net's MemoryData layer delivers from now on, batch by batch. Raises UsageError."""
        memory = [n.name for n in self._graph.nodes if n.layer.source == "memory"]
        if len(memory) != 1:
            raise UsageError(f"set_input_arrays: the net has {len(memory)} MemoryData layers, not one")
        feeder: Any = self._feed.feeders[memory[0]]
        feeder.reset(data, labels)

    # --- parameters --------------------------------------------------------------------------------------------------
    def _memories(self) -> list[ParamMemory]:
        return [m for blobs in self.params.values() for b in blobs for m in (b._data, b._diff)]

    def _params_to_net(self) -> None:
        for m in self._memories():
            m.push()

    def _params_from_net(self) -> None:
        for m in self._memories():
            m.pull()

    def clear_param_diffs(self) -> None:
        """Set the gradients of all learnable blobs to zero."""
        for m in self._memories():
            if m.grad:
                m.zero()

    def copy_from(self, path: str | os.PathLike[str]) -> None:
        """Copy the blobs of a .caffemodel or HDF5 file into layers of the same name. Raises WeightsError."""
        self._net.load(read_model(os.fspath(path)))
        self._params_from_net()

    load_hdf5 = copy_from

    def share_with(self, other: Net) -> None:
        """Use the other net's memory for the blobs of layers of the same name (their data; gradients stay apart)."""
        for name, params in self._net.params.items():
            for mine, theirs in zip(params, other._net.params.get(name, []), strict=False):
                if mine.shape != theirs.shape:
                    raise UsageError(f"share_with: layer '{name}' has blobs of other shapes in the other net")
                mine.data = theirs.data
                ParamBlob.of(mine)._data = ParamBlob.of(theirs)._data  # one array for both

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as a binary .caffemodel that C++ Caffe reads."""
        self._params_to_net()
        write_model(os.fspath(path), self._net.model(), format="binaryproto")

    def save_hdf5(self, path: str | os.PathLike[str], write_diff: bool = False) -> None:
        """Write the weights (and gradients) as HDF5."""
        self._params_to_net()
        write_model(os.fspath(path), self._net.model(diffs=write_diff), format="hdf5", diffs=write_diff)


def _constants(node: Node) -> list[float | None]:
    return node.layer.constants() if node.layer.source else [None] * len(node.outputs)


def _key(v: Value) -> Value | str:
    """Versions of a blob share memory, as in Caffe; unnamed tops are all different."""
    return v if v.name == "(automatic)" else v.name


def _arguments(args: tuple[Any, ...], phase: Any, level: Any, stages: Any, weights: Any) -> tuple[Any, Any, Any, Any]:
    """Positional arguments of both of Caffe's signatures."""
    if len(args) == 2 and isinstance(args[0], (str, os.PathLike)):
        weights, phase = args
    elif len(args) > 4:
        raise UsageError(f"Net takes a prototxt, phase, level, stages, weights: not {len(args) + 1} values")
    elif args:
        rest = (phase, level, stages, weights)[len(args) :]
        phase, level, stages, weights = (*args, *rest)
    if phase is None:
        raise UsageError("Net needs a phase: caffe.TRAIN or caffe.TEST")
    if isinstance(stages, str):
        stages = [s for s in stages.split(",") if s]
    return phase, level, stages, weights
