"""What tells that an answer does not belong to its question: latents and directions, ranked, and taken out.

Letters: N pairs, T tokens, D width of a site, K latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from actome.clamps import Ablate, Add, Project
from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.measures.spans import Texts, spans
from actome.tasks.trials import auroc

from .latents import AblateLatents, Encode

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

Pool = Literal["max", "mean"]
Examples = tuple[Texts, Texts]


@dataclass(frozen=True)
class MismatchLatents:
    """Latents ranked by how much more they are active where an answer does not belong to its question.

    Attributes:
        table: a row a latent, the highest first: site, latent, d (Cohen's d of mismatched against matched pairs),
            matched and mismatched (mean activity), and of both together mean, spread and active (share of pairs above
            zero).
        encode, decoder: the dictionary, where there is one; without it latents are the units of the site.
    """

    table: pd.DataFrame
    encode: Encode | None = None
    decoder: Tensor | None = None

    def ablate(self, top: int) -> list[Clamp]:
        """Clamps that set the highest `top` latents to zero, one a site."""
        self._enough(top)
        return self._clamps(self.table.iloc[:top])

    def random(self, top: int, draws: int = 3, *, near: int = 8, seed: int = 0) -> list[list[Clamp]]:
        """The control: as many other latents with the same activation statistics, several times.

        For each of the highest `top` latents another one of its site is drawn among the `near` that are most like it in
        mean, spread and share of pairs in which they are active (each in standard deviations over the site), none
        twice.
        """
        self._enough(top)
        rng = np.random.default_rng(seed)
        rest = self.table.iloc[top:]
        columns = ["mean", "spread", "active"]
        found = []
        for _ in range(draws):
            rows: list[int] = []
            for _, one in self.table.iloc[:top].iterrows():
                same = rest[(rest["site"] == one["site"]) & ~rest.index.isin(rows)]
                if same.empty:
                    raise MeasureError(f"{one['site']} has no other latents left to draw from; take fewer than {top}")
                scale = self.table.loc[self.table["site"] == one["site"], columns].std().to_numpy() + 1e-12
                far = (((same[columns] - one[columns].astype(float)).to_numpy() / scale) ** 2).sum(1)
                nearest = same.index[np.argsort(far, kind="stable")[:near]]
                rows.append(int(rng.choice(nearest)))
            found.append(self._clamps(self.table.loc[rows]))
        return found

    def _enough(self, top: int) -> None:
        if not 0 < top < len(self.table):
            raise MeasureError(f"top={top}: there are {len(self.table)} latents; take one at least, and not all")

    def _clamps(self, rows: pd.DataFrame) -> list[Clamp]:
        clamps: list[Clamp] = []
        for site, part in rows.groupby("site", sort=False):
            latents = [int(one) for one in part["latent"]]
            if self.encode is None:
                clamps.append(Ablate(str(site), "zero", units=latents))
            elif self.decoder is None:
                raise MeasureError("to take latents out their decoder is needed; give mismatch_latents(decoder=)")
            else:
                clamps.append(
                    AblateLatents(str(site), encode=self.encode, decoder=self.decoder, latents=tuple(latents))
                )
        return clamps


def mismatch_latents(
    model: Model,
    sites: str | Sequence[str],
    matched: Examples,
    mismatched: Examples,
    *,
    encode: Encode | None = None,
    decoder: Tensor | None = None,
    pool: Pool = "max",
    batch_size: int = 16,
) -> MismatchLatents:
    """Latents that are more active on answers that belong to another question.

    Args:
        sites: of MLP neurons, such as ``blocks.*.mlp.act``; with `encode`, the one site that the dictionary was made
            for.
        matched, mismatched: pairs, as ``(prompts, answers)``; best the same prompts and answers, dealt out anew.
        encode: the encoder of a dictionary such as a sparse autoencoder: latents (..., K) of states (..., D).
        decoder: (K, D), needed to take latents out.
        pool: over the tokens of an answer: ``"max"``, as in the source, or ``"mean"``.
        batch_size: pairs a forward.

    Raises:
        MeasureError: fewer than four pairs of a kind; several sites with one dictionary.

    >>> import actome as ac
    >>> prompts, answers = ["import", "from", "return", "def"], [" os", " re", " x", " f"]
    >>> found = mismatch_latents(ac.demo(), "blocks.1.mlp.act", (prompts, answers), (prompts, answers[::-1]))
    >>> list(found.table.columns)
    ['site', 'latent', 'd', 'matched', 'mismatched', 'mean', 'spread', 'active']

    Source: McKenzie et al. 2026, Endogenous Resistance to Activation Steering in Language Models. There a detector is
    never active on matched pairs and is on at least a given share of the others; ranking by Cohen's d is ours.
    """
    import pandas as pd

    names = [site.name for site in model.match(sites)]
    if encode is not None and len(names) > 1:
        raise MeasureError(f"a dictionary belongs to one site; {sites!r} are {len(names)}")
    high, low = (_pooled(model, names, some, encode, pool, batch_size) for some in (mismatched, matched))
    frames = []
    for name in names:
        both = torch.cat([high[name], low[name]])
        columns = {
            "d": cohens_d(high[name], low[name]),
            "matched": low[name].mean(0),
            "mismatched": high[name].mean(0),
            "mean": both.mean(0),
            "spread": both.std(0),
            "active": (both > 0).double().mean(0),
        }
        frame = pd.DataFrame({key: value.numpy() for key, value in columns.items()})
        frame.insert(0, "site", name)
        frame.insert(1, "latent", range(len(frame)))
        frames.append(frame)
    table = pd.concat(frames).sort_values("d", ascending=False, kind="stable").reset_index(drop=True)
    return MismatchLatents(table, encode, decoder)


@dataclass(frozen=True)
class MismatchDirections:
    """At each site the direction from matched to mismatched pairs.

    Attributes:
        directions: by site, (D), of length one.
        table: a row a site, the best told apart first: site, d (Cohen's d along the direction) and auroc, both on pairs
            that the direction was not fitted on; mean and spread of all pairs along it.
        means: by site, (D), of states of matched pairs.
        covariances: by site, (D, D), of all states.
    """

    directions: dict[str, Tensor]
    table: pd.DataFrame
    means: dict[str, Tensor]
    covariances: dict[str, Tensor]

    def ablate(self, sites: Sequence[str] | None = None) -> list[Clamp]:
        """Clamps that hold the states along the direction where matched pairs are in the mean.

        Zero would be no neutral place: it may lie on the side of the mismatched ones.

        Args:
            sites: all of them unless some are named.
        """
        return [clamp for site in self._chosen(sites) for clamp in self._held(site, self.directions[site])]

    def random(
        self, draws: int = 3, sites: Sequence[str] | None = None, *, tries: int = 200, seed: int = 0
    ) -> list[list[Clamp]]:
        """The control: directions along which states vary as much, at right angles to the one that was found.

        Each is that of `tries` draws from the covariance of the states whose variance comes closest.
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(draws):
            clamps: list[Clamp] = []
            for site in self._chosen(sites):
                one, cov = self.directions[site], self.covariances[site]
                values, basis = torch.linalg.eigh(cov)
                root = basis * values.clamp_min(0).sqrt()
                drawn = torch.randn(tries, len(cov), generator=generator, dtype=torch.float64) @ root.T
                drawn = drawn - (drawn @ one)[:, None] * one
                drawn = torch.nn.functional.normalize(drawn, dim=1)
                along = torch.einsum("nd,de,ne->n", drawn, cov, drawn)
                best = (along.clamp_min(1e-300).log() - (one @ cov @ one).clamp_min(1e-300).log()).abs().argmin()
                clamps += self._held(site, drawn[best])
            found.append(clamps)
        return found

    def _held(self, site: str, direction: Tensor) -> list[Clamp]:
        value = (self.means[site] @ direction) * direction
        return [Project(site, direction.float()), Add(site, value.float())]

    def _chosen(self, sites: Sequence[str] | None) -> list[str]:
        chosen = list(self.directions) if sites is None else list(sites)
        unknown = [site for site in chosen if site not in self.directions]
        if unknown:
            raise MeasureError(f"no direction was fitted at {unknown[0]!r}; there are {', '.join(self.directions)}")
        return chosen


def mismatch_directions(
    model: Model,
    sites: str | Sequence[str],
    matched: Examples,
    mismatched: Examples,
    *,
    batch_size: int = 16,
) -> MismatchDirections:
    """The direction at each site that leads from answers that fit to answers that belong to another question.

    It is the difference of means over all pairs; how well it tells them apart is looked at on every second pair with
    one fitted on the others. A state is the mean over the tokens of an answer.

    Args:
        sites: with one vector a token, such as ``blocks.*.resid.post``.
        matched, mismatched: see `mismatch_latents`.

    Raises:
        MeasureError: fewer than four pairs of a kind; states that are the same in both.

    >>> import actome as ac
    >>> prompts, answers = ["import", "from", "return", "def"], [" os", " re", " x", " f"]
    >>> found = mismatch_directions(ac.demo(), "blocks.*.resid.post", (prompts, answers), (prompts, answers[::-1]))
    >>> list(found.table.columns)
    ['site', 'd', 'auroc', 'mean', 'spread']
    """
    import pandas as pd

    names = [site.name for site in model.match(sites)]
    high, low = (_pooled(model, names, some, None, "mean", batch_size) for some in (mismatched, matched))
    directions, means, covariances, rows = {}, {}, {}, []
    for name in names:
        x, y = high[name], low[name]
        one = _between(x, y, name)
        fitted = _between(x[::2], y[::2], name)
        held = [x[1::2] @ fitted, y[1::2] @ fitted]
        d = float(cohens_d(held[0][:, None], held[1][:, None]))
        area = auroc(torch.cat(held).numpy(), [1] * len(held[0]) + [0] * len(held[1]))
        along = torch.cat([x, y]) @ one
        directions[name], means[name] = one, y.mean(0)
        covariances[name] = torch.cat([x, y]).T.cov()
        rows.append((name, d, area, float(along.mean()), float(along.std())))
    table = pd.DataFrame(rows, columns=["site", "d", "auroc", "mean", "spread"])
    return MismatchDirections(
        directions, table.sort_values("d", ascending=False, ignore_index=True), means, covariances
    )


def cohens_d(x_NK: Tensor, y_MK: Tensor) -> Tensor:
    """Difference of the means in pooled standard deviations, (K); 0 where neither varies nor differs.

    >>> cohens_d(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])).round(decimals=4)
    tensor([0.7071], dtype=torch.float64)

    Source: Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, 2.2.
    """
    x, y = x_NK.double(), y_MK.double()
    n, m = len(x), len(y)
    pooled = (((n - 1) * x.var(0) + (m - 1) * y.var(0)) / (n + m - 2)).sqrt()
    apart = x.mean(0) - y.mean(0)
    return torch.where(apart == 0, 0.0, apart / pooled.clamp_min(1e-12))


def _between(x: Tensor, y: Tensor, name: str) -> Tensor:
    apart = x.mean(0) - y.mean(0)
    if not bool(apart.isfinite().all()) or float(apart.norm()) == 0:
        raise MeasureError(f"{name}: states of matched and mismatched pairs are the same, or not finite")
    return apart / apart.norm()


def _pooled(
    model: Model, names: Sequence[str], some: Examples, encode: Encode | None, pool: Pool, batch_size: int
) -> dict[str, Tensor]:
    """Latents of each pair over the tokens of its answer, by site, (N, K), float64, on the CPU."""
    if pool not in ("max", "mean"):
        raise MeasureError(f"pool={pool!r} does not exist; choose max or mean")
    if not (isinstance(some, tuple) and len(some) == 2):
        raise MeasureError("matched and mismatched are pairs, as (prompts, answers)")
    if len(some[0]) < 4:
        raise MeasureError(f"{len(some[0])} pairs of a kind are too few; give 4 at least")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for one in spans(some[0], some[1], model.tokenizer, batch_size):
        position_T = torch.arange(one.batch.ids.shape[1])
        inside_BT = (position_T >= one.prompt[:, None]) & (position_T < (one.prompt + one.response)[:, None])
        recording = model.record(one.batch, list(names))
        for name in names:
            x_BTD = recording[name]
            z = (x_BTD if encode is None else encode(x_BTD)).flatten(2).double().cpu()
            if pool == "max":
                pooled = z.masked_fill(~inside_BT[..., None], -torch.inf).amax(1)
            else:
                pooled = (z * inside_BT[..., None]).sum(1) / inside_BT.sum(1, keepdim=True)
            parts[name].append(pooled)
    return {name: torch.cat(part) for name, part in parts.items()}
