"""Teacher: blobs of a frozen net, as data of the net that learns from it."""

from __future__ import annotations

from collections.abc import Sequence

from caffejacinto_py.layers.base import Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.layers.source import Source


@layer("Teacher", bottoms=(0, 0), tops=(1, None), field="teacher_param", forks="caffejacinto")
class Teacher(Source):
    """Blobs that a teacher makes of the batch that has just been read: `teacher { ... }` in the solver, a frozen net.

    Tops: one for each blob, with the blob's shape in the teacher. They get no gradient. teacher_param: teacher (its
    name in the solver; may be left out where there is one only); blob, one a top (by default the tops' names, without
    a leading "TEACHER/": top "teacher/ip2" is blob "ip2"). Stands behind the data layers. A net for testing needs none:
    `include { phase: TRAIN }`. How the teacher runs: docs/distillation.md. Source: ours.
    """

    source = "teacher"

    def check(self) -> None:
        n = len(self.param.blob)
        if n not in (0, self.ntop):
            text = f"{n} blobs for {self.ntop} tops: name one for each top, or none"
            raise self.fail(text, "teacher_param", "blob", 0)

    def assumed(self, ntop: int) -> list[Shape | None]:
        self.check()
        return [None] * ntop

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.check()
        if self.context.teacher is None:
            hint = 'in training: teacher { net: "..." weights: "..." } in the solver, or --teacher NET,WEIGHTS; '
            raise self.fail(
                "reads a teacher, and there is none",
                hint=hint + "elsewhere leave the layer out: include { phase: TRAIN }",
            )
        return list(self.context.teacher(self))

    def read(self) -> tuple[str | None, tuple[str, ...]]:
        """(name of the teacher or None, its blobs top by top)."""
        name = self.param.teacher or None
        return name, tuple(self.param.blob) or tuple(_blob(top, name) for top in self.proto.top)


def _blob(top: str, name: str | None) -> str:
    first, slash, rest = top.partition("/")
    return rest if slash and name in (None, first) else top
