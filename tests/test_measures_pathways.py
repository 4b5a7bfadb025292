"""Pathways and routers, against edit distances, cosines and counts by hand, and planted routing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import generator
from torch import Tensor

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import (
    ExpertLoad,
    PathwayConsistency,
    PathwayDistance,
    RouterEntropy,
    edit_distance,
    expert_embeddings,
)
from actome.tasks import Subject, SubjectConfig

some = settings(max_examples=15, deadline=None)
LAYERS, EXPERTS = 3, 6


def weights(seed: int, batch: int, length: int, layers: int = LAYERS, experts: int = EXPERTS, k: int = 2) -> Tensor:
    """(layer, batch, pos, expert), as a router that chooses k gives them."""
    z = torch.randn(layers, batch, length, experts, generator=generator(seed))
    top = z.topk(k, -1)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values.softmax(-1))


def levenshtein(a: list, b: list) -> int:
    """The textbook recursion, over all prefixes."""
    table = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def strings(x: Tensor, k: int) -> list[list[tuple[int, int]]]:
    """The pathway of each row, as (layer, expert) pairs."""
    mean = x.double().mean(2)
    return [
        [(layer, e) for layer in range(len(x)) for e in sorted(mean[layer, b].topk(k).indices.tolist())]
        for b in range(x.shape[1])
    ]


def values(measure, *args) -> dict[str, Tensor]:
    measure.update(*args)
    return measure.compute()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=1e-12, equal_nan=True)


# -- edit distance ----------------------------------------------------------------------------------------------


@given(
    pairs=st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 3), max_size=7)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=50, deadline=None)
def test_edit_distance_is_the_textbook_one(pairs):
    def padded(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [-1] * (8 - len(row)) for row in rows])

    got = edit_distance(padded([a for a, _ in pairs]), padded([b for _, b in pairs]))
    assert got.tolist() == [levenshtein(a, b) for a, b in pairs]


def test_entries_that_are_left_out_may_stand_anywhere():
    assert edit_distance(torch.tensor([[-1, 4, -1, 5]]), torch.tensor([[4, 5, 6, -1]])).tolist() == [1]


# -- distance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pathway_distance_is_the_mean_over_pairs(k):
    x = weights(k, 9, 4)
    got, paths = values(PathwayDistance(k=k), x), strings(x, k)
    pairs = list(itertools.combinations(paths, 2))
    want = sum(levenshtein(a, b) / (LAYERS * k) for a, b in pairs) / len(pairs)
    assert float(got["pathway_distance"][-1]) == pytest.approx(want, rel=1e-12)
    assert got["pathway_distance"][:-1].isnan().all()
    for layer in range(LAYERS):
        parts = [(a[layer * k : (layer + 1) * k], b[layer * k : (layer + 1) * k]) for a, b in pairs]
        want = sum(levenshtein(a, b) / k for a, b in parts) / len(parts)
        assert float(got["choice_distance"][layer]) == pytest.approx(want, rel=1e-12)
    assert float(got["pathways"][-1]) == len({tuple(path) for path in paths})


def test_samples_of_one_pathway_and_of_disjoint_ones():
    one = weights(0, 1, 5).expand(-1, 7, -1, -1)
    same_way = values(PathwayDistance(), one)
    assert float(same_way["pathway_distance"][-1]) == 0
    assert float(same_way["pathways"][-1]) == 1
    apart = torch.eye(4)[None, :, None].expand(3, -1, -1, -1)  # each sample has an expert of its own
    assert float(values(PathwayDistance(k=1), apart)["pathway_distance"][-1]) == 1


def test_a_share_of_the_weight_takes_as_many_as_it_needs():
    x = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.9, 0.05, 0.05, 0.0]])[None, :, None]
    measure = PathwayDistance(k=0.7)
    got = values(measure, x)
    assert measure.histogram() == {((0, 0), (0, 1)): 1, ((0, 0),): 1}
    assert float(got["pathway_distance"]) == 0.5  # one insertion, and the longer has two


def test_a_share_that_is_reached_exactly_takes_no_more():
    distance = PathwayDistance(k=0.5)
    distance.update([torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]])])
    assert set(distance.histogram()) == {((0, 0),), ((0, 1),)}


def test_logits_are_read_through_their_softmax_and_units_by_magnitude():
    z = torch.randn(LAYERS, 6, 5, EXPERTS, generator=generator(3))
    same(values(PathwayDistance(of="logits"), z), values(PathwayDistance(), z.softmax(-1)))
    same(values(PathwayDistance(of="units"), z), values(PathwayDistance(), z.abs()))


def test_tokens_as_samples():
    x = weights(4, 5, 3)
    same(values(PathwayDistance(sample="token"), x), values(PathwayDistance(), x.reshape(LAYERS, 15, 1, EXPERTS)))
    same(values(PathwayDistance(every=2), x), values(PathwayDistance(), x[:, :, ::2]))


@given(seed=st.integers(0, 999), cut=st.integers(1, 5), pad=st.integers(0, 3), reservoir=st.sampled_from([3, 256]))
@some
def test_pathways_merge_and_do_not_see_padding(seed, cut, pad, reservoir):
    x = weights(seed, 6, 3, layers=2, experts=3)
    table = [torch.randn(3, 4, generator=generator(i)) for i in range(2)]
    for make in (lambda: PathwayDistance(reservoir=reservoir), lambda: PathwayConsistency(table)):
        one, other = make(), make()
        padded = torch.cat([x[:, :cut], torch.full((2, cut, pad, 3), torch.nan)], 2)
        one.update(padded, torch.arange(3 + pad).expand(cut, -1) < 3)
        other.update(x[:, cut:])
        one.merge_state(other)
        # Means over padded rows are sums over other lengths.
        same(one.compute(), values(make(), x), rtol=1e-5)


def test_the_reservoir_is_bounded_and_counts_what_it_keeps():
    x = weights(5, 4000, 1, experts=16)
    full, small = PathwayDistance(reservoir=4096), PathwayDistance(reservoir=400)
    for part in x.split(500, 1):
        full.update(part), small.update(part)
    everything, kept = full.histogram(), small.histogram()
    assert len(kept) == 400
    assert all(everything[path] == count for path, count in kept.items())
    exact, estimate = full.compute(), small.compute()
    # Both from 400 of a few thousand pathways: their number within three standard errors of 1 / sqrt(400), the mean
    # distance of pairs of pathways drawn at random within three of about 0.2 / sqrt(400).
    assert float(estimate["pathways"][-1]) == pytest.approx(len(everything), rel=0.15)
    assert float(estimate["pathway_distance"][-1]) == pytest.approx(float(exact["pathway_distance"][-1]), abs=0.03)


def test_one_sample_has_no_distance_and_padding_says_nothing():
    x = weights(6, 3, 4)
    assert values(PathwayDistance(), x[:, :1])["pathway_distance"].isnan().all()
    empty = PathwayDistance()
    nothing = values(empty, x, torch.zeros(3, 4, dtype=torch.bool))
    assert all(value.isnan().all() for value in nothing.values())
    empty.update(x)
    same(empty.compute(), values(PathwayDistance(), x))
    broken = x.clone()
    broken[1, 2] = torch.nan
    same(values(PathwayDistance(), broken), values(PathwayDistance(), x[:, :2]))


# -- consistency ------------------------------------------------------------------------------------------------


def test_pathway_complexity_is_the_mean_turn_between_layers():
    x = weights(7, 5, 4)
    tables = [torch.randn(EXPERTS, 8, generator=generator(i)) for i in range(LAYERS)]
    got, mean = values(PathwayConsistency(tables), x)["pathway_complexity"], x.double().mean(2)
    vectors = []
    for layer in range(LAYERS):
        top = mean[layer].topk(2)
        vectors.append((tables[layer].double()[top.indices] * top.values[..., None]).sum(1))
    for layer in range(1, LAYERS):
        want = 1 - torch.cosine_similarity(vectors[layer - 1], vectors[layer], dim=-1).mean()
        assert float(got[layer]) == pytest.approx(float(want), rel=1e-5)
    assert got[0].isnan()


def test_a_smooth_pathway_is_simple_and_a_jumping_one_is_not():
    tables = [torch.eye(4)] * 3
    stay = torch.eye(4)[:, None].expand(3, -1, -1, -1)
    jump = torch.stack([torch.eye(4).roll(i, 0)[:, None] for i in range(3)])
    assert values(PathwayConsistency(tables, k=1), stay)["pathway_complexity"][1:].tolist() == [0.0, 0.0]
    assert values(PathwayConsistency(tables, k=1), jump)["pathway_complexity"][1:].tolist() == [1.0, 1.0]


def test_a_model_of_experts_and_a_dense_one():
    config = {"vocab": 16, "d_model": 16, "heads": 2, "layers": 3, "context": 12}
    model = ac.wrap(Subject.fresh(SubjectConfig(**config, experts=4)))
    ids = torch.randint(16, (20, 10), generator=generator())
    table = model.measure(
        ids,
        {
            "blocks.*.moe.weights": [PathwayDistance(), PathwayConsistency(expert_embeddings(model)), ExpertLoad()],
            "blocks.*.moe.router": RouterEntropy(),
        },
        batch_size=8,
    )
    recorded = model.record(ids, "blocks.*.moe.weights")["blocks.*.moe.weights"]
    want = values(PathwayDistance(), recorded)["pathway_distance"][-1]
    assert float(table.value("pathway_distance")[-1]) == pytest.approx(float(want), rel=1e-6)
    torch.testing.assert_close(
        table.value("load"), (recorded > 0).double().sum((1, 2)) / (2 * ids.numel()), rtol=1e-9, atol=0
    )
    assert table.value("experts_per_token").tolist() == [2.0] * 3
    assert table.frame["expert"].max() == 3
    dense = ac.wrap(Subject.fresh(SubjectConfig(**config)))
    got = dense.measure(ids, {"blocks.*.mlp.act": PathwayDistance(k=4, of="units")}).value("pathway_distance")
    assert 0 < float(got[-1]) < 1
    with pytest.raises(MeasureError, match="of='units'"):
        dense.measure(ids, {"blocks.*.mlp.act": PathwayDistance()})
    with pytest.raises(MeasureError, match=r"moe\.weights"):
        model.measure(ids, {"blocks.*.moe.router": ExpertLoad()})


def test_choices_that_do_not_fit_are_refused():
    x = weights(8, 2, 3)
    with pytest.raises(MeasureError, match="of 6 units cannot be chosen"):
        PathwayDistance(k=7).update(x)
    with pytest.raises(MeasureError, match="k=0"):
        PathwayDistance(k=0)
    with pytest.raises(MeasureError, match="of='router'"):
        PathwayDistance(of="router")
    with pytest.raises(MeasureError, match="embeddings were given"):
        PathwayConsistency([torch.eye(4)] * 3).update(x)


# -- routers ----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), cut=st.integers(1, 3), pad=st.integers(0, 3))
@some
def test_router_measures_merge_and_do_not_see_padding(seed, cut, pad):
    for make, x in ((ExpertLoad, weights(seed, 4, 5)[0]), (RouterEntropy, weights(seed, 4, 5)[0] * 9 - 4)):
        one, other = make(), make()
        one.update(
            torch.cat([x[:cut], torch.full((cut, pad, EXPERTS), torch.nan)], 1),
            torch.arange(5 + pad).expand(cut, -1) < 5,
        )
        other.update(x[cut:])
        one.merge_state(other)
        same(one.compute(), values(make(), x))


def test_load_is_what_counting_says():
    x = weights(9, 6, 7)[0]
    x[..., 4] = 0  # never chosen
    got = values(ExpertLoad(), x)
    counts = (x > 0).sum((0, 1)).double()
    f = counts / counts.sum()
    assert torch.equal(got["load"], f)
    torch.testing.assert_close(got["importance"], x.double().sum((0, 1)) / x.double().sum())
    assert float(got["load_entropy"]) == pytest.approx(
        float(-(f[f > 0] * f[f > 0].log()).sum() / math.log(EXPERTS)), rel=1e-12
    )
    assert float(got["load_cv"]) == pytest.approx(float(f.std(correction=0) / f.mean()), rel=1e-12)
    assert float(got["dead_experts"]) == pytest.approx(1 / EXPERTS)
    assert float(got["max_load"]) == pytest.approx(float(f.max() * EXPERTS))


def test_a_collapsed_and_a_balanced_load():
    collapsed = values(ExpertLoad(), torch.tensor([1.0, 0, 0, 0]).expand(2, 5, 4))
    assert [float(collapsed[n]) for n in ("load_entropy", "max_load", "dead_experts")] == [0.0, 4.0, 0.75]
    balanced = values(ExpertLoad(), torch.eye(4)[None])
    assert [float(balanced[n]) for n in ("load_entropy", "load_cv", "dead_experts")] == [1.0, 0.0, 0.0]


def test_router_entropy_is_what_its_definition_says():
    z = 2 * torch.randn(3, 8, EXPERTS, generator=generator(10))
    got, p = values(RouterEntropy(), z), z.double().softmax(-1).flatten(0, 1)
    entropy = -(p * p.log()).sum(-1).mean() / math.log(EXPERTS)
    mean = p.mean(0)
    two = p.topk(2).values
    want = {
        "router_entropy": entropy,
        "router_confidence": two[:, 0].mean(),
        "router_margin": (two[:, 0] - two[:, 1]).mean(),
        "router_z": z.double().logsumexp(-1).square().mean(),
        "router_information": -(mean * mean.log()).sum() / math.log(EXPERTS) - entropy,
    }
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5)


def test_an_indifferent_router_tells_nothing_of_its_tokens():
    got = values(RouterEntropy(), torch.zeros(2, 3, 4).bfloat16())
    assert float(got["router_entropy"]) == pytest.approx(1.0)
    assert float(got["router_information"]) == pytest.approx(0.0, abs=1e-6)
    nothing = values(RouterEntropy(), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert all(value.isnan() for value in nothing.values())
