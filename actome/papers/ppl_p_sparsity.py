"""[5] Sparsing Law: Towards Large Language Models with Greater Activation Sparsity.

The paper's number for the sparsity of any activation function: the share of MLP units that can be silenced, token by
token and with an equal relative error in all layers, before perplexity rises by p %. By it ReLU models are sparser than
SiLU models at the same loss, and it falls and rises with training data in a way that counting zeros does not show.

Tested on gated two-layer models trained on topic-bigram text. Thresholds are fitted on other text than perplexity and
shares are measured on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actome.core.load import wrap
from actome.core.model import Model
from actome.measures.cett import cett
from actome.measures.ppl_sparsity import ppl_sparsity, silenced
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, Training, train
from actome.tasks.topic_bigram import TopicBigram
from actome.tasks.trials import trial_seeds

ACTS = ("relu", "silu")
LENGTH, BATCH, KEPT = 32, 16, 0.3
# Steps at which the activation ratio of the ReLU model is followed.
TREND = (0, 100, 200, 400, 700, 1000, 1500, 2000)


def test(seed: int, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], dict[str, bool]]:
    steps, count, fine, rows = (40, 1, 0.05, 16) if scale == "smoke" else (2000, 3, 1e-3, 64)
    trend = [step for step in TREND if step < steps] + [steps]
    figures: dict[str, Any] = {"steps_of_trend": trend, "ratio_trend_relu": []}
    control: dict[str, Any] = {}
    for one in trial_seeds(seed, count):
        world = TopicBigram(seed=one)
        corpus, calibration, heldout = (
            world.sample(sequences, LENGTH, seed=one + i).tokens
            for i, sequences in enumerate((steps * BATCH, rows, 2 * rows), start=1)
        )
        _add(control, {"loss_floor": world.bayes_floor(heldout)})
        for act in ACTS:
            training = _trained(world.vocab, act, corpus, one, trend)
            model = wrap(training.module)
            _add(figures, {f"{name}_{act}": value for name, value in _rules(model, calibration, heldout, fine).items()})
            fresh = wrap(training.at(0))
            _add(control, {f"ratio_untrained_{act}": _ratio(fresh, calibration, heldout, fine)})
            if act == "relu":
                ratios = [_ratio(wrap(training.at(step)), calibration, heldout, fine) for step in trend]
                figures["ratio_trend_relu"].append(ratios)
    relu, silu = figures["ratio_relu"], figures["ratio_silu"]
    losses = zip(figures["loss_relu"], figures["loss_silu"], strict=True)
    checks = {
        "ReLU keeps a smaller share than SiLU at p = 1, every seed": all(
            a < b for a, b in zip(relu, silu, strict=True)
        ),
        "their losses are within 0.06 nats, every seed": all(abs(a - b) <= 0.06 for a, b in losses),
        "at 30 % kept of the SiLU model, equal CETT raises the loss less than one threshold for all, mean over seeds": (
            _mean(figures["rise_cett_silu"]) < _mean(figures["rise_fat_silu"])
        ),
        "a smaller share is kept at p = 5 than at p = 1, every model": all(
            a < b for act in ACTS for a, b in zip(figures[f"ratio_p5_{act}"], figures[f"ratio_{act}"], strict=True)
        ),
        "the ReLU model ends at 0.7 times its peak or less, mean over seeds": _mean(
            [ratios[-1] / max(ratios) for ratios in figures["ratio_trend_relu"]]
        )
        <= 0.7,
        "untrained MLPs can be dropped altogether": max(
            control["ratio_untrained_relu"] + control["ratio_untrained_silu"]
        )
        == 0.0,
    }
    return figures, control, checks


def _trained(vocab: int, act: str, corpus: Tensor, seed: int, checkpoints: list[int]) -> Training:
    config = SubjectConfig(vocab=vocab, d_model=32, layers=2, heads=2, context=LENGTH, d_mlp=256, mlp="gated", act=act)
    subject = Subject.fresh(config, seed=seed)
    return train(subject, corpus, batch_size=BATCH, checkpoints=checkpoints if act == "relu" else [0], seed=seed)


def _ratio(model: Model, calibration: Tensor, heldout: Tensor, fine: float) -> float:
    return ppl_sparsity(model, calibration, heldout, tolerance=fine, batch_size=128).mean_kept


def _rules(model: Model, calibration: Tensor, heldout: Tensor, fine: float) -> dict[str, float]:
    """Activation ratios at p = 1 and 5, the loss, the share of nonzero units, and what each rule costs at 30 % kept."""
    curves = cett(model, calibration, batch_size=128)
    one, five = (ppl_sparsity(model, curves, heldout, p=p, tolerance=fine, batch_size=128) for p in (1.0, 5.0))
    options = {"kept": KEPT, "gates": "module:blocks.*.mlp.act", "batch_size": 128}
    rules = {rule: silenced(model, calibration, heldout, rule, **options) for rule in ("cett", "fat", "topk", "zero")}
    return {
        "loss": one.dense_loss,
        "ratio": one.mean_kept,
        "ratio_p5": five.mean_kept,
        "nonzero": rules["zero"].mean_kept,
        **{f"rise_{rule}": rules[rule].loss - rules[rule].dense_loss for rule in ("cett", "fat", "topk")},
        **{f"kept_{rule}": rules[rule].mean_kept for rule in ("cett", "fat", "topk")},
    }


def _add(figures: dict[str, Any], new: dict[str, float]) -> None:
    for name, value in new.items():
        figures.setdefault(name, []).append(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


ENTRY = Entry(
    number=5,
    slug="ppl-p-sparsity",
    title="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
    kind="measure",
    home="actome.measures.ppl_sparsity",
    claim="At a perplexity rise of 1 % a ReLU model keeps a smaller share of its MLP units active than a SiLU model of "
    "equal loss, every seed; at 30 % kept, thresholds of equal CETT cost less than one threshold for all layers; more "
    "can be silenced at p = 5; the ReLU model's share falls to 0.7 times its peak or less in training.",
    test=test,
    takes={"smoke": "about 5 seconds", "small": "two to five minutes"},
    open="The fits of the share against training data and against the width-to-depth ratio.",
)
