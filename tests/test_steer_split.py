"""SPLIT and the clamp that it trains against weights edited by hand and brute force; curves against planted ones."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY
from torch import nn

import actome as ac
from actome.clamps import WeightUpdate, load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError, SiteError
from actome.steer import SPLIT, Pairs, equal_preference, evaluate, fit_curves, odds, preference_utility
from actome.tasks import Subject, SubjectConfig


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return ac.wrap(Subject.fresh(SubjectConfig(vocab=40, d_model=24, heads=4, layers=2, context=24, bias=True), seed=1))


IDS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
PAIRS = Pairs(IDS, drawn(0, 3, 2).abs().mul(9).long(), drawn(1, 3, 2).abs().mul(9).long() + 20)


def edited(model, path, weight=None, bias=None):
    """The model with other weights in one of its maps."""
    module = copy.deepcopy(model.module)
    linear = module.get_submodule(path)
    with torch.no_grad():
        if weight is not None:
            linear.weight += weight
        if bias is not None:
            linear.bias += bias
    return ac.wrap(module)


# -- the clamp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "read", "path", "into"),
    [
        ("blocks.1.mlp.out", "blocks.1.mlp.act", "blocks.1.mlp.down", 96),
        ("blocks.0.attn.out", "blocks.0.attn.z", "blocks.0.attn.out", 24),
        ("module:blocks.0.mlp.up", "module:blocks.0.mlp.up@in", "blocks.0.mlp.up", 24),
    ],
)
def test_it_is_the_map_with_other_weights(model, site, read, path, into):
    out = 96 if path.endswith("up") else 24
    weight, bias = 0.3 * drawn(2, out, into), drawn(3, out)
    by_hand = edited(model, path, 0.7 * weight, 0.7 * bias)
    with model.clamp(WeightUpdate(site, read=read, weight=weight, bias=bias, scale=0.7)):
        got, new = model.logits(IDS), model.generate(IDS, max_new_tokens=6).new
    torch.testing.assert_close(got, by_hand.logits(IDS), rtol=1e-4, atol=1e-5)
    # With the cache too, a position at a time.
    assert torch.equal(new, by_hand.generate(IDS, max_new_tokens=6).new)
    assert not torch.allclose(got, model.logits(IDS), atol=1e-2)


def test_low_rank_is_the_product_and_strengths_of_weight_and_bias_are_two_clamps(model):
    down, up, bias = drawn(4, 3, 96), 0.3 * drawn(5, 24, 3), drawn(6, 24)
    site, read = "blocks.1.mlp.out", "blocks.1.mlp.act"
    by_hand = edited(model, "blocks.1.mlp.down", 0.5 * up @ down, 2.0 * bias)
    low = WeightUpdate(site, read=read, down=down, up=up, scale=0.5)
    with model.clamp(low, WeightUpdate(site, bias=bias, scale=2.0)):
        torch.testing.assert_close(model.logits(IDS), by_hand.logits(IDS), rtol=1e-4, atol=1e-5)
    with model.clamp(low.at(units=[3, 5])):
        part = model.record(IDS, site)[site]
    with model.clamp(low):
        whole = model.record(IDS, site)[site]
    bare = model.record(IDS, site)[site]
    torch.testing.assert_close(part[..., [3, 5]], whole[..., [3, 5]])
    others = [i for i in range(24) if i not in (3, 5)]
    assert torch.equal(part[..., others], bare[..., others])


def test_it_reads_what_other_clamps_have_made_of_the_input(model):
    weight = drawn(7, 24, 96)
    by_hand = edited(model, "blocks.1.mlp.down", weight)
    off = ac.Ablate("blocks.1.mlp.act", "zero", units=range(40))
    update = WeightUpdate("blocks.1.mlp.out", read="blocks.1.mlp.act", weight=weight)
    with by_hand.clamp(off):
        want = by_hand.logits(IDS)
    for order in ((off, update), (update, off)):
        with model.clamp(*order):
            torch.testing.assert_close(model.logits(IDS), want, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded_and_works_in_bfloat16(model, tmp_path):
    update = WeightUpdate("blocks.1.mlp.out", read="blocks.1.mlp.act", down=drawn(8, 2, 96), up=drawn(9, 24, 2))
    (again,) = load_clamps(save_clamps(tmp_path / "one", update, model=model), model)
    with model.clamp(update):
        want = model.logits(IDS)
    with model.clamp(again):
        assert torch.equal(model.logits(IDS), want)
    half = ac.wrap(copy.deepcopy(model.module).bfloat16())
    with half.clamp(update):
        got = half.logits(IDS)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.3)


def test_a_clamp_that_does_not_fit_says_so(model):
    site, read = "blocks.1.mlp.out", "blocks.1.mlp.act"
    for options, words in [
        ({}, "nothing to add"),
        ({"down": drawn(0, 2, 96), "read": read}, "both factors"),
        ({"weight": drawn(0, 24, 96), "down": drawn(0, 2, 96), "up": drawn(0, 24, 2)}, "not as both"),
        ({"weight": drawn(0, 24, 96)}, "needs read="),
        ({"weight": drawn(0, 24), "read": read}, "a matrix"),
        ({"down": drawn(0, 2, 96), "up": drawn(0, 24, 3), "read": read}, "ranks differ"),
    ]:
        with pytest.raises(ClampError, match=words):
            WeightUpdate(site, **options)
    with (
        pytest.raises(ClampError, match="takes 95 numbers"),
        model.clamp(WeightUpdate(site, read=read, weight=drawn(0, 24, 95))),
    ):
        model.logits(IDS)
    with pytest.raises(ClampError, match="gives 23 numbers"), model.clamp(WeightUpdate(site, bias=drawn(0, 23))):
        model.logits(IDS)
    with (
        pytest.raises(SiteError, match="reached after"),
        model.clamp(WeightUpdate("blocks.0.mlp.out", read="blocks.1.mlp.act", weight=drawn(0, 24, 96))),
    ):
        pass


# -- its training -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Logits over two tokens, a linear map of an embedding: every likelihood is one of a single number."""

    def __init__(self, states):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(states)
        self.out = nn.Linear(states.shape[1], 2, bias=False)

    def forward(self, input_ids):
        return self.out(self.embed(input_ids))


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    # Orthogonal states with log-odds of -2, -1, 0 and 1.5 for token 1.
    module = Two(torch.eye(4))
    with torch.no_grad():
        module.out.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [-2.0, -1.0, 0.0, 1.5]]))
    return ac.wrap(module)


EACH = Pairs([[0], [1], [2], [3]], [[1]] * 4, [[0]] * 4)
START = np.array([-2.0, -1.0, 0.0, 1.5])


def loss(split, preference):
    """The loss of pairs with these preferences, where the two answers are all there is."""
    p = 1 / (1 + np.exp(-preference))
    margin = np.maximum(0, split.theta - preference)
    return -split.lam_p * np.log(p) - split.lam_n * np.log(1 - p) + split.gamma * margin


@pytest.mark.parametrize(
    "weights", [(1.0, 0.5, 5.0, 3.0), (1.0, 0.5, 0.0, 3.0), (1.0, 1.0, 0.3, 2.0), (0.2, 1.0, 0.5, 1.0)]
)
def test_a_vector_is_the_best_shift_there_is(two, weights):
    lam_p, lam_n, gamma, theta = weights
    split = SPLIT("module:out", theta=theta, gamma=gamma, lam_p=lam_p, lam_n=lam_n, steps=400, lr=0.1, batch_size=4)
    clamp = split.fit(two, EACH)
    shift = float(clamp.value[1] - clamp.value[0])
    tried = np.linspace(-6, 8, 14001)
    best = tried[loss(split, START[:, None] + tried).mean(0).argmin()]
    assert shift == pytest.approx(best, abs=0.02)


def test_weights_bring_every_pair_to_the_margin_where_a_vector_cannot(two):
    split = SPLIT("module:out", form="weight", theta=2.0, steps=400, lr=0.1, batch_size=4)
    clamp = split.fit(two, EACH)
    with two.clamp(clamp):
        assert odds(two, EACH).preference.numpy() == pytest.approx(2.0, abs=0.05)
    # Half of the strength goes half of the way, as the map is linear.
    with two.clamp(clamp.at(scale=0.5)):
        assert odds(two, EACH).preference.numpy() == pytest.approx((START + 2.0) / 2, abs=0.05)
    assert clamp.read == "module:out@in"


def test_without_a_margin_the_weights_of_the_terms_set_the_odds(two):
    split = SPLIT("module:out", form="weight", gamma=0.0, lam_p=3.0, lam_n=1.0, steps=400, lr=0.1, batch_size=4)
    with two.clamp(split.fit(two, EACH)):
        assert odds(two, EACH).preference.numpy() == pytest.approx(np.log(3.0), abs=0.02)


def test_supervised_tuning_is_a_case_of_it(model):
    split = SPLIT("blocks.0.mlp.out", gamma=0.0, lam_n=0.0, steps=1, batch_size=3, lr=0.5)
    got = split.fit(model, PAIRS).value
    value = torch.zeros(24, requires_grad=True)
    with model.clamp(ac.Add("blocks.0.mlp.out", value)):
        logits = model.logits(torch.cat([PAIRS.prompts, PAIRS.wanted], 1), grad=True)[:, 8:-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), PAIRS.wanted.flatten(), reduction="sum").div(3).backward()
    model.module.zero_grad(set_to_none=True)
    # The first step of Adam is the sign of the gradient.
    torch.testing.assert_close(got, -0.5 * value.grad.sign(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["vector", "lora", "weight"])
def test_every_form_trains_leaves_the_model_alone_and_is_saved(model, form, tmp_path):
    before = {name: p.clone() for name, p in model.module.state_dict().items()}
    split = SPLIT("blocks.1.mlp.out", form=form, theta=4.0, rank=2, steps=40, lr=0.03, batch_size=3)
    clamp = split.fit(model, PAIRS)
    assert all(torch.equal(before[name], p) for name, p in model.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    bare = odds(model, PAIRS).preference
    with model.clamp(clamp):
        steered = odds(model, PAIRS).preference
    assert float(steered.mean()) > float(bare.mean()) + 1
    again = split.fit(model, PAIRS)
    with model.clamp(again):
        assert torch.equal(odds(model, PAIRS).preference, steered)
    (loaded,) = load_clamps(save_clamps(tmp_path / "clamp", clamp), model)
    with model.clamp(loaded):
        assert torch.equal(odds(model, PAIRS).preference, steered)
    sweep = preference_utility(model, clamp, PAIRS, (0.0, 1.0))
    assert sweep["preference"].tolist() == pytest.approx([float(bare.mean()), float(steered.mean())])


def test_maps_that_keep_their_weights_the_other_way_round_are_maps_too():
    """GPT-2 has its linear maps transposed, which a site knows nothing of."""
    module = TINY["gpt2"]()
    model, weight = ac.wrap(module), 0.3 * drawn(3, 24, module.transformer.h[0].mlp.c_proj.weight.shape[0])
    with model.clamp(WeightUpdate("blocks.0.mlp.out", read="blocks.0.mlp.act", weight=weight)):
        got = model.logits(IDS)
    with torch.no_grad():
        module.transformer.h[0].mlp.c_proj.weight += weight.T
    torch.testing.assert_close(got, model.logits(IDS), rtol=1e-4, atol=1e-4)
    clamp = SPLIT("blocks.0.mlp.out", form="lora", steps=2, batch_size=3).fit(model, PAIRS)
    assert (clamp.up.shape[0], clamp.down.shape[1]) == weight.shape


def test_bad_input_is_refused_with_what_to_do(model):
    for options, words in [
        ({"form": "matrix"}, "choose vector, lora, weight"),
        ({"gamma": -1.0}, "0 or more"),
        ({"gamma": 0.0, "lam_p": 0.0, "lam_n": 0.0}, "not all of them 0"),
        ({"rank": 0}, "1 at least"),
    ]:
        with pytest.raises(MeasureError, match=words):
            SPLIT("blocks.1.mlp.out", **options)
    with pytest.raises(SiteError, match="give read="):
        SPLIT("blocks.1.resid.post", form="lora", steps=1).fit(model, PAIRS)
    with pytest.raises(SiteError, match="2 sites"):
        SPLIT("blocks.*.mlp.out", steps=1).fit(model, PAIRS)
    with pytest.raises(SiteError, match=r"only an nn.Linear"):
        SPLIT("module:blocks.0.mlp.act", steps=1).fit(model, PAIRS)
    assert all(p.requires_grad for p in model.module.parameters())


# -- curves -----------------------------------------------------------------------------------------------------------


def planted(m, kind, sides):
    """A sweep whose curves are known."""
    width, power = (1.7, 1.4) if kind == "rational" else (2.1, np.inf)
    below = (2.6, 0.8) if kind == "rational" else (1.3, np.inf)

    def decay(m, width, power):
        square = (m / width) ** 2
        return np.exp(-square) if np.isinf(power) else (1 + square) ** -power

    left = np.where((m < 0) & sides, decay(m, *below), decay(m, width, power))
    return pd.DataFrame({"multiplier": m, "preference": (2.0 * m - 1.5) * left + 0.7, "utility": 6.0 * left - 2.0})


@pytest.mark.parametrize("kind", ["rational", "gaussian"])
@pytest.mark.parametrize("sides", [False, True])
def test_planted_curves_are_found(kind, sides):
    m = np.linspace(-4 if sides else 0, 4, 33)
    found = fit_curves(planted(m, kind, sides), kind)
    between = planted(m[:-1] + 0.06, kind, sides)
    for name in ("preference", "utility"):
        curve = getattr(found, name)
        assert curve.r2 > 0.99999
        assert curve.r2_of(between["multiplier"], between[name]) > 0.9999
        assert (curve.below is not None) == sides
    assert float(found.utility(0.0)) == pytest.approx(4.0, abs=0.02)
    assert found.utility.gain == 0.0
    if kind == "gaussian":  # two numbers and a scale, which nothing else can take the place of
        assert found.preference.gain == pytest.approx(2.0, rel=0.02)
        assert (found.utility.decay.width, found.utility.decay.centre) == pytest.approx((2.1, 0.0), abs=0.02)
        assert (found.utility.level, found.utility.floor) == pytest.approx((6.0, -2.0), abs=0.02)


def test_noise_is_not_a_curve():
    m = np.linspace(0, 4, 33)
    rng = np.random.default_rng(0)
    noise = pd.DataFrame({"multiplier": m, "preference": rng.normal(size=33), "utility": rng.normal(size=33)})
    found = fit_curves(noise)
    assert max(found.preference.r2, found.utility.r2) < 0.6
    # Nor is one that rises and falls several times.
    wave = noise.assign(preference=np.sin(6 * m), utility=np.cos(6 * m))
    assert max(fit_curves(wave).preference.r2, fit_curves(wave).utility.r2) < 0.6


def test_curves_refuse_what_cannot_be_fitted():
    m = np.linspace(0, 4, 9)
    sweep = planted(m, "rational", False)
    with pytest.raises(MeasureError, match="choose rational or gaussian"):
        fit_curves(sweep, "cubic")
    with pytest.raises(MeasureError, match="5 points are too few for a curve of preference with 6"):
        fit_curves(sweep.iloc[:5])
    with pytest.raises(MeasureError, match="not finite"):
        fit_curves(sweep.assign(utility=np.nan))
    with pytest.raises(MeasureError, match="all the same"):
        fit_curves(sweep.assign(preference=1.0))


def test_methods_meet_at_equal_preference_and_not_at_equal_strength():
    m = np.linspace(0, 4, 9)
    cheap = pd.DataFrame({"multiplier": m, "preference": m, "utility": 6 - m})
    # The same trade twice as strong: worse at every multiplier, the same at every preference.
    strong = pd.DataFrame({"multiplier": m, "preference": 2 * m, "utility": 6 - 2 * m})
    dear = pd.DataFrame({"multiplier": m, "preference": m, "utility": 6 - 3 * m})
    found = equal_preference({"cheap": cheap, "strong": strong, "dear": dear}, 2.7).set_index("method")
    assert found["utility"].tolist() == pytest.approx([3.3, 3.3, 6 - 8.1])
    assert found["multiplier"].tolist() == pytest.approx([2.7, 1.35, 2.7])
    assert equal_preference({"cheap": cheap, "strong": strong})["preference"].tolist() == [4.0, 4.0]
    # Where preference comes down again the first crossing counts; rows may come in any order.
    bent = pd.DataFrame(
        {"multiplier": [2.0, 0.0, 1.0, -1.0], "preference": [1.0, 0.0, 2.0, 9.0], "utility": [0, 4, 2, 9]}
    )
    assert equal_preference({"bent": bent}, 1.0)["multiplier"].tolist() == [0.5]
    with pytest.raises(MeasureError, match="cheap goes from a preference of 0 to 4 and has none of 5"):
        equal_preference({"cheap": cheap}, 5.0)
    with pytest.raises(MeasureError, match="no multiplier of 0"):
        equal_preference({"cheap": cheap.iloc[1:]})


def test_a_trained_vector_goes_through_the_evaluation(model):
    many = Pairs(IDS.repeat(4, 1), PAIRS.wanted.repeat(4, 1), PAIRS.unwanted.repeat(4, 1))
    clamp = SPLIT("blocks.1.mlp.out", theta=3.0, steps=30, lr=0.1, batch_size=3).fit(model, PAIRS)
    found = evaluate(model, clamp, many, strengths=(1.0,), random=1, new_tokens=0)
    curve = found.curve("preference", arm="fitted")["value"]
    assert curve.iloc[1] > curve.iloc[0] + 1
