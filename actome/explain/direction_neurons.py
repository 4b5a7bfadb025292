"""Which MLP neurons write a direction when a behaviour shows: by what they would write, and by how they differ.

Letters: N examples that show it, M that do not, D width, F MLP units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from actome.clamps import Add, Set
from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.core.taps import HookPoint
from actome.measures.cett import down_projection
from actome.measures.states import Over, count, states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model
    from actome.core.sites import Site

_FEW = 8  # examples of a kind below which a difference is not looked at


class Neuron(NamedTuple):
    """One MLP unit, by the site of its activation."""

    site: str
    unit: int


@dataclass(frozen=True, eq=False)
class DirectionNeurons:
    """Neurons that write a direction, and what they do.

    Attributes:
        frame: a row a neuron of all that were looked at, largest attribution first: site, layer, unit, cosine (of its
            output row with the direction), writes (what it adds along the unit direction at an activation of 1),
            difference (mean activation where the behaviour shows, less that where it does not), z (of that
            difference), attribution (difference * writes, in the states' units) and chosen.
        shown, hidden: mean activations by site, (F) each, where the behaviour shows and where it does not.
    """

    frame: pd.DataFrame
    shown: Mapping[str, Tensor] = field(repr=False)
    hidden: Mapping[str, Tensor] = field(repr=False)

    @property
    def neurons(self) -> list[Neuron]:
        """The chosen ones, largest attribution first."""
        some = self.frame[self.frame["chosen"]]
        return [Neuron(site, int(unit)) for site, unit in zip(some["site"], some["unit"], strict=True)]

    def ablate(self, neurons: Sequence[Neuron] | None = None, how: Literal["mean", "zero"] = "mean") -> list[Clamp]:
        """Clamps that hold neurons where the behaviour does not show, one a site.

        Args:
            neurons: some of those looked at; the chosen ones by default.
            how: ``"mean"``: at their mean where it does not show; ``"zero"``: at 0.

        Raises:
            MeasureError: no neuron, or one that was not looked at.
        """
        if how not in ("mean", "zero"):
            raise MeasureError(f'how={how!r} does not exist; choose "mean" or "zero"')
        return [
            Set(site, self.hidden[site][units] if how == "mean" else 0.0, units=units)
            for site, units in self._by_site(neurons)
        ]

    def boost(self, neurons: Sequence[Neuron] | None = None, scale: float = 1.0) -> list[Clamp]:
        """Clamps that add to each neuron by how much it differs, one a site.

        At scale 1 they bring neurons from their mean where the behaviour does not show to that where it does, which
        adds the sum of their attributions along the direction.
        """
        return [
            Add(site, (self.shown[site] - self.hidden[site])[units], scale=scale, units=units)
            for site, units in self._by_site(neurons)
        ]

    def random(self, neurons: Sequence[Neuron] | None = None, seed: int = 0) -> list[Neuron]:
        """As many neurons at each site, drawn among those that are not chosen: the control.

        Raises:
            MeasureError: fewer are left at a site.
        """
        generator = torch.Generator().manual_seed(seed)
        taken = {*self.neurons, *(neurons or ())}
        drawn = []
        for site, units in self._by_site(neurons):
            left = [unit for unit in range(len(self.shown[site])) if Neuron(site, unit) not in taken]
            if len(left) < len(units):
                raise MeasureError(f"{site} has {len(left)} neurons that are not chosen, and {len(units)} are wanted")
            order = torch.randperm(len(left), generator=generator)[: len(units)]
            drawn += [Neuron(site, left[i]) for i in order.tolist()]
        return drawn

    def _by_site(self, neurons: Sequence[Neuron] | None) -> list[tuple[str, list[int]]]:
        wanted = self.neurons if neurons is None else list(neurons)
        if not wanted:
            raise MeasureError("there is no neuron to clamp; look at more of them (k=), or ask less of them (aligned=)")
        found: dict[str, list[int]] = {}
        for site, unit in wanted:
            if site not in self.shown or not 0 <= unit < len(self.shown[site]):
                raise MeasureError(f"unit {unit} of {site} was not looked at; there are {', '.join(self.shown)}")
            found.setdefault(site, []).append(unit)
        return [(site, sorted(set(units))) for site, units in found.items()]


class NeuronSets(NamedTuple):
    """Chosen neurons of two directions: of both, of the intrinsic one alone, of the prompted one alone."""

    shared: list[Neuron]
    intrinsic: list[Neuron]
    prompted: list[Neuron]


def neuron_sets(intrinsic: DirectionNeurons, prompted: DirectionNeurons) -> NeuronSets:
    """What the neurons of an intrinsic and of a prompted direction have in common, and what each has alone.

    How many are shared by chance depends on k and on how many there are: k * k / neurons.
    """
    one, other = intrinsic.neurons, prompted.neurons
    return NeuronSets(
        [neuron for neuron in one if neuron in other],
        [neuron for neuron in one if neuron not in other],
        [neuron for neuron in other if neuron not in one],
    )


def direction_neurons(
    model: Model,
    vector: Tensor,
    shown: Any,
    hidden: Any,
    k: int = 20,
    *,
    sites: str = "blocks.*.mlp.act",
    before: str | None = None,
    over: Over = "last",
    aligned: float = 0.1,
    z: float = 3.0,
    batch_size: int = 8,
) -> DirectionNeurons:
    r"""The neurons that a direction in the residual stream comes from.

    A neuron i with activation :math:`a_i` adds :math:`a_i w_i` to the stream, with :math:`w_i` its row of the output
    matrix. Chosen are the k with the largest attribution among those whose row is aligned with the direction and whose
    mean activation differs between examples that show the behaviour and examples that do not,

    .. math:: \text{attribution}_i = (\bar a_i^{shown} - \bar a_i^{hidden}) \, (w_i \cdot v / \|v\|) > 0 .

    Attributions of one layer add up to what its MLP contributes to the difference of means along v. Where a norm
    stands behind the MLP (Gemma 2, OLMo 2), rows are taken through its gains and not through its division by each
    token's length, so that they hold up to a positive factor. Experts of a mixture have no site of one vector a token;
    shared experts do (``blocks.*.moe.shared.act``).

    Args:
        model: any model with proved MLP sites.
        vector: (D), a direction in the residual stream; its length does not matter.
        shown, hidden: examples that show the behaviour and examples that do not, as `states` takes them. Label them by
            what the model answers, not by what the prompt asked for.
        k: how many to choose at most, over all sites.
        sites: activations that enter a down projection.
        before: where the vector was read, such as ``"blocks.3.resid.post"``: later MLPs are left out.
        over: which tokens of an example; see `states`.
        aligned: least size of the cosine of row and direction.
        z: least size of the difference in its standard errors.
        batch_size: rows a forward.

    Raises:
        MeasureError: a vector of another width, of zeros or not finite; too few examples; sites that enter no
            projection, or none before the vector.

    Source: Han et al. 2025, Dual Mechanisms of Value Expression: Intrinsic vs. Prompted Values in Large Language Models
    (alignment with the value vector, and difference). The two thresholds are ours.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> code = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
    >>> prose = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]
    >>> site = "blocks.1.resid.post"
    >>> vector = states(model, code, site)[site].mean(0) - states(model, prose, site)[site].mean(0)
    >>> found = direction_neurons(model, vector, code, prose, 3, before=site)
    >>> len(found.neurons), sorted(set(found.frame["site"]))
    (3, ['blocks.0.mlp.act', 'blocks.1.mlp.act'])
    >>> with model.clamp(*found.boost()):
    ...     text = model.generate("The value", max_new_tokens=4)
    """
    import pandas as pd

    if k < 1:
        raise MeasureError(f"k={k}; choose one neuron at least")
    for name, some in (("shown", shown), ("hidden", hidden)):
        if isinstance(some, str) or count(some) < _FEW:
            raise MeasureError(f"{name}: give a list of {_FEW} examples at least")
    direction_D = torch.as_tensor(vector).detach().double().cpu()
    if direction_D.ndim != 1 or not bool(torch.isfinite(direction_D).all()) or not bool(direction_D.norm() > 0):
        raise MeasureError(f"the vector has the shape {tuple(direction_D.shape)}; give (d_model), finite and not zero")
    direction_D = direction_D / direction_D.norm()
    places = model.match(sites)
    if before is not None:
        (end,) = (model.order[site.name] for site in model.match(before)[:1])
        places = tuple(site for site in places if model.order[site.name] < end)
        if not places:
            raise MeasureError(f"no site of {sites} comes before {before}")
    pattern = "{" + ",".join(site.name for site in places) + "}"
    high = states(model, shown, pattern, over=over, batch_size=batch_size)
    low = states(model, hidden, pattern, over=over, batch_size=batch_size)
    parts = []
    for site in places:
        rows_FD = output_rows(model, site)
        if rows_FD.shape[1] != len(direction_D):
            raise MeasureError(
                f"the vector is {len(direction_D)} wide, and {site.name} writes into a stream of {rows_FD.shape[1]}"
            )
        writes_F = rows_FD @ direction_D
        up, down = high[site.name].double(), low[site.name].double()
        error_F = (up.var(0) / len(up) + down.var(0) / len(down)).sqrt()
        difference_F = up.mean(0) - down.mean(0)
        parts.append(
            pd.DataFrame(
                {
                    "site": site.name,
                    "layer": site.layer,
                    "unit": range(len(writes_F)),
                    "cosine": (writes_F / rows_FD.norm(dim=1).clamp_min(1e-12)).numpy(),
                    "writes": writes_F.numpy(),
                    "difference": difference_F.numpy(),
                    "z": (difference_F / error_F.clamp_min(1e-12)).numpy(),
                    "attribution": (difference_F * writes_F).numpy(),
                }
            )
        )
    frame = pd.concat(parts).sort_values("attribution", ascending=False, kind="stable").reset_index(drop=True)
    fits = (frame["attribution"] > 0) & (frame["cosine"].abs() >= aligned) & (frame["z"].abs() >= z)
    frame["chosen"] = fits & (fits.cumsum() <= k)
    return DirectionNeurons(
        frame, {name: x.mean(0) for name, x in high.items()}, {name: x.mean(0) for name, x in low.items()}
    )


def output_rows(model: Model, site: Site) -> Tensor:
    """What each unit of an MLP writes into the residual stream at an activation of 1, (F, D), float64, on the CPU.

    Raises:
        MeasureError: a site that enters no projection.
    """
    rows_FD = down_projection(site).T.double().cpu()
    name = site.name.removesuffix("act") + "out"
    out = model.table[name].address if name in model.table else None
    # The site of what is added to the stream lies behind a norm in some families: then it counts by its gains.
    if isinstance(out, HookPoint) and out.side == "out" and not list(out.module.children()):
        norm = out.module
        if norm is not getattr(site.address, "module", None) and (gain := getattr(norm, "weight", None)) is not None:
            with torch.no_grad():
                rows_FD = rows_FD * norm.forward(torch.ones_like(gain)).double().cpu()
    return rows_FD
