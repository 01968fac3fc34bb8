"""A training that runs layers again is the training that does not, bit for bit: also where something counts what it
sees, draws random numbers, or looks at weights between iterations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from caffejacinto_py.compress import quantize
from caffejacinto_py.engine.memory.schedule import Again, Schedule
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.weights import write_model
from caffejacinto_py.solver import Solver
from tests.engine.test_memory import NET, NVCAFFE, conv, score, tight

SOLVER = "base_lr: 0.01 momentum: 0.9 lr_policy: 'fixed' max_iter: 40 random_seed: 3 snapshot_prefix: 's' "
SIMULATED = NVCAFFE + "quantize: true net_quantization_param { quantization_start: 2 %s }"
SPARSE = """sparse_mode: SPARSE_UPDATE sparsity_target: 0.5 sparsity_start_factor: 0.5 sparsity_step_factor: 0.1
  sparsity_step_iter: 3 sparsity_threshold_maxratio: 1 sparsity_threshold_value_max: 9 iter_size: 2"""
RECURRENT = (
    """name: "recurrent"
layer { name: "data" type: "DummyData" top: "data" top: "label" top: "cont" dummy_data_param {
  shape { dim: 12 dim: 3 dim: 8 dim: 8 } shape { dim: 12 } shape { dim: 4 dim: 3 } data_filler { type: "gaussian" }
  data_filler { type: "uniform" min: 0 max: 4.9 } data_filler { type: "constant" value: 1 } } }"""
    + conv("a", "data")
    + conv("b", "a")
    + """
layer { name: "ip" type: "InnerProduct" bottom: "b" top: "ip"
  inner_product_param { num_output: 16 weight_filler { type: "xavier" } } }
layer { name: "drop" type: "Dropout" bottom: "ip" top: "ip" }
layer { name: "time" type: "Reshape" bottom: "ip" top: "time" reshape_param { shape { dim: 4 dim: 3 dim: 16 } } }
layer { name: "lstm" type: "TYPE" bottom: "time" bottom: "cont" top: "lstm"
  recurrent_param { num_output: 8 weight_filler { type: "xavier" } } }
layer { name: "flat" type: "Reshape" bottom: "lstm" top: "flat" reshape_param { shape { dim: 12 dim: 8 } } }
layer { name: "tanh" type: "TanH" bottom: "flat" top: "tanh" }
layer { name: "drop2" type: "Dropout" bottom: "tanh" top: "drop2" }"""
    + score("fc", "drop2")
)
STUDENT = (
    NET
    + """
layer { name: "t" type: "Teacher" top: "teacher/fc" top: "teacher/pool" }
layer { name: "soft" type: "DistillSoftmaxLoss" bottom: "fc" bottom: "teacher/fc" top: "soft" }
layer { name: "hint" type: "FeatureHintLoss" bottom: "pool" bottom: "teacher/pool" top: "hint" loss_weight: 0.1 }
layer { name: "look" type: "AttentionTransferLoss" bottom: "pool" bottom: "teacher/pool" top: "look" }"""
)
HALF = "default_forward_type: FLOAT16 default_backward_type: FLOAT16 global_grad_scale_adaptive: true "
CASES: dict[str, tuple[str, str]] = {
    "ranges": (SIMULATED % "", ""),
    "stochastic rounding": (SIMULATED % "rounding_scheme: STOCHASTIC per_channel_weights: true", "iter_size: 2"),
    "sparsity": (NET, SPARSE),
    "sparsity in a simulation": (SIMULATED % "", SPARSE),
    "lstm": (RECURRENT.replace("TYPE", "LSTM"), ""),
    "rnn": (RECURRENT.replace("TYPE", "RNN"), ""),
    "distillation": (STUDENT, "teacher { net: 'teacher.prototxt' weights: 'teacher.caffemodel' }"),
    "loss scaling": (HALF + NVCAFFE, ""),
}


def nested(schedule: Schedule) -> bool:
    """Whether something that runs again runs a part of it again."""
    found = [item for item in schedule if isinstance(item, Again)]
    return any(isinstance(inner, Again) for item in found for inner in item.inner)


def everything(net: str, fields: str, plan: Callable[[Solver], None]) -> list[Any]:
    """All that 6 iterations leave behind: gradients of each, then the rest."""
    message = parse(SOLVER + fields, "SolverParameter").message
    message.net_param.CopyFrom(parse(net, "NetParameter").message)
    s = Solver(message, device="cpu")
    plan(s)
    found: list[Any] = []
    for _ in range(6):
        s.step(1)
        found += [b.param.grad.clone() for b in s.net.learnable if b.param.grad is not None]
    model, state = s.snapshot()
    files = sorted(p for p in Path().glob("s_iter_6*"))
    assert {Path(model), Path(state)} <= set(files)
    hook = quantize.find(s.net)
    ranges = {} if hook is None else hook.state()
    found += [torch.from_numpy(ranges[key].reshape(-1).copy()) for key in sorted(ranges)]
    found += [*(s.sparse.masks or ()), torch.tensor(s.sparse.factor), torch.tensor(s.losses.values())]
    found += [*s.net.parameters(), *s.net.buffers(), torch.get_rng_state()]
    found += [torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in files]
    s.close()
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    net, fields = CASES[name]
    monkeypatch.setattr("caffejacinto_py.engine.precision.missing", lambda kind, device: None)
    schedules: list[Schedule] = []

    def planned(s: Solver) -> None:
        made = tight(s.net, 0.0)
        assert made.cost.forwards > len(made.chain)
        schedules.append(made.schedule)

    found = []
    for folder, plan in (("plain", lambda s: None), ("planned", planned)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if "teacher" in fields:
            graph = prepare(parse(NET, "NetParameter").message, phase="TEST")
            write_model("teacher.caffemodel", Net(graph, seed=9).model())
            Path("teacher.prototxt").write_text(NET)
        found.append(everything(net, fields, plan))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert nested(schedules[0])
