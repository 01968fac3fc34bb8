"""Nets written as Python expressions: `n.conv = L.Convolution(n.data, kernel_size=3, num_output=8)`."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from caffejacinto_py.errors import UsageError, near
from caffejacinto_py.layers import registry
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.pool import descriptor


class UnknownParam(UsageError, AttributeError):
    """A parameter or type that the schema does not have."""


def param_name_dict() -> dict[str, str]:
    """Layer type -> its parameter field, without "_param", where the field's message is called <Type>Parameter."""
    fields = [(f.name, f.message_type) for f in descriptor("LayerParameter").fields if f.name.endswith("_param")]
    return {m.name.removesuffix("Parameter"): name.removesuffix("_param") for name, m in fields if m}


def _param_field(type: str) -> str | None:
    """The field that takes the keywords of a layer type: by Caffe's rule, else what the layer type itself uses."""
    found = param_name_dict().get(type)
    if found is not None:
        return f"{found}_param"
    return registry.find(type).field if registry.known(type) else None


def to_proto(*tops: Top | Function) -> Any:
    """A NetParameter with the layers that these tops depend on; names are made up."""
    return _net({}, tops)


def _net(names: dict[Any, str], tops: Any) -> Any:
    naming, layers = Naming(names), OrderedDict[Function, Any]()
    for top in tops:
        top._to_proto(layers, naming)
    return pb.NetParameter(layer=layers.values())


def assign_proto(proto: Any, name: str, value: Any) -> None:
    """Set a field of a message. A list fills a repeated field, one value becomes a list of one, a dict fills a message.
    Raises UnknownParam.
    """
    field = proto.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        hint = near(name, proto.DESCRIPTOR.fields_by_name)
        raise UnknownParam(f"{proto.DESCRIPTOR.name} has no field '{name}'", hint=hint)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(getattr(proto, name), (str, bytes)) or not hasattr(getattr(proto, name), "extend"):
        _assign_one(proto, field, value)
        return
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if field.message_type:
            _fill(getattr(proto, name).add(), item)
        else:
            getattr(proto, name).append(_plain(field, item))


def _assign_one(proto: Any, field: Any, value: Any) -> None:
    if field.message_type:
        getattr(proto, field.name).SetInParent()
        _fill(getattr(proto, field.name), value)
    else:
        setattr(proto, field.name, _plain(field, value))


def _fill(message: Any, value: Any) -> None:
    if not isinstance(value, Mapping):
        message.CopyFrom(value)
        return
    for name, item in value.items():
        assign_proto(message, name, item)


def _plain(field: Any, value: Any) -> Any:
    """Numbers of numpy as Python's, names of enum values as numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if field.enum_type is None or not isinstance(value, str):
        return value
    if value not in field.enum_type.values_by_name:
        hint = near(value, field.enum_type.values_by_name)
        raise UnknownParam(f"{field.name} has no value '{value}'", hint=hint)
    return field.enum_type.values_by_name[value].number


class Naming:
    """Names of tops and layers: given, or <Type>1, <Type>2, ..."""

    def __init__(self, given: dict[Any, str]) -> None:
        self._names = dict(given)
        self._counts: Counter[str] = Counter()

    def top(self, top: Top) -> str:
        return self._of(top, top.fn.type_name)

    def layer(self, fn: Function) -> str:
        """A layer is named like its first top."""
        if fn not in self._names and fn.tops:
            self._names[fn] = self.top(fn.tops[0])
        return self._of(fn, fn.type_name)

    def _of(self, thing: Any, type: str) -> str:
        if thing not in self._names:
            self._counts[type] += 1
            self._names[thing] = f"{type}{self._counts[type]}"
        return self._names[thing]


class Top:
    """An output of a layer: what layers take as inputs."""

    def __init__(self, fn: Function, n: int) -> None:
        self.fn = fn
        self.n = n

    def to_proto(self) -> Any:
        """A NetParameter with the layers that this top depends on."""
        return to_proto(self)

    def _update(self, params: dict[str, Any]) -> None:
        self.fn._update(params)

    def _to_proto(self, layers: OrderedDict[Function, Any], naming: Naming) -> None:
        self.fn._to_proto(layers, naming)


class Function:
    """A layer: its type, inputs, parameters and tops. Keywords ntop and in_place are about the layer itself."""

    def __init__(self, type_name: str, inputs: tuple[Any, ...], params: dict[str, Any]) -> None:
        for i, given in enumerate(inputs):
            if not isinstance(given, Top):
                raise TypeError(f"{type_name} input {i} is not a Top (type is {type(given)})")
        self.type_name = type_name
        self.inputs: tuple[Top, ...] = inputs
        self.params = dict(params)
        self.ntop: int = self.params.pop("ntop", 1)
        self.in_place: bool = self.params.pop("in_place", False)
        self.tops = tuple(Top(self, n) for n in range(self.ntop))

    def _update(self, params: dict[str, Any]) -> None:
        self.params.update(params)

    def _to_proto(self, layers: OrderedDict[Function, Any], naming: Naming) -> None:
        if self in layers:
            return
        bottoms = []
        for given in self.inputs:
            given._to_proto(layers, naming)
            bottoms.append(layers[given.fn].top[given.n])
        layer = pb.LayerParameter(type=self.type_name, bottom=bottoms)
        layer.top.extend(bottoms if self.in_place else [naming.top(t) for t in self.tops])
        layer.name = naming.layer(self)
        field = _param_field(self.type_name)
        for name, value in self.params.items():
            own = getattr(layer, field) if field else None
            if not name.endswith("param") and own is not None and name in own.DESCRIPTOR.fields_by_name:
                assign_proto(own, name, value)
            else:
                self._assign(layer, own, name, value)
        layers[self] = layer

    def _assign(self, layer: Any, own: Any, name: str, value: Any) -> None:
        try:
            assign_proto(layer, name, value)
        except UnknownParam as e:
            if name in layer.DESCRIPTOR.fields_by_name:
                raise
            known = [*layer.DESCRIPTOR.fields_by_name, *(own.DESCRIPTOR.fields_by_name if own else ())]
            raise UnknownParam(f"{self.type_name} has no parameter '{name}'", hint=near(name, known)) from e


class NetSpec:
    """Tops by name: `n = NetSpec(); n.data, n.label = L.Data(..., ntop=2)`; `n.to_proto()` is the net."""

    tops: OrderedDict[str, Any]

    def __init__(self) -> None:
        super().__setattr__("tops", OrderedDict())

    def __setattr__(self, name: str, value: Any) -> None:
        self.tops[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in self.tops:
            return self.tops[name]
        raise AttributeError(f"the net has no top '{name}'")

    def __delattr__(self, name: str) -> None:
        del self.tops[name]

    __setitem__ = __setattr__

    def __getitem__(self, name: str) -> Any:
        return self.tops[name]

    def __delitem__(self, name: str) -> None:
        del self.tops[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tops

    def __iter__(self) -> Iterator[str]:
        return iter(self.tops)

    def keys(self) -> list[str]:
        return list(self.tops)

    def vals(self) -> list[Any]:
        return list(self.tops.values())

    def update(self, name: str, params: dict[str, Any]) -> None:
        """Change keywords of the layer that makes this top."""
        self.tops[name]._update(params)

    def to_proto(self) -> Any:
        """The NetParameter; layers and tops are called as they are here."""
        return _net({top: name for name, top in self.tops.items()}, self.tops.values())


class Layers:
    """`L.Convolution(bottom, ..., **params)` for every layer type: a Top, a tuple of `ntop` tops, or with ntop=0 the
    layer itself.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def make(*args: Any, **kwargs: Any) -> Any:
            fn = Function(name, args, kwargs)
            if not fn.tops:
                return fn
            return fn.tops[0] if len(fn.tops) == 1 else fn.tops

        return make


class _Values:
    def __init__(self, name: str) -> None:
        self._message = f"{name}Parameter"

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(getattr(pb, self._message), name)
        except AttributeError:
            raise UnknownParam(f"the schema has no {self._message}.{name}") from None


class Parameters:
    """`P.Pooling.MAX`: values of the enums in <name>Parameter."""

    def __getattr__(self, name: str) -> _Values:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Values(name)


layers = Layers()
params = Parameters()
