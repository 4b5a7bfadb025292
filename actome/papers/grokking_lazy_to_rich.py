"""[82] Grokking as the Transition from Lazy to Rich Training Dynamics.

The paper produces grokking with one dial, the scale alpha of the output, and without regularisation: at a large alpha
the training set is first fitted with the features of the start (lazy), and the test follows only when features have
turned towards the target (rich).

Tested in the paper's own setting: a committee of nearly linear units with a fixed readout learns a quadratic by full
gradient descent, at a learning rate that goes with 1 / alpha^2. The controls are a small alpha, and linear units.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.dynamics.grokking import Grokking, grokking_delay
from actome.measures.kernel_alignment import TangentKernelAlignment
from actome.papers.registry import Entry, Scale
from actome.tasks.committee import Committee, QuadraticTeacher
from actome.tasks.training import log_spaced
from actome.tasks.trials import trial_seeds
from actome.tune.output_scale import OutputScale

INPUTS, EXAMPLES, WIDTH, EPS, TEST = 40, 450, 100, 0.25, 1000
ALPHAS = (0.5, 2.0, 4.0, 8.0)
RATE = 4.0  # in N / alpha^2
PROBES = 50  # of the training set, for the tangent kernel


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    # At smoke scale large scales do not generalise in time; the delay is then censored.
    seeds, steps = (1, 320) if scale == "smoke" else (3, 10_000)
    marks = np.array(log_spaced(steps, 16 if scale == "smoke" else 120)[1:])
    runs = [[_run(one, alpha, EPS, marks, kernel=True) for one in trial_seeds(seed, seeds)] for alpha in ALPHAS]
    linear = [_run(one, 2.0, 0.0, marks, kernel=False) for one in trial_seeds(seed, seeds)]

    found = [_delay(per_seed, marks) for per_seed in runs]
    delays = [one.delay for one in found]
    aligned = np.array([[run["alignment"] for run in per_seed] for per_seed in runs])  # (alpha, seed, mark)
    fitted = _at_fit(marks, aligned[-1], found[-1])
    ways = {
        name: found[-1].between(marks, [run[name] for run in runs[-1]]).mean(0).tolist()
        for name in ("alignment", "index", "label_alignment")
    }
    figures = {
        "alpha": list(ALPHAS),
        "delay": delays,
        "delay_by_seed": [list(one.runs) for one in found],
        "fitted_at_step": [one.train.at for one in found],
        "generalised_at_step": [one.test.at for one in found],
        "alignment_at_the_end": aligned[:, :, -1].mean(1).tolist(),
        "alignment_when_fitted_at_the_largest_alpha": fitted.tolist(),
        "share_of_the_way_before_fit_until_test_and_after": ways,
        "label_alignment_of_the_kernel_at_first_and_last": [
            [float(np.mean([run["label_alignment"][i] for run in per_seed])) for i in (0, -1)] for per_seed in runs
        ],
        "lazy_rich_index_at_the_end": [float(np.mean([run["index"][-1] for run in per_seed])) for per_seed in runs],
    }
    least = [float(run["test"].min()) for run in linear]
    control = {"delay_at_the_smallest_alpha": delays[0], "least_test_error_of_linear_units": least}
    checks = {
        "the delay grows from alpha to alpha": all(a < b for a, b in itertools.pairwise(delays)),
        "at the largest alpha it is at least 4": _at_least(found[-1]) >= 4,
        "there, when fitted, features are aligned less than half as far as at the end": bool(
            (fitted < aligned[-1, :, -1] / 2).all()
        ),
        "at the smallest alpha it is at most 2 (control)": delays[0] <= 2,
        "linear units never generalise: error above 0.5 of the first (control)": min(least) > 0.5,
    }
    return figures, control, checks


def _run(seed: int, alpha: float, eps: float, marks: np.ndarray, kernel: bool) -> dict[str, np.ndarray]:
    """Errors, alignment and kernel at the marked steps of one training."""
    teacher = QuadraticTeacher(INPUTS, seed % 2**31)
    (x, y), (x_test, y_test) = (teacher.sample(n, seed % 2**31 + i) for i, n in enumerate((EXAMPLES, TEST)))
    net = OutputScale(Committee(INPUTS, WIDTH, eps, seed=seed % 2**31), alpha)
    start, start_test = net.start(x), net.start(x_test)
    # The kernel of the scaled network is alpha^2 times this one, which no alignment sees.
    follow = TangentKernelAlignment(x[:PROBES], y[:PROBES])
    out: dict[str, list[float]] = {"train": [], "test": [], "alignment": []}
    wanted, measured, weight = set(marks.tolist()), _every(marks), net.model.weight
    for step in range(int(marks[-1]) + 1):
        # As `net(x)`, with the outputs of the start kept.
        residual = net.alpha * (net.model(x) - start) - y
        if step in wanted:
            out["train"].append(_error(residual, y))
            out["test"].append(_error(net.alpha * (net.model(x_test) - start_test) - y_test, y_test))
            out["alignment"].append(net.model.alignment(teacher.direction()))
        if kernel and step in measured:
            follow.update(step, net.model)
        (gradient,) = torch.autograd.grad(net.loss(residual.square().mean()), weight)
        with torch.no_grad():
            weight -= RATE * WIDTH * gradient
    table = follow.compute()
    for name, values in (("index", 1 - table.initial_alignment), ("label_alignment", table.label_alignment)):
        if kernel:
            out[name] = np.interp(marks, table.step, values).tolist()
    return {name: np.array(values) for name, values in out.items()}


def _error(residual: Tensor, y: Tensor) -> float:
    """Mean square error over that of answering zero, which is what every run begins with."""
    return float((residual.square().mean() / y.square().mean()).detach())


def _every(marks: np.ndarray) -> set[int]:
    """Step 0 and one in eight of the marked steps, the last among them: a kernel costs as much as many steps."""
    return {0, *marks[::-8].tolist()}


def _delay(per_seed: list[dict[str, np.ndarray]], marks: np.ndarray) -> Grokking:
    curves = ([run[name] for run in per_seed] for name in ("train", "test"))
    return grokking_delay(*curves, thr=0.1, x=marks, relative=False)


def _at_least(found: Grokking) -> float:
    """The median delay, of runs that did not generalise what they lasted for."""
    return float(np.median(np.minimum(found.runs, found.least)))


def _at_fit(marks: np.ndarray, aligned: np.ndarray, found: Grokking) -> np.ndarray:
    return np.array([np.interp(date, marks, row) for date, row in zip(found.train.runs, aligned, strict=True)])


ENTRY = Entry(
    number=82,
    slug="grokking-lazy-to-rich",
    title="Grokking as the Transition from Lazy to Rich Training Dynamics",
    kind="phenomenon",
    home="actome.dynamics.grokking_delay",
    claim="Without regularisation, the factor between generalising and fitting a quadratic grows with the output scale "
    "alpha: at most 2 at 0.5, at least 4 at 8, where at the time of fitting features are aligned less than half as far "
    "as at the end; linear units never generalise.",
    test=test,
    takes={"smoke": "seconds", "small": "about two minutes"},
    open="The theory of the learning curves (DMFT); MNIST, transformers on modular addition, student and teacher.",
)
