"""The search behind `fit_law`: a grid with linear parameters solved for, then least squares from its best points."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from actome.dynamics.law_families import TINY, Array, Law

Loss = Literal["linear", "soft_l1"]


@dataclass
class Solution:
    """Where a search ended, in the units of a fit.

    Attributes:
        theta: (parameters).
        residuals: (points), y - f, or of logarithms.
        jacobian: (points, parameters), of f.
        cost: half the sum of (robust) squared residuals.
        scale: residual size from which a soft loss is linear.
    """

    theta: Array
    residuals: Array
    jacobian: Array
    cost: float
    scale: float = float("inf")


@dataclass
class Search:
    """Fits one law at one set of x to as many y as wanted; what depends on x alone is computed once."""

    law: Law
    x: Array
    unit: float = field(init=False)
    shift: float = field(init=False)

    def __post_init__(self) -> None:
        anywhere = self.law.domain == "any"
        self.shift = float(self.x.min()) if anywhere else 0.0
        self.unit = float(np.ptp(self.x)) if anywhere else float(np.abs(self.x).max())
        self.u = (self.x - self.shift) / self.unit
        self.lower, self.upper = np.array(self.law.lower), np.array(self.law.upper)
        self._grid()

    def _grid(self) -> None:
        law = self.law
        names = law.parameters
        self.where = [names.index(one) for one in law.linear]
        self.factor = names.index(law.log_linear) if law.log_linear else None
        free = [i for i in range(len(names)) if i not in self.where and i != self.factor]
        kept, bases, columns = [], [], []
        for values in itertools.product(*(law.grid[names[i]] for i in free)):
            theta = np.zeros(len(names))
            theta[free] = values
            with np.errstate(all="ignore"):
                base = law.function(self.u, *theta)
                parts = [law.function(self.u, *(theta + np.eye(len(names))[i])) - base for i in self.where]
            if self.factor is not None:
                parts, base = [base, *parts], np.zeros_like(self.u)
            column = np.stack(parts, 1)
            if np.isfinite(base).all() and np.isfinite(column).all():
                kept.append(theta)
                bases.append(base)
                columns.append(column)
        self.thetas, self.bases, self.columns = np.array(kept), np.array(bases), np.array(columns)
        self.solvers = np.linalg.pinv(self.columns, rcond=1e-10)

    def starts(self, y: Array, count: int) -> list[Array]:
        """The best `count` points of the grid by squared error of y."""
        rest = y - self.bases  # (grid, points)
        solved = np.einsum("gpn,gn->gp", self.solvers, rest)
        thetas = self.thetas.copy()
        linear = solved
        bad = np.zeros(len(thetas))
        if self.factor is not None:
            thetas[:, self.factor] = np.log(np.clip(solved[:, 0], 1e-12, None))
            bad = np.where(solved[:, 0] > 0, 0.0, np.inf)
            linear = solved[:, 1:]
            solved = np.concatenate([np.clip(solved[:, :1], 1e-12, None), linear], 1)
        low, high = self.lower[self.where], self.upper[self.where]
        clipped = np.clip(linear, np.where(np.isfinite(low), low + TINY, low), high)
        thetas[:, self.where] = clipped
        solved[:, solved.shape[1] - len(self.where) :] = clipped
        error = ((rest - np.einsum("gnp,gp->gn", self.columns, solved)) ** 2).sum(1) + bad
        order = np.argsort(error, kind="stable")[:count]
        return [np.clip(thetas[i], self.lower, self.upper) for i in order]

    def values(self, theta: Array) -> Array:
        """The law at x, in the space that errors are squared in."""
        with np.errstate(all="ignore"):
            f = self.law.function(self.u, *theta)
            return np.log(np.maximum(f, 1e-300)) if self.law.space == "log" else f

    def solve(
        self,
        y: Array,
        *,
        starts: int,
        weights: Array | None = None,
        loss: Loss = "linear",
        also: list[Array] | None = None,
        quick: bool = False,
    ) -> Solution | None:
        """The best of several bounded least-squares searches; None when none of them got anywhere.

        `quick` stops at an error within a millionth of the least, for fits of which there are many.
        """
        from scipy.optimize import least_squares

        target = np.log(y) if self.law.space == "log" else y
        size = float(target.std()) or 1.0
        weight = np.ones_like(y) if weights is None else weights
        scale = 1.0

        def residuals(theta: Array) -> Array:
            out = (self.values(theta) - target) * weight / size
            return np.where(np.isfinite(out), out, 1e6)

        def polish(theta: Array, careful: bool, loss: Loss = "linear") -> Solution:
            tolerance = 1e-11 if careful else 1e-6
            out = least_squares(
                residuals, theta, bounds=(self.lower, self.upper), x_scale="jac", loss=loss, f_scale=scale,
                max_nfev=300 if careful else 60, xtol=tolerance, ftol=tolerance, gtol=tolerance,
            )  # fmt: skip
            return Solution(out.x, -residuals(out.x) * size / weight, np.empty(0), float(out.cost))

        found = sorted((polish(theta, False) for theta in [*(also or []), *self.starts(y, starts)]), key=_cost)
        if not found:
            return None
        best = found[0]
        if loss == "soft_l1":
            # Residuals beyond 1.345 robust standard deviations count linearly; the scale is that of the first fit.
            scale = max(1.345 * 1.4826 * float(np.median(np.abs(residuals(best.theta)))), 1e-9)
            found = sorted((polish(one.theta, False, loss) for one in found), key=_cost)
            best = found[0]
        if not quick:
            best = min((polish(one.theta, True, loss) for one in found[:2]), key=_cost)
        best.scale = scale * size if loss == "soft_l1" else best.scale
        best.jacobian = self.jacobian(best.theta)
        return best

    def jacobian(self, theta: Array, u: Array | None = None, space: bool = True) -> Array:
        """Central differences of the law in its parameters, one-sided at a bound, (points, parameters)."""
        at = self.u if u is None else u

        def values(one: Array) -> Array:
            with np.errstate(all="ignore"):
                f = self.law.function(at, *one)
                return np.log(np.maximum(f, 1e-300)) if space and self.law.space == "log" else f

        columns = []
        for i, one in enumerate(theta):
            step = 1e-5 * max(abs(one), 1e-4)
            up, down = theta.copy(), theta.copy()
            up[i], down[i] = min(one + step, self.upper[i]), max(one - step, self.lower[i])
            columns.append((values(up) - values(down)) / (up[i] - down[i]))
        return np.stack(columns, 1)


def _cost(one: Solution) -> float:
    return one.cost


def covariance(jacobian: Array, variance: float, fixed: Array) -> tuple[Array, Array]:
    """Covariance of least-squares estimates, and which parameters the data leave open.

    Args:
        jacobian: (points, parameters), rows multiplied by their weights.
        variance: of a residual of weight one.
        fixed: parameters at a bound; they are taken as known there.

    Returns:
        (parameters, parameters) over the directions that the data fix, zero for fixed parameters; and a mask of the
        parameters that lie in a direction along which the curve does not change.
    """
    k = jacobian.shape[1]
    cov, open_ = np.zeros((k, k)), np.zeros(k, dtype=bool)
    free = np.flatnonzero(~fixed)
    if not len(free):
        return cov, open_
    norms = np.linalg.norm(jacobian[:, free], axis=0)
    dead = norms <= 1e-12 * max(norms.max(), 1e-300)
    open_[free[dead]] = True
    live = free[~dead]
    scaled = jacobian[:, live] / norms[~dead]
    _, s, vt = np.linalg.svd(scaled, full_matrices=False)
    good = s > 1e-6 * s[0]
    open_[live[(np.abs(vt[~good]) > 0.05).any(0)]] = True
    inverse = (vt[good].T / s[good] ** 2) @ vt[good]
    cov[np.ix_(live, live)] = variance * inverse / np.outer(norms[~dead], norms[~dead])
    return cov, open_
