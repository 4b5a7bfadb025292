"""Entropic steering: the direction in which an agent's states are uncertain about its next action, as a clamp.

Letters: N prompts, D width, S samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.clamping import Place
from actome.core.continuations import Outcome, continuations, is_text, outcome_of, rows_of
from actome.core.errors import ClampError, MeasureError
from actome.tasks.trials import spearman

from .states import states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

_FEW = 8

# From a model and prompts to the actions of several completions of each.
ActionSampler = Callable[["Model", Any], Sequence[Sequence[Hashable]]]


@dataclass(frozen=True)
class SampledActions:
    """Samples whole completions, thought and action, and reads the action off each.

    The entropy of the next token is another matter: a thought may be worded in many ways and lead to one action, or be
    worded in one way and lead to several.

    Args:
        parse: from a completion to its action, or None where there is none. It is given text where prompts are
            text, else a list of ids.
        max_new_tokens: of a completion.
        samples: completions of each prompt.
        temperature, stop, batch_size, seed: see `core.continuations.continuations`.
    """

    parse: Outcome
    max_new_tokens: int
    samples: int = 20
    temperature: float = 1.0
    stop: int | Sequence[int] | None = None
    batch_size: int = 64
    seed: int = 0

    def completions(self, model: Model, prompts: Any) -> list[list[list[int]]]:
        """`samples` completions of each prompt, as ids."""
        return continuations(
            model, prompts, self.samples, self.max_new_tokens, temperature=self.temperature, stop=self.stop,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip

    def __call__(self, model: Model, prompts: Any) -> list[list[Hashable]]:
        text = is_text(prompts)
        return [[outcome_of(model, self.parse, one, text) for one in some] for some in self.completions(model, prompts)]


def action_entropy(actions: Sequence[Hashable]) -> float:
    """Entropy in nats of the actions of several completions, those without one left out; NaN when none has one.

    Of few samples it is too low, by about (actions - 1) / (2 samples) nats.

    >>> round(action_entropy(["left", "right", None, "left", "right"]), 3)
    0.693
    """
    seen = Counter(one for one in actions if one is not None)
    if not seen:
        return float("nan")
    p = torch.tensor(list(seen.values()), dtype=torch.float64)
    return float(torch.special.entr(p / p.sum()).sum())


@dataclass(frozen=True, eq=False)
class EntropicClamp(Clamp):
    r"""Adds :math:`\beta \, \|h\| \, u / \|u\|` to the newest token's state, from which the next token is made.

    Being relative to the state's own length, one strength means the same at every layer. By default it applies to the
    last token of each forward: of the prompt, and then to every generated one. ``clamp.at(phase="generated")`` leaves
    the prompt alone, and with it the first generated token.

    Args:
        direction: (D), :math:`u`; its length does not matter.
        scale: :math:`\beta`, in lengths of the state; below 0 it makes surer.
        entropies, residuals, lengths: (N) each, of the prompts that it was fitted on: entropy of the action, the same
            with length regressed out, number of tokens.

    Raises:
        ClampError: a direction of zeros, or of another width than the site.
    """

    direction: Tensor | None = None
    scale: float = 1.0
    entropies: Tensor | None = None
    residuals: Tensor | None = None
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Tensor) or self.direction.ndim != 1 or not bool(self.direction.norm() > 0):
            raise ClampError("EntropicClamp takes a direction (D) that is not zero, as EntropicSteering.fit gives")

    def transform(self, x: Tensor, place: Place) -> Tensor:
        assert self.direction is not None
        direction = place.fit((self.direction / self.direction.norm()).float(), x.float(), "direction")
        return (x.float() + self.scale * x.float().norm(dim=-1, keepdim=True) * direction).to(x.dtype)

    def random(self, seed: int = 0) -> EntropicClamp:
        """The same clamp with a direction drawn at random: a control that pushes as far."""
        assert self.direction is not None
        noise = torch.randn(self.direction.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, direction=noise / noise.norm(), entropies=None, residuals=None, lengths=None)

    @property
    def table(self) -> pd.DataFrame:
        """A row a prompt of those fitted on: length, entropy, residual (entropy without what its length explains)."""
        import pandas as pd

        if self.entropies is None or self.residuals is None or self.lengths is None:
            raise ClampError("this clamp was not fitted on prompts")
        return pd.DataFrame(
            {"length": self.lengths.numpy(), "entropy": self.entropies.numpy(), "residual": self.residuals.numpy()}
        )

    @property
    def length_correlation(self) -> tuple[float, float]:
        """Rank correlation of a prompt's length with the entropy, and with what its weight was made of."""
        table = self.table
        return spearman(table.length, table.entropy), spearman(table.length, table.residual)


@dataclass(frozen=True)
class EntropicSteering:
    r"""Fits the direction of uncertainty about actions.

    With :math:`z_i` the state at the last token of prompt i and :math:`H_i` the entropy of the action that follows it,

    .. math:: u = \sum_i w_i z_i - \frac1N \sum_i z_i, \qquad w_i = H_i \Big/ \sum_j H_j,

    which is the covariance of state and entropy over the mean entropy. Longer histories leave less to be uncertain
    about, so the plain form also finds what is common to short prompts; with ``degree`` above 0 a polynomial in the
    length is regressed out of the entropies first, and their mean kept.

    Args:
        site: where to read and to steer, one vector a token.
        degree: of that polynomial; 0 weights by entropy as it is.
        batch_size: rows a forward.

    Source: Rahn et al. 2024, Controlling Large Language Model Agents with Entropic Activation Steering (the
    entropy-weighted mean). That the plain mean is taken off, that length is, and the scaling by the state's own length
    are reconstructions of ours.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> prompts = ["import ", "def f(", "class A", "return ", "x = ", "for i in ", "if x", "while "]
    >>> sampler = SampledActions(lambda text: text[:1], max_new_tokens=3, samples=8)
    >>> clamp = EntropicSteering("blocks.1.resid.post").fit(model, prompts, sampler)
    >>> clamp.table.columns.tolist()
    ['length', 'entropy', 'residual']
    >>> with model.clamp(clamp.at(scale=0.5)):
    ...     text = model.generate("import ", max_new_tokens=4)
    """

    site: str
    degree: int = 2
    batch_size: int = 8

    def fit(self, model: Model, prompts: Any, action_sampler: ActionSampler) -> EntropicClamp:
        """The clamp, at strength 1.

        Args:
            model: the agent.
            prompts: texts or token ids, each ending where a thought begins.
            action_sampler: actions of several completions of each prompt, None where one has none: `SampledActions`,
                or a function of (model, prompts).

        Raises:
            MeasureError: a pattern of several sites, too few prompts, prompts without any action, or entropies that do
                not differ.
        """
        places = model.match(self.site)
        if len(places) != 1:
            raise MeasureError(f"{self.site} selects {len(places)} sites; give one, such as {places[0].name}")
        if not 0 <= self.degree <= 4:
            raise MeasureError(f"degree={self.degree} is not among 0 to 4")
        rows = rows_of(model, prompts)
        if len(rows) < _FEW:
            raise MeasureError(f"{len(rows)} prompts are too few; give {_FEW} at least")
        actions = action_sampler(model, prompts)
        if len(actions) != len(rows):
            raise MeasureError(f"the sampler gave actions of {len(actions)} prompts, and there are {len(rows)}")
        entropy_N = torch.tensor([action_entropy(some) for some in actions], dtype=torch.float64)
        lost = int(entropy_N.isnan().sum())
        if lost:
            raise MeasureError(
                f"no completion of {lost} of {len(rows)} prompts came to an action; allow more tokens or leave them out"
            )
        length_N = torch.tensor([len(row) for row in rows], dtype=torch.float64)
        left_N = without(length_N, entropy_N, self.degree)
        if float(left_N.std()) < 1e-9:
            raise MeasureError(
                "all prompts are equally uncertain, so nothing can be weighted by it; sample more actions"
            )
        z_ND = states(model, prompts, places[0].name, batch_size=self.batch_size)[places[0].name].double()
        weight_N = left_N / left_N.sum()
        u_D = weight_N @ z_ND - z_ND.mean(0)
        return EntropicClamp(
            places[0].name, u_D.float(), entropies=entropy_N, residuals=left_N, lengths=length_N, positions=-1
        )


def without(length_N: Tensor, entropy_N: Tensor, degree: int) -> Tensor:
    """Entropies without what a polynomial in the length explains; their mean stays.

    >>> length, entropy = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> [round(one, 6) for one in without(length, entropy, 1).tolist()]
    [2.5, 2.5, 2.5, 2.5]
    """
    length, entropy = length_N.double(), entropy_N.double()
    spread = length.std()
    if degree == 0 or not bool(spread > 0):
        return entropy
    x = (length - length.mean()) / spread
    degree = min(degree, len(x.unique()) - 1)
    design = torch.stack([x**power for power in range(degree + 1)], 1)
    return entropy - design @ torch.linalg.lstsq(design, entropy[:, None]).solution[:, 0] + entropy.mean()


def entropic_curve(
    model: Model,
    clamp: EntropicClamp,
    prompts: Any,
    sampler: SampledActions,
    *,
    strengths: Sequence[float] = (-1.0, 0.0, 1.0, 2.0),
    marks: Mapping[str, Callable[[Any], bool]] | None = None,
    random: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """What the clamp does at each strength: to the entropy of actions, and to what thoughts say.

    Args:
        model: the agent.
        clamp: fitted on other prompts.
        prompts: to act from.
        sampler: of completions.
        strengths: values of its scale.
        marks: by name, whether a completion (text or ids, as the sampler's `parse` is given) has something, such as a
            word of doubt.
        random: directions for the control.
        seed: of those.

    Returns:
        A row for each arm (``"fitted"``, ``"random"``), draw and strength: entropy (mean over prompts, nats), acted
        (share of completions with an action), and the share of completions with each mark.
    """
    import pandas as pd

    text = is_text(prompts)
    arms = [("fitted", 0, clamp), *(("random", draw, clamp.random(seed + draw)) for draw in range(random))]
    rows = []
    for arm, draw, one in arms:
        for strength in strengths:
            if strength:
                with model.clamp(one.at(scale=float(strength))):
                    found = sampler.completions(model, prompts)
            else:
                found = sampler.completions(model, prompts)
            actions = [[outcome_of(model, sampler.parse, ids, text) for ids in some] for some in found]
            entropies = torch.tensor([action_entropy(some) for some in actions])
            flat = [one for some in actions for one in some]
            row: dict[str, Any] = {"arm": arm, "draw": draw, "strength": strength}
            row |= {"entropy": float(entropies.nanmean()), "acted": sum(one is not None for one in flat) / len(flat)}
            for name, mark in (marks or {}).items():
                hits = [bool(outcome_of(model, mark, ids, text)) for some in found for ids in some]
                row[name] = sum(hits) / len(hits)
            rows.append(row)
    return pd.DataFrame(rows)
