"""Runs that a watched training could have written, made in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actome.dynamics import RunStore, RunWriter

CONFIG = {"lr": 3e-4, "layers": 6, "optimizer": "AdamW", "data": {"name": "corpus", "rows": 10_000}}


def training(
    run: RunWriter, steps: int, *, first: int = 0, layers: int = 6, heads: int = 4, every: int = 10
) -> Iterator[int]:
    """Logs one step at a time, as `actome.watch` does: scalars at each, the panel at every so-manieth."""
    rng = np.random.default_rng(first)
    for step in range(first, first + steps):
        t = step / 1000
        loss = 2.2 + 6.5 * np.exp(-3 * t) + 0.15 * rng.standard_normal()
        run.log(step, {"loss": loss, "loss/aux": 0.02 * loss, "lr": 3e-4 * min(1.0, step / 100), "step_time": 0.31})
        if step % every == 0:
            grow = np.exp(2.5 * t)
            parts = ["embed", *(f"blocks.{n}.{part}" for n in range(layers) for part in ("attn", "mlp")), "unembed"]
            run.log(step, {"grad_norm": 1.1 + 0.3 * rng.random(), "update_ratio": 1e-3, "overhead": 0.021})
            for n, part in enumerate(parts):
                norms = {"grad_norm": 0.2 + 0.1 * rng.random(), "weight_movement": n * t, "weight_norm": 30.0 + n}
                run.log(step, norms, site=part)
            for layer in range(layers):
                hot = 3 + grow * (layer == 3)
                run.log(step, {"attention_logit_max": hot}, site=f"blocks.{layer}.attn.scores", layer=layer)
                run.log(step, {"dead": 0.02 * layer * t}, site=f"blocks.{layer}.mlp.act", layer=layer)
                ranks = {"effective_rank_share": 0.6 - 0.05 * layer, "rms": 1.0 + layer, "massive_ratio": 20.0 * grow}
                run.log(step, ranks, site=f"blocks.{layer}.resid.post", layer=layer)
                for head in range(heads):
                    seen = {"induction": min(1.0, t * (head == 2) + 0.02), "sink_excess": 0.3 + 0.1 * head}
                    run.log(step, seen, site=f"blocks.{layer}.attn.pattern", layer=layer, head=head)
            run.log(step, {"max_logit": 12 + t, "log_z": 3.1}, site="logits")
        yield step


def written(path: Path, steps: int = 500, *, alarms: bool = True, **shape: int) -> Path:
    """A run that has ended, with what alarms and events there may be."""
    with RunStore.create(path, config=CONFIG, seed=3) as run:
        for step in training(run, steps, **shape):
            if step == 100:
                run.event("checkpoint", step, path="step100.pt")
            if alarms and step in (200, 300, 400):
                run.alarm(
                    step,
                    "attention_logit_growth",
                    f"The largest attention logit has doubled in {step // 2} steps and will cross 50 at {3 * step}.",
                    site="blocks.3.attn.scores",
                    level="critical" if step == 400 else "warning",
                    advice="Lower the learning rate, or put a norm on queries and keys.",
                    evidence={"attention_logit_max": 31.5, "crossing_step": 3 * step, "source": "Wortsman et al. 2023"},
                )
        if alarms:
            run.alarm(
                450, "dead_units", "12 % of the units of one layer never fire.", site="blocks.5.mlp.act", level="info"
            )
    return path
