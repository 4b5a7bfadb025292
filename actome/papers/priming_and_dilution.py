"""[93] How new data permeates LLM knowledge and how to dilute it.

The paper teaches a language model one surprising text at a time and finds that its keyword becomes likelier in contexts
that it has nothing to do with, the more so the less likely it was before; and that leaving out the largest updates, or
telling the fact by way of likelier words, leaks less.

Tested on a small model of short texts of eight themes, in which every attribute's probability is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from actome.dynamics.priming_scores import Fact, priming, priming_threshold, stepping_stone
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.theme_world import LINK, ThemeWorld
from actome.tasks.trials import null, spearman, trial_seeds
from actome.tune import IgnoreTopK

ROWS, EVERY, RATE = 16, 2, 3e-4
DOSES = (0.02, 0.32)  # beside 0.08; on every third fact
EARLIER = (1 / 3, 2 / 3)  # shares of the steps after which plain training is looked at as well


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    size, count = ((60, 9, 4), 1) if scale == "smoke" else ((800, 36, 30), 3)
    trials = [_trial(one % 2**31, *size) for one in trial_seeds(seed, count)]
    frames = {arm: [trial[arm] for trial in trials] for arm in trials[0]}
    correlation = {
        "near": _over(frames["plain"], lambda f: spearman(f.log_p_before, f.s_prime)),
        "far": _over(frames["plain"], lambda f: spearman(f.log_p_before, f.s_prime_far)),
        "near, log P after": _over(frames["plain"], lambda f: spearman(f.log_p_before, f.log_p_theme_after)),
    }
    medians = {arm: _over(of, lambda f: float(f.s_prime.median())) for arm, of in frames.items()}
    lower = {arm: [1 - a / b for a, b in zip(medians[arm], medians["plain"], strict=True)] for arm in medians}
    known = {arm: _over(of, lambda f: float(np.exp(f.log_p_after).mean())) for arm, of in frames.items()}
    price = {arm: [b - a for a, b in zip(known[arm], known["plain"], strict=True)] for arm in known}
    pooled = pd.concat(frames["plain"], ignore_index=True)
    bend = priming_threshold(pooled, permutations=199, resamples=100, seed=seed)
    figures = {
        "correlation_of_log_p_before_and_s_prime": correlation,
        "median_s_prime": medians,
        "median_s_prime_far": {arm: _over(of, lambda f: float(f.s_prime_far.median())) for arm, of in frames.items()},
        "mean_p_of_the_fact_after": known,
        "share_of_median_s_prime_taken_off": {arm: lower[arm] for arm in ("top8", "stone")},
        "p_of_the_fact_lost_by_top8": price["top8"],
        "top8_over_plain_s_prime_at_equal_p_of_the_fact": [_at_equal(trial) for trial in trials],
        "dose": _dose(frames),
        "bend_at_p": 10**bend.at,
        "bend_interval": [10**bend.low, 10**bend.high],
        "bend_p": bend.p,
        "least_p_before": float(np.exp(pooled.log_p_before.min())),
    }
    shuffled = [
        null(lambda a, b: -spearman(a, b), *(torch.tensor(f[name]) for name in ("log_p_before", "s_prime")), seed=seed)
        for f in frames["plain"]
    ]
    control = {
        "random8_share_taken_off": lower["random8"],
        "shuffled_pairs_p": [one.p for one in shuffled],
        "correlation_with_a_keyword_not_taught": _over(
            frames["plain"], lambda f: spearman(f.log_p_before, f.s_prime_null)
        ),
        "median_s_prime_of_a_keyword_not_taught": _over(frames["plain"], lambda f: float(f.s_prime_null.median())),
    }
    mean = {name: float(np.mean(runs)) for name, runs in correlation.items()}
    checks = {
        "the less likely the keyword, the more it primes its theme: Spearman -0.4 or less (mean)": mean["near"] <= -0.4,
        "and less clearly other themes": mean["near"] < mean["far"],
        "leaving out the top 8 % takes off 15 % or more of the median S_prime": float(np.mean(lower["top8"])) >= 0.15,
        "a random 8 % takes off less than 8 % (control)": float(np.mean(lower["random8"])) < 0.08,
        "a stepping stone lowers the median S_prime in every seed": min(lower["stone"]) > 0,
        "a keyword that was not taught is primed less, in every seed (control)": all(
            a < b for a, b in zip(control["median_s_prime_of_a_keyword_not_taught"], medians["plain"], strict=True)
        ),
        "at equal probability of the fact, top 8 % still leaks less than plain training stopped earlier": all(
            one < 1 for one in figures["top8_over_plain_s_prime_at_equal_p_of_the_fact"]
        ),
    }
    return figures, control, checks


def _trial(seed: int, pretraining: int, count: int, steps: int) -> dict[str, pd.DataFrame]:
    """A frame of `priming` for each arm."""
    world = ThemeWorld(seed=seed)
    config = SubjectConfig(vocab=world.vocab, d_model=48, heads=2, layers=1, context=world.context + 5)
    model = train(
        Subject.fresh(config, seed), world.sample(64 * pretraining, seed + 1), batch_size=64, seed=seed
    ).module
    pairs = [(theme, relation) for theme in range(world.themes) for relation in range(world.relations)]
    prefixes = {_name(*pair): world.prefixes(12, *pair, seed=seed + 2 + i) for i, pair in enumerate(pairs)}
    facts = _facts(world, count, seed)
    ordinary = world.sample(steps * ROWS, seed + 3).view(steps, ROWS, -1)

    def arm(samples: Sequence[Fact], wrapped: Callable[[Any], Any] = lambda plain: plain, upto: int = steps) -> Any:
        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return wrapped(torch.optim.Adam(parameters, RATE))

        return priming(
            model, samples, prefixes, upto, batches=lambda step: ordinary[step], every=EVERY, optimizer=make, seed=seed
        )

    def stepped(fact: Fact) -> Fact:
        relation = int(fact.theme.split()[1])
        ways = [torch.tensor([world.attribute(relation, i), LINK]) for i in range(world.attributes)]
        return stepping_stone(model, fact, ways)

    return {
        "plain": arm(facts),
        "top8": arm(facts, lambda plain: IgnoreTopK(plain, 0.08)),
        "random8": arm(facts, lambda plain: IgnoreTopK(plain, 0.08, choice="random", seed=seed)),
        "stone": arm([stepped(fact) for fact in facts]),
        **{f"plain, {share:.2f} of the steps": arm(facts, upto=round(share * steps)) for share in EARLIER},
        **{f"top{100 * k:.0f}": arm(facts[::3], lambda plain, k=k: IgnoreTopK(plain, k)) for k in DOSES},
    }


def _facts(world: ThemeWorld, count: int, seed: int) -> list[Fact]:
    """Facts whose keywords are spread over all ranks, in random themes and every relation in turn."""
    generator = torch.Generator().manual_seed(seed)
    facts = []
    for n in range(count):
        theme, relation = int(torch.randint(world.themes, (), generator=generator)), n % world.relations
        rank = world.attributes * n // count
        key, other = (
            world.attribute(relation, int((world.ranks[theme, relation] == one).nonzero()))
            for one in (rank, rank + 1 if rank + 1 < world.attributes else rank - 1)
        )
        far = tuple(_name(one, relation) for one in range(world.themes) if one != theme)
        context = world.prefixes(1, theme, relation, seed=seed + 1000 + n)[0]
        facts.append(Fact(context, torch.tensor([key]), _name(theme, relation), far, torch.tensor([other])))
    return facts


def _name(theme: int, relation: int) -> str:
    return f"{theme} {relation}"


def _over(frames: list[pd.DataFrame], figure: Callable[[pd.DataFrame], float]) -> list[float]:
    return [figure(frame) for frame in frames]


def _at_equal(trial: dict[str, pd.DataFrame]) -> float:
    """Median S_prime of top 8 % over that of plain training at the step at which it knows the facts as well.

    Between the steps looked at, log S_prime is taken on a straight line over the mean probability of the facts; before
    any step both are known: S_prime is 1.
    """
    plain = [trial[name] for name in trial if name.startswith("plain")]
    points = [(float(np.exp(f.log_p_after).mean()), float(np.log(f.s_prime.median()))) for f in plain]
    points = sorted([(float(np.exp(plain[0].log_p_before).mean()), 0.0), *points])
    top = trial["top8"]
    there = np.interp(float(np.exp(top.log_p_after).mean()), *zip(*points, strict=True))
    return float(top.s_prime.median() / np.exp(there))


def _dose(frames: dict[str, list[pd.DataFrame]]) -> dict[str, list[float]]:
    """Median S_prime on every third fact, by the share that is left out."""
    thirds = {"0": [f[::3] for f in frames["plain"]], "0.08": [f[::3] for f in frames["top8"]]}
    thirds |= {str(k): frames[f"top{100 * k:.0f}"] for k in DOSES}
    return {k: _over(thirds[k], lambda f: float(f.s_prime.median())) for k in sorted(thirds, key=float)}


ENTRY = Entry(
    number=93,
    slug="priming-and-dilution",
    title="How new data permeates LLM knowledge and how to dilute it",
    kind="phenomenon",
    home="actome.dynamics.priming",
    claim="Over facts of all ranks, Spearman of log P(keyword) before and S_prime is -0.4 or less within the theme and "
    "weaker in other themes; leaving out the top 8 % of updates takes 15 % off the median S_prime, a random 8 % less "
    "than 8 %; a stepping stone lowers it in every seed. Controls: a keyword that was not taught; equal knowledge.",
    test=test,
    takes={"smoke": "about 3 seconds", "small": "two and a half minutes"},
    open="The break near a probability of 1e-3 is out of this world's range (0.003 and up); pretrained models; chains "
    "of facts.",
)
