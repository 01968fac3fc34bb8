"""What a training shows of itself: the lines and records of iterations, of the end, and of a loss that is no number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from caffejacinto_py.engine.evaluate import summarize
from caffejacinto_py.engine.net import Net, Result
from caffejacinto_py.engine.ranks import Ranks
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.solver import lr, watch
from caffejacinto_py.solver.logs import number, output_lines

if TYPE_CHECKING:
    from caffejacinto_py.engine.evaluate import Score
    from caffejacinto_py.solver.feed import Feed
    from caffejacinto_py.solver.metrics import Metrics
    from caffejacinto_py.solver.progress import Clock, Losses

log = logging.getLogger(__name__)
LOOK_EVERY = 20  # iterations between looks at the loss on a GPU, where each look waits for the device


class Display:
    """The part of `Solver` that shows what happens."""

    param: Any
    net: Net
    test_nets: list[Net]
    feed: Feed
    ranks: Ranks
    iter: int
    current_step: int
    stopped: bool
    on_nan: str
    device: torch.device
    dialect: Dialect
    losses: Losses
    clock: Clock
    metrics: Metrics
    loss_weights: dict[str, float]

    if TYPE_CHECKING:

        def test_all(self) -> list[Score]: ...

    def _look(self, display: bool) -> None:
        """Stop or warn at a loss that is no number. On a GPU only now and then: a look waits for the device."""
        if not display and self.device.type != "cpu" and self.iter % LOOK_EVERY:
            return
        bad = self.losses.first_bad()
        if bad is None:
            return
        iteration, value = bad
        text = f"iteration {iteration}: the loss is {value}"
        if iteration < self.iter - 1:
            text += f" (noticed at iteration {self.iter}, the weights have been updated since)"
        if self.on_nan == "warn":
            log.warning("%s; training goes on", text)
            return
        hint = "lower base_lr, use clip_gradients, or check the data; --on-nan warn goes on all the same"
        found = self.ranks.gather(watch.first_bad(self.net, self.feed.last))
        cause = next((where for where in found if where != watch.NOTHING_BAD), watch.NOTHING_BAD)
        raise CaffeError(f"{text}; {cause}", hint=hint)

    def _display(self, result: Result) -> None:
        seconds, iterations = self.clock.lap()
        loss = self.losses.smoothed()
        speed = (
            f"{number(iterations / seconds if seconds else 0)} iter/s, {number(seconds)}s/{self.param.display} iters"
        )
        log.info("Iteration %d (%s), loss = %s", self.iter, speed, number(loss))
        mine = {name: [value.detach().reshape(-1).cpu()] for name, value in result.outputs.items()}
        everybody = self.ranks.gather(mine)
        outputs = summarize(
            {name: [row for rows in everybody for row in rows[name]] for name in mine}, self.loss_weights
        )
        for line in output_lines("Train", outputs):
            log.info("%s", line)
        rate = lr.learning_rate(self.param, self.iter, step=self.current_step, dialect=self.dialect)
        self.metrics.record("train", self.iter, {"loss": loss, "lr": rate, **named(outputs)})

    def _finish(self) -> None:
        """What Caffe does after the last iteration: a last loss, a last test."""
        param = self.param
        if self.stopped:
            log.info("Optimization stopped early.")
            return
        if param.display and self.iter % param.display == 0:
            with torch.no_grad():
                loss = self.ranks.sum(self.net(self.feed.next()).loss.clone()) / self.ranks.world
            self.losses.add(self.iter, loss)
            log.info("Iteration %d, loss = %s", self.iter, number(self.losses.smoothed()))
        if self.test_nets and param.test_interval and self.iter % param.test_interval == 0:
            self.test_all()
        log.info("Optimization Done.")

    def _summary(self, total: float) -> None:
        clock = self.clock
        clock.stop()
        if not clock.iterations:
            return
        speed = clock.images / clock.seconds if clock.seconds else 0.0
        text = (
            "Performance: %.1f img/s (%d iterations, %d images in %.2f s of training; %.2f s with tests and snapshots)"
        )
        log.info(text, speed, clock.iterations, clock.images, clock.seconds, total)
        values = {"img_per_s": speed, "iterations": clock.iterations, "seconds": clock.seconds, "total_seconds": total}
        self.metrics.record("end", self.iter, values)


def named(outputs: Sequence[Any]) -> dict[str, Any]:
    """Outputs for a record: name -> value, or name[k] where a blob has several elements."""
    names = [o.name for o in outputs]
    found: dict[str, Any] = {}
    for out in outputs:
        several = names.count(out.name) > 1
        key = f"{out.name}[{sum(k.startswith(out.name + '[') for k in found)}]" if several else out.name
        found[key] = out.value
    return found
