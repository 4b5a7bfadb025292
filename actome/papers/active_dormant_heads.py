"""[155] Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs.

The paper shows that attention sinks, drained values and residual peaks come up together on the bigram-backcopy task,
where a head has work on a few trigger tokens and none elsewhere; that such a head does nothing where it is dormant; and
that ReLU attention, and SGD in the place of Adam, do without them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.core.load import wrap
from actome.dynamics.dormant_heads import ExtremeTokens, ablation_by_query, sink_emergence
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, Training, next_token_loss, train
from actome.tasks.backcopy import Backcopy
from actome.tasks.trials import trial_seeds

LENGTH, BATCH = 32, 32
DOMAINS = ("ordinary", "trigger")


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, deep_steps, count = (60, 20, 1) if scale == "smoke" else (1000, 400, 3)
    seeds = trial_seeds(seed, count)[:1]
    worlds = [Backcopy(seed=one % 2**31) for one in seeds]
    held = [world.sample(256, LENGTH, seed=one % 2**31 + 7) for world, one in zip(worlds, seeds, strict=True)]
    for w,h,s in zip(worlds,held,seeds):
        for att in ("softmax","relu"):
            t=_run(w,s,steps,attention=att)
            f=ExtremeTokens(DOMAINS,normalise=att!="softmax").measure(wrap(t.module),h,labels(w,h))
            print(att,t.seconds,float(next_token_loss(t.module,h))-w.floor(h), f.round(3).to_dict("records"), ablation_by_query(wrap(t.module),h,labels(w,h),DOMAINS).round(3).to_dict("records"))
            if att=="softmax":
                tr=ExtremeTokens(DOMAINS).trace(t,h,labels(w,h)); print(tr.round(3).to_string())
                e=sink_emergence(tr,"ordinary",permutations=19); print(e, e.growth, e.control)
        a=_run(w,s,deep_steps,layers=3,mlp="plain"); b=_run(w,s,deep_steps,layers=3,mlp="plain",sgd=0.5)
        for t in (a,b):
            print("deep",t.seconds,[(st, round(float(next_token_loss(t.at(st),h))-w.floor(h),3),ExtremeTokens(DOMAINS).measure(wrap(t.at(st)),h,labels(w,h)).residual_peak.round(2).tolist()) for st in list(t.checkpoints)[8::3]])
    return {}, {}, {}


def labels(world: Backcopy, tokens: Tensor) -> Tensor:
    """1 at triggers and 0 at ordinary tokens."""
    return world.is_trigger(tokens).long()


def _run(world: Backcopy, seed: int, steps: int, *, sgd: float = 0.0, **shape: Any) -> Training:
    options = {"layers": 1, "mlp": "none", **shape}
    config = SubjectConfig(vocab=world.vocab, d_model=64, heads=1, context=LENGTH, **options)
    optimizer = (lambda groups: torch.optim.SGD(groups, sgd, momentum=0.9)) if sgd else None
    kept = sorted({0, *np.unique(np.geomspace(5, steps, 24).round().astype(int)).tolist()})
    return train(
        Subject.fresh(config, seed % 2**31), world.sample(steps * BATCH, LENGTH, seed=seed % 2**31), batch_size=BATCH,
        lr=3e-3, schedule="constant", optimizer=optimizer, checkpoints=kept, seed=seed % 2**31,
    )  # fmt: skip
