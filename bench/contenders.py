"""What bench/train.py times: a net of models/ through our engine, and its hand-written rival with torch.optim.SGD."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rivals
import torch
from torch import Tensor, nn

from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.solver import Solver, rules
from caffejacinto_py.solver.feed import Feed

MODELS = Path(__file__).resolve().parents[1] / "models"
LR, MOMENTUM, DECAY, SEED = 0.001, 0.9, 0.0005, 1


@dataclass(frozen=True)
class Case:
    """A net of models/, its input (C, H, W), the range of its input values, and its rival."""

    folder: str
    shape: tuple[int, int, int]
    low: float
    high: float
    classes: int
    rival: type[nn.Module]


CASES = {
    "lenet": Case("lenet", (1, 28, 28), 0, 1, 10, rivals.LeNet),
    "cifar10_quick": Case("cifar10_quick", (3, 32, 32), -128, 127, 10, rivals.Cifar10Quick),
    "jacintonet11v2": Case("jacintonet11v2_cifar10", (3, 32, 32), 0, 255, 10, rivals.JacintoNet11),
    "alexnet": Case("alexnet", (3, 227, 227), -128, 127, 1000, rivals.AlexNet),
    "resnet50": Case("resnet50", (3, 224, 224), -128, 127, 1000, rivals.ResNet50),
}


def make_inputs(case: Case, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    data = torch.rand(batch, *case.shape, generator=draw) * (case.high - case.low) + case.low
    label = torch.randint(case.classes, (batch,), generator=draw)
    return data.to(device, dtype), label.to(device)


def our_message(case: Case, batch: int, *, dropout: bool) -> Any:
    """The net of models/ with its TRAIN data layer replaced by an input of this batch size.

    dropout False: without its Dropout layers (they work in place, so nothing else changes).
    """
    message = load_net(str(MODELS / case.folder / "train_val.prototxt")).message
    kept = [x for x in message.layer if not x.HasField("data_param") and (dropout or not x.HasField("dropout_param"))]
    net = pb.NetParameter(name=message.name)
    source = net.layer.add(name="input", type="Input", top=["data", "label"])
    source.input_param.shape.add(dim=[batch, *case.shape])
    source.input_param.shape.add(dim=[batch])
    net.layer.extend(kept)
    return net


def our_net(case: Case, batch: int, device: str, dtype: torch.dtype, *, dropout: bool) -> Net:
    graph = prepare(our_message(case, batch, dropout=dropout), phase="TRAIN")
    return Net(graph, device=device, dtype=dtype, seed=SEED)


class Fixed(Feed):
    """A feed that gives the same tensors for ever."""

    inputs: dict[str, Tensor]

    def next(self) -> dict[str, Tensor]:
        self.last = self.inputs
        return self.inputs


class Ours:
    """Our Solver, as `caffejacinto train` runs it, but for the data, which is always the same."""

    def __init__(self, case: Case, data: Tensor, label: Tensor, *, dropout: bool = True) -> None:
        batch = len(label)
        message = pb.SolverParameter(base_lr=LR, lr_policy="fixed", momentum=MOMENTUM, weight_decay=DECAY)
        message.net_param.CopyFrom(our_message(case, batch, dropout=dropout))
        message.max_iter, message.random_seed = 1 << 30, SEED
        self.solver = Solver(message, device=data.device)
        self.net = self.solver.net
        self.solver.feed = feed = Fixed(self.net, seed=SEED)
        feed.inputs = {"data": data, "label": label}

    def steps(self, count: int) -> None:
        self.solver.step(count)

    def loss(self) -> float:
        """The loss of one more step."""
        self.solver.step(1)
        return self.solver.losses.smoothed()


class Exact:
    """Our net and update rule in float64, to compare with."""

    def __init__(self, case: Case, data: Tensor, label: Tensor) -> None:
        self.net = our_net(case, len(label), str(data.device), data.dtype, dropout=False)
        self.rule = rules.make(self.net.learnable, pb.SolverParameter(type="SGD"))
        self.inputs = {"data": data, "label": label}

    def loss(self) -> float:
        loss = self.net(self.inputs).loss
        loss.backward()
        self.rule.step(rules.Rates(LR, MOMENTUM, DECAY, 0))
        for blob in self.net.learnable:
            blob.param.grad = None
        return float(loss.detach())


class Eager:
    """The hand-written net with torch.optim.SGD, one parameter group per (lr_mult, decay_mult), from our weights."""

    def __init__(
        self,
        case: Case,
        net: Net,
        data: Tensor,
        label: Tensor,
        *,
        channels_last: bool,
        dropout: bool = True,
        fused: bool = False,
    ) -> None:
        self.data, self.label = data, label
        self.model = case.rival().to(data.device, data.dtype)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        blobs = self.model.blobs()
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for blob in net.learnable:
            if blob.lr_mult == 0:
                continue
            mine = blobs.pop((blob.node, blob.index))
            with torch.no_grad():
                mine.copy_(blob.param.reshape(mine.shape))
            groups.setdefault((blob.lr_mult, blob.decay_mult), []).append(mine)
        if blobs:
            raise SystemExit(f"the rival has blobs that the net has not: {list(blobs)}")
        if not dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.model = self.model.to(memory_format=self.layout)
        options = [{"params": p, "lr": LR * lr, "weight_decay": DECAY * wd} for (lr, wd), p in groups.items()]
        self.optimizer = torch.optim.SGD(options, lr=LR, momentum=MOMENTUM, **({"fused": True} if fused else {}))

    def step(self) -> Tensor:
        data = self.data.contiguous(memory_format=self.layout)
        self.optimizer.zero_grad()
        loss = self.model(data, self.label)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def loss(self) -> float:
        return float(self.step())


def verify(name: str, device: str) -> None:
    """Both sides give the same losses over three steps from the same weights: to 1e-9 in float64, to 1e-3 in float32.

    In float32 rounding grows from step to step (ResNet-50 at batch 4: the two layouts of the rival differ by 3% in
    the third loss), so ten times the rivals' own difference is allowed as well.
    """
    case = CASES[name]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        inputs = make_inputs(case, 4, device, dtype)
        ours = Exact(case, *inputs) if dtype == torch.float64 else Ours(case, *inputs, dropout=False)
        sides = [Eager(case, ours.net, *inputs, channels_last=last, dropout=False) for last in (False, True)]
        for step in range(3):
            want, found = ours.loss(), [side.loss() for side in sides]
            allowed = tolerance * abs(want) + 10 * abs(found[0] - found[1])
            if not max(abs(want - x) for x in found) <= allowed:
                raise SystemExit(f"{name}: step {step}, {dtype}: our loss is {want!r}, the rivals' are {found}")


def contender(kind: str, name: str, batch: int, device: str, *, fused: bool) -> Callable[[int], float]:
    """ "ours", "nchw" or "channels_last", warm: a function of a number of steps that returns seconds per step."""
    case = CASES[name]
    inputs = make_inputs(case, batch, device, torch.float32)
    side: Ours | Eager
    if kind == "ours":
        side = Ours(case, *inputs)
    else:
        net = our_net(case, batch, device, torch.float32, dropout=True)
        side = Eager(case, net, *inputs, channels_last=kind == "channels_last", fused=fused)
        del net
    side.steps(3)

    def timed(steps: int) -> float:
        _wait(device)
        start = time.perf_counter()
        side.steps(steps)
        _wait(device)
        return (time.perf_counter() - start) / steps

    return timed


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
