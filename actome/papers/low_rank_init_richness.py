"""[1] How connectivity structure shapes rich and lazy learning in neural circuits.

The paper finds that recurrent networks that begin with weights of low rank learn richly, their representations and
tangent kernels moving further than from a full-rank start of the same norm; unless the low rank is aligned with the
task, when learning is lazy again.

Tested on a recurrent network that reads digits row by row, trained from both starts to the same loss. The control has
to come out the other way: of two starts of the same low rank, that which is aligned with the task is the lazier.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actome.dynamics.regimes import Regime, regime
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.draw import seeded
from actome.tasks.rnn import LeakyRNN, rows_of
from actome.tasks.trials import trial_seeds
from actome.tune.init import low_rank_

WIDTH, LEAK, GAIN, RATE, BATCH = 100, 0.5, 1.5, 0.05, 64
CONTROL_RANK = 5  # one direction cannot hold ten classes
OUTPUTS = 4  # of ten, the same before and after


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    seeds, loss, most, probes = (1, 1.5, 100, 15) if scale == "smoke" else (4, 0.4, 3000, 60)
    arms: dict[str, list[tuple[Regime, float, int]]] = {}
    for one in trial_seeds(seed, seeds):
        data, own = digits(one, train=1297, test=500), one % 2**31
        solution = _solution(data, own, loss / 4, most)
        # Both controls have the norm that the aligned directions have in the solution.
        norm = float(torch.linalg.svdvals(solution)[:CONTROL_RANK].norm())
        for name, rank, size, aligned in (
            ("full", WIDTH, None, None),
            ("rank 1", 1, None, None),
            ("random", CONTROL_RANK, norm, None),
            ("aligned", CONTROL_RANK, norm, solution),
        ):
            net = LeakyRNN(8, WIDTH, 10, leak=LEAK, gain=GAIN, seed=own)
            if size is not None:
                with torch.no_grad():
                    net.recurrent.weight *= size / net.recurrent.weight.norm()
            low_rank_(net.recurrent.weight, rank, align_to=aligned)
            start = copy.deepcopy(net)
            steps, reached = _train(net, data, own, loss, most)
            found = regime(
                start, net, rows_of(data.test[:probes]), "module:state", outputs=OUTPUTS,
                weights="recurrent.weight", seed=own,
            )  # fmt: skip
            arms.setdefault(name, []).append((found, reached, steps))

    table = {name: _told(runs) for name, runs in arms.items()}
    full, low, random, aligned = table.values()
    figures = {
        "full": full,
        "rank_1": low,
        "KA_full_minus_rank_1": float(np.mean(full["KA"]) - np.mean(low["KA"])),
        "RA_full_minus_rank_1": float(np.mean(full["RA"]) - np.mean(low["RA"])),
        "seeds_where_all_three_say_that_rank_1_is_richer": int(
            sum(
                a.KA > b.KA and a.RA > b.RA and a.weight_change < b.weight_change
                for (a, *_), (b, *_) in zip(arms["full"], arms["rank 1"], strict=True)
            )
        ),
    }
    control = {"random": random, "aligned": aligned}
    checks = {
        "mean KA from rank 1 is at least 0.1 below that from full rank": figures["KA_full_minus_rank_1"] >= 0.1,
        "mean RA is at least 0.05 below": figures["RA_full_minus_rank_1"] >= 0.05,
        "both were trained to the same loss, within a tenth": bool(
            abs(np.mean(full["loss"]) / np.mean(low["loss"]) - 1) <= 0.1
        ),
        "both starts have the same norm": bool(np.allclose(full["norm"], low["norm"], rtol=1e-4)),
        "of one low rank, the start that is aligned with the task has the higher mean KA (control)": bool(
            np.mean(aligned["KA"]) > np.mean(random["KA"])
        ),
    }
    return figures, control, checks


def _solution(data: Digits, seed: int, loss: float, most: int) -> Tensor:
    """Recurrent weights that solve the task with the input and readout weights that the network starts with."""
    net = LeakyRNN(8, WIDTH, 10, leak=LEAK, gain=0.1, seed=seed)
    net.input.requires_grad_(False)
    net.readout.requires_grad_(False)
    _train(net, data, seed, loss, most)
    return net.recurrent.weight.detach()


def _train(net: LeakyRNN, data: Digits, seed: int, loss: float, most: int) -> tuple[int, float]:
    """Plain gradient descent until the loss on the training set is reached; steps taken, and that loss."""
    generator, x, y = seeded(seed), rows_of(data.train), data.train_labels
    optimiser = torch.optim.SGD([one for one in net.parameters() if one.requires_grad], RATE)
    reached = float("inf")
    for step in range(1, most + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()
        if step % 10 == 0:
            with torch.no_grad():
                reached = float(F.cross_entropy(net(x), y))
            if reached <= loss:
                break
    return step, reached


def _told(runs: list[tuple[Regime, float, int]]) -> dict[str, list[float]]:
    found = [one for one, _, _ in runs]
    name = "recurrent.weight"
    return {
        "KA": [one.KA for one in found],
        "RA": [one.RA for one in found],
        "index": [one.index for one in found],
        "weight_change": [one.weight_change for one in found],
        "norm": [one.weight_change / one.relative_change for one in found],
        "effective_rank_before": [one.rank[name][0] for one in found],
        "effective_rank_after": [one.rank[name][1] for one in found],
        "loss": [loss for _, loss, _ in runs],
        "steps": [float(steps) for _, _, steps in runs],
    }


ENTRY = Entry(
    number=1,
    slug="low-rank-init-richness",
    title="How connectivity structure shapes rich and lazy learning in neural circuits",
    kind="phenomenon",
    home="actome.dynamics.regime",
    claim="A recurrent network trained to the same loss from recurrent weights of rank 1 ends with a tangent-kernel "
    "alignment at least 0.1 and a representation alignment at least 0.05 lower than from full rank at the same norm; "
    "of two low-rank starts that which is aligned with the task is the lazier.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="The neuroscience tasks, connectivity measured in brains, and the theory of two-layer linear networks.",
)
