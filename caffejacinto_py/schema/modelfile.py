"""The content of a weights file: layers by name, each with its blobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError, Message

from caffejacinto_py.errors import InputError, Loc, WeightsError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.retag import from_schema, to_schema


class LayerBlobs:
    """One layer of a weights file.

    name, type: as in the file; type is today's string also for V1 and V0 files, "" in HDF5 files (which have none).
    blobs, diffs: arrays in Caffe's order (or LazyArrays, in a model that is only written); diffs is empty where the
        file has none. In a layer read from HDF5 an entry is None where the file leaves the blob out because an earlier
        layer owns it.
    legacy: per blob, whether its shape is the old (num, channels, height, width): compare with `shapes_match`.
    bottoms, tops: blob names.
    shared: indexes of blobs that an earlier layer owns; HDF5 files leave them out.
    """

    def __init__(
        self,
        name: str,
        type: str = "",
        blobs: Iterable[Any] = (),
        *,
        diffs: Iterable[Any] = (),
        legacy: Iterable[bool] | None = None,
        proto: Message | bytes | None = None,
        bottoms: Sequence[str] = (),
        tops: Sequence[str] = (),
        shared: Collection[int] = (),
    ) -> None:
        """proto: the LayerParameter that is written around the blobs (its own blobs, name and type are not used); bytes
        are one in our schema's numbers. Without it a layer is written with name, type, bottoms and tops."""
        self.name = name
        self.type = type
        self.blobs: list[Any] = list(blobs)
        self.diffs: list[Any] = list(diffs)
        self.legacy: list[bool] = [False] * len(self.blobs) if legacy is None else list(legacy)
        self.bottoms = list(bottoms)
        self.tops = list(tops)
        self.shared = frozenset(shared)
        self._proto: Any = pb.LayerParameter.FromString(proto) if isinstance(proto, bytes) else proto
        # Set by the readers: the message without blobs as a fork wrote it, and which fork; how to get it for V1 and V0.
        self.stored: tuple[bytes, str | None] | None = None
        self.upgrade: Callable[[], Any] | None = None

    def __repr__(self) -> str:
        shapes = [None if b is None else b.shape for b in self.blobs]
        return f"LayerBlobs({self.name!r}, {self.type!r}, {shapes})"

    @property
    def proto(self) -> Any:
        """The LayerParameter without blobs, in our schema, upgraded; parsed at the first use.

        Raises WeightsError where the stored fields are not a valid LayerParameter (the blobs can be used all the same).
        """
        if self._proto is None:
            if self.upgrade is not None:
                self._proto = self.upgrade()
            elif self.stored is not None:
                self._proto = _parse(pb.LayerParameter, to_schema(self.stored[0], self.type, self.stored[1]), self.name)
            else:
                self._proto = pb.LayerParameter(name=self.name, type=self.type, bottom=self.bottoms, top=self.tops)
        return self._proto

    @proto.setter
    def proto(self, message: Message) -> None:
        self._proto = message

    def fields(self, dialect: str | None) -> bytes:
        """The LayerParameter without blobs in the numbers of `dialect`, in field order, as a file has it."""
        if self.stored is not None and self._proto is None and self.stored[1] == dialect:
            data = self.stored[0]  # untouched since it was read: byte for byte as it was
        else:
            data = from_schema(self.proto.SerializeToString(deterministic=True), self.type, dialect)
        own = wire.string(1, self.name) + (wire.string(2, self.type) if self.type else b"")
        drop = (1, 2, 7) if self.type else (1, 7)
        kept = [data[at:end] for number, _, at, _, end in wire.fields(data, 0, len(data)) if number not in drop]
        return own + b"".join(kept)


@dataclass
class ModelFile:
    """A weights file in memory.

    path: where it came from ("" when made here). dialect: the fork that wrote it as far as the bytes show, else None.
    version: "V2", "V1" or "V0" (layer messages of a .caffemodel) or "HDF5".
    head: the net's other fields (input, state, quantize, ...) in our schema's numbers, without name and layers.
    """

    name: str
    layers: list[LayerBlobs]
    path: str = ""
    dialect: str | None = None
    version: str = "V2"
    head: bytes = b""
    old: bytes = field(default=b"", repr=False)  # V1 and V0: the whole net without blobs, as stored
    _upgraded: Any = field(default=None, repr=False, compare=False)

    def layer(self, name: str) -> LayerBlobs:
        """The layer of that name; KeyError when the file has none."""
        for entry in self.layers:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def net(self) -> Any:
        """The net as the file describes it: a NetParameter without blobs, upgraded to `layer` messages.

        Raises WeightsError where the stored fields are not valid. An HDF5 file describes only names.
        """
        if self.old:
            if self._upgraded is None:
                from caffejacinto_py.schema.upgrade import upgrade_net

                self._upgraded = _parse(pb.NetParameter, self.old, self.path)
                try:
                    upgrade_net(self._upgraded)
                except InputError as e:
                    raise WeightsError(f"the net inside cannot be upgraded: {e.text}", loc=Loc(self.path)) from None
            return self._upgraded
        net = _parse(pb.NetParameter, self.head, self.path)
        net.name = self.name
        net.layer.extend(entry.proto for entry in self.layers)
        return net

    def current_layers(self) -> list[LayerBlobs]:
        """The layers that a net of today has: all, but for padding layers of V0 files."""
        if not self.old:
            return self.layers
        names = {layer.name for layer in self.net().layer}
        return [entry for entry in self.layers if entry.name in names]

    def upgraded_layer(self, name: str) -> Any:
        """The upgraded message of a V1 or V0 layer. Raises WeightsError where the upgrade removes it (padding)."""
        for layer in self.net().layer:
            if layer.name == name:
                return layer
        raise WeightsError(
            f"layer '{name}' has no counterpart in the upgraded net",
            loc=Loc(self.path),
            hint="padding layers of V0 nets become part of the convolution behind them",
        )


def shapes_match(file_shape: Sequence[int], legacy: bool, target_shape: Sequence[int]) -> bool:
    """Whether a stored blob fits a parameter of `target_shape`, as C++ Caffe decides.

    Equal; or, for a legacy 4-axis shape, equal to the target with leading ones: (1, 1, N, K) fits (N, K).
    """
    target = tuple(target_shape)
    if not legacy:
        return tuple(file_shape) == target
    return len(target) <= 4 and tuple(file_shape) == (1,) * (4 - len(target)) + target


def _parse(kind: Any, data: bytes, name: str) -> Any:
    try:
        message = kind.FromString(data)
        _check_texts(message)
    except (DecodeError, UnicodeDecodeError) as e:
        raise WeightsError(f"the stored fields of '{name}' are not valid: {e}") from None
    return message


def _check_texts(message: Message) -> None:
    """Refuse text that is not UTF-8: protobuf does not when parsing, and hands out bytes or fails at access."""
    for descriptor, value in message.ListFields():
        items: Any = (value,) if isinstance(value, (Message, str, bytes)) else value
        if descriptor.message_type is not None:
            for inner in items:
                _check_texts(inner)
        elif descriptor.type == descriptor.TYPE_STRING:
            for item in items:
                if isinstance(item, bytes):
                    item.decode()
