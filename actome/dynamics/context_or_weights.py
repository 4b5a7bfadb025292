"""Which of the two a model does: learn from its context, or answer from its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError
from actome.tasks.in_context_classification import InContextClassification, Labelled
from actome.tasks.losses import logits_of


@dataclass(frozen=True)
class ContextOrWeights:
    """Accuracies of a model that may answer from the context or from its weights.

    Attributes:
        icl: on novel classes, whose label only the context has.
        iwl: on known classes that the context does not show.
        swapped: on known classes whose labels were drawn anew: agreement with the context, against the weights.
        stored: the same prompts: agreement with the weights, against the context. A prompt whose drawn label happens
            to be the stored one counts for both.
        context_label: on the prompts of `icl`, how often the answer is one of the labels shown, right or wrong.
        target_label: on the prompts of `icl`, accuracy when only the labels shown are allowed as answers.
        chance: 1 / labels.
    """

    icl: float
    iwl: float
    swapped: float
    stored: float
    context_label: float
    target_label: float
    chance: float


def icl_iwl(
    module: nn.Module, world: InContextClassification, *, sequences: int = 1000, seed: int = 0,
    encode: Callable[[Labelled], Tensor] | None = None,
) -> ContextOrWeights:  # fmt: skip
    """Tests learning in context and in weights apart from one another.

    The three sets of prompts are drawn here and none is one that was trained on as long as the seed is another; the
    test of learning in context uses *novel* classes, so that nothing stored helps.

    Args:
        module: gives logits over the labels at the last position.
        world: that it was trained in, with fixed labels and a `dim`. Its burstiness may be 0; tests with the class in
            context then show it once.
        sequences: prompts of each test.
        seed: of the draws.
        encode: from prompts to what the module takes first (`inputs_embeds` of a subject with `d_in`); by default
            `InContextClassification.inputs` without positions.

    Raises:
        MeasureError: a world with redrawn labels or without a `dim`, or a module with another number of outputs.

    Source: Reddy 2024, The mechanistic basis of data dependence and abrupt learning in an in-context classification
    task (in-context and in-weights accuracy, context-label and target-label accuracy).

    Example:
        >>> from actome.tasks import Subject, SubjectConfig
        >>> world = InContextClassification(classes=64, labels=8, dim=16, mapping="fixed")
        >>> subject = Subject.fresh(SubjectConfig(vocab=8, d_in=16, d_model=16, heads=2, context=5))
        >>> 0 <= icl_iwl(subject, world, sequences=100).icl <= 1
        True
    """
    if world.mapping != "fixed" or not world.dim:
        raise MeasureError(
            f"a world of mapping={world.mapping!r} and dim={world.dim} has nothing to store, or no novel classes; give "
            "mapping='fixed' and a dim above 0"
        )
    encode = encode or world.inputs
    shown = replace(world, burstiness=world.burstiness or 1)
    absent = replace(world, burstiness=0)
    novel = shown.sample(sequences, seed, novel=True)
    hidden = absent.sample(sequences, seed + 1)
    swapped = shown.sample(sequences, seed + 2, redrawn=True)
    logits_BL = _logits(module, encode(novel), world.labels)
    seen_BL = torch.zeros(logits_BL.shape, dtype=torch.bool).scatter_(1, novel.labels[:, :-1], True)
    against = _logits(module, encode(swapped), world.labels).argmax(-1)
    return ContextOrWeights(
        icl=_share(logits_BL.argmax(-1) == novel.labels[:, -1]),
        iwl=_share(_logits(module, encode(hidden), world.labels).argmax(-1) == hidden.labels[:, -1]),
        swapped=_share(against == swapped.labels[:, -1]),
        stored=_share(against == world.mapping_table()[swapped.classes[:, -1]]),
        context_label=_share(seen_BL.gather(1, logits_BL.argmax(-1, keepdim=True))),
        target_label=_share(logits_BL.masked_fill(~seen_BL, -torch.inf).argmax(-1) == novel.labels[:, -1]),
        chance=1 / world.labels,
    )


def _logits(module: nn.Module, inputs: Tensor, labels: int) -> Tensor:
    name = getattr(module, "main_input_name", None) if inputs.is_floating_point() else None
    parameter = next(module.parameters(), None)
    inputs = inputs if parameter is None else inputs.to(parameter.device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            out = logits_of(module(**{name: inputs}) if name else module(inputs))
    finally:
        module.train(was_training)
    out = out[:, -1] if out.ndim == 3 else out
    if out.shape != (len(inputs), labels):
        raise MeasureError(
            f"the module gives {tuple(out.shape)} at the query, and the world has {labels} labels; want logits "
            f"{(len(inputs), labels)}"
        )
    return out.float().cpu()


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
