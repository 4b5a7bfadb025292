"""Random walks over a graph whose nodes are named by tokens that are drawn anew for each sequence.

What a token means is known only from its company in the sequence. If a model's representations of the tokens come to
lie like the nodes of the graph, they were arranged in context.

Source: Park et al. 2025, "ICLR: In-Context Learning of Representations" (grid, ring and hexagonal graphs; walks and
random neighbour pairs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, seeded

Shape = Literal["ring", "grid", "hexagon", "cliques", "lattice"]


def graph(shape: Shape, nodes: int, columns: int | None = None) -> Tensor:
    """Adjacency matrix of a named graph, bool [nodes, nodes], symmetric, without loops.

    Args:
        shape: "ring"; "grid" (rows of `columns` nodes, four neighbours); "hexagon" (honeycomb drawn as a brick wall,
            rows of `columns`, up to three neighbours); "cliques" (two complete halves without an edge between);
            "lattice" (ring with edges to the next two nodes on either side).
        nodes: how many. A grid or hexagon needs a multiple of `columns`, cliques an even number.
        columns: of "grid" and "hexagon"; None takes the divisor of `nodes` nearest to its root.

    Raises:
        ValueError: for an unknown shape or a number of nodes that does not fit it.

    >>> graph("ring", 4).int()
    tensor([[0, 1, 0, 1],
            [1, 0, 1, 0],
            [0, 1, 0, 1],
            [1, 0, 1, 0]], dtype=torch.int32)
    >>> graph("grid", 9).sum(1)
    tensor([2, 3, 2, 3, 4, 3, 2, 3, 2])
    """
    counts(nodes=(nodes, 3))
    node = torch.arange(nodes)
    if shape in ("ring", "lattice"):
        apart = (node[:, None] - node).abs()
        apart = torch.minimum(apart, nodes - apart)
        return (apart > 0) & (apart <= (1 if shape == "ring" else 2))
    if shape == "cliques":
        if nodes % 2 or nodes < 4:
            raise ValueError(f"two cliques need an even number of at least 4 nodes, not nodes={nodes}")
        half = node >= nodes // 2
        return (half[:, None] == half) & (node[:, None] != node)
    if shape not in ("grid", "hexagon"):
        raise ValueError(f"shape={shape!r} does not exist; choose ring, grid, hexagon, cliques or lattice")
    if columns is None:
        columns = min((c for c in range(2, nodes) if nodes % c == 0), key=lambda c: abs(c - nodes**0.5), default=0)
    if columns < 2 or nodes % columns or nodes // columns < 2:
        raise ValueError(f"nodes={nodes} is no rectangle of columns={columns}; give two factors above one")
    row, column = node // columns, node % columns
    beside = (row[:, None] == row) & ((column[:, None] - column).abs() == 1)
    above = (column[:, None] == column) & (row == row[:, None] + 1)
    if shape == "hexagon":
        above &= ((row + column) % 2 == 0)[:, None]
    return beside | above | above.T


class Walks(NamedTuple):
    """Tokens [B, T], the nodes [B, T] that they name, and `names` [B, nodes], the token of each node."""

    tokens: Tensor
    nodes: Tensor
    names: Tensor


@dataclass(frozen=True, eq=False)
class GraphWalk:
    """A graph and a vocabulary to name its nodes with.

    Attributes:
        adjacency: bool [nodes, nodes], symmetric, no loops, no node without a neighbour; see `graph`.
        vocab: number of tokens; at least as many as nodes. None takes twice as many.
        mode: "walk" (each token names a random neighbour of the one before) or "pairs" (each pair of tokens names the
            two ends of a random edge; nothing links one pair to the next).

    >>> world = GraphWalk(graph("ring", 8), vocab=16)
    >>> walks = world.sample(4, 48, seed=1)
    >>> bool(world.adjacency[walks.nodes[:, :-1], walks.nodes[:, 1:]].all())
    True
    >>> walks.names.gather(1, walks.nodes).equal(walks.tokens)
    True
    """

    adjacency: Tensor = field(default_factory=lambda: graph("ring", 8))
    vocab: int | None = None
    mode: Literal["walk", "pairs"] = "walk"

    def __post_init__(self) -> None:
        adjacency = torch.as_tensor(self.adjacency).bool()
        if adjacency.ndim != 2 or not adjacency.equal(adjacency.T) or bool(adjacency.diagonal().any()):
            raise ValueError(f"adjacency {tuple(adjacency.shape)} must be square, symmetric and without loops")
        if not bool(adjacency.any(1).all()):
            raise ValueError(f"nodes {(~adjacency.any(1)).nonzero()[:, 0].tolist()} have no neighbour to walk to")
        if self.mode not in ("walk", "pairs"):
            raise ValueError(f"mode={self.mode!r} does not exist; choose 'walk' or 'pairs'")
        object.__setattr__(self, "adjacency", adjacency)
        object.__setattr__(self, "vocab", 2 * len(adjacency) if self.vocab is None else self.vocab)
        if self.vocab < len(adjacency):
            raise ValueError(f"vocab={self.vocab} has too few tokens to name {len(adjacency)} nodes apart")

    def sample(self, sequences: int, length: int, seed: int) -> Walks:
        """Draws names, first nodes (in proportion to their degree, which a walk keeps) and walks.

        Args:
            sequences: how many.
            length: tokens of each; even in mode "pairs".
            seed: of everything.
        """
        counts(sequences=(sequences, 1), length=(length, 2))
        if self.mode == "pairs" and length % 2:
            raise ValueError(f"length={length} is odd; pairs of neighbours need an even one")
        generator = seeded(seed)
        names_BN = torch.rand(sequences, self.vocab, generator=generator).argsort(1)[:, : len(self.adjacency)]
        degree_1N = self.adjacency.sum(1)[None]
        rows, first = Rows(self.adjacency), Rows(degree_1N)
        zero = torch.zeros(sequences, dtype=torch.long)
        if self.mode == "pairs":
            starts_BP = first.draw(zero[:, None].expand(-1, length // 2), generator)
            nodes_BT = torch.stack((starts_BP, rows.draw(starts_BP, generator)), 2).flatten(1)
        else:
            uniform_TB = torch.rand(length, sequences, generator=generator, dtype=torch.float64)
            nodes_TB = torch.zeros(length, sequences, dtype=torch.long)
            nodes_TB[0] = first.place(zero, uniform_TB[0])
            for t in range(1, length):
                nodes_TB[t] = rows.place(nodes_TB[t - 1], uniform_TB[t])
            nodes_BT = nodes_TB.T.contiguous()
        return Walks(names_BN.gather(1, nodes_BT), nodes_BT, names_BN)

    def neighbours(self, walks: Walks) -> Tensor:
        """Which tokens name a neighbour of the node at each position, bool [B, T, V].

        A model's probability on these is the accuracy of the paper: the share on tokens that could come next in a walk.
        """
        at_BTN = self.adjacency[walks.nodes]
        allowed_BTV = torch.zeros(*walks.tokens.shape, self.vocab, dtype=torch.bool)
        return allowed_BTV.scatter_(2, walks.names[:, None].expand_as(at_BTN), at_BTN)

    def floor(self, walks: Walks) -> float:
        """Least possible mean next-token loss, in nats, for one who knows the graph and the names of its nodes.

        In mode "walk" the mean of log(degree) over the nodes left; in mode "pairs" the first of a pair costs the
        entropy of the degree distribution (only tokens after the first of the sequence are counted in both).
        """
        degree_N = self.adjacency.sum(1).double()
        cost_BT = degree_N[walks.nodes[:, :-1]].log()
        if self.mode == "pairs":
            p_N = degree_N / degree_N.sum()
            cost_BT[:, 1::2] = torch.special.entr(p_N).sum()
        return float(cost_BT.mean())
