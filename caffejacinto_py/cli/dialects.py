"""Verbs that rewrite a net with another fork's layers: what its reader must be told."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caffejacinto_py.schema.dialect import Dialect


def must_say_dialect(message: Any, before: Dialect, log: logging.Logger) -> bool:
    """Fields of another fork make a rewritten net look like one of that fork: say so where that changes numbers."""
    from caffejacinto_py.schema.compat import Compat
    from caffejacinto_py.schema.dialect import resolve_dialect

    def numbers(dialect: Dialect) -> Dialect:
        return replace(dialect, name="", reason="", compat=Compat())

    after = resolve_dialect(message)
    if numbers(before) == numbers(after):
        return False
    log.warning("The new net looks like one of %s: use it with --dialect %s.", after.name, before.name)
    return True
