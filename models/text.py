"""Build a net layer by layer and print it as prototxt, for models/generate.py. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH = 110
FROZEN = ((0, 0),)
PLAIN = ((1, None), (2, None))  # (lr_mult, decay_mult): the bias learns twice as fast
NO_BIAS_DECAY = ((1, 1), (2, 0))  # ... and is not decayed


class Word(str):
    """An enum value: printed without quotes."""


def value(v: Any) -> str:
    """One field value as text format."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, dict):
        return "{ " + " ".join(fields(v)) + " }"
    if isinstance(v, str) and not isinstance(v, Word):
        return f'"{v}"'
    return f"{v:g}" if isinstance(v, float) else str(v)


def fields(message: dict[str, Any]) -> list[str]:
    """Each field of a message as `name: value` or `name { ... }`; None is left out, a list repeats the field."""
    out = []
    for name, v in message.items():
        for one in v if isinstance(v, list) else [v]:
            if one is not None:
                out.append(f"{name} {value(one)}" if isinstance(one, dict) else f"{name}: {value(one)}")
    return out


def block(name: str, message: dict[str, Any], indent: str = "") -> list[str]:
    """A message on one line where it fits, else one field a line."""
    line = f"{indent}{name} {value(message)}"
    if len(line) <= WIDTH and name != "layer":
        return [line]
    lines = [f"{indent}{name} {{"]
    for key, v in message.items():
        for one in v if isinstance(v, list) else [v]:
            if isinstance(one, dict):
                lines += block(key, one, indent + "  ")
            elif one is not None:
                lines.append(f"{indent}  {key}: {value(one)}")
    return [*lines, indent + "}"]


def filler(kind: str | None, **options: Any) -> dict[str, Any] | None:
    return {"type": kind, **options} if kind else None


class Net:
    """A net being written: with TRAIN and TEST data, or its deploy twin without data, losses and fillers.

    Every method adds one layer (or one customary group) and returns the name of its top.
    """

    def __init__(self, name: str, *, deploy: bool = False) -> None:
        self.name = name
        self.deploy = deploy
        self.layers: list[dict[str, Any]] = []

    def text(self) -> str:
        lines = ["# Written by models/generate.py.", f'name: "{self.name}"']
        for layer in self.layers:
            lines += block("layer", layer)
        return "\n".join(lines) + "\n"

    def add(
        self, name: str, type: str, bottom: str | Sequence[str], top: str = "", *, specs: Any = (), **message: Any
    ) -> str:
        bottoms = [bottom] if isinstance(bottom, str) else list(bottom)
        params = [{"lr_mult": lr, "decay_mult": decay} for lr, decay in specs]
        layer = {"name": name, "type": type, "bottom": bottoms, "top": [top or name], "param": params, **message}
        self.layers.append(layer)
        return top or name

    def data(
        self,
        name: str,
        shape: tuple[int, int, int],
        *,
        sources: tuple[str, str],
        batch: tuple[int, int],
        deploy_batch: int,
        mirror: bool = False,
        **transform: Any,
    ) -> str:
        """TRAIN and TEST Data layers reading LMDBs; in a deploy net an Input layer of (C, H, W)."""
        if self.deploy:
            dims = {"dim": [deploy_batch, *shape]}
            self.layers.append({"name": "data", "type": "Input", "top": ["data"], "input_param": {"shape": dims}})
            return "data"
        for phase, source, size in zip(("TRAIN", "TEST"), sources, batch, strict=True):
            flip = {"mirror": phase == "TRAIN"} if mirror else {}
            self.layers.append(
                {
                    "name": name,
                    "type": "Data",
                    "top": ["data", "label"],
                    "include": {"phase": Word(phase)},
                    "transform_param": {**flip, **transform},
                    "data_param": {"source": source, "batch_size": size, "backend": Word("LMDB")},
                }
            )
        return "data"

    def _weights(self, weight: Any, bias: Any, specs: Any) -> tuple[dict[str, Any], Any]:
        """Fillers and param specs; a deploy net has neither."""
        if self.deploy:
            return {}, ()
        return {"weight_filler": weight, "bias_filler": bias}, specs

    def conv(
        self,
        name: str,
        bottom: str,
        out: int,
        kernel: int,
        *,
        pad: int = 0,
        stride: int = 1,
        group: int = 1,
        bias_term: bool = True,
        weight: Any = None,
        bias: Any = None,
        specs: Any = (),
    ) -> str:
        fill, specs = self._weights(weight, bias, specs)
        param = {
            "num_output": out,
            "bias_term": None if bias_term else False,
            "pad": pad or None,
            "kernel_size": kernel,
            "stride": stride if stride > 1 else None,
            "group": group if group > 1 else None,
            **fill,
        }
        return self.add(name, "Convolution", bottom, specs=specs, convolution_param=param)

    def fc(self, name: str, bottom: str, out: int, *, weight: Any = None, bias: Any = None, specs: Any = ()) -> str:
        fill, specs = self._weights(weight, bias, specs)
        return self.add(name, "InnerProduct", bottom, specs=specs, inner_product_param={"num_output": out, **fill})

    def pool(self, name: str, bottom: str, kind: str, kernel: int, stride: int = 1, pad: int = 0) -> str:
        param = {
            "pool": Word(kind),
            "kernel_size": kernel,
            "stride": stride if stride > 1 else None,
            "pad": pad or None,
        }
        return self.add(name, "Pooling", bottom, pooling_param=param)

    def global_pool(self, name: str, bottom: str) -> str:
        return self.add(name, "Pooling", bottom, pooling_param={"pool": Word("AVE"), "global_pooling": True})

    def relu(self, name: str, blob: str) -> str:
        return self.add(name, "ReLU", blob, blob)

    def dropout(self, name: str, blob: str, ratio: float) -> str:
        return self.add(name, "Dropout", blob, blob, dropout_param={"dropout_ratio": ratio})

    def lrn(self, name: str, bottom: str, size: int, alpha: float, *, within: bool = False) -> str:
        region = Word("WITHIN_CHANNEL") if within else None
        param = {"local_size": size, "alpha": alpha, "beta": 0.75, "norm_region": region}
        return self.add(name, "LRN", bottom, lrn_param=param)

    def accuracy(self, name: str, scores: str, top_k: int = 1) -> None:
        only = {"include": {"phase": Word("TEST")}}
        if top_k > 1:
            only["accuracy_param"] = {"top_k": top_k}
        self.add(name, "Accuracy", [scores, "label"], **only)

    def classify(self, scores: str, *, top5: bool = False, loss: str = "loss", names: str = "accuracy") -> None:
        """What follows the class scores: accuracies and the loss, or probabilities in a deploy net."""
        if self.deploy:
            self.add("prob", "Softmax", scores)
            return
        self.accuracy(f"{names}/top1" if top5 else names, scores)
        if top5:
            self.accuracy(f"{names}/top5", scores, 5)
        self.add(loss, "SoftmaxWithLoss", [scores, "label"])
