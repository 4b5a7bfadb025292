"""[272] Early warning signals: The charted and uncharted territories.

Systems that approach a fold slow down: variance and autocorrelation rise before they jump. The paper maps where that
holds and where not: jumps that noise makes are not announced, and systems without a jump slow down as well.

Tested on simulated traces of known kinds, each ending before its jump, with the trends of `EarlyWarning` and the
likelihood ratio of `ou_lr_test`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actome.dynamics.early_warning import EarlyWarning
from actome.dynamics.ou_test import ou_deviance, ou_lr_test
from actome.papers.registry import Entry, Scale
from actome.tasks.bifurcation import KINDS, bifurcation
from actome.tasks.trials import auroc, trial_seeds

INDICATORS = ("variance", "ar1", "skewness", "low_frequency")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    runs, points, fitted, boots = (20, 200, 5, 19) if scale == "smoke" else (100, 500, 40, 99)
    seeds = dict(zip((*KINDS, "threshold"), trial_seeds(seed, len(KINDS) + 1), strict=True))
    made = {kind: bifurcation(kind, runs, points, seeds[kind]) for kind in KINDS}
    tool = EarlyWarning(surrogates=99, seed=seed)
    taus = {kind: tool.taus(one.traces) for kind, one in made.items()}
    # Another draw of stationary traces sets the 5 % level.
    null = tool.taus(bifurcation("none", 2 * runs, points, seeds["threshold"]).traces)
    level = {name: float(np.quantile(null[name], 0.95)) for name in INDICATORS}
    auc = {
        kind: {name: _auc(taus[kind][name], taus["none"][name]) for name in INDICATORS}
        for kind in KINDS
        if kind != "none"
    }
    rate = {kind: {name: float((taus[kind][name] > level[name]).mean()) for name in INDICATORS} for kind in KINDS}
    deviance = {kind: ou_deviance(tool.detrended(made[kind].traces[:fitted])) for kind in ("fold", "noise", "none")}
    one = {
        kind: ou_lr_test(tool.detrended(made[kind].traces[:1])[0], n_boot=boots, seed=seed) for kind in ("fold", "none")
    }
    surrogate = {kind: [tool.fit(trace) for trace in made[kind].traces[: fitted // 2]] for kind in ("fold", "none")}
    figures = {
        "jumped": {kind: float(one.jumped.mean()) for kind, one in made.items()},
        "auc_against_stationary": auc, "alarm_rate_at_5_percent": rate,
        "median_tau": {kind: {name: float(np.median(taus[kind][name])) for name in INDICATORS} for kind in KINDS},
        "auc_of_deviance": {kind: _auc(deviance[kind], deviance["none"]) for kind in ("fold", "noise")},
        "auc_of_tau_on_the_same_traces": _auc(taus["fold"]["variance"][:fitted], taus["none"]["variance"][:fitted]),
        "one_trace": {
            kind: {"deviance": found.deviance, "p": found.p, "auc": found.auc, "power": found.power}
            for kind, found in one.items()
        },
        "alarm_rate_by_surrogates": {
            kind: float(np.mean([one.alarm for one in found])) for kind, found in surrogate.items()
        },
    }  # fmt: skip
    noise = {name: auc["noise"][name] for name in ("variance", "ar1")}
    control = {
        "noise": noise, "step": {name: auc["step"][name] for name in ("variance", "ar1")},
        "stationary_alarm_rate": {name: rate["none"][name] for name in ("variance", "ar1")},
        "deviance_of_noise": figures["auc_of_deviance"]["noise"],
    }  # fmt: skip
    checks = {
        "fold: AUC of the trend of the variance of at least 0.9": auc["fold"]["variance"] >= 0.9,
        "fold: AUC of the trend of the autocorrelation of at least 0.75": auc["fold"]["ar1"] >= 0.75,
        "noise: both lie in 0.3 to 0.65 (control)": all(0.3 <= one <= 0.65 for one in noise.values()),
        "transcritical: the variance alarms in half of the runs or more, though nothing jumps": rate["transcritical"][
            "variance"
        ]
        >= 0.5,
    }
    return figures, control, checks


def _auc(scores: np.ndarray, stationary: np.ndarray) -> float:
    return auroc(np.concatenate([scores, stationary]), np.arange(len(scores) + len(stationary)) < len(scores))


ENTRY = Entry(
    number=272,
    slug="early-warning-signals",
    title="Early warning signals: The charted and uncharted territories",
    kind="measure",
    home="actome.dynamics.EarlyWarning",
    claim="Against stationary traces, trends before a fold have an AUC of at least 0.9 (variance) and 0.75 "
    "(autocorrelation), those before a jump by noise 0.3 to 0.65; before a transcritical bifurcation, where nothing "
    "jumps, the variance alarms in half of the runs or more at the 5 % level.",
    test=test,
    takes={"smoke": "seconds", "small": "about fifteen seconds"},
    open="Spatial indicators, and traces of real ecosystems.",
)  # fmt: skip
