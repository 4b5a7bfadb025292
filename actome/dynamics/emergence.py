"""How massive activations come up: the five-parameter law by layer, and what an architecture says of it beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actome.core.errors import MeasureError, nearest
from actome.dynamics.law_families import Law
from actome.dynamics.laws import LawFit
from actome.dynamics.trace_fits import fit_curves
from actome.dynamics.trace_table import Trace

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

FEATURES = ("relative_depth", "layers", "d_model", "heads", "head_dim", "log_parameters")


@dataclass(frozen=True)
class Emergence:
    """The emergence law of each layer.

    Attributes:
        frame: one row for each curve: place, site, layer, points; the parameters in units of the horizon (``A``,
            ``lam``, ``gam``, ``t0``, ``K``), so that trainings of different lengths compare; ``r2``; ``t_peak`` with
            ``t_low`` and ``t_high`` in steps, infinite where the curve has no peak; ``class``; ``rise``, the last value
            over the first; ``control`` and ``p`` of the same law on shuffled values; ``open``, the parameters that the
            data leave open.
        fits: the `LawFit` of each place, with its bands and diagnostics.
        failed: for each place that could not be fitted, why.
        horizon: the last step.
    """

    frame: pd.DataFrame = field(repr=False)
    fits: dict[str, LawFit] = field(repr=False)
    failed: dict[str, str]
    horizon: float

    def __repr__(self) -> str:
        said = ", ".join(f"{n} {kind}" for kind, n in self.frame["class"].value_counts().items())
        return f"Emergence({len(self.frame)} curves: {said}; r2 {self.frame['r2'].min():.3f} or more)"

    def band(self, place: str, steps: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Where the law's curve lies at some steps: low and high, (steps) each."""
        if place not in self.fits:
            raise MeasureError(f"{place!r} was not fitted{nearest(place, self.fits)}")
        return self.fits[place].band(steps, level)


def fit_emergence(
    trace: Trace | pd.DataFrame,
    law: str | Law = "exp_log",
    measure: str = "massive_ratio",
    site: str | None = None,
    *,
    min_points: int | None = None,
    permutations: int = 19,
    resamples: int = 100,
    starts: int = 30,
    seed: int = 0,
) -> Emergence:
    r"""Fits how the ratio of the largest to the median activation comes up in training, layer by layer.

    :math:`f(t) = A e^{-\lambda x_t} \ln x_t + K` with :math:`x_t = \gamma t + t_0`: with :math:`\lambda = 0` a
    logarithmic rise, with :math:`\lambda > 0` an early peak at :math:`t = (e^{W(1/\lambda)} - t_0) / \gamma`.

    Args:
        trace: with values of `measure`, or a frame with the columns step and value and, for several curves, site,
            layer or head.
        law: another one to fit instead.
        measure, site: which curves.
        min_points: fewer points than the law asks for (20); five parameters fit ten points of anything.
        permutations: of the shuffled control.
        resamples: of the bootstrap of ``t_peak``; 0 leaves its interval NaN.
        starts: searches of each fit.

    Raises:
        MeasureError: too few steps, or no such measure.

    Source: Gallego-Feliciano et al. 2025, Hidden Dynamics of Massive Activations in Transformer Training.

    >>> import pandas as pd
    >>> x = np.linspace(0, 1, 30)
    >>> value = 5 + 8 * np.exp(-0.3 * (20 * x + 1)) * np.log(20 * x + 1)
    >>> found = fit_emergence(pd.DataFrame({"step": (1e5 * x).astype(int), "value": value}), resamples=0)
    >>> row = found.frame.iloc[0]
    >>> row["class"], round(float(row["lam"]), 2), round(row["gam"]), bool(row["control"] < 0.5)
    ('early peak', 0.3, 20, True)
    """
    if not isinstance(trace, Trace):
        if not hasattr(trace, "columns"):
            raise MeasureError(
                f"a law is fitted to a Trace, or a frame with the columns step and value, not {type(trace).__name__}"
            )
        trace = Trace(trace if "measure" in trace else trace.assign(measure=measure))
    found = fit_curves(
        trace, measure, law, site, min_points=min_points, permutations=permutations, starts=starts, seed=seed
    )
    frame = found.frame
    horizon = float(trace.rows(measure, site)["step"].max())
    if "gam" in frame:
        frame = frame.assign(gam=frame["gam"] * horizon)
    ends = [_peak_interval(found.fits[place], resamples, seed) for place in frame["place"]]
    curves = {curve.place: curve for curve in trace.each(measure, site)}
    first = np.array([curves[place].y[0] for place in frame["place"]])
    last = np.array([curves[place].y[-1] for place in frame["place"]])
    frame = frame.assign(
        t_low=[low for low, _ in ends], t_high=[high for _, high in ends],
        rise=np.divide(last, first, out=np.full_like(last, np.nan), where=first != 0),
    )  # fmt: skip
    if "class" not in frame:
        frame = frame.assign(**{"class": found.law, "t_peak": math.nan})
    return Emergence(frame, found.fits, found.failed, horizon)


def _peak_interval(fit: LawFit, resamples: int, seed: int) -> tuple[float, float]:
    if not resamples or "t_peak" not in fit.derived:
        return math.nan, math.nan
    return fit.bootstrap(resamples, seed).interval("t_peak")


def architecture_of(model: Model) -> pd.DataFrame:
    """What `EmergencePredictor` reads of a model, one row for each layer.

    >>> import actome as ac
    >>> architecture_of(ac.demo())[["relative_depth", "layers", "d_model", "heads", "head_dim"]].iloc[1].tolist()
    [0.5, 4.0, 112.0, 4.0, 28.0]
    """
    import pandas as pd

    info = model.info
    layers, width, heads = info["layers"], info["d_model"], info["head"]
    rows = {
        "model": info["name"],
        "layer": range(layers),
        "relative_depth": [(layer + 1) / layers for layer in range(layers)],
        "layers": float(layers),
        "d_model": float(width),
        "heads": float(heads),
        "head_dim": width / heads,
        "log_parameters": math.log(info["parameters"]),
    }
    return pd.DataFrame(rows)


class EmergencePredictor:
    """Predicts parameters of the emergence law from the architecture, before anything is trained.

    One regressor a parameter. How well it does is told by leaving each model out in turn, all its layers together:
    layers of one model are alike, and a split by layers would flatter.

    Args:
        kind: ``"forest"``, ``"trees"`` (extremely randomised) or ``"linear"`` (ridge on standardised features).
        features: columns of the architectures that are used.
        seed: of the forests and of the shuffled control.

    Attributes (after `fit`):
        scores_: one row a parameter: ``error``, the mean absolute error of the models left out; ``mean_error``, that of
            predicting the mean of the others; ``skill``, 1 - error / mean_error; ``spearman`` of the predictions;
            ``control``, the median skill when architectures are dealt out to the models at random, and ``p``, the
            share of such shuffles that do as well.
        importance_: one row a parameter, the weight of each feature.

    Source: Gallego-Feliciano et al. 2025; which regressors they used is reconstructed.

    >>> import pandas as pd
    >>> archs = pd.DataFrame({"model": [f"m{i}" for i in range(12)], "d_model": [32.0 * (1 + i) for i in range(12)]})
    >>> params = pd.DataFrame({"K": 2.0 * archs["d_model"] + 1})
    >>> predictor = EmergencePredictor("linear", features=["d_model"]).fit(archs, params)
    >>> bool(predictor.scores_["skill"]["K"] > 0.9), bool(predictor.scores_["control"]["K"] < 0.5)
    (True, True)
    """

    def __init__(
        self,
        kind: Literal["forest", "trees", "linear"] = "forest",
        features: Sequence[str] = FEATURES,
        seed: int = 0,
    ):
        if kind not in ("forest", "trees", "linear"):
            raise MeasureError(f"kind={kind!r} does not exist; choose 'forest', 'trees' or 'linear'")
        self.kind, self.features, self.seed = kind, list(features), seed

    def fit(self, archs: pd.DataFrame, params: pd.DataFrame, *, shuffles: int = 19) -> EmergencePredictor:
        """Learns each parameter, and scores it on the models left out.

        Args:
            archs: one row for each layer, with a column ``model`` and those of `features`; see `architecture_of`.
            params: as many rows, one column a parameter, such as ``fit_emergence(...).frame[["A", "K", "t_peak"]]``.
            shuffles: of the control.

        Raises:
            MeasureError: fewer than four models, a missing column, or rows that are not finite.
        """
        import pandas as pd

        lacking = [name for name in ("model", *self.features) if name not in archs]
        if lacking or len(archs) != len(params):
            raise MeasureError(
                f"archs has {len(archs)} rows and params {len(params)}; columns lacking: {', '.join(lacking) or 'none'}"
            )
        x, models = archs[self.features].to_numpy(float), archs["model"].to_numpy()
        if len(set(models)) < 4:
            raise MeasureError(f"{len(set(models))} models; leaving one out needs four or more")
        bad = [name for name in params if not np.isfinite(params[name].to_numpy(float)).all()]
        if bad or not np.isfinite(x).all():
            raise MeasureError(f"not finite: {', '.join(bad) or 'a feature'}; leave such layers out, and say how many")
        rng = np.random.default_rng(self.seed)
        rows, self._models, self._errors, weights = {}, {}, {}, {}
        for name in params:
            y = params[name].to_numpy(float)
            guess, mean = self._left_out(x, y, models)
            skill = _skill(y, guess, mean)
            null = [_skill(y, *self._left_out(_dealt_out(x, models, rng), y, models)) for _ in range(shuffles)]
            self._errors[name] = np.abs(y - guess)
            self._models[name] = self._regressor().fit(x, y)
            weights[name] = _weights(self._models[name])
            rows[name] = {
                "error": float(np.abs(y - guess).mean()), "mean_error": float(np.abs(y - mean).mean()), "skill": skill,
                "spearman": _spearman(y, guess), "control": float(np.median(null)) if null else math.nan,
                "p": (1 + sum(one >= skill for one in null)) / (1 + len(null)),
            }  # fmt: skip
        self.scores_ = pd.DataFrame(rows).T
        self.importance_ = pd.DataFrame(weights, index=self.features).T
        return self

    def predict(self, archs: pd.DataFrame, level: float = 0.9) -> pd.DataFrame:
        """Each parameter for some architectures, with an interval: NAME, NAME_low, NAME_high.

        The interval is as wide as the errors on models left out: that quantile of their magnitudes on either side.
        """
        import pandas as pd

        if not hasattr(self, "scores_"):
            raise MeasureError("this predictor has seen nothing yet; call fit first")
        x = archs[self.features].to_numpy(float)
        out = {}
        for name, one in self._models.items():
            half = float(np.quantile(self._errors[name], level))
            out[name] = one.predict(x)
            out |= {f"{name}_low": out[name] - half, f"{name}_high": out[name] + half}
        return pd.DataFrame(out, index=archs.index)

    def _left_out(self, x: np.ndarray, y: np.ndarray, models: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the prediction of a regressor, and the mean, of all other models."""
        guess, mean = np.empty(len(y)), np.empty(len(y))
        for model in dict.fromkeys(models):
            mine = models == model
            guess[mine] = self._regressor().fit(x[~mine], y[~mine]).predict(x[mine])
            mean[mine] = y[~mine].mean()
        return guess, mean

    def _regressor(self) -> Any:
        from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if self.kind == "linear":
            return make_pipeline(StandardScaler(), Ridge(alpha=0.1))
        kind = RandomForestRegressor if self.kind == "forest" else ExtraTreesRegressor
        return kind(n_estimators=50, min_samples_leaf=2, random_state=self.seed)


def _dealt_out(x: np.ndarray, models: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Architectures of models exchanged at random, layer by layer as far as both have them."""
    names = list(dict.fromkeys(models))
    rows = {name: np.flatnonzero(models == name) for name in names}
    out = x.copy()
    for name, other in zip(names, rng.permutation(names), strict=True):
        theirs = rows[other]
        out[rows[name]] = x[theirs[np.arange(len(rows[name])) * len(theirs) // len(rows[name])]]
    return out


def _skill(y: np.ndarray, guess: np.ndarray, mean: np.ndarray) -> float:
    base = float(np.abs(y - mean).mean())
    return 1 - float(np.abs(y - guess).mean()) / base if base > 0 else math.nan


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from actome.tasks.trials import spearman

    return spearman(a, b)


def _weights(model: Any) -> np.ndarray:
    return np.abs(model[-1].coef_) if hasattr(model, "steps") else model.feature_importances_
