"""Direction neurons: the units of MLPs that write a direction, and write it when it is there.

Letters: N examples, D model width, F units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actome.clamps import Scale
from actome.core.errors import MeasureError
from actome.measures.cett import down_projection

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model

Unit = tuple[str, int]


@dataclass(frozen=True)
class NeuronSets:
    """Units that write both of two directions, and those of each alone; (site, unit) each."""

    shared: frozenset[Unit]
    first_only: frozenset[Unit]
    second_only: frozenset[Unit]


@dataclass(frozen=True)
class DirectionNeurons:
    """How far each unit writes a direction.

    Attributes:
        frame: a row a unit, the largest attribution first: site, unit, cosine (of its output row with the direction),
            difference (of mean activations, positive less negative), attribution (what it brings of the difference
            along the direction, in the states' units).
        chosen: those that count as the direction's neurons.
    """

    frame: pd.DataFrame
    chosen: frozenset[Unit]

    def sets(self, other: DirectionNeurons) -> NeuronSets:
        """Which neurons this direction shares with another one."""
        return NeuronSets(self.chosen & other.chosen, self.chosen - other.chosen, other.chosen - self.chosen)


def direction_neurons(
    model: Model,
    vector: Tensor,
    positive: Any,
    negative: Any,
    *,
    sites: str = "blocks.*.mlp.act",
    k: int = 16,
    cosine: float = 0.1,
    position: int = -1,
    batch_size: int = 32,
) -> DirectionNeurons:
    r"""The units whose output row aligns with a direction and whose activation differs between two sets of examples.

    Unit i adds :math:`a_i w_i` to the residual stream; of the difference between the sets along the unit direction v it
    brings :math:`(\bar a_i^+ - \bar a_i^-) \, w_i \cdot v`, its attribution. These sum to what the MLP of the layer
    brings in all, biases and norms behind the MLP left aside.

    Args:
        vector: the direction, (D); its length does not matter.
        positive, negative: examples, texts or token ids, with what the direction stands for and without.
        sites: what enters the down projections.
        k: neurons at most, of all sites together: those with the largest attribution, which must be above 0.
        cosine: least size of the cosine between a neuron's output row and the direction.
        position: of the token that is looked at.
        batch_size: rows a forward.

    Raises:
        MeasureError: a vector of another width or without a length; no example; `k` below 1; sites that enter no
            projection.

    Source: Han et al. 2025, Dual Mechanisms of Value Expression (neurons that contribute to a vector); the thresholds
    are this function's own.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> found = direction_neurons(model, torch.eye(112)[3], ["import os", "def f("], ["The cat", "It is"], k=4)
    >>> found.frame.columns.tolist(), len(found.chosen)
    (['site', 'unit', 'cosine', 'difference', 'attribution'], 4)
    """
    import pandas as pd

    v_D = torch.as_tensor(vector).detach().double().cpu().flatten()
    if not bool(v_D.norm() > 0) or not bool(torch.isfinite(v_D).all()):
        raise MeasureError("the vector has no length, or is not finite; give a direction")
    if k < 1:
        raise MeasureError(f"k={k}; give a number of neurons, 1 at least")
    v_D = v_D / v_D.norm()
    places = model.match(sites)
    names = [site.name for site in places]
    high, low = (_means(model, some, names, position, batch_size) for some in (positive, negative))
    parts = []
    for site in places:
        weight_DF = down_projection(site).double().cpu()
        if len(weight_DF) != len(v_D):
            raise MeasureError(f"the vector has the width {len(v_D)}, and units of {site.name} write {len(weight_DF)}")
        along_F = v_D @ weight_DF
        difference_F = high[site.name] - low[site.name]
        columns = {
            "site": site.name,
            "unit": range(len(along_F)),
            "cosine": (along_F / weight_DF.norm(dim=0).clamp_min(1e-30)).tolist(),
            "difference": difference_F.tolist(),
            "attribution": (difference_F * along_F).tolist(),
        }
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts).sort_values("attribution", ascending=False, kind="stable").reset_index(drop=True)
    top = frame[(frame["attribution"] > 0) & (frame["cosine"].abs() >= cosine)].head(k)
    return DirectionNeurons(frame, frozenset(zip(top["site"], map(int, top["unit"]), strict=True)))


def neuron_clamps(neurons: frozenset[Unit] | set[Unit], factor: float = 0.0) -> list[Scale]:
    """Clamps that multiply some units' activations: 0 takes the neurons out, more than 1 boosts them.

    Raises:
        MeasureError: no neuron.

    >>> neuron_clamps({("blocks.1.mlp.act", 7), ("blocks.1.mlp.act", 2)}, 2.0)[0].units
    [2, 7]
    """
    if not neurons:
        raise MeasureError("there is no neuron in the set; nothing to take out or to boost")
    by_site: Mapping[str, list[int]] = {site: [] for site, _ in sorted(neurons)}
    for site, unit in sorted(neurons):
        by_site[site].append(unit)
    return [Scale(site, factor, units=units) for site, units in by_site.items()]


def _means(model: Model, examples: Any, names: list[str], position: int, batch_size: int) -> dict[str, Tensor]:
    """Mean activations at a position, (F) by site, float64."""
    if isinstance(examples, str) or not len(examples):
        raise MeasureError(f"give a list of examples, at least one, not {examples!r:.60}")
    sums = dict.fromkeys(names, torch.zeros(()).double())
    for at in range(0, len(examples), batch_size):
        got = model.record(examples[at : at + batch_size], names, positions=position)
        sums = {name: sums[name] + got[name].double().cpu().flatten(0, 1).sum(0) for name in names}
    return {name: total / len(examples) for name, total in sums.items()}
