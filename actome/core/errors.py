"""What can go wrong, said so that the reader can act: what was asked, what was found, the nearest thing there is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class ActomeError(Exception):
    """Base of every error that actome raises on purpose; the command line prints its message and exits with 1."""


class SiteError(ActomeError, LookupError):
    """A site, layer, head, unit or pattern that the model does not have."""


class ClampError(ActomeError, RuntimeError):
    """A clamp that never fired, changed a shape, or does not fit the site that it names."""


class LoadError(ActomeError, RuntimeError):
    """A model that could not be loaded: no model there, truncated weights, pickled weights, remote code."""


class TextError(ActomeError, ValueError):
    """Text that cannot be used: empty, of another encoding, longer than asked for, or without a tokenizer."""


class RecordingError(ActomeError, RuntimeError):
    """A recording that cannot be read, written, appended to or resumed."""


class RunError(ActomeError, RuntimeError):
    """A run store that cannot be read, written, resumed, merged or recovered."""


class MeasureError(ActomeError, ValueError):
    """A measure that does not fit its site, or that was given too little to say anything."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The clause that names the existing things most like `name`, or nothing when there are none.

    >>> nearest("blocks.0.resid.pots", ["blocks.0.resid.pre", "blocks.0.resid.post"])
    '; nearest: blocks.0.resid.post, blocks.0.resid.pre'
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def nearest_beside(path: Path) -> str:
    """The same clause for a path that is not there: what lies in its folder under the names most like its own."""
    try:
        return nearest(path.name, sorted(os.listdir(path.parent)))
    except OSError:
        return ""
