"""Panels: named sets of measures, with the sites that each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..core.measure import TOGETHER, Measure
from .attention import AttentionEntropy, SinkScore
from .cka import CKA
from .contribution import Contribution
from .delta import DeltaSparsity
from .depth import Movement
from .drains import ResidualPeak, ValueDrain
from .extremes import MassiveActivations, OutlierChannels
from .histogram import Histogram
from .kurtosis import Kurtosis
from .logit_max import AttentionLogitMax
from .loss import NextTokenLoss
from .matrix_entropy import MatrixEntropy
from .pathways import PathwayConsistency, PathwayDistance
from .quantisation import QuantisationError
from .router import ExpertLoad, RouterEntropy
from .scale import ActivationScale
from .sparsity import DeadUnits, Sparsity, UnitFrequency
from .spectrum import EffectiveRank, Spectrum
from .spikes import Spikes
from .stiffness import Stiffness
from .token_collapse import RepetitionFrequency, TokenCollapse
from .trajectory import LatentTrajectory
from .uncertainty import TokenUncertainty
from .voids import Voids

# What makes a measure, and the patterns of one entry with what makes the measures that are taken at their sites.
Make = Callable[[], Measure]
Entry = tuple[tuple[str, ...], tuple[Make, ...]]


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
        fallback: the entries for a model that has none of these sites.

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
_POST = ("blocks.*.resid.post",)
_ACT = ("blocks.*.mlp.act",)
_PATTERN = ("blocks.*.attn.pattern",)
_LOGITS = ("logits",)
_MODULES = ("module:*",)
_WEIGHTS, _ROUTER = ("blocks.*.moe.weights",), ("blocks.*.moe.router",)
# What enters a matrix product, which is where a runtime rounds.
_ROUNDED = ("blocks.*.attn.z", *_ACT, *_POST)

# The spectrum of an MLP's many units: from a sketch, of every n-th token.
_wide_spectrum = partial(Spectrum, every=4)

_HEALTH = Panel(
    name="health",
    about="whether a model's activations are as they should be: scale, dead units, extremes, sinks, rank, loss",
    entries=(
        (_STREAM, (ActivationScale, Movement, Voids)),
        (_POST, (MassiveActivations, OutlierChannels, EffectiveRank)),
        (_ACT, (ActivationScale, Sparsity, DeadUnits)),
        (_PATTERN, (SinkScore, AttentionEntropy)),
        (_LOGITS, (NextTokenLoss,)),
    ),
    fallback=((_MODULES, (ActivationScale, Sparsity, DeadUnits)),),
)
_SPARSITY = Panel(
    name="sparsity",
    about="how many units work at a token, how often each does, and how much changes from token to token",
    entries=((_ACT, (ActivationScale, Sparsity, DeadUnits, UnitFrequency, DeltaSparsity, Histogram)),),
    fallback=((_MODULES, (ActivationScale, Sparsity, DeadUnits, UnitFrequency, Histogram)),),
)
_GEOMETRY = Panel(
    name="geometry",
    about="which directions activations take: spectrum, likeness of tokens and of layers, what each block contributes",
    entries=(
        (_STREAM, (Movement, Voids, Contribution, Stiffness)),
        (_POST, (Spectrum, MatrixEntropy, TokenCollapse, CKA, LatentTrajectory)),
        (_ACT, (_wide_spectrum,)),
    ),
    fallback=((_MODULES, (Spectrum,)),),
)
_ATTENTION = Panel(
    name="attention",
    about="where heads look, where they rest, and what goes with it at the first token",
    entries=(
        (_PATTERN, (SinkScore, AttentionEntropy)),
        (("blocks.*.attn.v",), (ValueDrain,)),
        (_POST, (ResidualPeak, MassiveActivations)),
    ),
)
_EXPERTS = Panel(
    name="experts",
    about="how a mixture of experts shares out its tokens; in a dense model, the ways through its strongest units",
    entries=(
        (_WEIGHTS, (ExpertLoad, PathwayDistance, PathwayConsistency)),
        (_ROUTER, (RouterEntropy,)),
    ),
    fallback=((_ACT, (partial(PathwayDistance, of="units"),)),),
)
_QUANTISATION = Panel(
    name="quantisation",
    about="what rounding to 8 or 4 bits would lose at each site, and which outliers are to blame",
    entries=(
        (_ROUNDED, (QuantisationError, OutlierChannels, Kurtosis, Histogram)),
        # Units of an MLP are heavy-tailed by themselves: against their medians much would be a spike.
        (("blocks.*.attn.z", *_POST), (Spikes,)),
    ),
    fallback=((_MODULES, (QuantisationError, OutlierChannels, Histogram)),),
)
_UNCERTAINTY = Panel(
    name="uncertainty",
    about="how sure the model is of the next token, and how right it is to be so",
    entries=((_LOGITS, (TokenUncertainty, RepetitionFrequency)),),
)
# Taken again and again while a model trains, so no wider matrices than this: their eigenvalues cost the most.
_training_spectrum = partial(Spectrum, max_width=1024)
_TRAINING = Panel(
    name="training",
    about="what is to be watched while a model trains: what grows, dies, collapses or comes up",
    entries=(
        (_POST, (ActivationScale, MassiveActivations, _training_spectrum, TokenCollapse)),
        (_ACT, (ActivationScale, Sparsity, DeadUnits)),
        (("blocks.*.attn.scores",), (AttentionLogitMax,)),
        (_PATTERN, (SinkScore,)),
        (_WEIGHTS, (ExpertLoad, PathwayDistance)),
        (_ROUTER, (RouterEntropy,)),
        (_LOGITS, (ActivationScale, NextTokenLoss, RepetitionFrequency)),
    ),
    fallback=((_MODULES, (ActivationScale, Sparsity, DeadUnits)),),
)

# What another measure of `all` says as well.
_SAID_BY_OTHERS = {EffectiveRank, NextTokenLoss}


def _union(name: str, about: str, *panels: Panel) -> Panel:
    """All entries of some panels, each measure at each site once."""
    entries: dict[tuple[str, ...], list[Make]] = {}
    for patterns, make in ((patterns, make) for panel in panels for patterns, makes in panel for make in makes):
        if make in _SAID_BY_OTHERS:
            continue
        # What looks at all sites of an entry together needs its patterns together.
        together = getattr(make, "func", make).layout in TOGETHER
        for place in [patterns] if together else [(pattern,) for pattern in patterns]:
            given = entries.setdefault(place, [])
            if make not in given:
                given.append(make)
    return Panel(name, about, tuple((place, tuple(makes)) for place, makes in entries.items()), _SPARSITY.fallback)


_PARTS = (_HEALTH, _SPARSITY, _GEOMETRY, _ATTENTION, _EXPERTS, _QUANTISATION, _UNCERTAINTY)

PANELS: dict[str, Panel] = {
    panel.name: panel
    for panel in (
        *_PARTS,
        _TRAINING,
        _union("all", "everything that one pass can say of a model: all of the panels but `training`", *_PARTS),
    )
}
