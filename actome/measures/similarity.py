"""How alike two sets of features are, by any of the measures of similarity; layers of models beside one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import MeasureError, nearest
from ..core.fold import Fold
from ..core.stream import batches, canonical, fitting
from ..core.text import Text
from .cca import CCA, SVCCA
from .cka import CKA, LinearCKA
from .neighbours import MutualKNN
from .paired import CrossMoments, common_rows
from .procrustes import Procrustes
from .rsa import RSA

if TYPE_CHECKING:
    import pandas as pd

    from ..core.model import Model
    from ..core.sites import Site

# By name, what folds two sets of features, and which of its values is the similarity.
METRICS: dict[str, tuple[Callable[..., Fold], str]] = {
    "cka": (LinearCKA, "cka"),
    "rsa": (RSA, "rsa"),
    "cca": (CCA, "cca"),
    "svcca": (SVCCA, "cca"),
    "procrustes": (Procrustes, "procrustes"),
    "mutual_knn": (MutualKNN, "mutual_knn"),
}


def similarity(x: Tensor, y: Tensor, metric: str = "cka", **options: Any) -> float:
    """How alike two sets of features of the same rows are: tokens, images, stimuli.

    Args:
        x, y: (N, unit) and (N, other); numpy arrays do as well, such as voxels or firing rates.
        metric: ``"cka"`` (debiased), ``"rsa"``, ``"cca"``, ``"svcca"``, ``"procrustes"`` or ``"mutual_knn"``. For
            streams, and for what else each can say, use the folds: `LinearCKA`, `RSA`, `CCA`, `SVCCA`, `Procrustes`,
                `MutualKNN`.
        options: of the fold, such as ``k=5``.

    Raises:
        MeasureError: a metric that does not exist, sets that do not pair, or too few rows.

    Example:
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(similarity(x, x.flip(1), "procrustes"), 6), round(similarity(x, x.flip(1), "cka"), 6)
        (1.0, 1.0)
    """
    fold, value = _metric(metric, options)
    if not all(isinstance(one, Tensor) or hasattr(one, "__array__") for one in (x, y)):
        kinds = f"{type(x).__name__} and {type(y).__name__}"
        raise MeasureError(f"similarity takes two sets of features (N, unit), not {kinds}; for two models see compare")
    x, y = common_rows(*(torch.as_tensor(one) for one in (x, y)))
    if isinstance(fold, CrossMoments):
        # Changes nothing but the rounding. Not the mean: what is the same in every row must become 0.
        x, y = x - x[:1], y - y[:1]
    fold.update(x, y)
    return float(fold.compute()[value])


def compare(
    a: Model,
    b: Model,
    inputs: Any,
    sites_a: str | Sequence[str],
    sites_b: str | Sequence[str] | None = None,
    *,
    metric: str = "cka",
    batch_size: int = 8,
    **options: Any,
) -> pd.DataFrame:
    """The similarity of every site of one model with every site of another, in one pass over a text.

    The models read the same tokens: two checkpoints of a run, two seeds, a model and its tuned or quantised self, or
    one model with itself. ``"cka"`` takes the unbiased minibatches of `CKA` (its options are ``kernel``, ``size``,
    ``every``), all pairs in one matrix product; every other metric keeps a fold for each pair, (U^2 + V^2 + U V)
    numbers for ``"cca"``, ``"svcca"`` and ``"procrustes"``, so give them few sites.

    Args:
        a, b: the models; the same one twice runs once.
        inputs: as `Model.measure` takes it; text is read by the tokenizer of `a`.
        sites_a: pattern or patterns.
        sites_b: the same for `b`; as `sites_a` when not given.
        metric: as in `similarity`.
        batch_size: rows a batch, for inputs that are not yet batched.

    Returns:
        A table with a row for each pair: site_a, layer_a, site_b, layer_b, measure, value.

    Raises:
        SiteError: a pattern that matches nothing.
        MeasureError: the sites do not have the same tokens, or there were too few; text for models whose tokenizers
            have other vocabularies.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> table = compare(model, model, "The value of the expression is an integer.", "blocks.*.resid.post")
        >>> table.shape, bool((table.value <= 1 + 1e-6).all())
        ((16, 6), True)
    """
    sites = _sites(a, sites_a), _sites(b, sites_a if sites_b is None else sites_b)
    _same_words(a, b, inputs)
    grid = CKA(**options) if metric == "cka" else None
    pairs = [] if grid is not None else [[_metric(metric, options)[0] for _ in sites[1]] for _ in sites[0]]
    for arguments, _, mask in batches(a, inputs, batch_size):
        found = _features(a, arguments, sites[0] + sites[1] if a is b else sites[0])
        if a is not b:
            try:
                of_other = _features(b, arguments, sites[1])
            except IndexError as error:
                raise MeasureError(
                    f"{b.name} cannot read the token ids that these inputs have for {a.name} ({error}): its vocabulary "
                    "or context is smaller; give ids that both can read"
                ) from error
            found |= {f"b {name}": x for name, x in of_other.items()}
        of_a = [found[site.name] for site in sites[0]]
        of_b = [found[site.name if a is b else f"b {site.name}"].to(of_a[0].device) for site in sites[1]]
        if any(one.shape[:2] != of_a[0].shape[:2] for one in of_a + of_b):
            shapes = ", ".join(str(tuple(one.shape[:2])) for one in of_a + of_b)
            raise MeasureError(f"the sites do not hold the same tokens; they have (batch, pos) of {shapes}")
        fits = fitting(mask, of_a[0], "tokens")
        if grid is not None:
            grid.update([*of_a, *of_b], fits)
            continue
        keep = torch.ones(of_a[0].shape[:2], dtype=torch.bool, device=of_a[0].device) if fits is None else fits
        for x, row in zip(of_a, pairs, strict=True):
            for y, fold in zip(of_b, row, strict=True):
                fold.update(x[keep], y[keep])
    if grid is not None:
        values = grid.compute()["cka"][: len(sites[0]), len(sites[0]) :].tolist()
    else:
        name = METRICS[metric][1]
        values = [[float(fold.compute()[name]) for fold in row] for row in pairs]
    return _table(sites[0], sites[1], metric, values)


def _same_words(a: Model, b: Model, inputs: Any) -> None:
    """Refuses text for two models to whom its ids would mean different things."""
    text = isinstance(inputs, str | Text) or (isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], str))
    words = [one.tokenizer.get_vocab() for one in (a, b) if hasattr(one.tokenizer, "get_vocab")]
    if a is not b and text and len(words) == 2 and words[0] != words[1]:
        raise MeasureError(
            f"{a.name} and {b.name} have tokenizers with other vocabularies, and the same ids would be other text to "
            "each; give ids that mean the same to both, or compare features of whole texts with similarity()"
        )


def _metric(metric: str, options: dict[str, Any]) -> tuple[Fold, str]:
    if metric not in METRICS:
        raise MeasureError(f"there is no metric {metric!r}{nearest(metric, METRICS)}; choose {', '.join(METRICS)}")
    make, value = METRICS[metric]
    return make(**options), value


def _sites(model: Model, patterns: str | Sequence[str]) -> list[Site]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return list({site.name: site for pattern in patterns for site in model.match(pattern)}.values())


def _features(model: Model, arguments: dict[str, Any], sites: Sequence[Site]) -> dict[str, Tensor]:
    """(batch, pos, unit) of each site, of one forward."""
    found: dict[str, Tensor] = {}

    def keeping(site: Site) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            found[site.name] = canonical(x, site, "tokens").detach().clone()

        return keep

    with (
        model.tap([(site.address, keeping(site), "read") for site in {s.name: s for s in sites}.values()]),
        torch.no_grad(),
    ):
        model.module(**arguments)
    return found


def _table(a: Sequence[Site], b: Sequence[Site], metric: str, values: Sequence[Sequence[float]]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        (one.name, one.layer, other.name, other.layer, metric, value)
        for one, row in zip(a, values, strict=True)
        for other, value in zip(b, row, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["site_a", "layer_a", "site_b", "layer_b", "measure", "value"])
    return table.astype({"layer_a": "Int64", "layer_b": "Int64"})
