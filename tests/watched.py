"""Small trainings that are watched by hand: losses and norms of each step, a panel of measures at every tenth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import actome as ac
from actome.dynamics.alarms import Alarm, Alarms, Reading
from actome.measures import (
    ActivationScale,
    DeadUnits,
    EffectiveRank,
    NextTokenLoss,
    RepetitionFrequency,
    TokenCollapse,
)
from actome.tasks import Subject, SubjectConfig, next_token_loss
from actome.tasks.topic_bigram import TopicBigram

CONFIG = {"vocab": 32, "d_model": 32, "layers": 2, "heads": 2, "context": 32, "act": "relu"}
EVERY = 10


@dataclass
class Run:
    """What was read at each step, and what was told."""

    told: list[Alarm] = field(default_factory=list)
    readings: list[tuple[int, list[Reading]]] = field(default_factory=list)

    def of(self, name: str) -> list[Alarm]:
        return [alarm for alarm in self.told if alarm.name == name]

    @property
    def loud(self) -> list[Alarm]:
        return [alarm for alarm in self.told if alarm.level != "info"]


def rows(table: ac.MeasureTable) -> list[Reading]:
    """A measured table as readings."""
    return [
        Reading(
            one["measure"], float("nan") if one["value"] is None else one["value"], one["site"],
            *(one.get(place) for place in ("layer", "head", "unit", "expert")),
        )
        for one in table.records(units=True)
        if one["measure"] != "peak" or one["site"].endswith("mlp.act")
    ]  # fmt: skip


def panel(model: ac.Model, probe: Tensor) -> list[Reading]:
    """The numbers that a watch samples."""
    streams = [ActivationScale(), EffectiveRank(), TokenCollapse(skip=1)]
    found = rows(
        model.measure(
            probe,
            {
                "blocks.*.resid.post": streams,
                "blocks.*.mlp.act": [ActivationScale(), DeadUnits()],
                "logits": [NextTokenLoss(), RepetitionFrequency()],
            },
        )
    )
    scores = model.record(probe[:4], "blocks.*.attn.scores")
    for layer in range(CONFIG["layers"]):
        site = f"blocks.{layer}.attn.scores"
        real = scores[site].masked_fill(scores[site] < -1e30, 0.0).abs().amax((0, 2, 3))
        found += [Reading("attention_logit_max", float(top), site, layer, head) for head, top in enumerate(real)]
    return found


def norms(module: nn.Module) -> list[Reading]:
    """Gradient norms of each component and of the whole."""
    squares: dict[str, float] = {}
    for name, weight in module.named_parameters():
        if weight.grad is not None:
            part = ".".join(name.split(".")[:3]) if name.startswith("blocks.") else name.split(".")[0]
            squares[part] = squares.get(part, 0.0) + float(weight.grad.float().square().sum())
    each = [Reading("grad_norm", square**0.5, part) for part, square in squares.items()]
    return [Reading("grad_norm", sum(squares.values()) ** 0.5), *each]


def watched(
    seed: int, steps: int = 150, *, alarms: Alarms | None = None, lr: float = 3e-3, warmup: int = 15,
    plant: Callable[[int, nn.Module], None] | None = None, data: Callable[[int], Tensor] | None = None,
    seen: Tensor | None = None, heldout: Tensor | None = None, config: dict | None = None, every: int = EVERY,
) -> Run:  # fmt: skip
    """Trains a small subject on text of fresh topics and asks the alarms at each step.

    `plant` is called before each step. Each step: batch, loss, gradient, sample (of the weights before the update; also
    where the loss is not finite), update.
    """
    world = TopicBigram(vocab=32, seed=seed)
    module = Subject.fresh(SubjectConfig(**{**CONFIG, **(config or {})}), seed=seed)
    model = ac.wrap(module)
    probe = world.sample(16, 32, seed=10_000 + seed).tokens
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    alarms, run = alarms or Alarms(), Run()
    module.train()
    for step in range(steps):
        if plant is not None:
            plant(step, module)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        batch = data(step) if data is not None else world.sample(16, 32, seed=step + 1000 * (seed + 1)).tokens
        loss = next_token_loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        gradients = norms(module)
        found = [Reading("loss", float(loss.detach())), gradients[0]]
        if step % every == 0 or not loss.isfinite():
            found += gradients[1:] + panel(model, probe)
            for name, text in (("loss_seen", seen), ("loss_heldout", heldout)):
                if text is not None:
                    with torch.no_grad():
                        found.append(Reading(name, float(next_token_loss(module, text))))
        run.readings.append((step, found))
        run.told += alarms.update(step, found)
        optimizer.step()
    return run
