"""[141] Learned feature representations are biased by complexity, learning order, position, and more.

Two features that a network needs equally and computes equally well need not get the same room in its activations: the
paper finds that easier ones, and those learned first, take more of the variance.

Tested on a multilayer perceptron that has to tell a bit and the parity of four bits, both independent and frequent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import actome as ac
from actome.measures import FeatureVariance, feature_rsa
from actome.papers.registry import Entry, Scale
from actome.tasks.feature_pairs import FeaturePairs, Pairs
from actome.tasks.nets import MLP, fit
from actome.tasks.trials import over_seeds

WIDTHS = [40, 128, 64, 64, 2]
SITE = "module:act.2"  # the last hidden layer: the first ones only hand on how the input is spread over units


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count = (300, 2) if scale == "smoke" else (900, 5)
    found = over_seeds(lambda one: _trial(one, steps), seed, count)
    gap = [easy - hard for easy, hard in zip(found["easy"], found["hard"], strict=True)]
    gap_first = [easy - hard for easy, hard in zip(found["easy_hard_first"], found["hard_hard_first"], strict=True)]
    mean_gap, mean_first = sum(gap) / count, sum(gap_first) / count
    accuracies = [value for name, values in found.items() if name.startswith("accuracy") for value in values]
    shown = ("easy", "hard", "easy_hard_first", "hard_hard_first", "hard_before_easy", "easy_xor", "hard_xor")
    figures = {
        "share": {name: found[name] for name in shown},
        "similarity_analysis": {name: found[f"rsa_{name}"] for name in ("easy", "hard")},
        "gap": mean_gap,
        "gap_hard_learned_first": mean_first,
        "least_accuracy": min(accuracies),
        "least_accuracy_of_a_probe": min(found["probe_easy"] + found["probe_hard"]),
    }
    control = {
        "share_untrained": {name: found[f"{name}_untrained"] for name in ("easy", "hard")},
        "share_in_the_input": {name: found[f"{name}_input"] for name in ("easy", "hard")},
    }
    checks = {
        "every net tells both features (accuracy at least 0.99)": min(accuracies) >= 0.99,
        "the easy feature has a share larger by 0.1": mean_gap >= 0.1,
        "learning the hard one first reverses the gap or at least halves it": mean_first <= mean_gap / 2,
        "control: untrained, no feature has more than its share in the input (and 0.05)": all(
            found[f"{name}_untrained"][i] <= found[f"{name}_input"][i] + 0.05
            for name in ("easy", "hard")
            for i in range(count)
        ),
    }
    return figures, control, checks


def _trial(seed: int, steps: int) -> dict[str, float]:
    world, xor = FeaturePairs(), FeaturePairs(bits=2)
    train, test_ = world.sample(4096, seed), world.sample(2048, seed + 1)
    untrained, plain, first, easier = (MLP(WIDTHS, seed=seed) for _ in range(4))
    _fit(plain, train, steps, seed)
    _fit(first, train, steps, seed, weights=(0.0, 1.0))
    hard_alone = _shares(first, test_)[1]
    _fit(first, train, steps, seed + 1)
    _fit(easier, xor.sample(4096, seed), steps, seed)
    out: dict[str, float] = {"hard_before_easy": hard_alone}
    for name, net, data in (
        ("", plain, test_),
        ("_hard_first", first, test_),
        ("_untrained", untrained, test_),
        ("_xor", easier, xor.sample(2048, seed + 1)),
    ):
        labels = torch.stack([data.easy, data.hard], -1)
        out["easy" + name], out["hard" + name] = _shares(net, data)
        if name != "_untrained":
            with torch.no_grad():
                right = ((net(data.inputs) > 0).long() == labels).double().mean(0)
            out["accuracy_easy" + name], out["accuracy_hard" + name] = right.tolist()
    measure = FeatureVariance([2, 2])
    measure.update(test_.inputs, torch.stack([test_.easy, test_.hard], -1))
    out["easy_input"], out["hard_input"] = measure.compute()["share"].tolist()
    return {**out, **_read(plain, train, test_)}


def _shares(net: MLP, data: Pairs) -> list[float]:
    labels = torch.stack([data.easy, data.hard], -1)
    found = ac.wrap(net).fold([(data.inputs, labels)], {SITE: FeatureVariance([2, 2])}, pool="flat")
    return found[SITE].compute()["share"].tolist()


def _fit(net: MLP, data: Pairs, steps: int, seed: int, weights: tuple[float, float] = (1.0, 1.0)) -> None:
    weight = torch.tensor(weights)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(out, target, reduction="none") * weight).sum(-1).mean()

    fit(net, data.inputs, torch.stack([data.easy, data.hard], -1).float(), steps=steps, loss=loss, seed=seed)


def _read(net: MLP, train: Pairs, held_out: Pairs) -> dict[str, float]:
    """How well a linear probe reads each feature, and how present similarity analysis finds it."""
    from sklearn.linear_model import LogisticRegression

    model = ac.wrap(net)
    fitted, shown = (model.record(data.inputs[:1024], SITE)[SITE] for data in (train, held_out))
    out = {}
    for name in ("easy", "hard"):
        probe = LogisticRegression(max_iter=500).fit(fitted.numpy(), getattr(train, name)[:1024].numpy())
        out[f"probe_{name}"] = float(probe.score(shown.numpy(), getattr(held_out, name)[:1024].numpy()))
    labels = torch.stack([held_out.easy, held_out.hard], -1)[:300]
    out["rsa_easy"], out["rsa_hard"] = feature_rsa(shown[:300], labels).tolist()
    return out


ENTRY = Entry(
    number=141,
    slug="representation-bias",
    title="Learned feature representations are biased by complexity, learning order, position, and more",
    kind="phenomenon",
    home="actome.measures.FeatureVariance",
    claim="In an MLP that tells a bit and the parity of four bits perfectly, the bit has a share of the last hidden "
    "layer's variance larger by 0.1 (mean of 5 seeds); learning the parity first at least halves that gap.",
    test=test,
    takes={"smoke": "about 5 seconds", "small": "about half a minute"},
    open="Prevalence and output position (the generator has both) are not tested.",
)
