"""The rectified scaling law: how the loss of fine-tuning falls with data, the phase before the power law included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actome.core.errors import MeasureError
from actome.dynamics.law_families import Array
from actome.dynamics.law_search import Loss
from actome.dynamics.laws import LawFit, fit_law


@dataclass
class RectifiedLaw:
    """L(D) = B / (D_l + D^beta) + E, fitted to log L.

    D_l is the size of what the model had learned before, in units of D^beta; while D^beta is small beside it, the loss
    hardly falls (the pre-power phase). With D_l = 0 it is the plain power law.

    Args:
        pre_learned_size: False fixes D_l at 0, which is the plain law (``"vanilla"``), fitted in the same way.
        loss: ``"soft_l1"`` lets outlying points count less.
        starts: how many searches; of curves of the law with noise, 3 and 12 end in the same place.

    Attributes:
        fit_: the `LawFit` with errors, diagnostics, bootstrap and control, after `fit`.

    Source: Selecting Large Language Model to Fine-tune via Rectified Scaling Law.

    >>> D = 200.0 * 2 ** np.arange(12)
    >>> law = RectifiedLaw().fit(D, 300 / (400 + D**0.6) + 0.5)
    >>> round(law.pre_learned), round(law.beta, 2), round(law.transition()), round(float(law.predict(1e7)), 3)
    (400, 0.6, 21715, 0.518)
    """

    pre_learned_size: bool = True
    loss: Loss = "linear"
    starts: int = 4
    fit_: LawFit | None = field(default=None, init=False, repr=False)

    def fit(self, D: Any, L: Any) -> RectifiedLaw:
        """Fits the law.

        Args:
            D: (sizes), how much data each run was fine-tuned on; 0 (no fine-tuning) may be among them, unless D_l is
                fixed at 0.
            L: (sizes) or (seeds, sizes), the losses, above 0; in the order of D.

        Raises:
            MeasureError: fewer than five sizes (four for the plain law), losses of 0 or less, negative sizes.
        """
        if self.pre_learned_size:
            self.fit_ = fit_law(D, L, "rectified", loss=self.loss, starts=self.starts, min_points=5)
            return self
        if np.min(np.asarray(D, dtype=np.float64)) <= 0:
            raise MeasureError("the plain power law has no value at D = 0; leave that point out, or let D_l be fitted")
        self.fit_ = fit_law(D, L, _VANILLA, loss=self.loss, starts=self.starts, min_points=4)
        return self

    def predict(self, D: Any) -> Array:
        """The loss at any sizes, in the shape of D."""
        return self._fitted().predict(D)

    @property
    def pre_learned(self) -> float:
        """D_l, in units of D^beta."""
        return self._fitted().parameters.get("D_l", 0.0)

    @property
    def beta(self) -> float:
        """The exponent."""
        return self._fitted().parameters["beta"]

    @property
    def floor(self) -> float:
        """E, the loss that no amount of data goes below."""
        return self._fitted().parameters["E"]

    def transition(self) -> float:
        """The amount of data at which the power phase begins: D^beta = D_l."""
        return float(self.pre_learned ** (1 / self.beta))

    def _fitted(self) -> LawFit:
        if self.fit_ is None:
            raise MeasureError("fit the law to sizes and losses first")
        return self.fit_


def _vanilla() -> Any:
    """The rectified law without D_l, as `fit_law` takes it."""
    from dataclasses import replace

    from actome.dynamics.law_families import LAWS

    return replace(
        LAWS["rectified"], name="vanilla", formula="B / x^beta + E", parameters=("B", "beta", "E"),
        function=lambda x, B, beta, E: B / x**beta + E, linear=("B", "E"), lower=(0.0, 0.01, 0.0),
        upper=(np.inf, 8.0, np.inf), grid={"beta": (0.03, 0.08, 0.15, 0.3, 0.5, 0.8, 1.2, 2.0)},
        unscale=lambda theta, unit, shift: np.array([theta[0] * unit ** theta[1], theta[1], theta[2]]), points=5,
        domain="positive", derived=lambda theta, x: {},
    )  # fmt: skip


_VANILLA = _vanilla()
