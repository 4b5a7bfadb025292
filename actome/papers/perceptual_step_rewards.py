"""[120] Unsupervised Perceptual Rewards for Imitation Learning.

The paper cuts a handful of demonstration videos into steps by the activations of a network that was trained for
something else, keeps the units that tell each step best, and gets a dense reward for new videos.

Tested on short films (reach for a handle, turn it, slide the door) with the activations of a small network that was
trained to tell number and shape of random objects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import actome as ac
from actome.measures import PerceptualReward, StepSegmenter
from actome.papers.registry import Entry, Scale
from actome.tasks.nets import CNN, fit
from actome.tasks.reach_turn_slide import ReachTurnSlide
from actome.tasks.trials import auroc, over_seeds, spearman

DEMOS, SUCCESSES, FAILURES = 5, 15, 15


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count = (150, 1) if scale == "smoke" else (800, 5)
    found = over_seeds(lambda one: _trial(one, steps), seed, count)
    figures = {
        "spearman_reward_progress": found["spearman"],
        "auroc_success": found["auroc"],
        "boundary_error_in_frames": found["boundary"],
        "boundary_error_of_even_cuts": found["boundary_even"],
        "boundary_error_piecewise_constant": found["boundary_constant"],
    }
    control = {
        "spearman_frames_shuffled_before_fitting": found["spearman_shuffled"],
        "auroc_frames_shuffled_before_fitting": found["auroc_shuffled"],
    }
    checks = {
        "mean Spearman of reward and true progress is at least 0.75": float(np.mean(found["spearman"])) >= 0.75,
        "success and failure are told by the final reward (AUROC at least 0.9)": float(np.mean(found["auroc"])) >= 0.9,
        "boundaries of piecewise constant films are found": max(found["boundary_constant"]) == 0,
        "control: fitted on shuffled frames the reward is constant or |Spearman| at most 0.3": max(
            map(abs, found["spearman_shuffled"])
        )
        <= 0.3,
    }
    return figures, control, checks


def _trial(seed: int, steps: int) -> dict[str, float]:
    world = ReachTurnSlide()
    objects = world.random_objects(4000, seed)
    net = CNN([1, 16, 32, 32], 16, pool=(0,), seed=seed)
    fit(net, objects.images, objects.kind * 4 + objects.number - 1, steps=steps, lr=3e-3, seed=seed)
    demos = world.sample(DEMOS, seed + 1)
    successes, failures = world.sample(SUCCESSES, seed + 2), world.sample(FAILURES, seed + 3, failures=1.0)
    model = ac.wrap(net)

    def units(frames_BTSS: Tensor) -> list[Tensor]:
        """Activations of both later convolutions on a 4x4 grid, (T, D) for each film."""
        B, T = frames_BTSS.shape[:2]
        recording = model.record(frames_BTSS.flatten(0, 1)[:, None], ["module:act.1", "module:act.2"])
        maps = [recording[site] for site in ("module:act.1", "module:act.2")]
        return list(torch.cat([F.adaptive_avg_pool2d(one, 4).flatten(1) for one in maps], 1).unflatten(0, (B, T)))

    shown = units(demos.frames)
    generator = torch.Generator().manual_seed(seed)
    mixed = [film[torch.randperm(len(film), generator=generator)] for film in shown]
    tested = units(torch.cat([successes.frames, failures.frames]))
    progress = torch.cat([successes.progress, failures.progress])
    won = torch.cat([successes.success, failures.success])
    out = {}
    for name, fitted in (("", shown), ("_shuffled", mixed)):
        reward = PerceptualReward(3, min_len=world.shortest).fit(fitted)
        scores = [reward.score(film) for film in tested]
        correlations = [spearman(s, p) for s, p in zip(scores[:SUCCESSES], progress[:SUCCESSES], strict=True)]
        out[f"spearman{name}"] = float(np.nan_to_num(correlations).mean())  # a constant reward correlates with nothing
        out[f"auroc{name}"] = auroc([float(s[-1]) for s in scores], won.numpy())
        if not name:
            cuts = torch.tensor(reward.segmenter_.cuts_, dtype=torch.double)
    true = demos.lengths.cumsum(1)[:, :2]
    even = torch.tensor([demos.frames.shape[1] * part / 3 for part in (1, 2)])
    out["boundary"], out["boundary_even"] = float((cuts - true).abs().mean()), float((even - true).abs().mean())
    out["boundary_constant"] = _piecewise(world, seed, units)
    return out


def _piecewise(world: ReachTurnSlide, seed: int, units: Any) -> float:
    """Largest boundary error where each step is one still picture with camera noise."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.bucketize(torch.arange(30), torch.tensor([7, 19]), right=True)
    frames = world.render((step[None] + 0.5) / 3, torch.tensor([[-0.8, 0.5]]))
    frames = (frames + world.noise * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    cuts = StepSegmenter(3, min_len=4).fit(units(frames)).cuts_[0]
    return float(max(abs(cuts[0] - 7), abs(cuts[1] - 19)))


ENTRY = Entry(
    number=120,
    slug="perceptual-step-rewards",
    title="Unsupervised Perceptual Rewards for Imitation Learning",
    kind="method",
    home="actome.measures.PerceptualReward",
    claim="From 5 demonstrations and units trained on something else, the reward follows true progress of held-out "
    "films (Spearman at least 0.75) and tells success from failure (AUROC at least 0.9); fitted on shuffled frames it "
    "does not (|Spearman| at most 0.3).",
    test=test,
    takes={"smoke": "about 4 seconds", "small": "under a minute"},
    open="Using the reward in a reinforcement-learning loop is not covered; boundaries are tested on films that are "
    "piecewise constant only.",
)
