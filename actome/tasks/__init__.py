"""Subjects: data with known ground truth, one small configurable transformer, its training, and the demo model.

Names are imported when they are first used: generators need no transformers.
"""

# ruff: noqa: F401 - what is imported for type checkers is given out by __getattr__

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Where each public name lives; generators and the demo model are imported from their own modules.
_HOMES = {
    "actome.tasks.cache": ("cached",),
    "actome.tasks.losses": ("TrainingError", "next_token_loss", "target_loss"),
    "actome.tasks.subject": ("Subject", "SubjectConfig"),
    "actome.tasks.training": ("Training", "log_spaced", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from actome.tasks.cache import cached
    from actome.tasks.losses import TrainingError, next_token_loss, target_loss
    from actome.tasks.subject import Subject, SubjectConfig
    from actome.tasks.training import Training, log_spaced, train


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'actome.tasks' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
