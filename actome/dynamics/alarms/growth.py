"""Quantities that grow towards a critical value: attention logits, output logits, activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from actome.core.errors import MeasureError
from actome.dynamics.crossing import Crossing, forecast_crossing

from .base import Alarm, Detector, Reading
from .history import Track
from .places import in_forward_order

_SCALING = "Small-scale proxies for large-scale Transformer training instabilities"


class Limit(NamedTuple):
    """When a quantity is too large, and from where on its growth is worth a forecast."""

    critical: float
    floor: float


class Growth(Detector):
    """A quantity that has passed a critical value, or will within a horizon at its present trend.

    At each site the largest value over heads is followed. Its trend in logarithms over the last samples, exponential or
    a power of the step, whichever fits better, is drawn on to the critical value. A forecast is told (``warning``) when
    the trend is certain to get there (the upper end of its interval is finite; the level is divided by the number of
    sites, which are looked at together) and gets there within the horizon; the passing itself is ``critical``.

    Below `floor` nothing is forecast: at the beginning of a training nearly everything grows exponentially.

    Args:
        limits: for each measure the critical value and the floor; the magnitude of what is read counts.
        window, least: samples that are fitted, at most and at least.
        horizon: how far ahead, as a multiple of the steps since the first sample.
        level: of the interval, for one site.

    Delay: one sample after passing; a forecast takes `least` samples above the floor's neighbourhood.
    """

    limits: Mapping[str, Limit]
    advice: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __init__(
        self,
        limits: Mapping[str, tuple[float, float]],
        *,
        window: int = 24,
        least: int = 6,
        horizon: float = 1.0,
        level: float = 0.95,
    ):
        for measure, (critical, floor) in limits.items():
            if not 0 < floor <= critical:
                raise MeasureError(f"{measure}: critical={critical:g} and floor={floor:g}; want 0 < floor <= critical")
        if not 4 <= least <= window or not horizon >= 0 or not 0 < level < 1:
            raise MeasureError(
                f"window={window}, least={least}, horizon={horizon}, level={level}: want 4 <= least <= window, a "
                "horizon of 0 or more and a level between 0 and 1"
            )
        self.limits = {measure: Limit(*pair) for measure, pair in limits.items()}
        self.window, self.least, self.horizon, self.level = window, least, horizon, level
        self._tracks: dict[tuple[str, str | None], Track] = {}
        self._began: int | None = None

    def update(self, step: int, readings: Sequence[Reading]) -> list[Alarm] | None:
        largest: dict[tuple[str, str | None], tuple[float, int | None]] = {}
        for one in readings:
            value = abs(one.value)
            if one.measure in self.limits and math.isfinite(value):  # what is not finite is another alarm
                key = one.measure, one.site
                if key not in largest or value > largest[key][0]:
                    largest[key] = value, one.head
        if not largest:
            return None
        self._began = step if self._began is None else self._began
        for key, (value, _) in largest.items():
            self._tracks.setdefault(key, Track(self.window)).add(step, value)
        found: dict[str, list[tuple[float, Alarm]]] = {"critical": [], "warning": []}
        order = in_forward_order([site or "" for _, site in largest])
        for measure, site in sorted(largest, key=lambda key: order.index(key[1] or "")):
            value, head = largest[measure, site]
            crossing = self._forecast(measure, site, step, len(largest))
            if value >= self.limits[measure].critical:
                found["critical"].append((-value, self._alarm(step, measure, site, head, value, crossing, past=True)))
            elif crossing is not None:
                found["warning"].append((crossing.at, self._alarm(step, measure, site, head, value, crossing)))
        # Of what is told at one step the largest, or the one that is forecast to cross first, leads.
        ranked = [alarm for level in found.values() for _, alarm in sorted(level, key=lambda one: one[0])]
        first: dict[str | None, Alarm] = {}
        for alarm in ranked:
            first.setdefault(alarm.site, alarm)
        return list(first.values())

    def rewind(self, step: int) -> None:
        for track in self._tracks.values():
            track.rewind(step)
        if self._began is not None and self._began >= step:
            self._began = None

    def _forecast(self, measure: str, site: str | None, step: int, sites: int) -> Crossing | None:
        """The crossing, where it is certain and near enough to be told."""
        track, limit = self._tracks[measure, site], self.limits[measure]
        if len(track) < self.least or track.values[-1] < limit.floor or min(track.values) <= 0:
            return None
        steps, values = track.arrays()
        assert self._began is not None
        found = forecast_crossing(steps, values, limit.critical, level=1 - (1 - self.level) / sites)
        near = found.at <= step + self.horizon * (step - self._began)
        return found if found.past or (near and math.isfinite(found.high)) else None

    def _alarm(
        self, step: int, measure: str, site: str | None, head: int | None, value: float, found: Crossing | None, *,
        past: bool = False,
    ) -> Alarm:  # fmt: skip
        limit = self.limits[measure].critical
        evidence: dict[str, Any] = {"measure": measure, "value": value, "critical": limit}
        if head is not None:
            evidence["head"] = head
        if found is not None:
            evidence |= {
                "law": found.law, "crossing": found.at, "low": found.low, "high": found.high, "r2": found.r2,
                "samples": found.points,
            }  # fmt: skip
        where = f"{measure}{f' at {site}' if site else ''}{f' (head {head})' if head is not None else ''}"
        if past or found is None:
            message = f"{where} is {value:.4g}, beyond the critical {limit:g}"
        else:
            message = (
                f"{where} is {value:.4g} and crosses {limit:g} at about step {found.at:.0f} ({found.low:.0f} to "
                f"{found.high:.0f}) if its {found.law} trend goes on"
            )
        level = "critical" if past else "warning"
        return Alarm(step, self.name, message, site, level, self.advice, evidence, self.source)


class AttentionLogitGrowth(Growth):
    """The largest attention logit of a head grows beyond what softmax stands: attention becomes one-hot and stops to
    learn, and the loss diverges.

    Critical is 1e4: the paper's runs whose logits passed it diverged. From 100 on it is forecast.

    >>> found = AttentionLogitGrowth()
    >>> site = "blocks.1.attn.scores"
    >>> for step in range(0, 200, 20):
    ...     told = found.update(step, [Reading("attention_logit_max", 5 * 2 ** (step / 20), site, 1, head=0)])
    >>> told[0].level, round(told[0].evidence["crossing"])          # 5 * 2^(x / 20) = 1e4
    ('warning', 219)
    """

    name: ClassVar[str] = "attention_logit_growth"
    needs: ClassVar[tuple[str, ...]] = ("attention_logit_max",)
    advice: ClassVar[str] = (
        "lower the learning rate, or normalise queries and keys per head (qk-norm), which bounds the logits; a longer "
        "warm-up delays it"
    )
    source: ClassVar[str] = _SCALING

    def __init__(self, critical: float = 1e4, floor: float = 100.0, **options: Any):
        super().__init__({"attention_logit_max": (critical, floor)}, **options)


class OutputLogitDivergence(Growth):
    """Output logits drift away from log-probabilities: log Z, or the largest logit, grows without an end.

    Critical is 256: from there on neighbouring numbers of bfloat16 are 2 apart, and probabilities differ by a factor of
    seven where logits cannot. From 64 on it is forecast.
    """

    name: ClassVar[str] = "output_logit_divergence"
    needs: ClassVar[tuple[str, ...]] = ("log_z", "max_logit")
    advice: ClassVar[str] = (
        "add a z-loss, 1e-4 (log Z)^2, to the loss; weight decay on the unembedding and a lower learning rate help too"
    )
    source: ClassVar[str] = _SCALING

    def __init__(self, critical: float = 256.0, floor: float = 64.0, **options: Any):
        super().__init__({"log_z": (critical, floor), "max_logit": (critical, floor)}, **options)


class ActivationGrowth(Growth):
    """Activations grow towards the largest number of their type; for trainings in float16, whose largest is 65504.

    Not among the defaults: bfloat16 and float32 have no such limit, and massive activations are large in healthy
    models.
    """

    name: ClassVar[str] = "activation_growth"
    needs: ClassVar[tuple[str, ...]] = ("max_abs",)
    advice: ClassVar[str] = "train in bfloat16, lower the learning rate, or normalise what this site reads"

    def __init__(self, critical: float = 65504.0, floor: float = 6000.0, **options: Any):
        super().__init__({"max_abs": (critical, floor)}, **options)
