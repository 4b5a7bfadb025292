"""Forking paths: at every token of a generated text, what it would have come to had it gone on otherwise.

Letters: T positions of the base path, V vocabulary, C outcomes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.core.continuations import Outcome, continuations, is_text, outcome_of, rows_of, stops
from actome.core.errors import MeasureError

from .changes import Changes, change_points

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True, eq=False)
class ForkingPaths:
    """What a text would have come to from each of its positions.

    Attributes:
        base: the ids of the base path, (T) of them, without the prompt.
        outcomes: what was found, that of the base path first; `None` is one where nothing could be read.
        distribution: (T, C), float64, o_t: the chance of each outcome before the t-th token is chosen.
        mass: (T), float64, the probability of the alternatives that were followed; o_t speaks of them alone.
        effective: (T), float64, of how many independent draws o_t is worth at least.
        frame: a row for each position, alternative and outcome: pos, token, p (of the token), base (whether it is the
            path's own), outcome, share (of the continuations from it), samples.
    """

    base: tuple[int, ...]
    outcomes: tuple[Hashable, ...]
    distribution: Tensor
    mass: Tensor
    effective: Tensor
    frame: pd.DataFrame = field(repr=False)

    @property
    def entropy(self) -> Tensor:
        """(T), H(o_t) in nats: how open the outcome still is."""
        return torch.special.entr(self.distribution).sum(-1)

    def changes(self, prior: float | None = None, concentration: float = 0.5) -> Changes:
        """Where o_t changes; see `change_points`. Counts are o_t times the draws that it is worth."""
        return change_points(self.distribution * self.effective[:, None], prior=prior, concentration=concentration)

    @property
    def table(self) -> pd.DataFrame:
        """A row a position: pos, token, p, mass, entropy, outcome (the likeliest), share (its chance), change."""
        import pandas as pd

        own = self.frame[self.frame["base"]].drop_duplicates("pos").set_index("pos")["p"]
        share, which = self.distribution.max(-1)
        change = self.changes().probability if len(self.base) > 1 else torch.zeros(len(self.base))
        return pd.DataFrame(
            {
                "pos": range(len(self.base)),
                "token": self.base,
                "p": own.to_numpy(),
                "mass": self.mass.numpy(),
                "entropy": self.entropy.numpy(),
                "outcome": pd.Series([self.outcomes[i] for i in which.tolist()], dtype=object),
                "share": share.numpy(),
                "change": change.numpy(),
            }
        )


def forking_paths(
    model: Model,
    prompt: Any,
    outcome: Outcome,
    *,
    max_new_tokens: int = 32,
    samples: int = 10,
    threshold: float = 0.05,
    top: int | None = None,
    base: Sequence[int] | Tensor | None = None,
    temperature: float = 1.0,
    stop: int | Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> ForkingPaths:
    r"""The distribution of final outcomes at every token of a path, by going on from the alternatives to that token.

    At position t of the base path :math:`x^*` each alternative w with :math:`p(w \mid x^*_{<t})` above the threshold is
    put in the place of :math:`x^*_t` and continued `samples` times:

    .. math:: o_t = \sum_w p(w \mid x^*_{<t}) \; \mathrm{hist}\{\mathrm{outcome}(x^*_{<t}, w, \ldots)\} \Big/
        \sum_w p(w \mid x^*_{<t})

    The path's own token is always among the alternatives. Costs a forward of the whole path and, for T positions with
    W alternatives, T W `samples` continuations.

    Args:
        model: any model that generates; clamps that are active apply to all of it.
        prompt: one text, or one row of token ids.
        outcome: from what follows the prompt to what it comes to: a number, text or None. It is given text where
            the prompt is text, else a list of ids.
        max_new_tokens: of the base path and of every other, counted from the prompt.
        samples: continuations of each alternative.
        threshold: probability from which on an alternative is followed.
        top: follow this many likeliest tokens instead of those above the threshold.
        base: ids of a path of one's own; by default the greedy one.
        temperature: of probabilities and continuations.
        stop: ids that end a path; those of the model's generation configuration unless given.
        batch_size: rows a forward.
        seed: of the continuations.

    Raises:
        MeasureError: several prompts, an empty path, a threshold outside 0 to 1, or an outcome that cannot be counted.

    Source: Bigelow et al. 2025, Forking Paths in Neural Text Generation; Zur et al. 2025, Are language models aware of
    the road not taken?

    >>> import actome as ac
    >>> found = forking_paths(ac.demo(), "import ", lambda text: "_" in text, max_new_tokens=4, samples=4, top=2)
    >>> found.distribution.shape[0] == len(found.base) <= 4, found.frame.columns.tolist()
    (True, ['pos', 'token', 'p', 'base', 'outcome', 'share', 'samples'])
    """
    import pandas as pd

    if not 0 <= threshold < 1 or (top is not None and top < 1) or temperature <= 0:
        raise MeasureError(
            f"threshold={threshold} must lie from 0 to 1, top={top} be 1 at least, temperature={temperature} above 0"
        )
    rows = rows_of(model, prompt)
    if len(rows) != 1:
        raise MeasureError(f"forking_paths takes one prompt at a time, not {len(rows)}")
    start, text, ends = rows[0], is_text(prompt), stops(model, stop)
    options: dict[str, Any] = {"stop": sorted(ends), "batch_size": batch_size, "seed": seed}
    if base is None:
        path = continuations(model, [start], 1, max_new_tokens, **options | {"temperature": 0})[0][0]
    else:
        path = [int(one) for one in base]
    if not path or len(path) > max_new_tokens:
        raise MeasureError(f"a base path of {len(path)} tokens; give 1 to max_new_tokens={max_new_tokens}")

    logits = model.logits(torch.tensor([start + path]))[0, len(start) - 1 : -1]
    p_TV = (logits.double().cpu() / temperature).softmax(-1)
    records: list[tuple[int, int, float, bool, list[Hashable]]] = []
    for t, own in enumerate(path):
        tokens = _alternatives(p_TV[t], own, threshold, top)
        prefixes = [[*path[:t], token] for token in tokens]
        left = max_new_tokens - t - 1
        going = [one for one in prefixes if one[-1] not in ends and left]
        rest = iter(
            continuations(model, [start + one for one in going], samples, left, temperature=temperature,
                          **options | {"seed": seed + t}) if going else []
        )  # fmt: skip
        for token, prefix in zip(tokens, prefixes, strict=True):
            tails = [[]] if token in ends or not left else next(rest)
            found = [outcome_of(model, outcome, prefix + tail, text) for tail in tails]
            records.append((t, token, float(p_TV[t, token]), token == own, found))

    whole = outcome_of(model, outcome, path, text)
    seen = dict.fromkeys([whole, *(one for *_, found in records for one in found)])
    index = {one: i for i, one in enumerate(seen)}
    distribution = torch.zeros(len(path), len(index), dtype=torch.float64)
    mass = torch.zeros(len(path), dtype=torch.float64)
    spread = torch.zeros(len(path), dtype=torch.float64)
    table = []
    for t, token, p, is_own, found in records:
        # One that ends here has a sure outcome, which is worth as much as any number of draws.
        drawn = len(found) if len(found) > 1 or samples == 1 else samples
        mass[t] += p
        spread[t] += p * p / drawn
        for one in found:
            distribution[t, index[one]] += p / len(found)
        n = len(found)
        table += [(t, token, p, is_own, one, found.count(one) / n, n) for one in dict.fromkeys(found)]
    columns = ["pos", "token", "p", "base", "outcome", "share", "samples"]
    frame = pd.DataFrame(table, columns=columns).astype({"outcome": object})
    return ForkingPaths(tuple(path), tuple(index), distribution / mass[:, None], mass, mass.square() / spread, frame)


def _alternatives(p_V: Tensor, own: int, threshold: float, top: int | None) -> list[int]:
    """The tokens to follow, likeliest first, the path's own among them."""
    order = p_V.argsort(descending=True)
    chosen = order[:top] if top is not None else order[p_V[order] > threshold]
    tokens = chosen.tolist()
    return tokens if own in tokens else [*tokens, own]
