"""actome: a laboratory for the activations of neural networks.

Three verbs at named sites of any model: `record` brings tensors out, `measure` folds a stream of them into small
statistics, `clamp` changes them on their way through.

    import actome as ac

    model = ac.demo()                                   # or ac.load("path/or/hub-id"), or ac.wrap(any_module)
    recording = model.record("The cat sat on", "blocks.*.resid.post")
    table = model.measure("The cat sat on", ac.measures.PANELS["health"])
    with model.clamp(ac.Scale("blocks.1.mlp.out", 0.0)):
        print(model.generate("def main(", max_new_tokens=20))

Names are imported when they are first used, so `import actome` loads neither torch nor transformers.
"""

# ruff: noqa: F401 - what is imported for type checkers is given out by __getattr__

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. The imports below say the same to type checkers and editors.
_HOMES = {
    "actome.core.model": ("Model",),
    "actome.core.load": ("load", "wrap"),
    "actome.core.clamp": ("Clamp", "When"),
    "actome.core.generate": ("Generation",),
    "actome.core.recording": ("Recording",),
    "actome.core.text": ("Text",),
    "actome.core.measure": ("Measure",),
    "actome.core.sites": ("Site",),
    "actome.core.errors": (
        "ActomeError",
        "ClampError",
        "LoadError",
        "MeasureError",
        "RecordingError",
        "RunError",
        "SiteError",
        "TextError",
    ),
    "actome.clamps": ("Ablate", "Add", "Clip", "Mask", "Patch", "Project", "Scale", "Set", "TopK"),
    "actome.tasks.demo": ("demo",),
    "actome.dynamics.watching": ("Watch", "watch"),
    "actome.dynamics.tracing": ("trace",),
    "actome.dynamics.trace_table": ("Trace",),
    "actome.report.scan": ("Scan", "scan"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = ("clamps", "core", "dynamics", "measures", "papers", "report", "steer", "tasks", "tune")

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from actome import clamps, core, dynamics, measures, papers, report, steer, tasks, tune
    from actome.clamps import Ablate, Add, Clip, Mask, Patch, Project, Scale, Set, TopK
    from actome.core.clamp import Clamp, When
    from actome.core.errors import (
        ActomeError,
        ClampError,
        LoadError,
        MeasureError,
        RecordingError,
        RunError,
        SiteError,
        TextError,
    )
    from actome.core.generate import Generation
    from actome.core.load import load, wrap
    from actome.core.measure import Measure
    from actome.core.model import Model
    from actome.core.recording import Recording
    from actome.core.sites import Site
    from actome.core.text import Text
    from actome.dynamics.trace_table import Trace
    from actome.dynamics.tracing import trace
    from actome.dynamics.watching import Watch, watch
    from actome.report.scan import Scan, scan
    from actome.tasks.demo import demo


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"actome.{name}")
    else:
        import difflib

        close = difflib.get_close_matches(name, [*__all__, *_PACKAGES])
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise AttributeError(f"module 'actome' has no attribute {name!r}{hint}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
