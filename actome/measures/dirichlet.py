"""Whether representations lie like the nodes of a graph: their energy over its edges, and its spectral embedding.

Letters: B batch, T position, N node, D width, W window, R relabelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.fold import Fold, Reduction
from ..core.real import double, ratio, wide


class DirichletEnergy(Fold):
    r"""How near the representations of neighbours on a graph are, as the context grows.

    In each sequence, :math:`H_n` is the mean activation of node *n* over its occurrences in a window. The energy is

    .. math:: E = \operatorname{mean}_{(i,j) \in \text{edges}} \|H_i - H_j\|^2 \,/\,
              \operatorname{mean}_{i < j} \|H_i - H_j\|^2

    over the nodes that occur in the window: 1 when the graph says nothing of who is near whom, below 1 when
    neighbours are nearer than others. Divided by the scatter of all pairs, so that shrinking or collapsing lowers
    nothing. Beside it stand the energies of random relabellings of the nodes, the same ones in all sequences:

    - ``energy`` (window): mean over sequences
    - ``null`` (window, relabelling): the same for each relabelled graph
    - ``z`` (window): distance from the mean of the relabellings, in their standard deviations
    - ``below`` (window): share of the relabellings with an energy that is not larger

    Sequences in whose window no edge or fewer than two nodes occur, or all nodes have one representation, are left out
    of that window; tokens with a non-finite activation are left out. Nodes that are visited one after the other share
    positions, and a token carries its own embedding: take both out first, with `without_means`.

    Args:
        graph: adjacency matrix, (node, node), symmetric.
        window: how many tokens each window holds.
        ends: where windows end (exclusive), such as (21, 34, 48); windows slide, they do not expand.
        hops: 1 takes the edges; 2 all pairs that share a neighbour; k all pairs with a walk of k steps between.
        exclude: so many principal components of the node means are taken out in each sequence first.
        null: how many relabellings.
        seed: of the relabellings.

    Shapes: `update(x, nodes)` takes x (B, T, D) and the node at each position (B, T), negative for none.

    Source: Park et al. 2025, ICLR: In-Context Learning of Representations (there: unnormalised, of the mean over
    sequences; two hops and relabellings are additions).

    Example:
        >>> ring = torch.roll(torch.eye(8), 1, 0) + torch.roll(torch.eye(8), -1, 0)
        >>> angle = torch.arange(8) * torch.pi / 4
        >>> circle = torch.stack([angle.cos(), angle.sin()], -1)
        >>> measure = DirichletEnergy(ring, window=8, ends=(8,))
        >>> measure.update(circle[None], torch.arange(8)[None])
        >>> round(float(measure.compute()["energy"][0]), 3)
        0.256
    """

    reductions: ClassVar[dict[str, Reduction]] = {"energy": "sum", "sequences": "sum"}

    def __init__(
        self,
        graph: Tensor,
        window: int,
        ends: Sequence[int],
        hops: int = 1,
        exclude: int = 0,
        null: int = 200,
        seed: int = 0,
        **options: object,
    ):
        super().__init__(**options)
        if window < 2 or not len(ends) or min(ends) < window:
            raise MeasureError(f"windows of {window} tokens (at least 2) cannot end at {list(ends)}")
        pairs = _pairs(graph, hops)
        self.window, self.ends, self.exclude = window, tuple(ends), exclude
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.arange(len(pairs))]
        orders += [torch.randperm(len(pairs), generator=generator) for _ in range(null)]
        self.graphs_RNN = torch.stack([pairs[order][:, order] for order in orders]).double()

    def statistics(self, x: Tensor, nodes: Tensor) -> dict[str, Tensor]:
        """energy: (window, 1 + relabelling), summed over sequences; sequences: the same, how many had one."""
        if x.ndim != 3 or nodes.shape != x.shape[:2] or x.shape[1] < max(self.ends):
            raise MeasureError(
                f"DirichletEnergy takes (B, T, D) with T >= {max(self.ends)} and nodes (B, T), "
                f"not {tuple(x.shape)} and {tuple(nodes.shape)}"
            )
        x = double(wide(x.detach()))
        finite = x.isfinite().all(-1)
        x, nodes = x.masked_fill(~finite[..., None], 0.0), nodes.to(x.device).masked_fill(~finite, -1)
        if int(nodes.max()) >= self.graphs_RNN.shape[1]:
            raise MeasureError(f"node {int(nodes.max())} is not on the graph, which has {self.graphs_RNN.shape[1]}")
        parts = [self._energies(x[:, e - self.window : e], nodes[:, e - self.window : e]) for e in self.ends]
        energy_WRB = torch.stack(parts)
        known = energy_WRB.isfinite()
        return {"energy": energy_WRB.where(known, 0.0).sum(-1), "sequences": known.sum(-1)}

    def _energies(self, x_BWD: Tensor, nodes_BW: Tensor) -> Tensor:
        """(1 + relabelling, B), NaN where there is none."""
        mean_BND, seen_BN = node_means(x_BWD, nodes_BW, self.graphs_RNN.shape[1])
        if self.exclude:
            mean_BND = _without_components(mean_BND, seen_BN, self.exclude)
        # Squared distances and not inner products, which would cancel where nodes are near one another.
        distance_BP = (mean_BND[:, :, None] - mean_BND[:, None]).square().sum(-1).flatten(1)
        pair_BP = (seen_BN[:, :, None] & seen_BN[:, None]).double().flatten(1)
        all_B = (distance_BP * pair_BP).sum(1) / (pair_BP.sum(1) - seen_BN.sum(1))
        graphs_RP = self.graphs_RNN.to(x_BWD.device).flatten(1)
        edges_RB = graphs_RP @ (distance_BP * pair_BP).T / (graphs_RP @ pair_BP.T)
        return (edges_RB / all_B).where((all_B > 0) & all_B.isfinite(), torch.nan)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        energy_WR = ratio(stats["energy"], stats["sequences"])
        energy, null = energy_WR[:, 0], energy_WR[:, 1:]
        return {
            "energy": energy,
            "null": null,
            "z": (energy - null.mean(1)) / null.std(1),
            "below": (null <= energy[:, None]).double().mean(1),
        }


def node_means(x_BTD: Tensor, nodes_BT: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The mean activation of each node in each sequence, (B, node, D), and which occur, (B, node) bool.

    >>> mean, seen = node_means(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 2]]), 3)
    >>> mean[0, :, 0].tolist(), seen[0].tolist()
    ([2.0, 0.0, 5.0], [True, False, True])
    """
    # Nodes below 0 fall into a column that is dropped.
    where_BTN = torch.nn.functional.one_hot(nodes_BT.clamp_min(-1) + 1, nodes + 1)[..., 1:].to(x_BTD.dtype)
    count_BN = where_BTN.sum(1)
    total_BND = where_BTN.transpose(1, 2) @ x_BTD
    return total_BND / count_BN.clamp_min(1)[..., None], count_BN > 0


def without_means(x_BTD: Tensor, tokens_BT: Tensor | None = None) -> Tensor:
    """Activations without what their position and their token have on average over all sequences given.

    The two are fitted together, as additive effects by least squares, so that neither holds a part of the other.
    Without `tokens` the means of positions alone are taken out: of embeddings nothing would be left otherwise.

    >>> x = torch.tensor([[[1.0], [12.0]], [[2.0], [11.0]]])  # token + 10 * position
    >>> without_means(x, torch.tensor([[1, 2], [2, 1]])).abs().max() < 1e-5
    tensor(True)
    """
    B, T, D = x_BTD.shape
    x = double(wide(x_BTD))
    if tokens_BT is None:
        return x - x.mean(0)
    tokens, index = tokens_BT.unique(return_inverse=True)
    count_KT = torch.zeros(len(tokens), T, dtype=x.dtype, device=x.device)
    places = torch.arange(T, device=x.device).expand(B, T)
    count_KT.index_put_((index.flatten(), places.flatten()), torch.ones((), dtype=x.dtype, device=x.device), True)
    gram = torch.zeros(T + len(tokens), T + len(tokens), dtype=x.dtype, device=x.device)
    gram[:T, :T], gram[T:, T:] = count_KT.sum(0).diag(), count_KT.sum(1).diag()
    gram[:T, T:], gram[T:, :T] = count_KT.T, count_KT
    by_token = torch.zeros(len(tokens), D, dtype=x.dtype, device=x.device)
    by_token.index_add_(0, index.flatten(), x.flatten(0, 1))
    effects = torch.linalg.pinv(gram, hermitian=True) @ torch.cat([x.sum(0), by_token])
    return x - effects[:T] - effects[T:][index]


def spectral_alignment(h_ND: Tensor, graph: Tensor, k: int = 2) -> float:
    r"""How much of the first principal components of node representations the graph's spectral embedding explains.

    The components (over nodes, centred) are projected onto the k eigenvectors of the Laplacian with the smallest
    eigenvalues after the constant one; where the k-th shares its eigenvalue with later ones, those are taken too.
    1 when the components lie in that space; a random one gives its dimension over N - 1.

    Args:
        h_ND: mean representation of each node, (node, D).
        graph: adjacency matrix, (node, node), of a connected graph.
        k: how many components.

    Raises:
        MeasureError: sizes that do not fit, or a graph that is not connected.

    Source: Park et al. 2025, ICLR: In-Context Learning of Representations (energy minimisation and spectral embedding).

    Example:
        >>> ring = torch.roll(torch.eye(8), 1, 0) + torch.roll(torch.eye(8), -1, 0)
        >>> angle = torch.arange(8) * torch.pi / 4
        >>> round(spectral_alignment(torch.stack([angle.cos(), 2 * angle.sin()], -1), ring), 6)
        1.0
    """
    adjacency = _pairs(graph, 1).double()
    N = len(adjacency)
    if len(h_ND) != N or not 1 <= k < N:
        raise MeasureError(f"{len(h_ND)} nodes and k={k} components do not fit a graph of {N} nodes")
    eigenvalues, eigenvectors = torch.linalg.eigh(adjacency.sum(1).diag() - adjacency)
    if float(eigenvalues[1]) < 1e-9:
        raise MeasureError("the graph is not connected, so its spectral embedding is not unique")
    low = eigenvectors[:, 1 : int((eigenvalues <= eigenvalues[k] + 1e-9).sum())]
    h = h_ND.detach().double().cpu()
    components = torch.linalg.svd(h - h.mean(0), full_matrices=False)[0][:, :k]
    return float((low.T @ components).square().sum() / components.shape[1])


def _pairs(graph: Tensor, hops: int) -> Tensor:
    adjacency = torch.as_tensor(graph).cpu() > 0
    if adjacency.ndim != 2 or not torch.equal(adjacency, adjacency.T):
        raise MeasureError(f"a graph is a symmetric adjacency matrix, not {tuple(adjacency.shape)}")
    if hops < 1:
        raise MeasureError(f"hops={hops}; neighbours are 1 hop apart")
    reach = torch.linalg.matrix_power(adjacency.double(), hops) > 0
    reach.fill_diagonal_(False)
    if not bool(reach.any()):
        raise MeasureError(f"no two nodes of the graph are {hops} hops apart")
    return reach


def _without_components(mean_BND: Tensor, seen_BN: Tensor, count: int) -> Tensor:
    seen = seen_BN[..., None].to(mean_BND.dtype)
    centred = (mean_BND - (mean_BND * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)) * seen
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:, :count]
    return centred - (centred @ directions.transpose(1, 2)) @ directions
