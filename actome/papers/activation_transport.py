"""[220] Controlling Language and Diffusion Models by Transporting Activations.

The paper steers by a map for each unit that carries its activations from their distribution on source examples to that
on target examples, with a strength from 0 to 1, layer after layer.

Tested in three parts. Exact: Gaussian units with known means and spreads, judged on new draws against the parameters
themselves, once from samples and once from two streams whose quantiles were merged; pairs by index instead of by order
are the control. Dialect: a subject that learnt two personas which say the same in different words; maps lead from
prompts of the good persona to those of the bad one, and are judged on other questions. They are compared with maps that
were all fitted at once, with addition of a vector at an equal rate of bad words, and with maps of shuffled labels.
Diffusion: a denoiser of spots on two rings; maps lead from the inner to the outer ring, fitted on all steps of drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.load import wrap
from actome.core.model import Model
from actome.papers.registry import Entry, Scale
from actome.steer import ActivationTransport, Contrast, Examples, Quantiles, Transport
from actome.steer.transport import unit_maps
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.diffusion2d import INNER, OUTER, Denoiser, Rings2D, draw
from actome.tasks.persona import BAD, GOOD, PersonaWorld
from actome.tasks.trials import over_seeds, trial_seeds

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SITES, LAST = "blocks.*.{attn,mlp}.out", "blocks.2.resid.post"
ADDED = tuple(i / 8 for i in range(2, 41))  # multiples of the gap between the two sets' means
UNITS = 8


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    smoke = scale == "smoke"
    count, steps, moves, many = (1, 20, 20, 2000) if smoke else (3, 400, 1500, 40000)

    def trial(one: int) -> dict[str, float]:
        a, b, c = (each % 2**31 for each in trial_seeds(one, 3))
        return _exact(a, many) | _dialect(b, steps) | _diffusion(c, moves)

    each = over_seeds(trial, seed, count)
    mean = {name: sum(values) / count for name, values in each.items()}
    control = {name: mean.pop(name) for name in list(mean) if name.startswith("control")}
    shown = ("bad_1", "content_1", "distance", "added_content", "style_1")
    figures = {**mean, "seeds": {name: each[name] for name in shown}}
    bad = [mean[f"bad_{lam:g}"] for lam in STRENGTHS]
    style = [mean[f"style_{lam:g}"] for lam in STRENGTHS]
    checks = {
        "Gaussian units come within 0.02 of the target's mean (in its spreads) and spread, from samples and merged "
        "streams": max(mean[f"{part}_{what}"] for part in ("exact", "merged") for what in ("mean", "spread")) <= 0.02,
        "the map of means alone leaves the spread as it was, within 0.02": mean["exact_spread_of_mean_map"] <= 0.02,
        "the rate of bad words rises with the strength, from below 0.15 to at least 0.8": bad[0] < 0.15
        and bad[-1] >= 0.8
        and bad == sorted(bad),
        "maps fitted in order leave the last states no farther from the target's than those fitted at once": (
            mean["distance"] <= mean["distance_at_once"]
        ),
        "content falls by less than 0.1": mean["content_0"] - mean["content_1"] < 0.1,
        "and by less than when a vector is added to an equal rate": mean["content_1"] > mean["added_content"],
        "maps of shuffled labels bring at most 0.3 of the rate": control["control_shuffled_bad"] <= 0.3 * bad[-1],
        "drawn points change ring with the strength, from at most 0.05 to at least 0.8, content 0.9": style[0] <= 0.05
        and style[-1] >= 0.8
        and style == sorted(style)
        and mean["diffusion_content"] >= 0.9,
    }
    return figures, control, checks


# -- Gaussian units


def _exact(seed: int, count: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    means, spreads = torch.randn(2, 1, UNITS, generator=generator), torch.rand(2, 1, UNITS, generator=generator) + 0.5
    source, target, fresh = (means[i] + spreads[i] * torch.randn(count, UNITS, generator=generator) for i in (0, 1, 0))

    def off(factor: Tensor, offset: Tensor, name: str) -> dict[str, float]:
        moved = fresh * factor + offset
        wide = moved.std(0) / spreads[1, 0]
        return {
            f"{name}_mean": float(((moved.mean(0) - means[1, 0]) / spreads[1, 0]).abs().mean()),
            f"{name}_spread": float((wide - 1).abs().mean()),
        }

    streams = []
    for x in (source, target):
        halves = [Quantiles(), Quantiles()]
        for half, part in zip(halves, x.chunk(2), strict=True):
            for some in part.split(500):
                half.update(some)
        halves[0].merge(halves[1])
        streams.append(halves[0])
    linear = unit_maps(source, target, "linear")
    factor, offset = unit_maps(source, target, "mean")
    kept = float(((fresh * factor + offset).std(0) / spreads[0, 0] - 1).abs().mean())
    a, b = source - source.mean(0), target - target.mean(0)
    by_index = (a * b).sum(0) / (a * a).sum(0)
    unsorted = off(by_index, target.mean(0) - by_index * source.mean(0), "by_index")
    return {
        **off(*linear, "exact"),
        **off(*unit_maps(streams[0], streams[1], "linear"), "merged"),
        "exact_spread_of_mean_map": kept,
        "control_spread_by_index": unsorted["by_index_spread"],
    }


# -- a dialect


def _dialect(seed: int, steps: int) -> dict[str, float]:
    data, init, order = (one % 2**31 for one in trial_seeds(seed, 3))
    world = PersonaWorld(system=0.5, seed=data)
    text = world.pretrain_stream(32 * steps, 6, seed=data)
    config = SubjectConfig(vocab=world.vocab, d_model=64, heads=4, layers=3, context=32)
    subject = Subject.fresh(config, seed=init)
    train(subject, (text.tokens, text.answers), batch_size=32, lr=3e-3, seed=data)
    model = wrap(subject)

    good, bad = (world.probe(system=system) for system in (GOOD, BAD))
    shuffled = torch.randperm(len(good.prompts), generator=torch.Generator().manual_seed(order))
    fit, asked = shuffled.chunk(2)
    examples = Examples(bad.prompts[fit], good.prompts[fit])
    target = model.record(bad.prompts[asked], LAST)[LAST][:, -1].float()

    def judge(rows: Tensor, clamps: Sequence[Clamp]) -> dict[str, float]:
        prompts = good.prompts[rows]
        with model.clamp(*clamps) if clamps else nullcontext():
            chance = model.logits(prompts)[:, -1].float().softmax(-1)
            last = model.record(prompts, LAST)[LAST][:, -1].float()
        said = [chance.gather(1, words[rows, None])[:, 0] for words in (good.good, good.bad)]
        apart = (last.sort(0).values - target.sort(0).values).abs().mean(0) / target.std(0)
        return {
            "bad": float((said[1] / (said[0] + said[1])).mean()),
            "content": float((said[0] + said[1]).mean()),
            "distance": float(apart.mean()),
            "spread": float((last.std(0) / target.std(0)).log().abs().mean()),
        }

    def fitted(data: Examples, **options: Any) -> list[Transport]:
        return ActivationTransport(SITES, **{"over": "last", "batch_size": 64, **options}).fit(model, data)

    maps = fitted(examples)
    figures: dict[str, float] = {}
    for lam in STRENGTHS:
        found = judge(asked, [one.at(scale=lam) for one in maps])  # type: ignore[call-arg]
        figures |= {f"bad_{lam:g}": found["bad"], f"content_{lam:g}": found["content"]}
    figures |= {"distance": found["distance"], "spread": found["spread"]}
    figures["distance_bare"] = judge(asked, [])["distance"]
    at_once = judge(asked, fitted(examples, sequential=False))
    figures |= {f"{name}_at_once": at_once[name] for name in ("distance", "content", "bad")}
    means, wide = judge(asked, fitted(examples, kind="mean")), judge(asked, fitted(examples, support=False))
    figures |= {"spread_of_means": means["spread"], "content_of_means": means["content"]}
    pooled = judge(asked, fitted(examples, over="mean"))
    for name in ("bad", "content", "spread"):
        figures |= {f"{name}_without_support": wide[name], f"{name}_of_pooled_tokens": pooled[name]}

    added = _added(model, examples, lambda clamps: judge(asked, clamps), found["bad"])
    figures |= {f"added_{name}": value for name, value in judge(asked, [added]).items()}
    swap = torch.rand(len(fit), 1, generator=torch.Generator().manual_seed(order + 1)) < 0.5
    one, other = bad.prompts[fit], good.prompts[fit]
    mixed = Examples(one.where(swap, other), other.where(swap, one))
    figures["control_shuffled_bad"] = judge(asked, fitted(mixed))["bad"]
    return figures


def _added(model: Model, examples: Examples, judge: Any, rate: float) -> Clamp:
    """Of vectors that bring an equal rate the one that keeps most content, chosen on the judged questions."""
    found = Contrast("blocks.*.resid.post", over="last", batch_size=64).fit(model, examples)
    best: tuple[float, float, Clamp] | None = None
    for site in found.directions or {}:
        for strength in ADDED:
            one = found.to(site, strength)
            got = judge([one])
            reached = min(got["bad"], rate)
            if best is None or (reached, got["content"]) > best[:2]:
                best = (reached, got["content"], one)
            if got["bad"] >= rate:
                break
    assert best is not None
    return best[2]


# -- diffusion


def _diffusion(seed: int, steps: int) -> dict[str, float]:
    world = Rings2D()
    net = Denoiser(world, seed=seed)
    train(net, world.noised(steps * 256, seed), batch_size=256, lr=3e-3, seed=seed)
    model = wrap(net)
    contents = torch.arange(world.contents).repeat(60)
    inner, outer = (world.condition(contents, torch.full_like(contents, style)) for style in (INNER, OUTER))

    def seen(condition: Tensor, site: str, clamps: Sequence[Clamp], noise: int) -> Quantiles:
        """What a site gives over all steps of drawing."""
        found = Quantiles()

        def denoise(x: Tensor) -> Tensor:
            found.update(model.record(x, site)[site].float())
            return net(x)

        with model.clamp(*clamps) if clamps else nullcontext():
            draw(denoise, condition, noise)
        return found

    def fitted(kind: Any, in_order: bool) -> list[Transport]:
        maps: list[Transport] = []
        for i in range(len(net.net.act)):
            site = f"module:net.act.{i}"
            source = seen(inner, site, maps if in_order else [], seed + 1)
            maps.append(Transport.between(site, source, seen(outer, site, [], seed + 2), kind))
        return maps

    def judge(clamps: Sequence[Clamp]) -> tuple[float, float, float]:
        with model.clamp(*clamps) if clamps else nullcontext():
            points = draw(net, inner, seed + 3)
        found, styles = world.read(points)
        return float(styles.float().mean()), float((found == contents).float().mean()), float(points.norm(dim=1).mean())

    maps = fitted("linear", True)
    figures: dict[str, float] = {}
    for lam in STRENGTHS:
        style, content, radius = judge([one.at(scale=lam) for one in maps])  # type: ignore[call-arg]
        figures |= {f"style_{lam:g}": style, f"radius_{lam:g}": radius}
    return {
        **figures,
        "diffusion_content": content,
        "style_at_once": judge(fitted("linear", False))[0],
        "style_of_means": judge(fitted("mean", True))[0],
    }


ENTRY = Entry(
    number=220,
    slug="activation-transport",
    title="Controlling Language and Diffusion Models by Transporting Activations",
    kind="method",
    home="actome.steer.ActivationTransport",
    claim="Gaussian units come within 0.02 of the target's mean and spread; in a dialect the rate of bad words rises "
    "with the strength from below 0.15 to at least 0.8, content falls by less than 0.1 and less than under addition at "
    "an equal rate, maps fitted in order leave the last states no farther from the target's than those fitted at once, "
    "and shuffled labels bring at most 0.3 of it; points of a diffusion model change ring and keep their content.",
    test=test,
    takes={"smoke": "seconds", "small": "about a minute"},
    open="Language and image models of use; toxicity, truthfulness and concepts; maps of attention in diffusion.",
)
