"""Panels: named sets of measures, with the sites that each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..core.measure import Measure
from .attention import AttentionEntropy, SinkScore
from .depth import Movement
from .extremes import MassiveActivations, OutlierChannels
from .loss import NextTokenLoss
from .scale import ActivationScale
from .sparsity import DeadUnits, Sparsity
from .spectrum import EffectiveRank
from .voids import Voids

# The patterns of one entry, and what makes the measures that are taken at their sites.
Entry = tuple[tuple[str, ...], tuple[Callable[[], Measure], ...]]


@dataclass(frozen=True)
class Panel:
    """A named set of measures, for ``model.measure(text, PANELS["health"])``.

    What a model has no place for is skipped and told in the table's ``skipped``: a network without attention has no
    patterns, one that does not predict the next token no such loss.

    Attributes:
        name: what it is called.
        about: what it is for, in one sentence.
        entries: pairs of patterns and measures. Patterns name the sites of one stack of blocks; they are tried with
            the prefixes of encoders, decoders and towers as well.
        fallback: the entries for a model that has none of these sites, only modules.

    >>> patterns, measures = PANELS["health"].entries[0]
    >>> patterns, [measure.__name__ for measure in measures]
    (('blocks.0.resid.pre', 'blocks.*.resid.post'), ['ActivationScale', 'Movement', 'Voids'])
    """

    name: str
    about: str
    entries: tuple[Entry, ...]
    fallback: tuple[Entry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


# The stream before the first block and after each: what a block does shows between neighbours.
_STREAM = ("blocks.0.resid.pre", "blocks.*.resid.post")

PANELS: dict[str, Panel] = {
    panel.name: panel
    for panel in (
        Panel(
            name="health",
            about="whether a model's activations are as they should be: scale, dead units, extremes, sinks, rank, loss",
            entries=(
                (_STREAM, (ActivationScale, Movement, Voids)),
                (("blocks.*.resid.post",), (MassiveActivations, OutlierChannels, EffectiveRank)),
                (("blocks.*.mlp.act",), (ActivationScale, Sparsity, DeadUnits)),
                (("blocks.*.attn.pattern",), (SinkScore, AttentionEntropy)),
                (("logits",), (NextTokenLoss,)),
            ),
            fallback=((("module:*",), (ActivationScale, Sparsity, DeadUnits)),),
        ),
    )
}
