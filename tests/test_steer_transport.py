"""Transport against closed forms and another library's optimal assignment; experts against planted ones."""

import pytest
import torch
from tiny import TINY

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError
from actome.steer import ActivationTransport, Examples, ExpertTuner, Quantiles, Transport, states
from actome.steer.experts import Force
from actome.steer.transport import gaussian_map, unit_maps
from actome.tasks import Subject, SubjectConfig


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- transport --------------------------------------------------------------------------------------------------------


def test_gaussian_units_come_to_the_mean_and_spread_of_the_target():
    source, target = 2 * drawn(0, 4000, 3) + 1, drawn(1, 4000, 3) * torch.tensor([0.5, 1.0, 3.0]) - 2
    factor, offset = unit_maps(source, target, "linear")
    moved = source * factor + offset
    torch.testing.assert_close(moved.mean(0), target.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(moved.std(0), target.std(0), rtol=0.02, atol=0)
    factor, offset = unit_maps(source, target, "mean")
    moved = source * factor + offset
    torch.testing.assert_close(moved.mean(0), target.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.std(0), source.std(0), rtol=1e-4, atol=0)


def test_pairs_of_order_statistics_are_the_optimal_assignment():
    from scipy.optimize import linear_sum_assignment

    source, target = drawn(0, 40, 1).double(), drawn(1, 40, 1).double().exp()
    cost = (source - target.T).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    a, b = source[rows, 0], target[columns, 0]
    w = float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())
    factor, offset = unit_maps(source, target, "linear")
    assert float(factor) == pytest.approx(w, rel=1e-5)
    assert float(offset) == pytest.approx(float(b.mean() - w * a.mean()), rel=1e-4)


def test_sets_of_different_sizes_agree_with_equal_ones():
    source, target = drawn(0, 3000, 2), 3 * drawn(1, 2000, 2) + 1
    a = unit_maps(source, target, "linear")
    b = unit_maps(source[:2000], target, "linear")
    torch.testing.assert_close(a[0], b[0], rtol=0.05, atol=0)


def test_the_gaussian_map_carries_covariances_and_is_symmetric_and_positive():
    mix, other = drawn(0, 5, 5), drawn(1, 5, 5)
    source, target = drawn(2, 6000, 5) @ mix, drawn(3, 6000, 5) @ other + 1
    factor, offset = gaussian_map(source, target, shrink=0.0)
    moved = source @ factor.T + offset
    torch.testing.assert_close(torch.cov(moved.T), torch.cov(target.T), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(factor, factor.T, rtol=1e-3, atol=1e-4)
    assert float(torch.linalg.eigvalsh(factor.double()).min()) > 0  # the optimal one among all that carry covariances
    one = unit_maps(source[:, :1], target[:, :1], "linear")
    torch.testing.assert_close(gaussian_map(source[:, :1], target[:, :1], 0.0)[0][0], one[0], rtol=0.02, atol=0)


@pytest.fixture(scope="module")
def model():
    return ac.wrap(Subject.fresh(SubjectConfig(vocab=40, d_model=24, heads=2, layers=3, context=32), seed=1))


def tokens(low, high, n, seed):
    return torch.randint(low, high, (n, 8), generator=torch.Generator().manual_seed(seed))


def test_strength_and_support_by_hand(model):
    ids = tokens(0, 40, 2, 0)
    site = "blocks.1.resid.post"
    x = model.record(ids, site)[site]
    low, high = x.flatten(0, 1).quantile(0.2, 0), x.flatten(0, 1).quantile(0.8, 0)
    clamp = Transport(site, factor=torch.full((24,), 2.0), offset=torch.ones(24), low=low, high=high, scale=0.5)
    with model.clamp(clamp):
        got = model.record(ids, site)[site]
    seen = (x >= low) & (x <= high)
    torch.testing.assert_close(got, torch.where(seen, 0.5 * x + 0.5 * (2 * x + 1), x))


def test_maps_in_order_do_not_carry_twice(model):
    """Of distances of the last states to the target's, those of maps fitted in order are the smaller."""
    data = Examples(tokens(0, 8, 200, 1), tokens(32, 40, 200, 2))
    last = "blocks.2.resid.post"
    target = states(model, data.positive, last, over="mean")[last]
    fresh = tokens(32, 40, 200, 3)
    apart = {}
    for sequential in (True, False):
        clamps = ActivationTransport("blocks.*.resid.post", sequential=sequential, support=False).fit(model, data)
        with model.clamp(*clamps):
            got = states(model, fresh, last, over="mean")[last]
        spread = target.std(0)
        apart[sequential] = float((((got.mean(0) - target.mean(0)) / spread) ** 2).mean())
    bare = states(model, fresh, last, over="mean")[last]
    assert apart[True] < 0.1
    assert apart[True] <= apart[False]
    assert apart[True] < 0.2 * float((((bare.mean(0) - target.mean(0)) / target.std(0)) ** 2).mean())


@pytest.mark.parametrize("kind", ["linear", "mean", "gaussian"])
def test_transports_are_saved(model, tmp_path, kind):
    data = Examples(tokens(0, 8, 40, 1), tokens(32, 40, 30, 2))
    clamps = ActivationTransport("blocks.{0..1}.resid.post", kind=kind).fit(model, data)
    loaded = load_clamps(save_clamps(tmp_path / kind, clamps, model=model), model)
    ids = tokens(0, 40, 2, 0)
    with model.clamp(*clamps):
        wanted = model.logits(ids)
    with model.clamp(*loaded):
        assert torch.equal(model.logits(ids), wanted)


def test_quantiles_of_merged_streams_are_those_of_the_whole():
    x = torch.cat([drawn(0, 3001, 3), drawn(1, 1003, 3).exp() + 4])[
        torch.randperm(4004, generator=torch.Generator().manual_seed(2))
    ]
    whole = Quantiles(size=256)
    for some in x.split(37):
        whole.update(some)
    parts = [Quantiles(size=256) for _ in range(3)]
    for part, some in zip(parts, x.split([1500, 4, 2500]), strict=True):
        part.update(some)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    shares = torch.linspace(0.02, 0.98, 25)
    for one in (whole, parts[0]):
        assert one.count == 4004
        torch.testing.assert_close(one.mean, x.double().mean(0), rtol=1e-9, atol=1e-9)
        assert torch.equal(one.high.float(), x.amax(0))
        # Where each quantile lies among all examples: within two cuts of half a share each, and one between points.
        found = (x.double() <= one.at(shares)[:, None]).double().mean(1)
        assert float((found - shares[:, None]).abs().max()) < 3 / 256
    assert parts[1].count == 4


def test_maps_of_streams_are_those_of_samples():
    source, target = drawn(0, 5000, 2), 3 * drawn(1, 7000, 2).exp()
    streams = [Quantiles(), Quantiles()]
    for stream, x in zip(streams, (source, target), strict=True):
        for some in x.split(100):
            stream.update(some)
    a, b = (Transport.between("embed", *pair) for pair in ((source, target), streams))
    torch.testing.assert_close(a.factor, b.factor, rtol=0.02, atol=0)
    torch.testing.assert_close(a.offset, b.offset, rtol=0, atol=0.02)
    assert torch.equal(a.high, b.high)
    few = [Quantiles(), Quantiles()]
    few[0].update(source[:50])
    few[1].update(target[:50])
    exact = unit_maps(source[:50], target[:50], "linear")
    torch.testing.assert_close(unit_maps(few[0], few[1], "linear"), exact)


def test_support_between_quantiles_and_places(model):
    source, target = drawn(0, 1000, 2), drawn(1, 1000, 2)
    clamp = Transport.between("embed", source, target, support=(0.1, 0.9))
    inside = ((source >= clamp.low) & (source <= clamp.high)).float().mean(0)
    torch.testing.assert_close(inside, torch.full((2,), 0.8), rtol=0, atol=0.003)
    data = Examples(tokens(0, 8, 40, 1), tokens(32, 40, 40, 2))
    clamps = ActivationTransport("blocks.{0..1}.resid.post", over="last", positions=-1).fit(model, data)
    ids = tokens(0, 40, 2, 0)
    with model.clamp(*clamps):
        got = model.logits(ids)
    bare = model.logits(ids)
    assert torch.equal(got[:, :-1], bare[:, :-1])
    assert not torch.equal(got[:, -1], bare[:, -1])
    # The second map was fitted where the first one acts: on the last token it is what remains to be done.
    with model.clamp(clamps[0]):
        source = states(model, data.negative, clamps[1].site)[clamps[1].site]
    target = states(model, data.positive, clamps[1].site)[clamps[1].site]
    torch.testing.assert_close(clamps[1].factor, unit_maps(source, target, "linear")[0])


def test_bad_streams():
    one = Quantiles()
    with pytest.raises(MeasureError, match="nothing has been seen"):
        one.at(torch.tensor([0.5]))
    one.update(drawn(0, 5, 3))
    with pytest.raises(MeasureError, match="of 2 units do not fit what was seen, of 3"):
        one.update(drawn(0, 5, 2))
    with pytest.raises(MeasureError, match="not finite"):
        one.update(torch.full((2, 3), float("nan")))
    with pytest.raises(MeasureError, match="keep 16"):
        Quantiles(4)
    with pytest.raises(MeasureError, match="give no map"):
        unit_maps(Quantiles(), drawn(0, 5, 3), "linear")
    with pytest.raises(MeasureError, match="two shares"):
        Transport.between("embed", drawn(0, 5, 3), drawn(1, 5, 3), support=(0.9, 0.1))


def test_bad_transports(model):
    with pytest.raises(MeasureError, match="choose linear"):
        ActivationTransport(kind="affine").fit(model, Examples(tokens(0, 9, 9, 0), tokens(0, 9, 9, 1)))
    with pytest.raises(ClampError, match="do not fit"):
        Transport("embed", factor=torch.ones(3), offset=torch.ones(4))
    with pytest.raises(ClampError, match="takes a factor"):
        Transport("embed")
    wide = Transport("embed", factor=torch.ones(3), offset=torch.ones(3))
    with pytest.raises(ClampError, match="width 3, the site 24"), model.clamp(wide):
        model.logits(tokens(0, 9, 1, 0))


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture():
    """A mixture whose routers send tokens below 20 to expert 3 in layer 1, whatever else they do."""
    subject = Subject.fresh(SubjectConfig(vocab=40, d_model=24, heads=2, layers=2, context=32, experts=8), seed=2)
    with torch.no_grad():
        mark = torch.nn.functional.normalize(drawn(5, 24), dim=0)
        subject.get_input_embeddings().weight[:20] += 3 * mark
        subject.get_input_embeddings().weight[20:] -= 3 * mark
        for name, parameter in subject.named_parameters():
            if "1" in name and "router" in name and parameter.shape == (8, 24):
                parameter[3] = 4 * mark
    return ac.wrap(subject)


def test_the_planted_expert_is_found_and_can_be_taken_out_or_forced_in(mixture):
    # Of this layer alone: others may tell these tokens apart by chance, as a random router does.
    data = Examples(tokens(0, 20, 60, 1), tokens(20, 40, 60, 2))
    tuned = ExpertTuner(n=1, site="blocks.1.moe.router").fit(mixture, data)
    assert tuned.top == ((0, 3),)
    assert tuned.k == 2
    assert float(tuned.scores[0, 3]) > 0.8

    def share(ids):
        chosen = mixture.record(ids, "blocks.1.moe.chosen")["blocks.1.moe.chosen"]
        return float((chosen == 3).any(-1).float().mean())

    high, low = tokens(0, 20, 20, 7), tokens(20, 40, 20, 8)
    assert share(high) > 0.9
    with mixture.clamp(*tuned.suppress()):
        assert share(high) == 0.0
        weights = mixture.record(high, "blocks.1.moe.weights")["blocks.1.moe.weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))  # others fill the place
    assert share(low) < 0.1
    with mixture.clamp(*tuned.stimulate()):
        assert share(low) == 1.0
        assert mixture.record(low, "blocks.1.moe.chosen")["blocks.1.moe.chosen"].shape[-1] == 2


def test_controls_are_other_experts_of_the_same_layers(mixture):
    tuned = ExpertTuner(n=4).fit(mixture, Examples(tokens(0, 20, 60, 1), tokens(20, 40, 60, 2)))
    for seed in range(5):
        control = tuned.random(seed)
        assert sorted(layer for layer, _ in control.top) == sorted(layer for layer, _ in tuned.top)
        assert not set(control.top) & set(tuned.top)
        assert len(set(control.top)) == 4
    assert tuned.random(1).top == tuned.random(1).top


def test_what_cannot_be_taken_out_is_refused(mixture, model):
    data = Examples(tokens(0, 20, 20, 1), tokens(20, 40, 20, 2))
    with pytest.raises(ClampError, match="would be left"):
        ExpertTuner(n=16).fit(mixture, data).suppress()
    with pytest.raises(MeasureError, match="from 1 to 16"):
        ExpertTuner(n=17).fit(mixture, data)
    with pytest.raises(ac.SiteError):
        ExpertTuner(n=1).fit(model, data)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_router_that_does_not_go_by_its_logits_is_refused(spread):
    """DeepSeek-V3 adds a correction to its scores before it chooses; without one it goes by its logits."""
    module = TINY["deepseek-v3"]()
    for block in module.modules():
        if hasattr(block, "topk_group"):
            block.num_group = block.topk_group = 1  # all experts in one group
    for name, value in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.copy_(torch.linspace(-spread, spread, len(value)))
    model = ac.wrap(module.eval())
    data = Examples(tokens(0, 20, 10, 1), tokens(20, 40, 10, 2))
    if spread:
        with pytest.raises(ClampError, match="does not choose the experts with the highest logits"):
            ExpertTuner(n=1).fit(model, data)
    else:
        assert ExpertTuner(n=1).fit(model, data).k == module.config.num_experts_per_tok


def test_where_all_experts_are_active_forcing_changes_nothing():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Force("blocks.0.moe.router", experts=(1,), k=4).transform(x, None), x)
