"""Choices: questions with several answers, for what a clamp costs on tasks that it has nothing to do with.

Letters: N questions, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.measures.spans import Texts

from .likelihood import response_nll
from .placing import Placing

if TYPE_CHECKING:
    from actome.core.model import Model


@dataclass(frozen=True)
class Choices:
    """Questions, each with answers one of which is right.

    Attributes:
        prompts: texts or token ids, N.
        answers: N lists of texts or of token ids, two or more each.
        right: which of its answers is right, N places.

    >>> Choices(["1 + 1 ="], [[" 2", " 3"]], [0])
    Choices(prompts=['1 + 1 ='], answers=[[' 2', ' 3']], right=[0])
    """

    prompts: Texts
    answers: Sequence[Texts]
    right: Sequence[int]

    def __post_init__(self) -> None:
        sizes = (len(self.prompts), len(self.answers), len(self.right))
        if len(set(sizes)) > 1 or not sizes[0]:
            raise MeasureError(
                "choices take as many sets of answers and right ones as prompts, one at least; there are "
                f"{sizes[0]} prompts, {sizes[1]} sets and {sizes[2]} right ones"
            )
        for i, (some, right) in enumerate(zip(self.answers, self.right, strict=True)):
            if len(some) < 2 or not 0 <= int(right) < len(some):
                raise MeasureError(f"question {i} has {len(some)} answers, and number {right} is said to be right")

    def __len__(self) -> int:
        return len(self.prompts)


def accuracy(
    model: Model,
    choices: Choices,
    *,
    clamps: Sequence[Clamp] = (),
    placing: Placing = "all",
    per_token: bool = False,
    batch_size: int = 16,
) -> Tensor:
    """Whether the right answer is the likeliest, of each question, (N) of 0 and 1, float64.

    Args:
        clamps, placing: active beside those that are; see `response_nll`.
        per_token: compare nats a token, for answers of different lengths.

    >>> import actome as ac
    >>> accuracy(ac.demo(), Choices(["import", "from"], [[" os", " ostrich"], [" the", " xyzzy"]], [0, 0])).tolist()
    [1.0, 1.0]
    """
    prompts: list[Any] = []
    answers: list[Any] = []
    for prompt, some in zip(choices.prompts, choices.answers, strict=True):
        prompts += [prompt] * len(some)
        answers += list(some)
    found = response_nll(model, prompts, answers, clamps=clamps, placing=placing, batch_size=batch_size)
    nll = found.mean if per_token else found.nll
    best = [int(one.argmin()) for one in nll.split([len(some) for some in choices.answers])]
    return (torch.tensor(best) == torch.as_tensor(choices.right)).double()
