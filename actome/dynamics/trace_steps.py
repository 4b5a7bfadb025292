"""Steps: at which training step a checkpoint was saved, as its name or its trainer says."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from actome.core.errors import LoadError

_STATE = "trainer_state.json"  # which transformers' Trainer leaves in every checkpoint
_THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000}
# The word that says it, most telling first: "stage1-step1000-tokens5B" and "epoch=3-step=1200" mean the step.
_WORDS = ("global[_-]?step", "steps?", "checkpoint", "ckpt", "iter(?:ation)?s?")
_NAMED = [re.compile(rf"(?<![a-z]){word}[-_=.]?(\d+)([km]?)(?![a-z0-9])", re.IGNORECASE) for word in _WORDS]


def step_of(name: str) -> int | None:
    """The training step that a name gives, or None.

    A number behind ``global_step``, ``step``, ``checkpoint``, ``ckpt`` or ``iter``, with ``-``, ``_``, ``=`` or nothing
    between (``k`` and ``M`` behind it multiply); or a name that is nothing but a number.

    >>> [step_of(name) for name in ("checkpoint-500", "step1000", "global_step_20", "epoch=3-step=1200", "0042")]
    [500, 1000, 20, 1200, 42]
    >>> step_of("stage1-step10k-tokens21B"), step_of("main"), step_of("v2.0")
    (10000, None, None)
    """
    if name.isdecimal():
        return int(name)
    for pattern in _NAMED:
        if found := pattern.search(name):
            return int(found[1]) * _THOUSANDS[found[2].lower()]
    return None


def step_of_folder(folder: Path) -> int | None:
    """The step of a checkpoint's folder: what its trainer wrote down, else what its name says.

    Raises:
        LoadError: the two differ.
    """
    named, told = step_of(folder.name), None
    # Where it is not of a Trainer, or damaged, the name is left.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = int(json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"])
    if named is not None and told is not None and named != told:
        raise LoadError(
            f"{folder} is step {named} by its name and step {told} by its {_STATE}; rename it, or give a list of "
            "(step, path)"
        )
    return named if told is None else told


def chosen(there: Iterable[int], wanted: Iterable[int] | None, label: str) -> tuple[list[int], dict[int, str]]:
    """The steps to go through in order, and for each that is wanted and not there the reason.

    >>> chosen([0, 10, 20], [10, 15], "runs/a")
    ([10], {15: 'runs/a has no checkpoint of step 15; nearest: 10, 20'})
    """
    known = sorted(there)
    if wanted is None:
        return known, {}
    missing = {}
    for step in sorted({int(one) for one in wanted}):
        if step not in known:
            close = sorted(known, key=lambda one: (abs(one - step), one))[:2]
            beside = ", ".join(map(str, sorted(close))) or "none"
            missing[step] = f"{label} has no checkpoint of step {step}; nearest: {beside}"
    return [step for step in known if step in {int(one) for one in wanted}], missing
