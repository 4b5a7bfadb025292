"""[98] Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks.

The paper trains a transformer on curves drawn from a parametric prior, so that one pass gives the distribution of the
rest of a learning curve, and stops training runs by it.

Tested with the network that actome ships, and one trained here for a while, on fresh curves of the prior; with
validation accuracies of perceptrons on digits, losses of small subjects and the loss of the demo model, none of which
any of the methods has seen; and by playing series of digit classifiers with predictive stopping.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from actome.dynamics.extrapolation import last_value_of, score_extrapolations
from actome.dynamics.lcpfn import LCPFN
from actome.dynamics.learning_curves import curve_prior
from actome.dynamics.stopping import stop_runs
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.backcopy import Backcopy
from actome.tasks.demo import DEMO_MODEL
from actome.tasks.digits import digits
from actome.tasks.nets import MLP, accuracy, fit
from actome.tasks.trials import paired, trial_seeds

LENGTH, CUT = 50, 10


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    smoke = scale == "smoke"
    curves, some, steps, pools, nets = (60, 1, 5, 1, 2) if smoke else (400, 20, 300, 3, 16)
    prior, control = _prior(seed, curves, some, steps)
    runs = [_digit_runs(one % 2**31, nets) for one in trial_seeds(seed, pools)]
    losses, floors = _subject_losses(seed, 1 if smoke else 4, 50 if smoke else 250)
    figures: dict[str, Any] = {
        "prior": prior,
        "digit_classifiers": _scores(np.concatenate(runs), 0 if smoke else 8),
        "subject_losses": _scores(losses, 0 if smoke else len(losses), goal="min", bounds=floors),
        "demo_model_loss": {str(cut): _demo(cut, smoke) for cut in (12, 30)},
        "stopping": _stopping(runs, seed),
    }
    stopping = figures["stopping"]
    best = prior["log_score"]
    checks = {
        "shipped: mean log score exceeds that of last value + fitted normal by 0.2 nats": best["pfn"]
        >= best["last_value_fitted"] + 0.2,
        "shipped: the 90 % interval holds 85 to 97 %": 0.85 <= prior["coverage"]["pfn"] <= 0.97,
        "trained here: log score exceeds that of last value + fitted normal by 0.2 nats": best["pfn_trained_here"]
        >= best["last_value_fitted"] + 0.2,
        "control: with another curve's first values it loses more than 1 nat": best["pfn"] - control["log_score"] > 1,
        "digits: better log score than last value and power law": all(
            figures["digit_classifiers"]["log_score"]["pfn"] > figures["digit_classifiers"]["log_score"][one]
            for one in ("last", "power")
        ),
        "digits: stopping saves at least 30 % of the epochs": stopping["saved"]["mean"] >= 0.3,
        "digits: and loses at most 0.01 of the best accuracy": stopping["regret"]["mean"] <= 0.01,
    }
    return figures, control, checks


def _prior(seed: int, curves: int, some: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    fresh, trained_on = trial_seeds(seed, 2)
    noisy = curve_prior(curves, LENGTH, fresh).noisy
    here = LCPFN.pretrain(seq_len=LENGTH, steps=steps, seed=trained_on)
    baseline = last_value_of(curve_prior(2000, LENGTH, trained_on).noisy, CUT)
    methods = {
        "pfn": "pfn", "pfn_trained_here": lambda y, q: here.predict(y, length=len(y) + q),
        "last_value_fitted": baseline, "last": "last",
    }  # fmt: skip
    table = score_extrapolations(noisy, CUT, methods)
    slow = score_extrapolations(noisy[:some], CUT, {"pfn": "pfn", "power": "power", "ensemble": "ensemble"})
    figures = {name: _by_method(table, name) for name in ("log_score", "crps", "error", "coverage")}
    pairs = table.pivot(index="curve", columns="method", values="log_score")
    gain = paired(pairs["pfn"], pairs["last_value_fitted"])
    figures["gain_over_last_value_fitted"] = [gain.mean, gain.low, gain.high]
    figures["first_curves"] = {name: _by_method(slow, name) for name in ("log_score", "crps", "coverage")}
    # The control: the first values of another curve, so that all is as it was but for what is known of the curve.
    other = np.roll(noisy, 1, axis=0)
    mixed = np.concatenate([other[:, :CUT], noisy[:, CUT:]], 1)
    wrong = score_extrapolations(mixed, CUT, ["pfn"])
    return figures, {"log_score": float(wrong.log_score.mean()), "coverage": float(wrong.coverage.mean())}


def _by_method(table: Any, column: str) -> dict[str, float]:
    return {str(name): float(value) for name, value in table.groupby("method")[column].mean().items()}


def _scores(curves: Any, slow: int, **how: Any) -> dict[str, Any]:
    """Means over curves; the ensemble, which takes a second a curve, on the first `slow` ones beside the network."""
    bounds = how.pop("bounds", None)
    tables = []
    for number, curve in enumerate(curves):
        names = ["pfn", "power", "last", *(["ensemble"] if number < slow else [])]
        part = None if bounds is None else bounds[number]
        tables.append(score_extrapolations([curve], CUT, names, bounds=part, **how).assign(curve=number))
    import pandas as pd

    table = pd.concat(tables)
    first = table[table.curve < slow]
    out: dict[str, Any] = {"curves": len(curves), "curves_of_ensemble": slow}
    for name in ("log_score", "crps", "error", "coverage"):
        out[name] = _by_method(table[table.method != "ensemble"], name)
        out[f"{name}_of_the_first"] = _by_method(first[first.method.isin(["pfn", "ensemble"])], name)
    return out


def _digit_runs(seed: int, nets: int) -> np.ndarray:
    """Validation accuracy after each of 50 epochs, (nets, epochs); rates and widths at random, over two decades."""
    data, rng, out = digits(seed, train=800, test=500), np.random.default_rng(seed), []
    for number in range(nets):
        width, rate = int(2 ** rng.uniform(2, 7)), float(10 ** rng.uniform(-4, -2))
        net, curve = MLP([64, width, 10], seed=seed + number), []
        per_epoch = len(data.train) // 64

        def on_step(done: int, loss: float, net: Any = net, curve: list = curve, per: int = per_epoch) -> None:
            if done % per == 0:
                curve.append(accuracy(net, data.test, data.test_labels))

        fit(net, data.train, data.train_labels, steps=per_epoch * LENGTH, lr=rate, seed=seed + number, on_step=on_step)
        out.append(curve)
    return np.array(out)


def _subject_losses(seed: int, count: int, steps: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Training losses of subjects in 50 means over equally many steps, and their bounds: entropy and log vocabulary."""
    curves, bounds = [], []
    for one in trial_seeds(seed + 1, count):
        world = Backcopy(seed=one)
        tokens = world.sample(16 * steps, 32, seed=one)
        config = SubjectConfig(vocab=world.vocab, d_model=32, layers=1, heads=2, context=32)
        losses = train(Subject.fresh(config, seed=one % 2**31), tokens, steps, batch_size=16, seed=one % 2**31).losses
        curves.append(losses.double().view(LENGTH, -1).mean(1).numpy())
        bounds.append((world.floor(tokens), float(np.log(world.vocab))))
    return np.array(curves), bounds


def _demo(cut: int, quick: bool) -> dict[str, Any]:
    """The demo model's training loss, 60 means over steps 513 to 8192; bounds as `extrapolate_curve` assumes them."""
    told = json.loads((DEMO_MODEL / "training.json").read_text())["loss"]
    values = np.array([told[step] for step in sorted(told, key=int)])[8:].reshape(-1, 2).mean(1)
    table = score_extrapolations([values], cut, ["pfn", "power", "last", *(["ensemble"] * (not quick))], goal="min")
    columns = ("log_score", "crps", "coverage", "end_error")
    return {name: {str(row.method): float(getattr(row, name)) for row in table.itertuples()} for name in columns}


def _stopping(runs: list[np.ndarray], seed: int) -> dict[str, Any]:
    """Of each pool of runs, played in the order in which they were made; means with intervals over pools."""
    played = [stop_runs(pool) for pool in runs]
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {"share_of_steps_run_by_pool": [1 - one.saved for one in played]}
    for name in ("saved", "regret"):
        values = np.array([getattr(one, name) for one in played])
        low, high = np.quantile(values[rng.integers(0, len(values), (2000, len(values)))].mean(1), [0.025, 0.975])
        out[name] = {"mean": float(values.mean()), "low": float(low), "high": float(high)}
    return out


ENTRY = Entry(
    number=98,
    slug="lc-pfn",
    title="Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks",
    kind="method",
    home="actome.dynamics.LCPFN",
    claim="On fresh curves of the prior, ten of fifty values seen, the log score exceeds that of the last value with a "
    "fitted normal by 0.2 nats, the 90 % interval holds 85 to 97 %, and another curve's values lose more than 1 nat; "
    "on digit classifiers it beats last value and power law, and stopping by it saves 30 % of epochs for 0.01 of "
    "accuracy.",
    test=test,
    takes={"smoke": "about 5 seconds", "small": "about two minutes"},
    open="The network of the original size (12 layers of width 512) and its benchmarks of learning curves.",
)
