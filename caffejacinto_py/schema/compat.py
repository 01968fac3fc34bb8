"""Compat switches: where this program deviates from a C++ binary on purpose, and how to get the binary's numbers back.

The default of every switch is "sound": what the documentation of the fork promises, or what is right mathematically.
All switches live in `SWITCHES`; a net's choices travel in its `Dialect` (`dialect.compat`), never in a global.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from caffejacinto_py.errors import UsageError, near

SOUND = "sound"


class Switch(NamedTuple):
    """values: what it can be set to, "sound" first. text: what each means, for docs and --help."""

    values: tuple[str, ...]
    text: str


SWITCHES: dict[str, Switch] = {
    "quantization": Switch(
        (SOUND, "cpu", "gpu"),
        "Quantization simulation of caffe-jacinto. cpu, gpu: rounds as that build does (cpu half away from zero after "
        "clipping, gpu half to even before it), weights snapped in place once at the end of the first quantized pass, "
        "ranges measured on blobs as they lie in memory after the pass, offsets not rounded.",
    ),
    "sparsity": Switch(
        (SOUND, "0.17"),
        "0.17: sparsity_itr_increment_bfr_applying is not read, as in that version.",
    ),
    "optimize": Switch(
        (SOUND, "binary"),
        "Absorbing batch norm. binary: eps as written (below 1e-5 too), the correction blob ignored, a Scale behind a "
        "BatchNorm with scale_bias discarded.",
    ),
    "adaption": Switch(
        (SOUND, "cpu", "gpu"),
        "Rounding of LP layers. cpu: STOCHASTIC is always floor, as that build draws 0; NaN becomes the lowest value. "
        "gpu: DETERMINISTIC falls through into STOCHASTIC for weights and other out-of-place rounding.",
    ),
    "lp_param": Switch(
        ("logical", "physical"),
        "What a `param` entry of an LP layer means. logical: 0 weights, 1 bias (3 or 4 entries: the four blobs). "
        "physical: entry i is blob i of (weights, rounded weights, bias, rounded bias), as ADaPTION reads it.",
    ),
    "ristretto": Switch(
        (SOUND, "cpu", "gpu"),
        "Layers of Ristretto. cpu, gpu: as that build does, a layer overwrites its bottom with the rounded values, "
        "which other layers then read, and minifloats just below their largest number round past it (NaN becomes it). "
        "cpu: power-of-two mode leaves activations alone. gpu: halves round to even, not away from zero.",
    ),
    "elu": Switch((SOUND, "binary"), "ELU with lambda in caffe-jacinto. binary: its gradient, not the derivative."),
    "normalize": Switch(
        (SOUND, "binary"),
        "Normalize with unequal scales per channel. binary: its gradient, not the derivative.",
    ),
}


@dataclass(frozen=True)
class Compat:
    """One value per switch; see `SWITCHES`."""

    quantization: str = SOUND
    sparsity: str = SOUND
    optimize: str = SOUND
    adaption: str = SOUND
    lp_param: str = "logical"
    ristretto: str = SOUND
    elu: str = SOUND
    normalize: str = SOUND

    def set(self, **choices: str) -> Compat:
        """With some switches changed. Raises UsageError for an unknown switch or value, naming the known ones."""
        for name, value in choices.items():
            if name not in SWITCHES:
                known = f"known: {', '.join(SWITCHES)}"
                raise UsageError(f"unknown compat switch '{name}'", hint=near(name, SWITCHES) or known)
            if value not in SWITCHES[name].values:
                hint = f"one of: {', '.join(SWITCHES[name].values)}"
                raise UsageError(f"compat switch '{name}' has no value '{value}'", hint=hint)
        return replace(self, **choices)

    def changed(self) -> dict[str, str]:
        """The switches that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def parse_compat(texts: Iterable[str] | Mapping[str, Any]) -> Compat:
    """From "name=value" texts, several in one with commas. Raises UsageError."""
    if isinstance(texts, Mapping):
        return Compat().set(**texts)
    choices: dict[str, str] = {}
    for text in (word.strip() for one in texts for word in one.split(",")):
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"compat switch '{text}': no value", hint="write NAME=VALUE, for example quantization=cpu")
        choices[name.strip()] = value.strip()
    return Compat().set(**choices)
