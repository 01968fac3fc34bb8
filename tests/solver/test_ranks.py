"""Two ranks are one training: the same weights, masks, ranges and scores as one rank with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from caffejacinto_py.engine.ranks import ALONE, environment, join
from caffejacinto_py.errors import DataError, PrototxtError, UsageError
from caffejacinto_py.solver import nets, together
from caffejacinto_py.solver.reduce import cut
from tests.solver import ranks_worker as worker
from tests.solver.helpers import document, make_db, make_files, make_solver, params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run all scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.prepare(folder)
    out = folder / "out"
    out.mkdir()
    one = worker.solver(folder, "plain", None, f'snapshot_prefix: "{out}/one"')
    one.step(4)
    one.snapshot()
    one.close()
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "CAFFEJACINTO_RENDEZVOUS": f"file://{folder}/meeting",
        "OMP_NUM_THREADS": "1",
    }
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "tests.solver.ranks_worker", str(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    running = [subprocess.Popen(command, env={**env, "RANK": str(r)}, **pipes) for r in range(2)]
    said = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(said)[-4000:]
    return folder


def found(two: Path, rank: int) -> dict[str, Any]:
    return json.loads((two / "out" / f"found.{rank}.json").read_text())


def of_rank(two: Path, name: str, rank: int) -> dict[str, np.ndarray]:
    with np.load(two / "out" / f"{name}.{rank}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["plain", "iter_size", "sync_bn", "sparse", "quantized", "adam"])
def test_two_ranks_are_one(two: Path, name: str) -> None:
    """Losses of every iteration, scores of every test (3 batches on 2 ranks), weights, masks and ranges.

    Not the tests of a quantized net: its ranges move with every pass of a test, and two ranks need fewer.
    """
    run = worker.solver(two, name, None)
    worker.train(run, 8)
    run.close()
    want, got = worker.facts(run), of_rank(two, name, 0)
    assert sum(k.startswith("loss/") for k in want) == 10
    assert want.keys() == got.keys()
    in_tests = {"loss/0", "loss/5", *(k for k in want if k.startswith("testhook/"))}
    for key in want.keys() - (in_tests if name == "quantized" else set()):
        if key.startswith("mask/"):
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)
        else:
            np.testing.assert_allclose(got[key], want[key], rtol=2e-4, atol=2e-6, err_msg=key)
    if name == "sparse":
        assert any((m == 0).any() for k, m in got.items() if k.startswith("mask/"))
    if name == "quantized":
        assert "hook/ranges" in got


@pytest.mark.parametrize("name", list(worker.VARIANTS))
def test_ranks_agree_bit_for_bit(two: Path, name: str) -> None:
    """Weights, masks, ranges, losses; not the running statistics of BatchNorm, which are each rank's own."""
    a, b = of_rank(two, name, 0), of_rank(two, name, 1)
    own = {"bn/0", "bn/1"} if name == "bn" else set()
    for key in a.keys() - own:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    for key in own:
        assert not np.array_equal(a[key], b[key])


def test_statistics_per_rank_are_not_those_of_the_whole_batch(two: Path) -> None:
    whole, each = of_rank(two, "sync_bn", 0), of_rank(two, "bn", 0)
    assert not np.allclose(whole["bn/1"], each["bn/1"], rtol=1e-3)


def test_dropout_draws_differ_between_ranks(two: Path) -> None:
    """Were they the same, two ranks of one image each would drop the same places."""
    together.reseed(7, 3, ranks_of(0))
    a = torch.rand(100)
    together.reseed(7, 3, ranks_of(1))
    b = torch.rand(100)
    together.reseed(7, 3, ranks_of(0))
    assert not torch.equal(a, b)
    assert torch.equal(a, torch.rand(100))
    assert not np.array_equal(of_rank(two, "dropout", 0)["loss/1"], of_rank(two, "plain", 0)["loss/1"])


def ranks_of(rank: int) -> Any:
    from caffejacinto_py.engine.ranks import Ranks

    return Ranks(rank, 2)


def test_two_ranks_go_on_where_one_stopped(two: Path) -> None:
    whole = worker.solver(two, "plain", None)
    whole.step(8)
    for rank in range(2):
        got = of_rank(two, "resumed", rank)
        for key, want in params(whole).items():
            np.testing.assert_allclose(got[key], want, rtol=2e-4, atol=2e-6, err_msg=key)


def test_one_goes_on_where_two_ranks_stopped(two: Path) -> None:
    whole = worker.solver(two, "plain", None)
    whole.step(8)
    again = worker.solver(two, "plain", None)
    again.restore(two / "out" / "two_iter_4.solverstate")
    assert again.feed.positions() == {"data": 4}
    assert again.test_feeds[0].positions() == {"data": 1}  # not 2, though each rank has run a batch
    again.step(4)
    for key, want in params(whole).items():
        np.testing.assert_allclose(params(again)[key], want, rtol=2e-4, atol=2e-6, err_msg=key)


def test_a_request_that_reached_one_rank_stops_both(two: Path) -> None:
    first, second = (found(two, r)["stop"] for r in range(2))
    assert first == second
    assert first["stopped"]
    assert 4 <= first["iter"] <= 6
    assert (two / "out" / f"stop_iter_{first['iter']}.solverstate.extra").exists()


def test_a_bad_loss_of_one_rank_ends_both_with_its_cause(two: Path) -> None:
    for rank in range(2):
        error = found(two, rank)["bad_loss"]
        assert "iteration 0: the loss is nan; the first bad blob is the input 'data'" in error["error"]


def test_ranks_with_different_files(two: Path) -> None:
    for rank in range(2):
        error = found(two, rank)["refused"]
        assert error["kind"] == "DifferentError"
        assert "rank 1 and rank 0 do not train the same: the solver differs" in error["error"]
        other = found(two, rank)["other_options"]
        assert "do not train the same: --precision, --sync-bn differ" in other["error"]


def test_weights_that_left_each_other_are_noticed(two: Path) -> None:
    for rank in range(2):
        assert "have left those of rank" in found(two, rank)["left"]["error"]
    assert not list((two / "out").glob("left_iter*"))


# --- without other processes -----------------------------------------------------------------------------------------
def source(folder: Path, text: str = "") -> nets.NetSource:
    make_files(folder)
    path = folder / "net.prototxt"
    path.write_text(path.read_text().replace("batch_size: 4", text or "batch_size: 4"))
    doc = document(folder)

    def where(*path: str | int) -> Any:
        return doc.locs.find(path)

    return nets.train_source(doc.message, where, nets.NetFiles(where))


def test_a_batch_is_divided(tmp_path: Path) -> None:
    whole = source(tmp_path)
    part = nets.divide(whole, 2)
    assert [p.data_param.batch_size for p in part.doc.message.layer[:2]] == [2, 3]  # the TEST layer keeps its batch
    assert whole.doc.message.layer[0].data_param.batch_size == 4
    assert nets.divide(whole, 1) is whole


def test_a_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(PrototxtError, match="a batch of 5 cannot be divided among 2 ranks") as error:
        nets.divide(source(tmp_path, "batch_size: 5"), 2)
    assert error.value.loc is not None
    assert (Path(error.value.loc.file).name, error.value.loc.line) == ("net.prototxt", 5)
    assert "--dialect bvlc" in str(error.value.hint)


def test_more_ranks_than_records(tmp_path: Path) -> None:
    from caffejacinto_py.data.order import Share

    make_db(tmp_path / "db", count=3)
    (tmp_path / "net.prototxt").write_text(worker_net(tmp_path))
    run = make_solver(tmp_path)
    run.feed.share = Share(0, 4, 4)
    with pytest.raises(DataError, match="layer 'data': 3 records cannot be dealt out to 4 ranks"):
        run.step(1)
    run.close()


def worker_net(folder: Path) -> str:
    from tests.solver.helpers import NET

    return NET.format(folder=folder)


@pytest.mark.parametrize(
    ("saved", "then", "now", "want"),
    [
        ({"a": 10}, {}, {"a": 8}, {"a": 10}),  # a state from before there were ranks
        ({"a": 10}, {"a": 8}, {"a": 8}, {"a": 10}),
        ({"a": 10}, {"a": 8}, {"a": 16}, {"a": 5}),
        ({"a": 10}, {"a": 8}, {"a": 24}, {"a": 4}),  # 80 records: at the next whole batch
    ],
)
def test_positions_count_records(
    saved: dict[str, int], then: dict[str, int], now: dict[str, int], want: dict[str, int], caplog: Any
) -> None:
    assert together.positions(saved, then, now) == want
    assert ("16 records are skipped" in caplog.text) == (now == {"a": 24})


def test_buckets() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (10, 50, 30, 10)]
    assert [[p.numel() for p in b.params] for b in cut(params, 2)] == [[10, 30, 50], [10]]
    assert [[p.numel() for p in b.params] for b in cut(params, 0)] == [[10], [30], [50], [10]]
    assert [[p.numel() for p in b.params] for b in cut(params, 1)] == [[10, 30, 50, 10]]
    mixed = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    assert len(cut(mixed, 1)) == 2


def test_alone_says_nothing_to_anybody() -> None:
    assert ALONE.gather(3) == [3]
    assert ALONE.share("x") == "x"
    assert ALONE.ask(2)() == 2
    tensor = torch.ones(2)
    assert torch.equal(ALONE.least(ALONE.sum(tensor)), torch.ones(2))


def test_environment() -> None:
    assert environment({}) is None
    assert environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == (1, 4, 0)
    with pytest.raises(UsageError, match="RANK='x'"):
        environment({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="RANK=2 does not fit WORLD_SIZE=2"):
        environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_an_environment_that_lacks_the_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "CAFFEJACINTO_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="lacks MASTER_ADDR, MASTER_PORT"):
        join(0, 2)
