"""What the tests of measures share: every measure with inputs that suit it, and how to cut those up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actome.core.measure import Measure
from actome.measures import (
    ActivationScale,
    AttentionEntropy,
    AttentionLogitMax,
    Contribution,
    DeadUnits,
    EffectiveRank,
    ExpertLoad,
    Histogram,
    HypersphericalEnergy,
    InductionScore,
    LatentTrajectory,
    MassiveActivations,
    MatrixEntropy,
    Movement,
    NextTokenLoss,
    OutlierChannels,
    PathwayConsistency,
    PathwayDistance,
    RepetitionFrequency,
    RouterEntropy,
    SinkScore,
    Sparsity,
    Spectrum,
    Stiffness,
    TokenCollapse,
    TokenUncertainty,
    Voids,
)
from actome.measures.cett import CETT
from actome.measures.delta import DeltaSparsity
from actome.measures.drains import ResidualPeak, ValueDrain
from actome.measures.kurtosis import Kurtosis
from actome.measures.quantisation import QuantisationError
from actome.measures.sparsity import UnitFrequency
from actome.measures.spikes import Spikes

# Where the batch is among the dims that `update` takes.
BATCH_DIM = {"tokens": 0, "pattern": 0, "logits": 0, "depth": 1, "sites": 1}
UNITS = 24


@dataclass(frozen=True)
class Subject:
    """A measure and a source of inputs: (generator, batch, length) -> x as `update` takes it."""

    make: Callable[[], Measure]
    inputs: Callable[[torch.Generator, int, int], Tensor]

    @property
    def batch_dim(self) -> int:
        return BATCH_DIM[self.make().layout]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(g: torch.Generator, batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, UNITS, generator=g)
    # A silent unit, a loud channel, one massive entry a row and exact zeros: every measure has something to find.
    x = x * (torch.rand(x.shape, generator=g) > 0.2)
    x[..., 3] = 0.0
    x[..., 5] += 30.0
    x[:, 0, 7] = 500.0
    return x


def scores(g: torch.Generator, batch: int, length: int) -> Tensor:
    x = 3 * torch.randn(batch, 3, length, length, generator=g)
    return x.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)


def pattern(g: torch.Generator, batch: int, length: int) -> Tensor:
    scores = 3 * torch.randn(batch, 3, length, length, generator=g)
    scores[:, 1, :, 0] += 6.0
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def logits(g: torch.Generator, batch: int, length: int) -> Tensor:
    return 4 * torch.randn(batch, length, 11, generator=g)


def stream(g: torch.Generator, batch: int, length: int) -> Tensor:
    return torch.randn(5, batch, length, UNITS, generator=g).cumsum(0)


SUBJECTS = {
    "ActivationScale": Subject(ActivationScale, activations),
    "Sparsity": Subject(Sparsity, activations),
    "DeadUnits": Subject(DeadUnits, activations),
    "MassiveActivations": Subject(lambda: MassiveActivations(positions=4), activations),
    "OutlierChannels": Subject(OutlierChannels, activations),
    "EffectiveRank": Subject(EffectiveRank, activations),
    "SinkScore": Subject(SinkScore, pattern),
    "AttentionEntropy": Subject(AttentionEntropy, pattern),
    "AttentionLogitMax": Subject(AttentionLogitMax, scores),
    "InductionScore": Subject(InductionScore, pattern),
    "NextTokenLoss": Subject(NextTokenLoss, logits),
    "Movement": Subject(Movement, stream),
    "Voids": Subject(Voids, stream),
    "Spectrum": Subject(Spectrum, activations),
    "MatrixEntropy": Subject(MatrixEntropy, activations),
    "HypersphericalEnergy": Subject(lambda: HypersphericalEnergy(size=16), activations),
    "Stiffness": Subject(Stiffness, stream),
    "UnitFrequency": Subject(UnitFrequency, activations),
    "UnitFrequency, near": Subject(lambda: UnitFrequency(near=0.1), activations),
    "DeltaSparsity": Subject(DeltaSparsity, activations),
    "Kurtosis": Subject(lambda: Kurtosis(every=1), activations),
    "Spikes": Subject(lambda: Spikes(every=2), activations),
    "QuantisationError": Subject(lambda: QuantisationError(every=1), activations),
    "QuantisationError, every third": Subject(lambda: QuantisationError(every=3), activations),
    "ResidualPeak": Subject(lambda: ResidualPeak(positions=3), activations),
    "ValueDrain": Subject(lambda: ValueDrain(heads=4), activations),
    "CETT": Subject(
        lambda: CETT(torch.randn(6, UNITS, generator=generator(9)), [0.5, 2.0, 20.0, 1e4], every=2), activations
    ),
    "Histogram": Subject(Histogram, activations),
    "TokenCollapse": Subject(TokenCollapse, activations),
    "LatentTrajectory": Subject(lambda: LatentTrajectory(segment=2), activations),
    "ExpertLoad": Subject(ExpertLoad, activations),
    "RouterEntropy": Subject(RouterEntropy, activations),
    "RepetitionFrequency": Subject(RepetitionFrequency, logits),
    "TokenUncertainty": Subject(TokenUncertainty, logits),
    "Contribution": Subject(Contribution, stream),
    "Contribution, every other": Subject(lambda: Contribution(every=2), stream),
    "PathwayConsistency, every third": Subject(
        lambda: PathwayConsistency(torch.randn(5, UNITS, 4, generator=generator(8)).unbind(), of="units", every=3),
        stream,
    ),
    "PathwayDistance": Subject(lambda: PathwayDistance(of="units", reservoir=2), stream),
    "PathwayConsistency": Subject(
        lambda: PathwayConsistency(torch.randn(5, UNITS, 4, generator=generator(8)).unbind(), of="units"), stream
    ),
}


def ids(g: torch.Generator, batch: int, length: int) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=g)


def measured(
    subject: Subject, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None
) -> dict[str, Tensor]:
    """The values of one update."""
    measure = subject.make()
    measure.update(x, mask, tokens)
    return measure.compute()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Equal up to the rounding of float32 sums over a few hundred numbers, which is all that batches may change."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value,
            theirs[name],
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            check_dtype=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )
