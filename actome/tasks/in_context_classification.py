"""Classification in context: exemplars with labels, then an exemplar to label.

Labels may be drawn anew for each sequence, so that only copying from the context works, or belong to their class for
good, so that they can be stored in the weights. How often the context shows the class asked for (burstiness), how many
classes there are and how much their exemplars vary decides which of the two a model learns.

Source: Reddy 2024, "The mechanistic basis of data dependence and abrupt learning in an in-context classification
task"; Singh et al. 2024, "What needs to go right for an induction head?" (labels redrawn).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded


class Labelled(NamedTuple):
    """Prompts of N pairs and a query.

    Attributes:
        tokens: [B, 2 N + 1]: class, label, class, label, ..., class of the query; labels are numbered after classes.
        items: [B, N + 1, D], exemplars in the order of the prompt, the query last; D = 0 where exemplars are tokens.
        classes: [B, N + 1]; in prompts with novel classes numbers from `classes` on, which no token stands for.
        labels: [B, N + 1], from 0; the last is the answer.
        copies: [B, N], which of the pairs have the class of the query.
    """

    tokens: Tensor
    items: Tensor
    classes: Tensor
    labels: Tensor
    copies: Tensor

    def exemplars(self) -> Tensor:
        """From each label to the exemplar before it, bool [2 N + 1, 2 N + 1]: what a previous-token head has to do.

        >>> InContextClassification().sample(1, seed=0).exemplars().nonzero().tolist()
        [[1, 0], [3, 2]]
        """
        length = 2 * self.copies.shape[1] + 1
        label_N = torch.arange(1, length, 2)
        pattern_QS = torch.zeros(length, length, dtype=torch.bool)
        pattern_QS[label_N, label_N - 1] = True
        return pattern_QS

    def matches(self, temperature: float = 0.0) -> Tensor:
        """From the query to the labels of its class, [B, 2 N + 1, 2 N + 1]: what an induction head has to do.

        Args:
            temperature: 0 for bools; above it the weights of a softmax over the labels of the cosine of their exemplar
                and the query (1 or 0 for exemplars that are tokens), divided by it: a match that is not given the
                answer but the likeness of exemplars.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} is negative; give 0 for the matches themselves")
        B, N = self.copies.shape
        if temperature == 0:
            weight_BN = self.copies
        else:
            if self.items.shape[2]:
                unit_BQD = torch.nn.functional.normalize(self.items, dim=-1)
                alike_BN = (unit_BQD[:, :-1] * unit_BQD[:, -1:]).sum(-1)
            else:
                alike_BN = (self.classes[:, :-1] == self.classes[:, -1:]).float()
            weight_BN = (alike_BN / temperature).softmax(-1)
        pattern_BQS = torch.zeros(B, 2 * N + 1, 2 * N + 1, dtype=weight_BN.dtype)
        pattern_BQS[:, -1, 1::2] = weight_BN
        return pattern_BQS


@dataclass(frozen=True)
class InContextClassification:
    """Classes with exemplars, labels, and the make-up of a context.

    Attributes:
        classes: number of classes known in training.
        labels: number of labels.
        pairs: exemplar-label pairs before the query, N.
        burstiness: pairs of each class in the context; the query's is among them. It divides `pairs`. 0 makes all pairs
            of different classes, none of them the query's.
        mapping: "redrawn" (labels of the classes in a context are drawn for each sequence, all different) or "fixed"
            (each class has one label for good).
        dim: of Gaussian exemplars; 0 makes an exemplar the token of its class.
        spread: of exemplars around the mean of their class: x = (mean + spread * noise) / sqrt(1 + spread^2).
        exponent: of class frequency by rank, rank^-exponent; 0 makes all equally frequent.
        seed: of class means and of the fixed mapping.

    >>> world = InContextClassification()
    >>> prompts = world.sample(100, seed=1)
    >>> prompts.tokens.shape, world.vocab
    (torch.Size([100, 5]), 55)
    >>> (prompts.copies.sum(1) == 1).all().item(), world.floor(prompts)
    (True, 0.0)
    """

    classes: int = 50
    labels: int = 5
    pairs: int = 2
    burstiness: int = 1
    mapping: str = "redrawn"
    dim: int = 0
    spread: float = 0.0
    exponent: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts(classes=(self.classes, 2), labels=(self.labels, 2), pairs=(self.pairs, 1), dim=(self.dim, 0))
        counts(burstiness=(self.burstiness, 0))
        if self.mapping not in ("redrawn", "fixed"):
            raise ValueError(f"mapping={self.mapping!r} does not exist; choose 'redrawn' or 'fixed'")
        if self.burstiness and self.pairs % self.burstiness:
            raise ValueError(f"burstiness={self.burstiness} does not divide pairs={self.pairs}")
        if self.spread < 0 or (self.spread and not self.dim):
            raise ValueError(f"spread={self.spread} cannot be negative, and needs exemplars of a dim above 0")
        if self.exponent < 0:
            raise ValueError(f"exponent={self.exponent} is negative; give 0 for equal frequencies")
        if self._kinds > self.classes:
            raise ValueError(f"a prompt of {self._kinds} different classes does not fit classes={self.classes}")
        if self.mapping == "redrawn" and self._kinds > self.labels:
            raise ValueError(
                f"{self._kinds} different classes in a prompt need as many labels to redraw, not {self.labels}"
            )

    @property
    def _kinds(self) -> int:
        """How many different classes one prompt shows, the query's among them."""
        return self.pairs // self.burstiness if self.burstiness else self.pairs + 1

    @property
    def vocab(self) -> int:
        """Number of tokens: classes, then labels."""
        return self.classes + self.labels

    def mapping_table(self) -> Tensor:
        """The label that each class has for good under "fixed", [classes]."""
        return torch.randint(self.labels, (self.classes,), generator=seeded(self.seed))

    def means(self) -> Tensor:
        """Class means, [classes, D], standard normal over the square root of D, so that their length is about one."""
        generator = seeded(self.seed + 1)
        return torch.randn(self.classes, self.dim, generator=generator) / max(self.dim, 1) ** 0.5

    def label_vectors(self) -> Tensor:
        """What stands for each label among continuous inputs, [labels, D], drawn like the class means."""
        return torch.randn(self.labels, self.dim, generator=seeded(self.seed + 2)) / max(self.dim, 1) ** 0.5

    def inputs(self, prompts: Labelled, *, window: int = 0, seed: int = 0) -> Tensor:
        """Prompts as continuous inputs, exemplars and label vectors in turn, [B, 2 N + 1, D + window].

        Args:
            prompts: of a world with a `dim`.
            window: places of a one-hot position beside the content. A prompt begins at one drawn at random, so that no
                place of its own says which pair is which. 0 leaves positions to the model.
            seed: of where prompts begin.

        >>> world = InContextClassification(dim=16, spread=0.1)
        >>> world.inputs(world.sample(4, seed=1), window=8).shape
        torch.Size([4, 5, 24])
        """
        if not self.dim:
            raise ValueError("exemplars are tokens in a world with dim=0; give prompts.tokens to the model, or a dim")
        length = 2 * self.pairs + 1
        if window and window < length:
            raise ValueError(f"window={window} has no room for a prompt of {length} tokens")
        shown_BND = self.label_vectors()[prompts.labels[:, :-1]]
        pairs_BTD = torch.stack((prompts.items[:, :-1], shown_BND), 2).flatten(1, 2)
        inputs_BTD = torch.cat((pairs_BTD, prompts.items[:, -1:]), 1)
        if not window:
            return inputs_BTD
        start_B1 = torch.randint(window - length + 1, (len(inputs_BTD), 1), generator=seeded(seed))
        places_BTP = torch.nn.functional.one_hot(start_B1 + torch.arange(length), window)
        return torch.cat((inputs_BTD, places_BTP.to(inputs_BTD.dtype)), 2)

    def sample(self, sequences: int, seed: int, *, novel: bool = False, redrawn: bool | None = None) -> Labelled:
        """Draws prompts, all at once.

        Args:
            sequences: how many.
            seed: of the draw; the world has its own.
            novel: whether classes are new ones (needs exemplars with a dim): tests learning in context.
            redrawn: overrules the mapping. True in a world with fixed labels swaps them: the context contradicts the
                weights. With `burstiness=0` and fixed labels the answer can only come from the weights.
        """
        counts(sequences=(sequences, 1))
        if novel and not self.dim:
            raise ValueError(
                "novel classes have no token, and dim=0 makes exemplars tokens; give a dim to draw new ones"
            )
        redrawn = self.mapping == "redrawn" if redrawn is None else redrawn
        if redrawn and self._kinds > self.labels:
            raise ValueError(f"{self._kinds} different classes need as many labels to redraw, not labels={self.labels}")
        generator = seeded(seed)
        rank_C = torch.arange(1, self.classes + 1, dtype=torch.float64)
        wait_BC = torch.empty(sequences, self.classes, dtype=torch.float64).exponential_(generator=generator)
        # By exponential waiting times: without replacement, in proportion to frequency. The query's is the first.
        kinds_BM = (wait_BC * rank_C**self.exponent).topk(self._kinds, largest=False).indices
        if redrawn:
            label_BM = torch.rand(sequences, self.labels, generator=generator).argsort(1)[:, : self._kinds]
        elif novel:
            label_BM = torch.randint(self.labels, (sequences, self._kinds), generator=generator)
        else:
            label_BM = self.mapping_table()[kinds_BM]
        # Which of a prompt's kinds stands in each slot; the query is kind 0.
        if self.burstiness:
            slots_N = torch.arange(self._kinds).repeat_interleave(self.burstiness)
        else:
            slots_N = torch.arange(1, self._kinds)
        order_BN = slots_N[torch.rand(sequences, self.pairs, generator=generator).argsort(1)]
        order_BQ = torch.cat((order_BN, torch.zeros(sequences, 1, dtype=torch.long)), 1)

        classes_BQ, labels_BQ = kinds_BM.gather(1, order_BQ), label_BM.gather(1, order_BQ)
        if self.dim:
            if novel:
                means_BMD = torch.randn(sequences, self._kinds, self.dim, generator=generator) / self.dim**0.5
            else:
                means_BMD = self.means()[kinds_BM]
            items_BQD = means_BMD.gather(1, order_BQ[..., None].expand(-1, -1, self.dim))
            noise_BQD = torch.randn(items_BQD.shape, generator=generator) / self.dim**0.5
            items_BQD = (items_BQD + self.spread * noise_BQD) / (1 + self.spread**2) ** 0.5
        else:
            items_BQD = torch.zeros(sequences, self.pairs + 1, 0)
        if novel:
            classes_BQ = self.classes + torch.arange(sequences)[:, None] * self._kinds + order_BQ
        tokens_B2N = torch.stack((classes_BQ, self.classes + labels_BQ), 2).flatten(1)[:, :-1]
        return Labelled(tokens_B2N, items_BQD, classes_BQ, labels_BQ, order_BN == 0)

    def copied(self, prompts: Labelled, pattern_BHQS: Tensor) -> Tensor:
        """Logits of a perfect copier: for each label the attention that the query pays it, [B, labels].

        Args:
            prompts: whose labels are copied.
            pattern_BHQS: attention (batch, head, query, key), summed over its heads; gradients flow through it.

        Labels that the prompt does not show have the logit -inf.
        """
        shown_BN = prompts.labels[:, :-1].to(pattern_BHQS.device)
        paid_BN = pattern_BHQS[:, :, -1, 1::2].sum(1)
        logits_BL = paid_BN.new_zeros(len(shown_BN), self.labels).scatter_add(1, shown_BN, paid_BN)
        seen_BL = torch.zeros_like(logits_BL, dtype=torch.bool).scatter(1, shown_BN, True)
        return logits_BL.masked_fill(~seen_BL, -torch.inf)

    def answer(self, prompts: Labelled, redrawn: bool | None = None) -> Tensor:
        """Exact P(label of the query | prompt) for one who can tell the classes apart, [B, labels], float64.

        The label beside a pair of the query's class where the context has one; else the stored label; else, with labels
        redrawn, the labels not seen are equally probable.
        """
        redrawn = self.mapping == "redrawn" if redrawn is None else redrawn
        seen_BL = torch.zeros(len(prompts.labels), self.labels, dtype=torch.float64)
        seen_BL.scatter_(1, prompts.labels[:, :-1], 1.0)
        known_B = prompts.copies.any(1)
        query_B = prompts.classes[:, -1]
        if redrawn:
            guess_BL = (1 - seen_BL) / (1 - seen_BL).sum(1, keepdim=True).clamp_min(1)
        elif bool((query_B < self.classes).all()):
            guess_BL = torch.nn.functional.one_hot(self.mapping_table()[query_B], self.labels).double()
        else:
            guess_BL = torch.full_like(seen_BL, 1 / self.labels)
        at_B = prompts.copies.int().argmax(1)
        shown_B = prompts.labels[:, :-1].gather(1, at_B[:, None])[:, 0]
        copied_BL = torch.nn.functional.one_hot(shown_B, self.labels).double()
        return torch.where(known_B[:, None], copied_BL, guess_BL)

    def floor(self, prompts: Labelled, redrawn: bool | None = None) -> float:
        """Least possible mean loss on the query's label, in nats, for one who can tell the classes apart."""
        return float(torch.special.entr(self.answer(prompts, redrawn)).sum(-1).mean())
