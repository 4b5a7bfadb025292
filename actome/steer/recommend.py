"""Recommend: the smallest strength that gives most of what can be had, and where, from a dose-response."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .lab import HARM

if TYPE_CHECKING:
    import pandas as pd

# Rises of nats a token and of repeated n-grams, falls of accuracy and of log-odds that either response is given, beyond
# which a model has come apart.
COLLAPSE = {"nll": 1.0, "repetition": 0.5, "accuracy": 0.5, "utility": 5.0}
LEAST = 0.1  # nats of preference below which an effect is none
_PLACE = ["site", "positions", "strength"]


class Advice(NamedTuple):
    """Where and how strongly to steer, or None three times; and why."""

    site: str | None
    positions: str | None
    strength: float | None
    why: str


def recommend(frame: pd.DataFrame, allowed: float) -> Advice:
    """The smallest strength that gives most of what can be had without more damage than is allowed."""
    wide = _wide(frame[frame["arm"] == "fitted"])
    bare = wide[wide["strength"] == 0.0].iloc[0]
    fit = (wide["strength"] > 0) & wide["preference"].notna()
    for name, sign in HARM.items():
        if name in wide:
            fit &= ~(sign * (wide[name] - bare[name]) > allowed)
    usable = wide[fit]
    harms = ", ".join(name for name in HARM if name in wide) or "nothing"
    if not wide.loc[wide["strength"] > 0, "preference"].notna().any() and (wide["strength"] > 0).any():
        return _nothing("no strength leaves a finite preference; look whether the clamp's value and scale are finite")
    if usable.empty:
        return Advice(None, None, None, f"every strength does more damage than {allowed:g} ({harms})")
    gain = usable["preference"] - bare["preference"]
    if not gain.max() >= LEAST:
        return _nothing(f"no strength within the allowed damage raises preference by {LEAST} nats ({gain.max():.2g})")
    chance = _wide(frame[frame["arm"] != "fitted"], ["arm", "draw"])
    enough = usable.assign(gain=gain)[gain >= 0.9 * gain.max()]
    best = enough.sort_values(["strength", "gain"], ascending=[True, False]).iloc[0]
    got = best["preference"] - bare["preference"]
    # Of controls anywhere: the best of several places is better than the controls of one of them by chance alone.
    there = chance[chance["strength"] == best["strength"]]
    beside = "; no control was looked at"
    if len(there):
        other = there["preference"].max() - bare["preference"]
        if other >= got:
            return _nothing(f"controls raise preference as much ({other:.2f} of {got:.2f} nats)")
        beside = f"; the best control moves it by {other:+.2f}"
    costs = [f"{name} {best[name] - bare[name]:+.3f}" for name in HARM if name in wide]
    cost = f" ({', '.join(costs)})" if costs else ""
    why = f"preference {got:+.2f} nats{cost}: 90 % of what can be had with damage up to {allowed:g}{beside}"
    return Advice(str(best["site"]), str(best["positions"]), float(best["strength"]), why)


def collapsed(frame: pd.DataFrame) -> pd.DataFrame:
    """Where the model comes apart under the fitted clamp: site, positions, strength, and how far each figure moved."""
    wide = _wide(frame[frame["arm"] == "fitted"])
    bare = wide[wide["strength"] == 0.0].iloc[0]
    known = [name for name in COLLAPSE if name in wide]
    moved = wide[known].sub(bare[known]).astype(float)
    # What is not finite has come apart as well.
    harm = moved.mul([HARM.get(name, -1) for name in known]).fillna(float("inf"))
    broken = (harm > [COLLAPSE[name] for name in known]).any(axis=1)
    return wide[_PLACE].assign(**{name: moved[name] for name in known})[broken].reset_index(drop=True)


def _nothing(why: str) -> Advice:
    return Advice(None, None, None, why)


def _wide(frame: pd.DataFrame, more: list[str] | None = None) -> pd.DataFrame:
    """One row a strength, one column a measure."""
    index = [*(more or []), *_PLACE]
    return frame.pivot(index=index, columns="measure", values="value").reset_index()
