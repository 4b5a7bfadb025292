"""Chains of clues towards one of several classes, with the exact posterior after every clue.

Each class has a code of ternary clues, drawn once. A chain says how noisy it is, then gives the clues of its class one
by one, each wrong with the probability of its noise level, is cut off after some of them, and asks for the answer. So
it is a small model of reasoning in steps: what is known after a step, how uncertain the answer still is, how much a
step was worth and whether an answer given now would be right are all known exactly.

Noise level is visible difficulty: a score that only reads the level already tells right from wrong answers quite well.
Always report results within a level too.

Source: own construction, for measures of reasoning in steps such as conditional-entropy reduction and trajectory
signals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, entropy, seeded, share


class Chains(NamedTuple):
    """Chains, whole and as they are read. C classes, K clues; lengths are K + 3.

    Attributes:
        tokens: [B, K + 3]: noise level, the clues shown, answer cue, true class, then padding.
        mask: [B, K + 3], which tokens are not padding.
        shown: [B], how many clues stand before the answer cue, 0 to K.
        levels: [B], noise level.
        classes: [B], true class, which follows the cue.
        clues: [B, K], all the clues of the chain, the ones cut off among them; values 0 to 2.
        answers: [B], a class drawn from the exact posterior after the clues shown: what a perfect reader, sampled at
            temperature one, would say.
        correct: [B], whether that answer is the true class.
    """

    tokens: Tensor
    mask: Tensor
    shown: Tensor
    levels: Tensor
    classes: Tensor
    clues: Tensor
    answers: Tensor
    correct: Tensor

    @property
    def cue(self) -> Tensor:
        """Positions of the answer cue, [B]; a model's distribution over classes is read there."""
        return self.shown + 1

    def steps(self) -> Tensor:
        """[B, K + 1]: the position at which step s ends, s clues being known: s. Beyond the clues shown: -1."""
        step_S = torch.arange(self.clues.shape[1] + 1)
        return torch.where(step_S <= self.shown[:, None], step_S, -1)


@dataclass(frozen=True)
class ClueChain:
    """The codes and noise levels of one world. Tokens: classes first, then clue values, levels, cue and padding.

    Attributes:
        classes: number of classes, all equally frequent.
        clues: number of clues in a code.
        errors: probability that a clue is wrong (one of the two other values), one for each noise level.
        seed: of the codes, which all differ from one another.

    >>> world = ClueChain()
    >>> chains = world.sample(1000, seed=1)
    >>> world.posterior(chains.clues, chains.levels).shape  # after 0, 1, ..., 8 clues
    torch.Size([1000, 9, 12])
    >>> drop = world.entropy(chains.clues, chains.levels).diff(dim=1).sum(1)
    >>> drop[chains.levels == 0].mean().item() < drop[chains.levels == 2].mean().item() < 0
    True
    """

    classes: int = 12
    clues: int = 8
    errors: tuple[float, ...] = (0.05, 0.25, 0.45)
    seed: int = 0

    def __post_init__(self) -> None:
        counts(classes=(self.classes, 2), clues=(self.clues, 1), levels=(len(self.errors), 1))
        for error in self.errors:
            share(error=error)
        if self.classes > 3**self.clues:
            raise ValueError(f"{self.classes} classes need more than clues={self.clues} ternary clues to differ")

    @property
    def level_token(self) -> int:
        """Token of noise level 0; the others follow."""
        return self.classes + 3

    @property
    def cue_token(self) -> int:
        """Token that asks for the answer."""
        return self.level_token + len(self.errors)

    @property
    def pad_token(self) -> int:
        """Token after the answer, to the end of the row."""
        return self.cue_token + 1

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.pad_token + 1

    def codes(self) -> Tensor:
        """The right value of each clue for each class, [classes, clues], values 0 to 2, no two classes alike."""
        generator = seeded(self.seed)
        numbers = torch.randperm(3**self.clues, generator=generator)[: self.classes]
        return numbers[:, None] // 3 ** torch.arange(self.clues) % 3

    def sample(self, sequences: int, seed: int, *, shown: int | None = None, level: int | None = None) -> Chains:
        """Draws chains, all at once.

        Args:
            sequences: how many.
            seed: of the draw; the codes have their own.
            shown: clues before the answer cue; None draws 0 to all of them with equal chance.
            level: noise level; None draws all with equal chance.
        """
        counts(sequences=(sequences, 1))
        if shown is not None and not 0 <= shown <= self.clues:
            raise ValueError(f"shown={shown} is not among 0 to {self.clues} clues")
        if level is not None and not 0 <= level < len(self.errors):
            raise ValueError(f"level={level} does not exist; there are levels 0 to {len(self.errors) - 1}")
        generator = seeded(seed)
        classes_B = torch.randint(self.classes, (sequences,), generator=generator)
        levels_B = torch.randint(len(self.errors), (sequences,), generator=generator)
        shown_B = torch.randint(self.clues + 1, (sequences,), generator=generator)
        if level is not None:
            levels_B = torch.full_like(levels_B, level)
        if shown is not None:
            shown_B = torch.full_like(shown_B, shown)
        wrong_BK = torch.rand(sequences, self.clues, generator=generator) < torch.tensor(self.errors)[levels_B][:, None]
        by_BK = torch.randint(1, 3, (sequences, self.clues), generator=generator)
        clues_BK = (self.codes()[classes_B] + wrong_BK * by_BK) % 3

        position_T = torch.arange(self.clues + 3)
        tokens_BT = torch.full((sequences, self.clues + 3), self.pad_token)
        tokens_BT[:, 0] = self.level_token + levels_B
        is_clue_BK = position_T[: self.clues] < shown_B[:, None]
        tokens_BT[:, 1 : self.clues + 1] = torch.where(is_clue_BK, self.classes + clues_BK, self.pad_token)
        tokens_BT.scatter_(1, (shown_B + 1)[:, None], self.cue_token)
        tokens_BT.scatter_(1, (shown_B + 2)[:, None], classes_B[:, None])

        posterior_BC = self.posterior(clues_BK, levels_B)[torch.arange(sequences), shown_B]
        answers_B = Rows(posterior_BC).draw(torch.arange(sequences), generator)
        return Chains(
            tokens=tokens_BT,
            mask=position_T < (shown_B + 3)[:, None],
            shown=shown_B,
            levels=levels_B,
            classes=classes_B,
            clues=clues_BK,
            answers=answers_B,
            correct=answers_B == classes_B,
        )

    def likelihood(self, levels: Tensor) -> Tensor:
        """P(value of clue k | class) at each chain's level, [B, clues, 3, classes], float64."""
        error_B = torch.tensor(self.errors, dtype=torch.float64)[levels]
        right_K3C = self.codes().T[:, None, :] == torch.arange(3)[None, :, None]
        return torch.where(right_K3C, 1 - error_B[:, None, None, None], error_B[:, None, None, None] / 2)

    def posterior(self, clues: Tensor, levels: Tensor) -> Tensor:
        """P(class | level, first s clues) for s = 0 to K, [B, K + 1, classes], float64.

        Args:
            clues: [B, K], values 0 to 2.
            levels: [B].
        """
        likelihood_BK3C = self.likelihood(levels)
        index = clues[:, :, None, None].expand(-1, -1, 1, self.classes)
        steps_BKC = likelihood_BK3C.gather(2, index)[:, :, 0].clamp_min(1e-300).log().cumsum(1)
        return torch.nn.functional.pad(steps_BKC, (0, 0, 1, 0)).softmax(-1)

    def entropy(self, clues: Tensor, levels: Tensor) -> Tensor:
        """H(class | level, first s clues) in nats for s = 0 to K, [B, K + 1]: conditional entropy of the answer."""
        return entropy(self.posterior(clues, levels))

    def value(self, clues: Tensor, levels: Tensor, greedy: bool = False) -> Tensor:
        """Chance that an answer given after s clues is right, [B, K + 1], known exactly.

        Of an answer sampled from the posterior p: sum p^2. Of the most probable answer (`greedy`): max p. Its change
        from step to step is the reward-prediction error of that step.
        """
        posterior = self.posterior(clues, levels)
        return posterior.amax(-1) if greedy else posterior.square().sum(-1)

    def next_clue(self, clues: Tensor, levels: Tensor) -> Tensor:
        """P(value of clue s | level, the clues before it) for s = 0 to K - 1, [B, K, 3], float64."""
        return torch.einsum("bkc,bkvc->bkv", self.posterior(clues, levels)[:, :-1], self.likelihood(levels))

    def floor(self, chains: Chains) -> float:
        """Least possible mean loss on the answer token, in nats: mean entropy of the posterior at the cue."""
        entropy_BS = self.entropy(chains.clues, chains.levels)
        return float(entropy_BS[torch.arange(len(entropy_BS)), chains.shown].mean())
