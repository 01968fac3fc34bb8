"""Layer messages of every fork, renumbered to our schema and back.

Forks gave the same field numbers of LayerParameter (145-152), TransformationParameter (8-21), QuantizationParameter and
LossParameter different meanings. In our schema each meaning has a number of its own. On the wire they are told apart by
wire type, then by layer type (two forks used number 147 for a message: only the layer says which), then by dialect.

`to_schema` and `from_schema` are inverse for files that one fork wrote. Sources: the caffe.proto of BVLC Caffe, NVCaffe
0.17, caffe-jacinto 0.16 and 0.17, SSD, ADaPTION, Ristretto.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from caffejacinto_py.schema import wire
from caffejacinto_py.schema.pool import descriptor
from caffejacinto_py.schema.wire import I32, LEN, VARINT

Change = tuple[int, Callable[[bytes], bytes] | None, Mapping[int, int] | None]  # number, for LEN, for VARINT values
Rule = Callable[[int, int], Change | None]

_TRANSFORM, _LOSS, _QUANT, _QPARAMS = "TransformationParameter", "LossParameter", "QuantizationParameter", "QParams"
_NET_QUANT = "NetQuantizationParameter"
_NV_STAMPS = {145: "forward_type", 146: "backward_type", 147: "forward_math", 148: "backward_math"}
_ADAPTION = {
    147: "lpfp_param",
    148: "roi_pooling_param",
    149: "smooth_l1_loss_param",
    150: "lp_convolution_param",
    151: "lp_act_param",
    152: "lp_inner_product_param",
}
_RECURRENT = frozenset(("RNN", "LSTM", "Recurrent"))
_SSD_TRANSFORM = {
    8: "resize_param",
    9: "noise_param",
    10: "emit_constraint",
    11: "crop_h",
    12: "crop_w",
    13: "distort_param",
    14: "expand_param",
}
_OLD_TRANSFORM = {12: "var_sz_img_enabled", 20: "display", 21: "num_labels"}
_OLD_QUANT = {3: "power2_range", 4: "quantized_infer_count", 6: "qparam_out", 7: "qparam_w"}
_OLD_QPARAMS = {
    4: "fracbits", 5: "unsigned_data", 6: "unsigned_quant", 7: "scale", 8: "offset", 9: "min", 10: "max",
}  # fmt: skip
_OLD_NET_QUANT = {
    1: "quantization_start", 2: "precision", 3: "rounding_scheme", 4: "bitwidth_activations", 5: "bitwidth_weights",
    8: "quantize_weights", 9: "quantize_activations", 10: "display_quantization", 11: "insert_quantization_param",
    12: "power2_range", 13: "apply_offset_activations", 14: "apply_offset_weights",
}  # fmt: skip
_RISTRETTO_QUANT = {
    3: "bw_layer_in", 4: "bw_layer_out", 5: "bw_params", 6: "fl_layer_in", 7: "fl_layer_out", 8: "fl_params",
    9: "mant_bits", 10: "exp_bits", 11: "exp_min", 12: "exp_max",
}  # fmt: skip
_RISTRETTO_ENUMS = {
    1: ("precision", ("DYNAMIC_FIXED_POINT", "MINIFLOAT", "INTEGER_POWER_OF_2_WEIGHTS")),
    2: ("rounding_scheme", ("NEAREST", "STOCHASTIC")),
}


def to_schema(layer: bytes, kind: str, dialect: str | None) -> bytes:
    """A serialized LayerParameter of type `kind` as a fork wrote it -> the numbers of our schema."""

    def rule(number: int, form: int) -> Change | None:
        if form == VARINT and number in _NV_STAMPS:
            return _number("LayerParameter", _NV_STAMPS[number]), None, None
        if form != LEN:
            return None
        if number == 100:
            return 100, lambda data: _transform(data, dialect), None
        if number == 101:
            return 101, lambda data: _loss(data, dialect), None
        if number == 8404 and _is_old_quantization(layer_field=data_of(layer, 8404)):
            return 8404, _rewriter(_old_quant_rule), None
        if number == 149 and kind.endswith("Ristretto"):
            return 8404, _rewriter(_ristretto_rule), None
        if number == 151 and kind in _RECURRENT:
            return _number("LayerParameter", "recurrent_param"), None, None
        if number in _ADAPTION and _is_adaption(number, kind):
            return _number("LayerParameter", _ADAPTION[number]), None, None
        return None

    return rewrite(layer, rule)


def from_schema(layer: bytes, kind: str, dialect: str | None) -> bytes:
    """A serialized LayerParameter of our schema -> the numbers of the fork that owns each field.

    Where forks disagree on one field the dialect decides (NVCaffe's family or the others).
    """
    home = {_number("LayerParameter", name): number for number, name in (*_NV_STAMPS.items(), *_ADAPTION.items())}
    nv = dialect in ("nvcaffe", "jacinto", "jacinto-0.16")

    def rule(number: int, form: int) -> Change | None:
        if number in home:
            return home[number], None, None
        if number == 100 and dialect in ("ssd", "jacinto-0.16"):
            names = _SSD_TRANSFORM if dialect == "ssd" else _OLD_TRANSFORM
            return 100, _rewriter(_renumber(_inverse(_TRANSFORM, names))), None
        if number == 101:
            return 101, _rewriter(_renumber(_inverse(_LOSS, {4: "label_weights"}))), None
        if number == 8404 and kind.endswith("Ristretto"):
            return 149, _rewriter(_ristretto_home), None
        if number == 8404 and dialect == "jacinto-0.16":
            return 8404, _rewriter(_old_quant_home), None
        if nv and number == _number("LayerParameter", "recurrent_param"):
            return 151, None, None
        return None

    return rewrite(layer, rule)


def head_to_schema(head: bytes, dialect: str | None) -> bytes:
    """The net's own fields (a NetParameter without layers) as a fork wrote them -> the numbers of our schema."""
    return _head(head, dialect, _table(_NET_QUANT, _OLD_NET_QUANT))


def head_from_schema(head: bytes, dialect: str | None) -> bytes:
    """... and back."""
    return _head(head, dialect, _inverse(_NET_QUANT, _OLD_NET_QUANT))


def _head(head: bytes, dialect: str | None, numbers: Mapping[int, int]) -> bytes:
    if dialect != "jacinto-0.16":
        return head
    inner = _rewriter(_renumber(numbers))
    return rewrite(head, lambda number, form: (201, inner, None) if number == 201 and form == LEN else None)


def rewrite(data: bytes, rule: Rule) -> bytes:
    """The message with fields renumbered by `rule(number, wire type)`, in field order; unnamed fields as they are."""
    parts: list[tuple[int, bytes]] = []
    for number, form, start, value, end in wire.fields(data, 0, len(data)):
        change = rule(number, form)
        if change is None:
            parts.append((number, data[start:end]))
            continue
        new, inner, values = change
        if form == LEN:
            payload = data[value:end]
            parts.append((new, wire.block(new, inner(payload) if inner else payload)))
        elif form == VARINT:
            parts.append((new, wire.uint(new, (values or {}).get(value, value))))
        else:
            parts.append((new, wire.tag(new, form) + data[value:end]))
    parts.sort(key=lambda p: p[0])
    return b"".join(p for _, p in parts)


def data_of(message: bytes, number: int) -> bytes:
    """The payloads of all LEN fields `number`, joined (which is what merging sub-messages means)."""
    found = wire.fields(message, 0, len(message))
    return b"".join(message[value:end] for n, form, _, value, end in found if n == number and form == LEN)


def _is_old_quantization(*, layer_field: bytes) -> bool:
    """Whether a quantization_param has the layout of caffe-jacinto 0.16, by the wire types inside QParams.

    0.17 has fracbits at 3, shiftbits at 8 (both varint) and max at 11; 0.16 has offset (fixed32) at 8, no 3 and no 11.
    """
    old = new = False
    for number, form, _, value, end in wire.fields(layer_field, 0, len(layer_field)):
        if number == 8 and form == VARINT:
            new = True
        if number not in (5, 6, 7) or form != LEN:
            continue
        for inner, inner_form, _, _, _ in wire.fields(layer_field, value, end):
            new |= inner in (3, 11) or (inner == 8 and inner_form == VARINT)
            old |= inner == 8 and inner_form == I32
    return old and not new


def uses_old_quantization(layer: bytes) -> bool:
    """Whether a layer message holds a quantization_param of caffe-jacinto 0.16."""
    return _is_old_quantization(layer_field=data_of(layer, 8404))


def _is_adaption(number: int, kind: str) -> bool:
    """Whether ADaPTION's meaning of a LEN field 147-152 fits the layer type."""
    if number == 147:
        return kind.startswith("LP")
    if number == 148:
        return kind == "ROIPooling"
    return not (number == 152 and kind.startswith("TRT"))


def _transform(data: bytes, dialect: str | None) -> bytes:
    """TransformationParameter -> our numbers, which are NVCaffe's."""
    forms = {number: form for number, form, _, _, _ in wire.fields(data, 0, len(data))}
    sub = any(forms.get(n) == LEN for n in (8, 9, 10, 13, 14))
    nv = any(15 <= n <= 23 or 208 <= n <= 214 or (8 <= n <= 10 and f == VARINT) for n, f in forms.items())
    if sub or (dialect == "ssd" and not nv):
        return rewrite(data, _renumber(_table(_TRANSFORM, _SSD_TRANSFORM)))
    if dialect == "jacinto-0.16" or forms.get(12) == VARINT:
        return rewrite(data, _renumber(_table(_TRANSFORM, _OLD_TRANSFORM)))
    return data


def _loss(data: bytes, dialect: str | None) -> bytes:
    """LossParameter 4: one label_smoothing (NVCaffe) or a list of label_weights (caffe-jacinto)."""
    count = sum(number == 4 for number, _, _, _, _ in wire.fields(data, 0, len(data)))
    if count > 1 or (count == 1 and dialect == "jacinto"):
        return rewrite(data, _renumber(_table(_LOSS, {4: "label_weights"})))
    return data


def _renumber(table: Mapping[int, int]) -> Rule:
    return lambda number, form: (table[number], None, None) if number in table else None


def _rewriter(rule: Rule) -> Callable[[bytes], bytes]:
    return lambda data: rewrite(data, rule)


def _old_quant_rule(number: int, form: int) -> Change | None:
    inner = _rewriter(_renumber(_table(_QPARAMS, _OLD_QPARAMS))) if number in (5, 6, 7) else None
    new = _table(_QUANT, _OLD_QUANT).get(number, number)
    return new, inner, None


def _old_quant_home(number: int, form: int) -> Change | None:
    inner = _rewriter(_renumber(_inverse(_QPARAMS, _OLD_QPARAMS))) if number in (5, 6, 7) else None
    return _inverse(_QUANT, _OLD_QUANT).get(number, number), inner, None


def _ristretto_rule(number: int, form: int) -> Change | None:
    if number in _RISTRETTO_ENUMS:
        return number, None, dict(enumerate(_enum_numbers(number)))
    new = _table(_QUANT, _RISTRETTO_QUANT).get(number)
    return None if new is None else (new, None, None)


def _ristretto_home(number: int, form: int) -> Change | None:
    if number in _RISTRETTO_ENUMS:
        return number, None, {own: i for i, own in enumerate(_enum_numbers(number))}
    new = _inverse(_QUANT, _RISTRETTO_QUANT).get(number)
    return None if new is None else (new, None, None)


def _enum_numbers(number: int) -> list[int]:
    """Our numbers of Ristretto's enum values, in Ristretto's order (its numbers are 0, 1, ...)."""
    name, values = _RISTRETTO_ENUMS[number]
    enum = descriptor(_QUANT).fields_by_name[name].enum_type
    assert enum is not None
    return [enum.values_by_name[v].number for v in values]


@cache
def _number(message: str, name: str) -> int:
    owner = descriptor(_QUANT).nested_types_by_name[_QPARAMS] if message == _QPARAMS else descriptor(message)
    return owner.fields_by_name[name].number


def _table(message: str, names: Mapping[int, str]) -> dict[int, int]:
    """Fork's number -> our number."""
    return {number: _number(message, name) for number, name in names.items()}


def _inverse(message: str, names: Mapping[int, str]) -> dict[int, int]:
    """Our number -> fork's number."""
    return {_number(message, name): number for number, name in names.items()}
