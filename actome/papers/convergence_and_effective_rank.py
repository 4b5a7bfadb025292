"""[192] Tending Towards Stability: Convergence Challenges in Small Language Models.

The paper compares the activations of every layer at every checkpoint with their final state (CKA) and finds that layers
of large models settle within the first fifth of the training and those of small ones later and less steadily, the more
so the less of their rank their weights use.

Tested on perceptrons of three hidden layers that read digits, by width. Also with a learning rate that decays, under
which everything seems to converge: nothing moves any more. The control is how alike the final states of two seeds are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actome.dynamics.convergence import Convergence, associated
from actome.measures.cka import LinearCKA
from actome.papers.registry import Entry, Scale
from actome.tasks.digits import Digits, digits
from actome.tasks.nets import MLP
from actome.tasks.training import Training, train
from actome.tasks.trials import trial_seeds

WIDTHS, CHECKPOINTS, EARLY, TWICE = (8, 16, 64, 256), 15, 0.2, 2.0
SITES = "module:act.*"


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    seeds, steps = (2, 30) if scale == "smoke" else (3, 900)
    widths = WIDTHS[::3] if scale == "smoke" else WIDTHS
    data = digits(seed)
    runs = {
        schedule: {
            width: [_converged(data, width, steps, one, schedule) for one in trial_seeds(seed, seeds)]
            for width in widths
        }
        for schedule in ("constant", "cosine")
    }
    figures: dict[str, Any] = {
        schedule: {str(width): _means(some) for width, some in by_width.items()} for schedule, by_width in runs.items()
    }
    layers = [row for some in runs["constant"].values() for one in some for row in one["layers"]]
    ranks, dates = ([row[key] for row in layers] for key in ("rank", "t90"))
    figures["rank_with_t90"] = associated(ranks, dates, 199, 200, seed)
    across = [_across(data, [one["net"] for one in some]) for some in runs["constant"].values()]
    control = {"two_seeds_at_the_end": dict(zip(map(str, widths), across, strict=True))}

    constant = figures["constant"]
    firsts = [constant[str(width)]["first"] for width in widths]
    narrow, wide = constant[str(widths[0])]["t90"], constant[str(widths[-1])]["t90"]
    checks = {
        "convergence at 1/15 of the training rises with width (rank correlation over widths above 0.5)": bool(
            associated(widths, firsts, 9, 9)["rho"] > 0.5 if len(widths) > 2 else firsts[1] > firsts[0]
        ),
        "the widest net is at 0.9 for good within a fifth of the training": wide <= EARLY,
        "and at least twice as early as the narrowest": narrow >= TWICE * wide,
        "two seeds' final states are less alike than 0.9 at every width (control)": max(across) < 0.9,
    }
    return figures, control, {name: bool(held) for name, held in checks.items()}


def _means(some: list[dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in some])) for key in ("first", "t90", "roughness", "rank")}


def _converged(data: Digits, width: int, steps: int, seed: int, schedule: str) -> dict[str, Any]:
    training = _trained(data, width, steps, seed % 2**31, schedule)
    found = Convergence(SITES).trace(training, data.test)
    table = found.summary
    first = [curve.y[1] for curve in found.trace.each("convergence")]
    # A nonlinearity has no weights: its rank is that of the linear map before it.
    ranks = Convergence([f"module:linear.{i}" for i in range(3)]).trace(training, data.test[:64]).summary
    layers = [
        {"t90": float(one), "rank": float(rank)}
        for one, rank in zip(table["t90"], ranks["weight_rank_share"], strict=True)
    ]
    return {
        "first": float(np.mean(first)),
        "t90": float(table["t90"].mean()),
        "roughness": float(table["roughness"].mean()),
        "rank": float(ranks["weight_rank_share"].mean()),
        "layers": layers,
        "net": training.module,
    }


def _trained(data: Digits, width: int, steps: int, seed: int, schedule: str) -> Training:
    net = MLP([64, width, width, width, 10], seed=seed)
    kept = [round(steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)]
    return train(
        net, _batches(data, seed), steps, lr=1e-3, betas=(0.9, 0.999), warmup=0, schedule=schedule, clip=None,
        loss=_loss, checkpoints=kept, seed=seed,
    )  # fmt: skip


def _batches(data: Digits, seed: int) -> Any:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(data.train), (64,), generator=torch.Generator().manual_seed(seed + 7919 * step))
        return data.train[chosen], data.train_labels[chosen]

    return batch


def _loss(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(net(x), y)


@torch.no_grad()
def _across(data: Digits, nets: list[MLP]) -> float:
    """CKA of the last hidden layers of nets that differ in seed, mean over pairs of neighbours."""
    states = []
    for net in nets:
        x = data.test
        for linear, act in zip(net.linear, net.act, strict=False):
            x = act(linear(x))
        states.append(x)
    found = []
    for a, b in zip(states, states[1:] + states[:1], strict=True):
        cka = LinearCKA()
        cka.update(a, b)
        found.append(float(cka.compute()["cka"]))
    return float(np.mean(found))


ENTRY = Entry(
    number=192,
    slug="convergence-and-effective-rank",
    title="Tending Towards Stability: Convergence Challenges in Small Language Models",
    kind="measure",
    home="actome.dynamics.Convergence",
    claim="Activations of wide perceptrons are near their final state earlier than those of narrow ones: similarity at "
    "a fifteenth of the training rises with width, and the widest is at 0.9 for good within a fifth of it, at least "
    "twice as early as the narrowest.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Language models; gradients; whether rank causes slowness.",
)  # fmt: skip
