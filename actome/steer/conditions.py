"""Conditions: steer only when the prompt's own activation says so, with rules over several of them.

Letters: B rows, T positions, N prompts, D width.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from actome.core.clamp import Clamp, When
from actome.core.errors import ClampError, MeasureError, nearest

from .directions import direction
from .states import Over, count, states

if TYPE_CHECKING:
    from actome.core.model import Model


def similarity(states_ND: Tensor, direction_D: Tensor, *, signed: bool = False) -> Tensor:
    r"""How much of a state lies along a direction: :math:`\cos(h, \tanh(P h))`, P the projection on it; (N), float32.

    The hyperbolic tangent bounds single large entries. For small states it is the cosine's absolute value; a direction
    has no sign here, so that a state on its other side counts as much. With `signed` that one counts as negative.

    Source: Lee et al. 2025, Programming Refusal with Conditional Activation Steering, section 3.3.

    >>> similarity(torch.tensor([[0.01, 0.0], [0.01, 0.01]]), torch.tensor([1.0, 0.0])).tolist()
    [1.0, 0.707...]
    """
    unit = direction_D.float() / direction_D.float().norm()
    states = states_ND.float()
    along = states @ unit
    found = torch.nn.functional.cosine_similarity(states, torch.tanh(along[..., None] * unit), dim=-1)
    return found * along.sign() if signed else found


@dataclass(frozen=True, eq=False)
class Similar(When):
    """Whether a prompt's state is like a direction: its `similarity` lies above a threshold, or below it.

    Judged on the prompt, on the mean of its tokens or on the last one, and kept for the sequence.

    Args:
        site: a site with one vector a token.
        direction: (D).
        threshold: of the similarity.
        above: true when the similarity is *larger* than the threshold; False when it is smaller.
        over: ``"mean"`` or ``"last"``, of the prompt's tokens.
        signed: whether states on the direction's other side count as negative; see `similarity`.

    Attributes:
        f1: how well it told labelled prompts apart that it was fitted on, when it was.
    """

    direction: Tensor | None = None
    threshold: float = 0.0
    above: bool = True
    over: Literal["mean", "last"] = "mean"
    signed: bool = False
    latch: bool = True
    f1: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Tensor) or self.direction.ndim != 1 or not bool(self.direction.any()):
            raise ClampError("Similar takes a direction (D) that is not zero")
        if self.over not in ("mean", "last"):
            raise ClampError(f'over={self.over!r}: "mean" or "last"')

    @property
    def needs_run(self) -> bool:
        """It has to know which tokens are padding."""
        return True

    def holds(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch,) bool."""
        assert self.direction is not None
        if x.ndim != 3 or x.shape[-1] != len(self.direction):
            raise ClampError(
                f"{self.site}: the condition's direction has width {len(self.direction)}, the site {tuple(x.shape)}"
            )
        real_BT = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device)
        if self.over == "last":
            place_T = torch.arange(1, x.shape[1] + 1, device=x.device)
            real_BT = place_T == (real_BT * place_T).amax(1, keepdim=True)
        weight_BT = real_BT.float() / real_BT.sum(1, keepdim=True).clamp_min(1)
        pooled_BD = torch.einsum("bt,btd->bd", weight_BT, x.float())
        found_B = similarity(pooled_BD, self.direction.to(x.device), signed=self.signed)
        return found_B > self.threshold if self.above else found_B < self.threshold


@dataclass(frozen=True, eq=False)
class Rule(When):
    """A rule over named conditions, such as ``"harm and not (code or poem)"``.

    Args:
        site: left empty; it is that of the last condition.
        rule: names of conditions with ``and``, ``or``, ``not`` and parentheses.
        conditions: by name.

    Raises:
        ClampError: a rule that is not of this form, or names a condition that is not there.

    >>> one = Similar("blocks.0.resid.post", direction=torch.ones(4))
    >>> rule = Rule(rule="a and not b", conditions={"a": one, "b": one})
    >>> rule.combine((torch.tensor([True, True]), torch.tensor([False, True])))
    tensor([ True, False])
    """

    site: str = ""
    rule: str = ""
    conditions: Mapping[str, When] | None = None
    latch: bool = True

    def __post_init__(self) -> None:
        known = dict(self.conditions or {})
        try:
            tree = ast.parse(self.rule, mode="eval").body
        except SyntaxError:
            tree = None
        names = None if tree is None else _names(tree)
        if names is None:
            raise ClampError(f"{self.rule!r} is not a rule: names of conditions with and, or, not and parentheses")
        for name in names:
            if name not in known:
                raise ClampError(f"the rule names {name!r}, which is no condition{nearest(name, known)}")
            if isinstance(known[name], Rule):
                raise ClampError(f"{name!r} is a rule itself; write what it says into this rule, in parentheses")
        object.__setattr__(self, "conditions", {name: known[name] for name in dict.fromkeys(names)})
        object.__setattr__(self, "site", next(reversed(self.conditions.values())).site)  # type: ignore[union-attr]

    @property
    def parts(self) -> tuple[When, ...]:
        """The conditions that the rule names."""
        return tuple((self.conditions or {}).values())

    def combine(self, flags: tuple[Tensor, ...]) -> Tensor:
        """The rule's value for each row."""
        known = dict(zip(self.conditions or {}, flags, strict=True))
        return _value(ast.parse(self.rule, mode="eval").body, known)


def _names(tree: ast.AST) -> list[str] | None:
    """The names in a rule, in order; None for what is no rule."""
    if isinstance(tree, ast.Name):
        return [tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
        return _names(tree.operand)
    if isinstance(tree, ast.BoolOp):
        parts = [_names(one) for one in tree.values]
        return None if any(part is None for part in parts) else [name for part in parts for name in part or []]
    return None


def _value(tree: ast.AST, flags: Mapping[str, Tensor]) -> Tensor:
    if isinstance(tree, ast.Name):
        return flags[tree.id]
    if isinstance(tree, ast.UnaryOp):
        return ~_value(tree.operand, flags)
    assert isinstance(tree, ast.BoolOp)
    values = [_value(one, flags) for one in tree.values]
    stacked = torch.stack(torch.broadcast_tensors(*values))
    return stacked.all(0) if isinstance(tree.op, ast.And) else stacked.any(0)


@dataclass(frozen=True)
class Condition:
    """Fits the direction, site and threshold by which prompts of one category are told from others.

    The direction is the first component of pairs of prompts, each centred on itself. Site, threshold and side are those
    with the best F1 on labelled prompts, by exhaustive search over the sites and all thresholds between their
    similarities.

    Args:
        sites: a pattern; the search is over these.
        over: ``"mean"`` or ``"last"``, of the prompt's tokens.
        signed: whether states on the direction's other side count as negative. The paper's do not (False), and where
            states have no large mean in common, prompts that lie opposite to the category are then taken for it.
        batch_size: rows a forward.

    Source: Lee et al. 2025, Programming Refusal with Conditional Activation Steering, sections 3.2 to 3.4. Its
    released code takes first components too; its words "larger" and "smaller" are of the threshold, ours
    (`Similar.above`) of the similarity.
    """

    sites: str = "blocks.*.resid.post"
    over: Literal["mean", "last"] = "mean"
    signed: bool = False
    batch_size: int = 8

    def fit(self, model: Model, prompts: Any, others: Any) -> Similar:
        """The condition.

        Args:
            prompts, others: prompts of the category and of others, eight of each at least.

        Raises:
            MeasureError: too few prompts.
        """
        for name, some in (("prompts of the category", prompts), ("other prompts", others)):
            if count(some) < 8:
                raise MeasureError(f"{count(some)} {name} are too few; give 8 at least")
        over: Over = self.over
        high, low = (
            states(model, some, self.sites, over=over, batch_size=self.batch_size) for some in (prompts, others)
        )
        best: Similar | None = None
        for site in high:
            pairs = min(len(high[site]), len(low[site]))
            found = direction(high[site][:pairs], low[site][:pairs], "pca")
            told = (similarity(some[site], found, signed=self.signed) for some in (high, low))
            threshold, above, f1 = best_threshold(*told)
            if best is None or f1 > (best.f1 or 0.0):
                best = Similar(
                    site, direction=found, threshold=threshold, above=above, over=self.over, signed=self.signed, f1=f1
                )
        assert best is not None
        return best


def before(model: Model, sites: str, site: str) -> str:
    """A pattern of those sites that are reached before another one, where a condition for a clamp there may stand.

    Raises:
        MeasureError: none is.

    >>> import actome as ac
    >>> before(ac.demo(), "blocks.*.resid.post", "blocks.2.resid.post")
    '{blocks.0.resid.post,blocks.1.resid.post}'
    """
    order = model.order
    names = [one.name for one in model.match(sites) if one.name in order and order[one.name] < order.get(site, -1)]
    if not names:
        raise MeasureError(f"no site of {sites} is reached before {site}; name earlier ones, or steer a later one")
    return "{" + ",".join(names) + "}" if len(names) > 1 else names[0]


def best_threshold(high_N: Tensor, low_M: Tensor) -> tuple[float, bool, float]:
    """The threshold with the best F1, whether the first set lies above it, and that F1.

    >>> best_threshold(torch.tensor([0.75, 0.9]), torch.tensor([0.1, 0.25]))
    (0.5, True, 1.0)
    """
    scores = torch.cat([high_N, low_M]).double().numpy()
    positive = np.repeat([True, False], [len(high_N), len(low_M)])
    order = np.unique(scores)
    cuts = np.concatenate([[order[0] - 1e-3], (order[1:] + order[:-1]) / 2, [order[-1] + 1e-3]])
    best = (float(cuts[0]), True, -1.0)
    for above in (True, False):
        called = (scores > cuts[:, None]) if above else (scores < cuts[:, None])
        right = (called & positive).sum(1)
        f1 = 2 * right / np.maximum(called.sum(1) + positive.sum(), 1)
        at = int(f1.argmax())
        if f1[at] > best[2]:
            # In the middle of the stretch of equally good cuts.
            same = np.flatnonzero(f1 == f1[at])
            best = (float(cuts[same[len(same) // 2]]), above, float(f1[at]))
    return best


def when(clamp: Clamp, condition: When) -> Clamp:
    """The clamp, applied only to sequences whose prompt meets the condition, from the clamp's site on.

    The prompt is judged where the condition's site stands, so that must come before the clamp's.

    >>> from actome.clamps import Add
    >>> condition = Similar("blocks.0.resid.post", direction=torch.ones(4), threshold=0.5)
    >>> when(Add("blocks.1.resid.post", 1.0), condition).when.threshold
    0.5
    """
    return replace(clamp, when=condition)
