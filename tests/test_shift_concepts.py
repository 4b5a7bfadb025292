"""Concept shifts against planted concepts and planted shifts."""

import pytest
import torch
from torch.nn import functional as F

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import MeasureError
from actome.shift import ConceptShift, coarse


def planted(seed=0, n=600, k=5, width=24, noise=0.3, spread=0.0):
    """States around k centres, moved by a shift of each concept and, with `spread`, each sample by its own as well."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    kind, centres, shifts = torch.arange(n) % k, 4 * drawn(k, width), 4 * drawn(k, width)
    base = centres[kind] + noise * drawn(n, width)
    own = spread * torch.linspace(0, 1, k)[kind, None] * drawn(n, width)
    return kind, centres, shifts, base, base + shifts[kind] + own


def nearest(vectors, centres):
    return torch.cdist(vectors, centres).argmin(1)


@pytest.mark.parametrize("method", ["kmeans", "nmf", "pca"])
def test_planted_shifts_come_back(method):
    generator = torch.Generator().manual_seed(1)
    kind = torch.arange(800) % 4
    # One positive strength a sample along orthogonal directions: what all three methods can find.
    directions = torch.linalg.qr(torch.randn(20, 8, generator=generator)).Q.T
    strength = 3 + torch.rand(800, 1, generator=generator)
    base = strength * directions[kind] + 0.01 * torch.randn(800, 20, generator=generator)
    shifts = 2 * directions[4:]
    found = ConceptShift(k=4, method=method, seed=0).fit(base, base + shifts[kind])
    near = torch.cdist(found.shifts_, shifts)
    if method == "pca":  # four kinds around their mean span three dims, so one component has hardly a sample of its own
        assert int((near.amin(1) < 0.1).sum()) >= 3
        return
    assert sorted(near.argmin(1).tolist()) == [0, 1, 2, 3]
    assert float(near.amin(1).max()) < 1e-4
    order = near.argmin(1)
    cosine = F.cosine_similarity(found.concepts_, directions[order], dim=1)
    assert float(cosine.min()) > 0.99
    assert float((found.concepts_.norm(dim=1) - 3.5).abs().max()) < 0.15  # in the units of states


def test_recovered_concepts_are_those_of_the_tuned_model_and_matched_by_what_they_are():
    _, centres, shifts, base, tuned = planted()
    found = ConceptShift(k=5).fit(base, tuned)
    which = nearest(found.concepts_, centres)
    assert sorted(which.tolist()) == list(range(5))
    # Means over some 60 samples with noise 0.3 a unit, over 24 units.
    assert float((found.recovered_ - (centres + shifts)[which]).norm(dim=1).max()) < 0.6
    # Not by index: the tuned model's clusters come in an order of their own.
    assert torch.equal(nearest(found.tuned_[found.match_], centres + shifts), which)
    assert found.sizes_.sum() == 300


def test_shifts_of_other_concepts_recover_nothing():
    _, _, _, base, tuned = planted()
    found = ConceptShift(k=5, top=20).fit(base, tuned)
    right = float(found.overlap_.mean())
    wrong = [float(found.overlap(found.permuted(seed), found.match_).mean()) for seed in range(5)]
    assert right > 0.5
    assert max(wrong) < right / 2
    assert float(found.overlap(found.concepts_, found.match_).mean()) < right / 2
    order = [torch.cdist(found.permuted(seed) - found.concepts_, found.shifts_).argmin(1) for seed in range(5)]
    assert not any(bool((one == torch.arange(5)).any()) for one in order)


def test_words_are_those_of_the_unembedding():
    _, _, _, base, tuned = planted()
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
    found = ConceptShift(k=5, top=3).fit(base, tuned, weight)
    expected = (found.recovered_ @ weight.T).argsort(1, descending=True)[:, :3]
    assert torch.equal(found.words(found.recovered_), expected)
    by_hand = [
        len(set(a.tolist()) & set(b.tolist())) / 3
        for a, b in zip(expected, found.words(found.tuned_)[found.match_], strict=True)
    ]
    assert found.overlap_.tolist() == pytest.approx(by_hand)
    called = ConceptShift(k=5, top=3).fit(base, tuned, lambda vectors: vectors @ weight.T)
    assert torch.equal(called.overlap_, found.overlap_)


def test_consistency_falls_with_the_spread_of_changes():
    kind, centres, _, base, tuned = planted(spread=8.0)
    found = ConceptShift(k=5).fit(base, tuned)
    which = nearest(found.concepts_, centres)
    assert torch.equal(found.consistency_.argsort(descending=True), which.argsort())
    assert float(found.consistency_[which == 0]) > 0.999
    # By hand, over the held-out samples only.
    from actome.tasks.trials import split

    held = split(len(base), [0.5, 0.5], 0)[1]
    rows = held[kind[held] == 4]
    concept = int((which == 4).nonzero())
    by_hand = F.cosine_similarity((tuned - base)[rows], found.shifts_[concept][None], dim=1).mean()
    assert float(found.consistency_[concept]) == pytest.approx(float(by_hand), abs=1e-5)


def test_matching_one_to_one_is_the_best_sum_and_best_is_each_for_itself():
    import itertools

    _, _, _, base, tuned = planted(k=4, noise=2.0)
    found = ConceptShift(k=4).fit(base, tuned)
    cosine = F.normalize(found.recovered_, dim=1) @ F.normalize(found.tuned_, dim=1).T
    best = max(
        itertools.permutations(range(4)), key=lambda order: sum(float(cosine[i, j]) for i, j in enumerate(order))
    )
    assert tuple(found.match_.tolist()) == best
    found.matching = "best"
    assert torch.equal(found.matched(found.recovered_), cosine.argmax(1))


def test_bfloat16_states_and_alpha():
    _, _, _, base, tuned = planted()
    found = ConceptShift(k=5, alpha=0.5).fit(base.bfloat16(), tuned.bfloat16())
    torch.testing.assert_close(found.recovered_, found.concepts_ + 0.5 * found.shifts_)
    assert found.frame.shape == (5, 7)


def test_coarse_and_fine_vectors_are_plain_additions(tmp_path):
    _, _, _, base, tuned = planted()
    found = ConceptShift(k=5).fit(base, tuned)
    fine = found.fine("blocks.1.resid.post", 1, 3)
    torch.testing.assert_close(fine.value, found.tuned_[3] - found.tuned_[1])
    torch.testing.assert_close(found.fine("x", 0, 2, tuned=False).value, found.concepts_[2] - found.concepts_[0])
    target = torch.arange(600) < 100
    clamp = coarse("blocks.1.resid.post", tuned, target, scale=2.0)
    torch.testing.assert_close(clamp.value, tuned[:100].mean(0) - tuned[100:].mean(0))
    assert type(clamp) is ac.Add
    again = load_clamps(save_clamps(tmp_path / "clamps", [clamp, fine]))
    assert torch.equal(again[0].value, clamp.value)
    assert again[0].scale == 2.0


def test_a_coarse_vector_carries_the_one_mean_to_the_other():
    model = ac.demo()
    site = "blocks.2.resid.post"
    prompts = ["import os", "def f(x):", "return x", "The cat", "It is a", "When the"]
    states = torch.cat([model.record(one, site, positions=-1)[site][:, 0] for one in prompts])
    clamp = coarse(site, states, torch.tensor([True] * 3 + [False] * 3))
    with model.clamp(clamp):
        moved = torch.cat([model.record(one, site, positions=-1)[site][:, 0] for one in prompts[3:]])
    torch.testing.assert_close(moved.mean(0), states[:3].mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({"method": "ica"}, ((40, 4), (40, 4)), "choose kmeans, nmf or pca"),
        ({"matching": "index"}, ((40, 4), (40, 4)), "choose hungarian or best"),
        ({"k": 1}, ((40, 4), (40, 4)), "two concepts"),
        ({"k": 5, "held_out": 1.0}, ((40, 4), (40, 4)), "a share between 0 and 1"),
        ({"k": 5}, ((40, 4), (39, 4)), "of the same inputs in both models"),
        ({"k": 15}, ((40, 4), (40, 4)), "a smaller k"),
        ({"k": 5, "method": "pca"}, ((40, 4), (40, 4)), "have no 5 components"),
    ],
)
def test_what_cannot_be_is_refused(options, shapes, message):
    states = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    with pytest.raises(MeasureError, match=message):
        ConceptShift(**options).fit(*states)


def test_other_bad_inputs():
    states = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MeasureError, match="not finite"):
        ConceptShift(k=2).fit(states, states / 0)
    with pytest.raises(MeasureError, match="does not fit states of width 4"):
        ConceptShift(k=2).fit(states, states + 1, torch.ones(9, 5))
    with pytest.raises(MeasureError, match="0 to 1"):
        ConceptShift(k=2).fit(states, states + 1).fine("x", 0, 2)
    with pytest.raises(MeasureError, match="both kinds"):
        coarse("x", states, torch.ones(40, dtype=torch.bool))
    with pytest.raises(MeasureError, match="one flag a sample"):
        coarse("x", states, torch.ones(4, dtype=torch.bool))
