"""BatchNorm from one family's form into the other's: in the net, and in the weights.

BVLC Caffe (SSD, ADaPTION, Ristretto): BatchNorm with blobs mean sum, variance sum, factor; a Scale layer behind it
learns scale and shift. NVCaffe, caffe-jacinto: one BatchNorm layer with `scale_bias: true` and blobs mean, variance, 1,
scale, shift. In phase TEST both compute the same numbers. Source: BVLC and NVCaffe batch_norm_layer.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from caffejacinto_py.errors import PrototxtError, UsageError, WeightsError
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.mark import mark, mark_model
from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile
from caffejacinto_py.schema.pool import pb

_NV = ("nvcaffe", "jacinto", "jacinto-0.16")
FORMS = ("bvlc", "nvcaffe")
LEAST_EPS = 1e-5  # NVCaffe never uses a smaller one
# the last one is read by BVLC only: a net of NVCaffe may say anything there
_NV_FIELDS = ("scale_bias", "scale_filler", "bias_filler", "engine", "use_global_stats")
_RULES = ("include", "exclude")


@dataclass
class Converted:
    """net: the changed NetParameter. merged: BatchNorm layer -> the Scale layer that went into it. split: BatchNorm
    layer -> the Scale layer made of it. notices: lines for the user."""

    net: Any
    form: str
    norms: list[str] = field(default_factory=list)
    merged: dict[str, str] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def convert_net(net: Any, form: str) -> Converted:
    """An upgraded NetParameter with its BatchNorm layers in `form` ("bvlc", "nvcaffe"); `net` stays as it is.

    Raises UsageError for another form, PrototxtError for BatchNorm layers that share blobs by name.
    """
    if form not in FORMS:
        raise UsageError(f"no form of BatchNorm is named '{form}'", hint=f"one of {', '.join(FORMS)}")
    new = pb.NetParameter()
    new.CopyFrom(net)
    done = Converted(new, form)
    for layer in net.layer:
        named = [p.name for p in layer.param if p.name]
        if layer.type == "BatchNorm" and named:
            text = f"layer '{layer.name}' shares its blobs by the name '{named[0]}'"
            raise PrototxtError(text, hint="shared BatchNorm blobs cannot be converted: take the names away first")
    (_to_nv if form == "nvcaffe" else _to_bvlc)(done)
    if done.norms and (resolve_dialect(new).name in _NV) != (form == "nvcaffe"):
        mark(new, form)
    return done


def _affine(layer: Any) -> bool:
    p = layer.batch_norm_param
    return bool(p.scale_bias or p.HasField("scale_filler") or p.HasField("bias_filler"))


def _to_nv(done: Converted) -> None:
    """Merge each Scale layer into the BatchNorm before it."""
    layers, gone = list(done.net.layer), set()
    for i, layer in enumerate(layers):
        if layer.type != "BatchNorm":
            continue
        done.norms.append(layer.name)
        if _affine(layer):
            continue
        j = _scale_behind(layers, i)
        p = layer.batch_norm_param
        if p.HasField("eps") and p.eps < LEAST_EPS * (1 - 1e-6):
            done.notices.append(f"layer '{layer.name}': eps {p.eps:g}, but NVCaffe uses at least {LEAST_EPS:g}")
        if p.use_global_stats:
            done.notices.append(f"layer '{layer.name}': use_global_stats is not read by NVCaffe, the phase decides")
        p.ClearField("use_global_stats")
        del layer.param[:]
        if j is None:
            continue
        scale = layers[j]
        gone.add(j)
        done.merged[layer.name] = scale.name
        layer.top[:] = scale.top
        p.scale_bias = True
        for name, filler in (("scale_filler", "filler"), ("bias_filler", "bias_filler")):
            if scale.scale_param.HasField(filler):
                getattr(p, name).CopyFrom(getattr(scale.scale_param, filler))
        if any(s.HasField("lr_mult") and s.lr_mult != 1 for s in scale.param):
            done.notices.append(f"layer '{layer.name}': lr_mult of scale and shift is always 1 in NVCaffe")
    _keep(done.net, [layer for i, layer in enumerate(layers) if i not in gone])


def _scale_behind(layers: list[Any], i: int) -> int | None:
    """The Scale layer that is the only reader of BatchNorm layer i's top, with scale and shift per channel."""
    norm = layers[i]
    top = norm.top[0] if norm.top else ""
    readers = []
    for j in range(i + 1, len(layers)):
        if top in layers[j].bottom:
            readers.append(j)
        if top in layers[j].top:  # from here on the name is another value
            break
    if len(readers) != 1:
        return None
    scale, p = layers[readers[0]], layers[readers[0]].scale_param
    fits = scale.type == "Scale" and len(scale.bottom) == 1 and p.axis in (1, -3) and p.num_axes == 1
    same = all(list(getattr(norm, r)) == list(getattr(scale, r)) for r in _RULES)
    named = any(s.name for s in scale.param)
    return readers[0] if fits and same and not named else None


def _to_bvlc(done: Converted) -> None:
    """Put a Scale layer behind each BatchNorm that scales by itself."""
    layers: list[Any] = []
    names = {layer.name for layer in done.net.layer}
    for layer in done.net.layer:
        layers.append(layer)
        if layer.type != "BatchNorm":
            continue
        done.norms.append(layer.name)
        scale = _scale_of(layer, names) if _affine(layer) else None
        p = layer.batch_norm_param
        for name in _NV_FIELDS:
            p.ClearField(name)
        if p.eps < LEAST_EPS * (1 - 1e-6):
            p.eps = LEAST_EPS
        if not p.ListFields():
            layer.ClearField("batch_norm_param")
        del layer.param[:]
        if scale is not None:
            names.add(scale.name)
            done.split[layer.name] = scale.name
            layers.append(scale)
    _keep(done.net, layers)


def _scale_of(layer: Any, names: set[str]) -> Any:
    """A Scale layer in place on the BatchNorm's top."""
    name = f"{layer.name}_scale"
    while name in names:
        name += "_"
    scale = pb.LayerParameter(name=name, type="Scale", bottom=layer.top, top=layer.top)
    for rule in _RULES:
        getattr(scale, rule).extend(getattr(layer, rule))
    scale.scale_param.bias_term = True
    p = layer.batch_norm_param
    for own, other in (("filler", "scale_filler"), ("bias_filler", "bias_filler")):
        if p.HasField(other):
            getattr(scale.scale_param, own).CopyFrom(getattr(p, other))
    return scale


def _keep(net: Any, layers: list[Any]) -> None:
    kept = [type(layer).FromString(layer.SerializeToString()) for layer in layers]
    del net.layer[:]
    net.layer.extend(kept)


def convert_blobs(model: ModelFile, done: Converted) -> ModelFile:
    """The weights for the converted net. Sums are divided by the factor; BVLC's factor becomes 1, which is exact.

    Layers of the net that the file does not have are left out, layers of the file that the net does not have stay.
    Raises WeightsError where a BatchNorm layer does not
    have the blobs it should.
    """
    held = {entry.name: entry for entry in model.current_layers()}
    fresh: dict[str, list[np.ndarray]] = {}
    for name in done.norms:
        entry = held.get(name)
        if entry is not None and entry.blobs:
            fresh.update(_norm_blobs(entry, held, done))
    gone = {name for norm, name in done.merged.items() if norm in fresh}
    messages = {m.name: m for m in done.net.layer}
    names = [name for name in messages if name in held or name in fresh]
    names += [name for name in held if name not in messages and name not in gone]
    layers = []
    for name in names:
        if name not in messages:
            layers.append(held[name])
            continue
        blobs = fresh[name] if name in fresh else held[name].blobs
        legacy = None if name in fresh else held[name].legacy
        m = messages[name]
        layers.append(LayerBlobs(name, m.type, blobs, legacy=legacy, proto=m, bottoms=m.bottom, tops=m.top))
    dialect = None if done.form == "bvlc" else "nvcaffe"
    made = ModelFile(done.net.name or model.name, layers, model.path, dialect)
    return mark_model(made, done.net.dialect) if done.net.dialect else made


def _norm_blobs(entry: LayerBlobs, held: dict[str, LayerBlobs], done: Converted) -> dict[str, list[np.ndarray]]:
    """The new blobs of a BatchNorm layer, and of the Scale layer where one is split off."""
    name = entry.name
    mean, variance, *affine = _statistics(entry)
    if name in done.merged:
        scale = held.get(done.merged[name])
        if scale is None or not scale.blobs:
            raise WeightsError(f"the weights have BatchNorm layer '{name}', but not Scale layer '{done.merged[name]}'")
        affine = _affine_blobs(scale, mean.size)
    found = {name: [mean, variance, np.ones(1, np.float32)]}
    if name in done.split:
        found[done.split[name]] = affine or [np.ones_like(mean), np.zeros_like(mean)]
    elif affine and done.form == "bvlc":
        hint = "give --model the net that these weights are of, with scale_bias: true"
        raise WeightsError(f"layer '{name}' has scale and shift in the weights, but not in the net", hint=hint)
    else:
        found[name] += affine
    return found


def _statistics(entry: LayerBlobs) -> list[np.ndarray]:
    """[mean, variance] or [mean, variance, scale, shift] of a BatchNorm layer: flat float32, divided by the factor."""
    blobs = [np.array(b, np.float32).reshape(-1) for b in entry.blobs if b is not None]
    if len(blobs) not in (3, 5):
        raise WeightsError(f"BatchNorm layer '{entry.name}' has {len(blobs)} blobs in the weights, not 3 or 5")
    if len(blobs) == 5 and blobs[2].size != 1 and blobs[4].size == 1:  # the order of DIGITS
        blobs = blobs[2:] + blobs[:2]
    mean, variance, factor, *affine = blobs
    if len({b.size for b in (mean, variance, *affine)}) != 1 or factor.size != 1:
        raise WeightsError(f"BatchNorm layer '{entry.name}': the blobs do not fit each other")
    if factor[0] == 0 and not affine:  # an untrained BVLC layer uses zeros
        return [np.zeros_like(mean), np.zeros_like(variance)]
    # NVCaffe's own factor is 1 and never read; another one shows sums, as loading into such a net takes it too
    value = factor if factor[0] != 0 else np.float32(1)
    return [mean / value, variance / value, *affine]


def _affine_blobs(entry: LayerBlobs, channels: int) -> list[np.ndarray]:
    """[scale, shift] of a Scale layer; without a shift zeros."""
    blobs = [np.array(b, np.float32).reshape(-1) for b in entry.blobs if b is not None]
    if not blobs or any(b.size != channels for b in blobs):
        raise WeightsError(f"Scale layer '{entry.name}' does not have {channels} channels, as the BatchNorm before it")
    return [blobs[0], blobs[1] if len(blobs) > 1 else np.zeros_like(blobs[0])]
