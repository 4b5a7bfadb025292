"""Shared and unique directions against planted ones, a brute-force null, and parts that are not there."""

import math

import pytest
import torch

import actome as ac
from actome.clamps import Add, load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError
from actome.steer import DirectionParts, Examples, SplitDirections, states
from actome.steer.split_directions import PARTS
from actome.tasks import Subject, SubjectConfig

WIDTH, VOCAB = 48, 30
BOTH, ALONE, ASKED = torch.eye(WIDTH)[:3]


def planted(intrinsic, prompted, count=300, seed=0):
    """States of the four kinds whose differences of means are known, in noise of unit variance."""
    noise = torch.randn(4, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return noise[0] + intrinsic, noise[1], noise[2] + prompted, noise[3]


@pytest.fixture(scope="module")
def model():
    config = SubjectConfig(vocab=VOCAB, d_model=16, layers=2, heads=2, context=12, init=2.0)
    return ac.wrap(Subject.fresh(config, seed=0))


def test_planted_parts_are_found():
    parts = SplitDirections().fit(*planted(4 * BOTH + 3 * ALONE, 8 * BOTH + 6 * ASKED, 2000))
    # Unit vectors (0.8, 0.6, 0) and (0.8, 0, 0.6): cosine 0.64; halfway between them lies the shared one.
    assert parts.cosine_.value == pytest.approx(0.64, abs=0.03)
    shared = (1.6 * BOTH + 0.6 * ALONE + 0.6 * ASKED) / math.sqrt(1.6**2 + 2 * 0.36)
    intrinsic, prompted = 0.8 * BOTH + 0.6 * ALONE, 0.8 * BOTH + 0.6 * ASKED
    unique_int, unique_pr = intrinsic - 0.64 * prompted, prompted - 0.64 * intrinsic
    wanted = {"intrinsic": intrinsic, "prompted": prompted, "shared": shared}
    wanted |= {"unique_int": unique_int / unique_int.norm(), "unique_pr": unique_pr / unique_pr.norm()}
    for part, direction in wanted.items():
        assert float(parts.direction(part) @ direction) > 0.99, part
        assert float(parts.direction(part).norm()) == pytest.approx(1, abs=1e-5)
    assert abs(float(parts.unique_int_ @ parts.prompted_)) < 1e-5
    assert abs(float(parts.unique_pr_ @ parts.intrinsic_)) < 1e-5
    # The first singular direction of two unit vectors is their sum, scaled.
    both = parts.intrinsic_ + parts.prompted_
    torch.testing.assert_close(parts.shared_, both / both.norm(), rtol=1e-4, atol=1e-5)
    assert float(parts.vector_pr_.norm()) == pytest.approx(10, rel=0.05)
    assert parts.length_ == pytest.approx(7.5, rel=0.05)
    table = parts.table
    assert list(table) == list(PARTS)
    assert table.loc["intrinsic", "prompted"] == pytest.approx(parts.cosine_.value, abs=1e-5)
    assert table.loc["unique_int", "prompted"] == pytest.approx(0, abs=1e-5)


def test_noise_of_few_examples_lowers_the_cosine_and_the_correction_takes_it_back():
    found = [SplitDirections(permutations=1).fit(*planted(BOTH, BOTH, 200, seed)) for seed in range(40)]
    raw = sum(one.cosine_.value for one in found) / 40
    corrected = [one.cosine_corrected_ for one in found]
    assert raw == pytest.approx(1 / (1 + WIDTH * 2 / 200), abs=0.05)  # noise of 2 / 200 a dim, signal of 1
    assert sum(corrected) / 40 == pytest.approx(1, abs=0.08)
    # Vectors that truly differ stay apart.
    other = [
        SplitDirections(permutations=1).fit(*planted(BOTH, 0.6 * BOTH + 0.8 * ASKED, 200, s)).cosine_corrected_
        for s in range(40)
    ]
    assert sum(other) / 40 == pytest.approx(0.6, abs=0.08)


def test_the_null_is_that_of_shuffled_labels_without_the_difference_itself():
    x = planted(6 * BOTH, 6 * BOTH + 6 * ASKED, 40)
    parts = SplitDirections(permutations=400, seed=3).fit(*x)
    generator = torch.Generator().manual_seed(8)
    by_hand = []
    for _ in range(400):
        shuffled = []
        for high, low in (x[:2], x[2:]):
            left = torch.cat([high - high.mean(0), low - low.mean(0)])[torch.randperm(80, generator=generator)]
            shuffled.append(left[:40].mean(0) - left[40:].mean(0))
        by_hand.append(float(torch.cosine_similarity(*shuffled, dim=0)))
    assert float(parts.cosine_.null.std()) == pytest.approx(float(torch.tensor(by_hand).std()), rel=0.2)
    assert float(parts.cosine_.null.mean()) == pytest.approx(0, abs=0.03)
    assert parts.cosine_.p == pytest.approx(1 / 401)
    assert parts.cosine_.null.tolist() == SplitDirections(permutations=400, seed=3).fit(*x).cosine_.null.tolist()


def test_without_anything_in_common_chance_gives_as_much():
    p = [SplitDirections(permutations=99).fit(*planted(0 * BOTH, 0 * BOTH, 30, seed)).cosine_.p for seed in range(60)]
    assert 0.35 < sum(p) / 60 < 0.65
    assert sum(one <= 0.1 for one in p) <= 14  # 6 expected
    assert SplitDirections().fit(*planted(5 * ALONE, 5 * ASKED)).cosine_.p > 0.01


def test_parts_that_are_not_there_are_refused():
    against = SplitDirections().fit(*planted(5 * BOTH, -5 * BOTH))
    with pytest.raises(MeasureError, match=r"cosine of -0.9\d: they share no direction"):
        _ = against.shared_
    assert against.table["shared"].isna().all()
    x = planted(5 * BOTH, 5 * BOTH)
    same = SplitDirections().fit(*x[:2], *x[:2])
    with pytest.raises(MeasureError, match="point the same way"):
        _ = same.unique_pr_
    torch.testing.assert_close(same.shared_, same.intrinsic_, rtol=1e-4, atol=1e-5)


def test_all_parts_push_equally_far_and_are_saved(model, tmp_path):
    site = "blocks.1.resid.post"
    x = [one[:, :16] for one in planted(4 * BOTH + 3 * ALONE, 8 * BOTH + 6 * ASKED)]
    parts = SplitDirections(site).fit(*x)
    ids = torch.arange(12).view(2, 6)
    before = model.record(ids, site)[site]
    for part in PARTS:
        with model.clamp(parts.clamp(part, 0.5)):
            moved = model.record(ids, site)[site] - before
        torch.testing.assert_close(moved.norm(dim=-1), torch.full((2, 6), parts.length_ / 2), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moved[0, 0] / moved[0, 0].norm(), parts.direction(part), rtol=1e-3, atol=1e-4)
    with model.clamp(parts.random(1), parts.clamp("unique_pr")):
        model.logits(ids)
    assert float(parts.random(1).value.norm()) == pytest.approx(parts.length_, rel=1e-5)
    clamps = [parts.clamp(part, 0.7) for part in PARTS]
    again = load_clamps(save_clamps(tmp_path / "parts", clamps, model=model), model)
    for one, other in zip(clamps, again, strict=True):
        assert type(other) is Add
        assert (other.scale, other.site) == (0.7, site)
        assert other.value.equal(one.value)


def test_half_precision(model):
    half = ac.wrap(
        Subject.fresh(SubjectConfig(vocab=VOCAB, d_model=16, layers=1, heads=2, context=12), seed=0).to(torch.bfloat16)
    )
    x = [one[:, :16].to(torch.bfloat16) for one in planted(4 * BOTH, 4 * BOTH + 4 * ASKED)]
    parts = SplitDirections("blocks.0.resid.post").fit(*x)
    assert float(parts.unique_pr_ @ ASKED[:16]) > 0.9
    with half.clamp(parts.clamp("shared")):
        assert half.logits(torch.tensor([[1, 2]])).dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [3, 64])
def test_from_examples_it_is_what_states_give(model, batch_size):
    g = torch.Generator().manual_seed(4)
    four = [(torch.randint(VOCAB, (10, 5), generator=g), torch.randint(VOCAB, (10, 2), generator=g)) for _ in range(4)]
    site = "blocks.0.resid.post"
    parts = SplitDirections(site, batch_size=batch_size).fit_examples(model, Examples(*four[:2]), Examples(*four[2:]))
    read = [states(model, one, site, over="response")[site] for one in four]
    torch.testing.assert_close(parts.vector_int_, read[0].mean(0) - read[1].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.vector_pr_, read[2].mean(0) - read[3].mean(0), rtol=1e-4, atol=1e-5)
    assert isinstance(parts, DirectionParts)


def test_what_does_not_fit_is_refused(model):
    x = planted(BOTH, ASKED, 10)
    for change, message in (
        ((x[0], x[1], x[2][:1], x[3]), "prompted: positive states"),
        ((x[0], x[0], x[2], x[3]), "intrinsic: the two sets of states are the same"),
        ((x[0] / 0, x[1], x[2], x[3]), "intrinsic: positive states hold values that are not finite"),
        ((x[0], x[1], x[2][:, :5], x[3][:, :5]), "intrinsic states are 48 wide and prompted ones 5"),
    ):
        with pytest.raises(MeasureError, match=message):
            SplitDirections().fit(*change)
    parts = SplitDirections().fit(*x)
    with pytest.raises(MeasureError, match="part='common' does not exist"):
        parts.direction("common")
    with pytest.raises(ClampError, match="give site="):
        parts.clamp("prompted")
    assert parts.clamp("prompted", site="embed").site == "embed"
    with pytest.raises(MeasureError, match="permutations=0"):
        SplitDirections(permutations=0).fit(*x)
    some = Examples([[1, 2]] * 8, [[3, 4]] * 8)
    with pytest.raises(MeasureError, match="site= says where"):
        SplitDirections().fit_examples(model, some, some)
    with pytest.raises(MeasureError, match="selects 2 sites"):
        SplitDirections("blocks.*.resid.post").fit_examples(model, some, some)
