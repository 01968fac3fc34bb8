"""Many raw records of one size at once: the common case (MNIST, CIFAR, resized ImageNet), without parsing each of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caffejacinto_py.errors import DataError
from caffejacinto_py.schema.datum import make_datum, parse_datum

_SMALL = 64 << 10  # below this, copying a record first is faster than slicing a view of it


class RawLayout:
    """Where pixels and label lie in a record that Caffe's tools wrote for images of one shape.

    All such records start with the same bytes and end with few different ones (the label), so a comparison and a
    table replace the parser; each different end is parsed once. A record that is laid out in another way is left to
    the parser.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        dark, bright = (np.frombuffer(make_datum(np.full(shape, v, np.uint8)), np.uint8) for v in (0, 255))
        self.start = int(np.argmax(dark != bright))
        self.end = self.start + shape[0] * shape[1] * shape[2]
        self.head = dark[: self.start].tobytes()
        self.labels: dict[bytes, int] = {}

    def stack(self, values: Sequence[memoryview]) -> tuple[np.ndarray, list[int]] | None:
        """Images N,C,H,W uint8 and labels; None when a record has another layout."""
        start, end, head, known = self.start, self.end, self.head, self.labels
        copy = end < _SMALL
        pieces, labels = [], []
        for value in values:
            record = bytes(value) if copy else value
            if record[:start] != head:
                return None
            tail = bytes(record[end:])
            label = known.get(tail)
            if label is None:
                label = self._parse(value)
                if label is None:
                    return None
                known[tail] = label
            pieces.append(record[start:end])
            labels.append(label)
        return np.frombuffer(b"".join(pieces), np.uint8).reshape(len(pieces), *self.shape), labels

    def _parse(self, value: memoryview) -> int | None:
        """The label of a record whose end was not seen before; None when the parser does not confirm the layout."""
        try:
            datum = parse_datum(value)
        except DataError:
            return None  # the slow way meets it again and can name the record
        plain = not datum.encoded and datum.float_data is None and len(self.labels) < 1 << 16
        shape = (datum.channels, datum.height, datum.width)
        return datum.label if plain and shape == self.shape and len(datum.data) == self.end - self.start else None
