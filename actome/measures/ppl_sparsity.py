"""How many MLP units may be silenced token by token before perplexity rises by p %, and simpler rules to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import MeasureTable
from .cett import cett
from .loss import NextTokenLoss
from .sparsity import UnitFrequency

if TYPE_CHECKING:
    from ..core.model import Model

Rule = Literal["cett", "fat", "topk", "zero"]
_Taps = list[tuple[Any, Callable[[Tensor], Tensor], Literal["write"]]]


# Tokens to predict without which no rise of perplexity is worth telling.
_LEAST = 64


@dataclass(frozen=True)
class Silenced:
    """A model with part of its MLP units silenced, token by token.

    Attributes:
        rule: how it was decided which.
        setting: the rule's one number: the error c, the threshold eps, or the share of units k / F.
        kept: for each site the share of units that were not 0, over the tokens of the held-out text.
        thresholds: for each site t on the size of a contribution (``"cett"``) or eps (``"fat"``).
        loss, dense_loss: next-token loss of the held-out text with and without silencing, in nats.
        tried: every (setting, ratio of perplexities, mean share kept) on the way there.
    """

    rule: Rule
    setting: float
    kept: dict[str, float]
    thresholds: dict[str, float]
    loss: float
    dense_loss: float
    tried: list[tuple[float, float, float]] = field(default_factory=list, repr=False)

    @property
    def mean_kept(self) -> float:
        """The activation ratio: share kept, averaged over sites."""
        return sum(self.kept.values()) / len(self.kept)

    @property
    def sparsity(self) -> float:
        """1 - `mean_kept`."""
        return 1 - self.mean_kept

    @property
    def ratio(self) -> float:
        """Perplexity of the silenced model over that of the dense one."""
        return math.exp(self.loss - self.dense_loss)


def ppl_sparsity(
    model: Model,
    calibration: Any,
    heldout: Any,
    p: float = 1.0,
    sites: str | Sequence[str] = "blocks.*.mlp.act",
    *,
    tolerance: float = 1e-3,
    batch_size: int = 8,
) -> Silenced:
    """PPL-p% sparsity: the largest share of MLP units that can be silenced while perplexity rises by at most p %.

    Every layer gets the threshold at which its `CETT` equals one number c, the same for all layers; all layers are
    silenced at once, and c is bisected until the perplexity ratio of the held-out text is 1 + p / 100. Works for any
    activation function, where counting zeros only works for ReLU.

    Args:
        calibration: text that the thresholds are fitted on, as in `Model.measure`; or the table that `cett` gave, to
            be used for several p.
        heldout: other text, on which perplexity and shares are measured; read once for each step of the bisection, so
            no iterator that can be read only once.
        p: rise of perplexity in per cent.
        sites: what enters down projections.
        tolerance: width of c at which the bisection ends.
        batch_size: rows a batch, for inputs that are not yet batched.

    Returns:
        `Silenced` at the largest c that was found to keep within the budget, ``.sparsity`` among it. An MLP that does
        nothing, as before training, can be dropped altogether: sparsity 1.

    Raises:
        MeasureError: p is not above 0, calibration and held-out text are the same, or the held-out text has fewer than
            64 tokens to predict. Far more are wanted: with n of them the rise is known to about its spread between
            tokens over sqrt(n).

    Source: Luo et al. 2024, Sparsing Law; the bisection as in its released code.

    Example:
        >>> import actome as ac
        >>> one, other = ("The value of the expression is. " * 20, "It is what it is, and that is that. " * 20)
        >>> found = ppl_sparsity(ac.demo(), one, other, tolerance=0.1)
        >>> found.ratio <= 1.01, 0 <= found.sparsity <= 1
        (True, True)
    """
    if not p > 0:
        raise MeasureError(f"p is {p}; give a rise of perplexity in per cent, above 0")
    if calibration is heldout or (isinstance(calibration, str | list) and calibration == heldout):
        raise MeasureError("thresholds fitted on a text flatter it; give another one as held-out text")
    fitted = isinstance(calibration, MeasureTable)
    curves = calibration if fitted else cett(model, calibration, sites, batch_size=batch_size)
    bench = _Bench(model, heldout, sites, batch_size)
    dense = bench.run([])[0]
    if not math.isfinite(dense):
        raise MeasureError(
            f"the loss on the held-out text is {dense}: it needs a token with one before it, and logits that are finite"
        )
    if bench.predictions < _LEAST:
        raise MeasureError(
            f"the held-out text has {bench.predictions} tokens to predict; a rise of {p} % needs at least {_LEAST}, "
            "and thousands to be known well"
        )
    tried: list[tuple[float, float, float]] = []

    def at(c: float) -> Silenced:
        taps, thresholds = _cett_taps(model, curves, c)
        loss, kept = bench.run(taps)
        found = Silenced("cett", c, kept, thresholds, loss, dense, tried)
        tried.append((c, found.ratio, found.mean_kept))
        return found

    everything = at(1.0)
    if everything.ratio <= 1 + p / 100:
        return everything
    low, high, best = 0.0, 1.0, at(0.0)
    while high - low > tolerance:
        middle = (low + high) / 2
        found = at(middle)
        if found.ratio <= 1 + p / 100:
            low, best = middle, found
        else:
            high = middle
    return best


def silenced(
    model: Model,
    calibration: Any,
    heldout: Any,
    rule: Rule = "cett",
    kept: float = 0.3,
    sites: str | Sequence[str] = "blocks.*.mlp.act",
    *,
    gates: str | Sequence[str] | None = None,
    batch_size: int = 8,
) -> Silenced:
    """Silences all but a share of the MLP units by one of four rules, to compare them at an equal share.

    - ``"cett"``: contributions :math:`|z_i| \\lVert W_{:,i} \\rVert < t_l` with an equal CETT in all layers
    - ``"fat"``: activations :math:`|s_i| < \\epsilon`, one threshold for all layers (FATReLU)
    - ``"topk"``: all but the k largest :math:`|z_i|` of each token, the same k in all layers
    - ``"zero"``: what is exactly 0 already; `kept` does not apply

    Args:
        calibration: text on which the setting is fitted so that the mean share kept is `kept`.
        heldout: other text, on which loss and share are measured.
        kept: the share of units to keep. More than are active to begin with cannot be kept.
        sites: what enters down projections; shares are counted there.
        gates: for ``"fat"``, where s is: the output of the activation function, such as ``"module:blocks.*.mlp.act"``
            of a gated MLP. Of a plain MLP s = z, so by default `sites`.
        batch_size: rows a batch, for inputs that are not yet batched.

    Raises:
        MeasureError: a rule that does not exist, or a share outside (0, 1].

    Source: the rules that Luo et al. 2024, Sparsing Law, compare.

    Example:
        >>> import actome as ac
        >>> found = silenced(ac.demo(), "The value of the expression is", "It is what it is", "topk", kept=0.25)
        >>> round(found.mean_kept, 6)
        0.25
    """
    if rule not in ("cett", "fat", "topk", "zero"):
        raise MeasureError(f"there is no rule {rule!r}; choose 'cett', 'fat', 'topk' or 'zero'")
    if not 0 < kept <= 1:
        raise MeasureError(f"kept is {kept}; give a share above 0 and at most 1")
    bench = _Bench(model, heldout, sites, batch_size)
    dense, zero = bench.run([])
    if rule == "zero":
        return Silenced(rule, 0.0, zero, {}, dense, dense)
    if rule == "topk":
        loss, shares = bench.run([(site.address, _top(kept), "write") for site in model.match(sites)])
        return Silenced(rule, kept, shares, {}, loss, dense)

    fitting = _Bench(model, calibration, sites, batch_size, loss=False)
    if rule == "cett":
        curves = cett(model, calibration, sites, batch_size=batch_size)
        low, high = 0.0, 1.0

        def taps_at(setting: float) -> tuple[_Taps, dict[str, float]]:
            return _cett_taps(model, curves, setting)
    else:
        places = model.match(sites if gates is None else gates)
        low, high = 0.0, _largest(model, calibration, places, batch_size)

        def taps_at(setting: float) -> tuple[_Taps, dict[str, float]]:
            taps: _Taps = [(site.address, _above(setting), "write") for site in places]
            return taps, {site.name: setting for site in places}

    for _ in range(20):
        middle = (low + high) / 2
        shares = fitting.run(taps_at(middle)[0])[1]
        if sum(shares.values()) / len(shares) >= kept:
            low = middle
        else:
            high = middle
    taps, thresholds = taps_at(low)
    loss, shares = bench.run(taps)
    return Silenced(rule, low, shares, thresholds, loss, dense)


class _Bench:
    """Loss and shares of nonzero units of one text, under taps."""

    def __init__(self, model: Model, text: Any, sites: str | Sequence[str], batch_size: int, loss: bool = True):
        self.model, self.text, self.batch_size = model, text, batch_size
        self.names = [site.name for site in model.match(sites)]
        self.measures: dict[Any, Any] = {tuple(self.names): UnitFrequency()}
        self.predictions = 0
        if loss:
            self.measures["logits"] = NextTokenLoss()

    def run(self, taps: _Taps) -> tuple[float, dict[str, float]]:
        with self.model.tap(taps):
            table = self.model.measure(self.text, self.measures, batch_size=self.batch_size)
        kept = {name: float(table.value("active", name)) for name in self.names}
        self.predictions = sum(int(one.measure.predictions) for one in table if "loss" in one.values)
        return float(table.value("loss")) if "logits" in self.measures else math.nan, kept


def _cett_taps(model: Model, curves: MeasureTable, error: float) -> tuple[_Taps, dict[str, float]]:
    taps: _Taps = []
    thresholds = {}
    for result in curves:
        (site,) = result.sites
        measure: Any = result.measure
        thresholds[site.name] = threshold = measure.threshold_at(error) if error > 0 else 0.0
        units_F = measure.units_thresholds(threshold)
        taps.append((model.match(site.name)[0].address, _above(units_F), "write"))
    return taps, thresholds


def _above(threshold: Tensor | float) -> Callable[[Tensor], Tensor]:
    def keep(x: Tensor) -> Tensor:
        bound = threshold.to(x.device) if isinstance(threshold, Tensor) else threshold
        return x.masked_fill(x.abs() < bound, 0.0)

    return keep


def _top(share: float) -> Callable[[Tensor], Tensor]:
    def keep(x: Tensor) -> Tensor:
        k = max(1, round(share * x.shape[-1]))
        index = x.abs().topk(k, dim=-1).indices
        return x.new_zeros(x.shape).scatter(-1, index, x.gather(-1, index))

    return keep


def _largest(model: Model, text: Any, sites: Sequence[Any], batch_size: int) -> float:
    from .scale import ActivationScale

    table = model.measure(text, {tuple(site.name for site in sites): ActivationScale()}, batch_size=batch_size)
    return float(table.value("max_abs").max())
