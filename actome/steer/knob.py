"""A knob: one direction at one site that decides between two ways to answer, found by swapping it between inputs.

Letters: N inputs, B batch, T position, D width of the site, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actome.clamps import SetCoordinate
from actome.core.errors import MeasureError
from actome.core.tokens import encode
from actome.tasks.trials import auroc

from .states import count, subset

if TYPE_CHECKING:
    from actome.core.model import Model


@dataclass(frozen=True, eq=False)
class RankOneSubspace:
    """One direction that holds an intent, as `RankOneDAS` found it.

    Attributes:
        site, pos: where it is.
        unit: (D), of length one, float32.
        means: by intent, the mean coordinate of inputs that have it, in units of `unit`.
        losses: cross-entropy by step of the fit, in nats.
    """

    site: str
    unit: Tensor
    means: Mapping[str, float]
    losses: Tensor
    pos: int = -1
    batch_size: int = 64

    def knob(self, intent: str, scale: float = 1.0) -> SetCoordinate:
        """A clamp that turns a model to one intent: it sets the coordinate to the intent's mean, whatever the input.

        It works on the model that it was fitted on, with no intent in the input, and can be tried on relatives that
        have the same site. ``save_clamps`` keeps it.

        Args:
            intent: one of those of the fit.
            scale: the share of the way.

        Raises:
            MeasureError: an intent that the fit did not have.
        """
        if intent not in self.means:
            raise MeasureError(f"there is no intent {intent!r}; the fit had {', '.join(self.means)}")
        return SetCoordinate(self.site, self.unit, self.means[intent], scale, positions=self.pos)

    def coordinates(self, model: Model, inputs: Any) -> Tensor:
        """Where inputs lie along the direction, (N), float32."""
        return _states(model, self.site, self.pos, inputs, self.batch_size) @ self.unit

    def separation(self, model: Model, inputs: Any, kinds: Sequence[str]) -> float:
        """How well the coordinate tells inputs of two intents apart, or inputs that are answered by either.

        Args:
            model: need not be the one of the fit.
            inputs: texts or token ids.
            kinds: of each, one of the two intents of the fit.

        Returns:
            The chance that one of the intent with the higher mean lies above one of the other: 1 for all, 0.5 for
            nothing, below it for the wrong way round; NaN when one intent is missing.

        Raises:
            MeasureError: not one kind for each input, or other kinds than the intents of the fit.
        """
        if len(kinds) != count(inputs):
            raise MeasureError(f"{count(inputs)} inputs and {len(kinds)} kinds; give one kind for each")
        if not set(kinds) <= set(self.means) or len(self.means) != 2:
            raise MeasureError(f"kinds {', '.join(sorted(set(kinds)))} are not of two intents {', '.join(self.means)}")
        high = max(self.means, key=lambda one: self.means[one])
        return auroc(self.coordinates(model, inputs), [one == high for one in kinds])


@dataclass(frozen=True)
class RankOneDAS:
    r"""Fits the direction whose swap makes a model give the other answer: rank-1 distributed alignment search.

    Of a *base* input with one intent and a *source* input with the other, about something else, the source's coordinate
    along u takes the place of the base's, :math:`h' = h - u u^\top h + u u^\top h_{src}`; u is trained, by
    cross-entropy and nothing else, to make the model give the answer that the base input would have under the source's
    intent. The model stays as it is.

    Args:
        site: where; one with a vector a token.
        pos: the position that is changed, from each row's first real token or, negative, from its last. The answer is
            read after the last one.
        epochs, lr, batch_size: of training by Adam; u is brought back to length one after each step.
        seed: of the first u and the order of pairs.

    A source must not have the base's wanted answer: otherwise copying the answer would do as well as taking over the
    intent. Pairs should be of inputs that the model answers right under both intents.

    Source: Minder et al. 2025, Controllable Context Sensitivity and the Knob Behind It (the subspace and the knob);
    Geiger et al. 2024, Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations (the search).

    >>> import actome as ac
    >>> model = ac.demo()
    >>> base, source = ["import os", "The cat", "def f(x):", "It is a"], ["The dog", "import re", "You can", "x = [1]"]
    >>> found = RankOneDAS("blocks.2.resid.post", epochs=1).fit(
    ...     model, base, source, labels=[5, 6, 5, 6], intents=["text", "code", "text", "code"])
    >>> round(float(found.unit.norm()), 4), sorted(found.means), found.knob("code").site
    (1.0, ['code', 'text'], 'blocks.2.resid.post')
    """

    site: str
    pos: int = -1
    epochs: int = 2
    lr: float = 1e-2
    batch_size: int = 64
    seed: int = 0

    def fit(
        self,
        model: Model,
        base_inputs: Any,
        source_inputs: Any,
        labels: Sequence[int] | Tensor,
        *,
        intents: Sequence[str],
    ) -> RankOneSubspace:
        """The direction, and the mean coordinate of each intent.

        Args:
            model: answers with one token after the last of an input.
            base_inputs, source_inputs: texts or token ids, in pairs.
            labels: (N) token ids: what the base input should be answered under its source's intent.
            intents: of each source.

        Raises:
            MeasureError: numbers that differ, or fewer than two intents.
            TextError: a label that is no token id of the model.
            SiteError: a site that the model does not have, or several.
        """
        labels_N = torch.as_tensor(labels, dtype=torch.long)
        N = len(labels_N)
        if not (count(base_inputs) == count(source_inputs) == len(intents) == N) or not N:
            raise MeasureError(
                f"{count(base_inputs)} base inputs, {count(source_inputs)} sources, {N} labels and {len(intents)} "
                "intents; give as many of each, at least one"
            )
        if len(set(intents)) < 2:
            raise MeasureError(f"all sources have the intent {intents[0]!r}; give pairs for two intents")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise MeasureError(f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr} must be above zero")
        model.check_ids(labels_N, "label")
        source_ND = _states(model, self.site, self.pos, source_inputs, self.batch_size)
        unit_D, losses = self._trained(model, base_inputs, source_ND, labels_N)
        along_N = source_ND @ unit_D
        means = {
            intent: float(along_N[torch.tensor([one == intent for one in intents])].mean())
            for intent in dict.fromkeys(intents)
        }
        return RankOneSubspace(self.site, unit_D, means, losses, self.pos, self.batch_size)

    def _trained(self, model: Model, base: Any, source_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        unit = F.normalize(torch.randn(source_ND.shape[1], generator=generator), dim=0).requires_grad_()
        adam = torch.optim.Adam([unit], lr=self.lr)
        frozen = [p for p in model.module.parameters() if p.requires_grad]
        losses = []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            for _ in range(self.epochs):
                for part in torch.randperm(len(labels_N), generator=generator).split(self.batch_size):
                    # Both sides by u of length one: a gradient along u would be turned aside by Adam's scaling.
                    along_B = source_ND[part] @ F.normalize(unit, dim=0)
                    swap = SetCoordinate(self.site, unit, along_B[:, None], positions=self.pos)
                    with model.clamp(swap):
                        logits_BV = _last_logits(model, subset(base, part.tolist()))
                    loss = F.cross_entropy(logits_BV, labels_N[part].to(logits_BV.device))
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                    with torch.no_grad():
                        unit /= unit.norm()
                    losses.append(loss.detach().cpu())
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return unit.detach(), torch.stack(losses)


def _last_logits(model: Model, inputs: Any) -> Tensor:
    """Logits after each row's last real token, (B, V), float32, with the graph where there is one."""
    batch = encode(inputs, model.tokenizer)
    logits_BTV = model.logits(batch, grad=True)
    if batch.mask is None:
        return logits_BTV[:, -1].float()
    last_B = batch.mask.sum(1).to(logits_BTV.device) - 1
    return logits_BTV[torch.arange(len(last_B), device=last_B.device), last_B].float()


def _states(model: Model, site: str, pos: int, inputs: Any, batch_size: int) -> Tensor:
    """Each input's vector at one position of the site, (N, D), float32, on the CPU."""
    (name,) = [one.name for one in _one(model, site)]
    parts = []
    for at in range(0, count(inputs), batch_size):
        rows = subset(inputs, range(at, min(at + batch_size, count(inputs))))
        parts.append(model.record(encode(rows, model.tokenizer), name, positions=pos)[name][:, 0].float().cpu())
    return torch.cat(parts)


def _one(model: Model, site: str) -> Sequence[Any]:
    found = model.match(site)
    if len(found) != 1 or found[0].dims[:2] != ("batch", "pos") or len(found[0].dims) != 3:
        names = ", ".join(one.name for one in found[:4])
        raise MeasureError(f"{site!r} must be one site with a vector a token; it is {names}")
    return found
