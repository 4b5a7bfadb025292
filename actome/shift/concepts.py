"""Concept shifts: what fine-tuning did to each concept of a model, from states of the same inputs in both.

Letters: N samples, D width of the site, K concepts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actome.clamps import Add
from actome.core.errors import MeasureError
from actome.tasks.trials import split

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["kmeans", "nmf", "pca"]
Unembed = Tensor | Callable[[Tensor], Tensor]


@dataclass
class ConceptShift:
    r"""Decomposes the states of a base and of a tuned model into concepts, and carries the base's to the tuned ones.

    States of the base are decomposed, :math:`A \approx V U` with concept vectors U, and each sample belongs to its
    strongest concept. A concept's shift is the mean change of its samples, :math:`\delta_k = \overline{b_m - a_m}`, and
    :math:`u_k + \alpha \delta_k` is its recovered vector. It is matched to the concepts that the tuned model's states
    give by themselves, over *other* samples, so that nothing is recovered on what it was made of.

    Args:
        k: concepts, of either model.
        method: ``"kmeans"``, whose concepts are means; ``"nmf"``, of positive and negative parts of the states, so that
            strengths are not negative while vectors may be; ``"pca"``, components around the mean, in the direction in
            which the skew is positive.
        alpha: how much of the shift recovered vectors take.
        held_out: share of the samples that the tuned model's concepts, and consistency, are told on.
        top: words, or samples where there is no unembedding, by which a concept is known.
        matching: ``"hungarian"``, one to one, or ``"best"``, the best cosine of each.
        seed: of the split and of the decompositions.

    Attributes:
        concepts_: (K, D), of the base, in the units of states.
        tuned_: (K, D), of the tuned model.
        shifts_: (K, D).
        recovered_: (K, D).
        match_: (K), for each recovered concept the tuned one that it is matched to.
        overlap_: (K), share of top words that a recovered concept has in common with its match.
        consistency_: (K), mean cosine of the held-out samples' own changes with their concept's shift; NaN for a
            concept that no held-out sample belongs to.
        sizes_: (K), samples that each shift is the mean of.

    Source: Khayatan et al. 2025, Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering, section 4
    (the split of the samples is ours, and what stands for semi-NMF).

    >>> generator = torch.Generator().manual_seed(0)
    >>> centres, shifts = 9 * torch.eye(4, 8), 5 * torch.eye(8)[4:]
    >>> kind = torch.arange(400) % 4
    >>> a = centres[kind] + torch.randn(400, 8, generator=generator)
    >>> found = ConceptShift(k=4).fit(a, a + shifts[kind])
    >>> found.consistency_.round(decimals=3).tolist(), bool((found.shifts_.norm(dim=1) - 5).abs().max() < 1e-4)
    ([1.0, 1.0, 1.0, 1.0], True)
    """

    k: int = 20
    method: Method = "kmeans"
    alpha: float = 1.0
    held_out: float = 0.5
    top: int = 10
    matching: Literal["hungarian", "best"] = "hungarian"
    seed: int = 0
    concepts_: Tensor = field(init=False, repr=False)
    tuned_: Tensor = field(init=False, repr=False)
    shifts_: Tensor = field(init=False, repr=False)
    recovered_: Tensor = field(init=False, repr=False)
    match_: Tensor = field(init=False, repr=False)
    overlap_: Tensor = field(init=False, repr=False)
    consistency_: Tensor = field(init=False, repr=False)
    sizes_: Tensor = field(init=False, repr=False)
    _known_by: Callable[[Tensor], Tensor] = field(init=False, repr=False)

    def fit(self, base: Tensor, tuned: Tensor, unembed: Unembed | None = None) -> ConceptShift:
        """Concepts, shifts and what they recover; gives itself back.

        Args:
            base, tuned: (N, D) states of one site at the token of interest, for the same inputs in the same order.
            unembed: what words a vector speaks for: (V, D), or a function from (K, D) to scores (K, V), such as the
                final norm and the unembedding. Without it concepts are known by their nearest held-out states of the
                tuned model.

        Raises:
            MeasureError: states that differ in shape or are not finite, too few samples, or an option out of range.
        """
        try:
            base, tuned = torch.as_tensor(base), torch.as_tensor(tuned)
        except (TypeError, ValueError) as error:
            raise MeasureError(f"give the states of both models as tensors (samples, width): {error}") from None
        a_ND, b_ND = self._checked(base, tuned)
        fit_M, held_M = split(len(a_ND), [1 - self.held_out, self.held_out], self.seed)
        if min(len(fit_M), len(held_M)) < 2 * self.k:
            raise MeasureError(
                f"{len(fit_M)} samples to fit on and {len(held_M)} held out are too few for k={self.k}; give two a "
                "concept of either at least, or a smaller k"
            )
        self.concepts_, of = _decomposed(a_ND[fit_M], self.k, self.method, self.seed)
        self.tuned_, _ = _decomposed(b_ND[held_M], self.k, self.method, self.seed)
        moved_ND = b_ND - a_ND
        own_M, other_M = of(a_ND[fit_M]), of(a_ND[held_M])
        self.sizes_ = torch.bincount(own_M, minlength=self.k)
        self.shifts_ = _means(moved_ND[fit_M], own_M, self.k)
        self.recovered_ = self.concepts_ + self.alpha * self.shifts_
        cosine_M = F.cosine_similarity(moved_ND[held_M], self.shifts_[other_M], dim=1)
        self.consistency_ = _means(cosine_M[:, None], other_M, self.k)[:, 0]
        self.consistency_[torch.bincount(other_M, minlength=self.k) == 0] = float("nan")
        self._known_by = self._scores(b_ND[held_M], unembed)
        self.match_ = self.matched(self.recovered_)
        self.overlap_ = self.overlap(self.recovered_, self.match_)
        return self

    def matched(self, vectors: Tensor) -> Tensor:
        """For each of K vectors (K, D) the tuned concept that it is matched to by cosine, (K)."""
        cosine_KK = F.normalize(vectors.float(), dim=1) @ F.normalize(self.tuned_, dim=1).T
        if self.matching == "best":
            return cosine_KK.argmax(1)
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(-cosine_KK.numpy())
        return torch.as_tensor(columns[np.argsort(rows)])

    def overlap(self, vectors: Tensor, match: Tensor | None = None) -> Tensor:
        """Share of top words that vectors have in common with tuned concepts, (K).

        Args:
            vectors: (K, D), such as `concepts_` for what there was without the shift.
            match: (K), the tuned concept of each; by default that which it is matched to itself.
        """
        match = self.matched(vectors) if match is None else match
        ours, theirs = self.words(vectors), self.words(self.tuned_)[match]
        return (ours[:, :, None] == theirs[:, None, :]).any(2).double().mean(1)

    def words(self, vectors: Tensor) -> Tensor:
        """The top words of vectors (K, D), best first, as ids (K, top); without an unembedding held-out samples."""
        scores = self._known_by(vectors.float())
        return scores.topk(min(self.top, scores.shape[1]), dim=1).indices

    def permuted(self, seed: int = 0) -> Tensor:
        """What shifts of other concepts recover, (K, D): a control, in which no concept keeps its own shift."""
        order = torch.randperm(self.k, generator=torch.Generator().manual_seed(seed))
        other_K = torch.empty_like(order)
        other_K[order] = order.roll(1)
        return self.concepts_ + self.alpha * self.shifts_[other_K]

    def fine(self, site: str, source: int, target: int, *, tuned: bool = True, scale: float = 1.0) -> Add:
        """A clamp that leads from one concept to another: the difference of two concept vectors.

        Args:
            site: where it is added, at every position; a pattern of later layers too, as the paper does.
            source, target: concepts.
            tuned: concepts of the tuned model, or of the base.
            scale: of it.
        """
        for name, one in (("source", source), ("target", target)):
            if not 0 <= one < self.k:
                raise MeasureError(f"{name}={one} is no concept; there are 0 to {self.k - 1}")
        vectors = self.tuned_ if tuned else self.concepts_
        return Add(site, vectors[target] - vectors[source], scale)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a concept: samples, length of its shift, consistency, match, overlap with it, and that without."""
        import pandas as pd

        return pd.DataFrame(
            {
                "concept": range(self.k),
                "samples": self.sizes_.tolist(),
                "shift": self.shifts_.norm(dim=1).tolist(),
                "consistency": self.consistency_.tolist(),
                "match": self.match_.tolist(),
                "overlap": self.overlap_.tolist(),
                "unshifted": self.overlap(self.concepts_, self.match_).tolist(),
            }
        )

    def _checked(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        if self.method not in ("kmeans", "nmf", "pca"):
            raise MeasureError(f"method={self.method!r} does not exist; choose kmeans, nmf or pca")
        if self.matching not in ("hungarian", "best"):
            raise MeasureError(f"matching={self.matching!r} does not exist; choose hungarian or best")
        if not isinstance(self.k, int) or self.k < 2 or self.top < 1 or not 0 < self.held_out < 1:
            raise MeasureError(
                f"k={self.k}, top={self.top}, held_out={self.held_out}: two concepts and one word at least, and a "
                "share between 0 and 1"
            )
        if base.ndim != 2 or base.shape != tuned.shape:
            raise MeasureError(
                f"states of shape {tuple(base.shape)} and {tuple(tuned.shape)}; give (samples, width) of the same "
                "inputs in both models"
            )
        if self.method == "pca" and self.k > base.shape[1]:
            raise MeasureError(f"states of width {base.shape[1]} have no {self.k} components; give a smaller k")
        a, b = (x.detach().float().cpu() for x in (base, tuned))
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise MeasureError("there are states that are not finite; leave those samples out")
        return a, b

    @staticmethod
    def _scores(states_MD: Tensor, unembed: Unembed | None) -> Callable[[Tensor], Tensor]:
        if unembed is None:
            near = F.normalize(states_MD, dim=1)
            return lambda vectors: F.normalize(vectors, dim=1) @ near.T
        if isinstance(unembed, Tensor):
            weight_VD = unembed.detach().float().cpu()
            if weight_VD.ndim != 2 or weight_VD.shape[1] != states_MD.shape[1]:
                raise MeasureError(
                    f"an unembedding {tuple(weight_VD.shape)} does not fit states of width {states_MD.shape[1]}"
                )
            return lambda vectors: vectors @ weight_VD.T
        given = unembed
        return lambda vectors: given(vectors).detach().float().cpu()


def coarse(site: str, states: Tensor, target: Tensor, scale: float = 1.0) -> Add:
    """A clamp that leads to a target answer: the mean of its samples' states less that of all others'.

    Args:
        site: where it is added, at every position; a pattern of later layers too, as the paper does.
        states: (N, D) of samples at the token of interest.
        target: (N) bool, which of them get the target answer.
        scale: of it.

    Raises:
        MeasureError: not one flag a sample, or samples of one kind only.

    Source: Khayatan et al. 2025, section 5.2.

    >>> coarse("blocks.1.resid.post", torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([True, False])).value
    tensor([ 2., -1.])
    """
    target = torch.as_tensor(target, dtype=torch.bool, device=states.device)
    if states.ndim != 2 or target.shape != states.shape[:1]:
        raise MeasureError(f"states {tuple(states.shape)} and {tuple(target.shape)} flags; give one flag a sample")
    if bool(target.all()) or not bool(target.any()):
        raise MeasureError(f"{int(target.sum())} of {len(target)} samples get the target answer; both kinds are needed")
    states = states.detach().float()
    if not bool(states.isfinite().all()):
        raise MeasureError("there are states that are not finite; leave those samples out")
    return Add(site, states[target].mean(0) - states[~target].mean(0), scale)


def _means(values_ND: Tensor, of_N: Tensor, k: int) -> Tensor:
    """Mean of each concept's rows, (k, D); zero where there is none."""
    sums = torch.zeros(k, values_ND.shape[1]).index_add(0, of_N, values_ND)
    return sums / torch.bincount(of_N, minlength=k).clamp_min(1)[:, None]


def _decomposed(states_ND: Tensor, k: int, method: Method, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Concept vectors in the units of states (k, D), and a function from states to their strongest concept (N)."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import NMF, PCA

    x = states_ND.double().numpy()
    if method == "kmeans":
        means = KMeans(k, n_init=4, random_state=seed).fit(x)
        return torch.tensor(means.cluster_centers_).float(), lambda y: torch.as_tensor(means.predict(y.double())).long()
    if method == "nmf":
        nmf = NMF(k, init="nndsvda", random_state=seed, max_iter=400, tol=1e-3)
        strength_NK = torch.as_tensor(nmf.fit_transform(_parts(x)))
        positive, negative = np.split(nmf.components_, 2, axis=1)
        vectors_KD = torch.as_tensor(positive - negative)

        def strengths(y: Tensor) -> Tensor:
            return torch.as_tensor(nmf.transform(_parts(y.double().numpy())))

        offset_D = torch.zeros(x.shape[1], dtype=torch.float64)
    else:
        pca = PCA(k, svd_solver="full").fit(x)
        scores_NK = pca.transform(x)
        sign_K = np.where((scores_NK**3).sum(0) < 0, -1.0, 1.0)
        strength_NK = torch.as_tensor(scores_NK * sign_K)
        vectors_KD, offset_D = torch.as_tensor(pca.components_ * sign_K[:, None]), torch.as_tensor(pca.mean_)

        def strengths(y: Tensor) -> Tensor:
            return torch.as_tensor(pca.transform(y.double().numpy()) * sign_K)

    # A concept's strength is compared in units of length, and its vector is as strong as in its own samples.
    length_K = vectors_KD.norm(dim=1)
    own_N = (strength_NK * length_K).argmax(1)
    typical_K = torch.stack([strength_NK[own_N == one, one].mean() for one in range(k)]).nan_to_num(0.0)
    return (offset_D + typical_K[:, None] * vectors_KD).float(), lambda y: (strengths(y) * length_K).argmax(1)


def _parts(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.clip(0), (-x).clip(0)], 1)
