"""Values that are not finite: where in the forward or backward they began, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from .base import Alarm, Detector, Reading
from .places import in_forward_order

_ACTIVATIONS = ("non_finite", "non_finite_tokens")
_GRADIENTS = ("grad_norm",)
_WEIGHTS = ("weight_norm", "weight_movement", "update_norm", "update_ratio")
_LOSSES = ("loss", "train_loss", "loss_seen", "loss_heldout")
_SCALED = 3  # steps in a row at which a gradient overflows although the loss scale was lowered after each


class NonFinite(Detector):
    """NaN or infinite activations, gradients, weights or loss, and the site where they began.

    The first cause that is seen at a step names the place: among activations the first site of the forward; without
    those, among gradients the last component of the forward, for the backward passes there first; then the first
    component of weights. What follows from it at later steps is not told again: after one update everything is NaN, and
    no site tells anything. A masked or unread activation may be NaN for long before the loss shows it.

    Under a loss scale (float16; a reading ``loss_scale``) gradients overflow in a healthy training now and then: alone
    they are told as ``info`` until they have done so three times in a row.

    Args:
        order: the names of all sites in forward order, for models whose sites do not say it.

    Delay: the sample at which the value is in a tensor that is measured.
    """

    name: ClassVar[str] = "non_finite"
    needs: ClassVar[tuple[str, ...]] = (*_ACTIVATIONS, *_GRADIENTS, *_WEIGHTS, *_LOSSES, "loss_scale")

    def __init__(self, order: Sequence[str] = ()):
        self.order = tuple(order)
        self._first: Alarm | None = None
        self._scaled: int | None = None  # since which step a loss scale has been seen
        self._overflows: list[int] = []

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        bad: dict[str, list[str | None]] = {"activations": [], "gradients": [], "weights": [], "loss": []}
        for one in readings:
            if one.measure == "loss_scale":
                self._scaled = step if self._scaled is None else self._scaled
            elif one.measure in _ACTIVATIONS:
                if one.value != 0:  # NaN counts
                    bad["activations"].append(one.site)
            elif not math.isfinite(one.value):
                kind = "gradients" if one.measure in _GRADIENTS else "weights" if one.measure in _WEIGHTS else "loss"
                bad[kind].append(one.site)
        if not any(bad.values()):
            # Without activations at this step one cannot tell that they are well again.
            first, looked = self._first, {one.measure for one in readings}
            if first is not None and not looked & _kind_of(first):
                return None
            if "grad_norm" in looked:
                self._overflows = []
            self._first = None
            return []
        place = self._place(bad, [one.site for one in readings if one.measure == "non_finite" and one.site])
        if self._only(bad, "gradients") and self._scaled is not None:
            self._overflows = [*self._overflows, step][-_SCALED:]
            if len(self._overflows) < _SCALED:
                return [self._alarm(step, place, bad, "info")]
        first = self._first
        if first is None or (first.site is None and place is not None):
            self._first = self._alarm(step if first is None else first.step, place, bad, "critical")
        return [self._first]

    def rewind(self, step: int) -> None:
        if self._first is not None and self._first.step >= step:
            self._first = None
        if self._scaled is not None and self._scaled >= step:
            self._scaled = None
        self._overflows = [one for one in self._overflows if one < step]

    def _place(self, bad: dict[str, list[str | None]], measured: list[str]) -> str | None:
        """The site to name; None where everything is broken after an update, so that no site tells anything."""
        if (
            self._first is not None
            and len(measured) > 1
            and in_forward_order(measured, self.order)[0] in bad["activations"]
        ):
            return None
        for kind in ("activations", "gradients", "weights"):
            sites = in_forward_order([site for site in bad[kind] if site is not None], self.order)
            if sites and (kind == "activations" or self._first is None):
                return sites[-1] if kind == "gradients" else sites[0]
        return None

    @staticmethod
    def _only(bad: dict[str, list[str | None]], kind: str) -> bool:
        return all(not sites for other, sites in bad.items() if other != kind)

    def _alarm(self, step: int, place: str | None, bad: dict[str, list[str | None]], level: Any) -> Alarm:
        kind = next(kind for kind in bad if bad[kind])
        sites = {kind: in_forward_order([s for s in found if s is not None], self.order) for kind, found in bad.items()}
        loss = bool(bad["loss"])
        where = "" if place is None else f" at {place}"
        rest = "; the loss is not finite either" if loss and kind != "loss" else ""
        ahead = "; the loss is still finite" if not loss else ""
        return Alarm(
            step, self.name, f"{kind} not finite{where} from step {step} on{rest}{ahead}", place, level,
            _ADVICE[kind], {"first": place, "loss": loss, **{k: v[:64] for k, v in sites.items() if v}},
        )  # fmt: skip


def _kind_of(alarm: Alarm) -> set[str]:
    kinds = {"activations": _ACTIVATIONS, "gradients": _GRADIENTS, "weights": _WEIGHTS}
    return {name for kind, names in kinds.items() if alarm.evidence.get(kind) for name in names} or set(_LOSSES)


_ADVICE = {
    "activations": "stop and go back to the last checkpoint before this step; look at the inputs of this site (a "
    "division by zero, an exponential or a square that overflows) and, in float16, at its largest activation",
    "gradients": "stop before the next update; look for a square root or logarithm at zero in this component's "
    "backward, clip the gradient, and under a loss scale lower it",
    "weights": "stop and go back to the last checkpoint before this step; the update itself was not finite: look at "
    "the optimizer's epsilon and its state",
    "loss": "stop and go back to the last checkpoint before this step; measure the activations at this step to find "
    "where it began",
}
