"""Neurons of a direction against brute force on every family, planted neurons, and controls that come out otherwise."""

import pytest
import torch
from tiny import CAUSAL, TINY

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import MeasureError
from actome.explain import Neuron, direction_neurons, neuron_sets, output_rows
from actome.tasks import Subject, SubjectConfig

NORMED = ("gemma2", "gemma3", "gemma3-multimodal", "olmo2")  # a norm stands between the projection and the stream
IDS = torch.randint(4, 64, (2, 5), generator=torch.Generator().manual_seed(0))


def acts(model):
    return [site for site in model.sites() if site.name.endswith(("mlp.act", "moe.shared.act"))]


FAMILIES = [name for name in CAUSAL if acts(ac.wrap(TINY[name]()))]


def test_most_families_have_mlp_sites():
    assert len(FAMILIES) >= 20
    assert {"gpt2", "pythia", "llama", "qwen3", "deepseek-v3", *NORMED} <= set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_units_row_is_what_an_activation_of_one_writes(name):
    model = ac.wrap(TINY[name]())
    site = acts(model)[-1]
    out = site.name.removesuffix("act") + "out"
    rows_FD = output_rows(model, site)
    before = model.record(IDS, [site.name, out])
    if name in NORMED:
        # Up to each token's positive factor: the norm of what went in.
        written = before[site.name].double() @ rows_FD
        got = before[out].double()
        torch.testing.assert_close(
            written / written.norm(dim=-1, keepdim=True), got / got.norm(dim=-1, keepdim=True), rtol=1e-3, atol=1e-4
        )
        return
    for unit in (0, 3):
        with model.clamp(ac.Add(site.name, 1.0, units=[unit])):
            moved = model.record(IDS, out)[out] - before[out]
        torch.testing.assert_close(moved.double(), rows_FD[unit].expand_as(moved), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def planted():
    """A layer in which neurons 2 and 7 write a direction, and neuron 5 writes against it."""
    config = SubjectConfig(vocab=20, d_model=24, layers=2, heads=2, d_mlp=32, context=8, act="relu", positions="none")
    subject = Subject.fresh(config, seed=3)
    model = ac.wrap(subject)
    direction = torch.eye(24)[4]
    down = dict(subject.named_modules())["blocks.0.mlp"].down
    with torch.no_grad():
        down.weight *= 0.2
        down.weight[:, [2, 5, 7]] = torch.stack([2 * direction, -1.5 * direction, 3 * direction], 1)
    return model, direction


def test_planted_neurons_are_found_and_those_that_do_not_differ_are_not(planted):
    model, direction = planted
    site = "blocks.0.mlp.act"
    g = torch.Generator().manual_seed(1)
    shown = torch.cat([torch.randint(2, 20, (40, 4), generator=g), torch.full((40, 1), 1)], 1)
    hidden = torch.randint(2, 20, (40, 5), generator=g)
    # Neuron 2 rises where the last token is 1, neuron 5 (which writes against it) falls there, neuron 7 is on always.
    is_one = ac.When("embed", lambda x: (x - model.module.embed.weight[1]).abs().amax(-1) < 1e-6)
    not_one = ac.When("embed", lambda x: (x - model.module.embed.weight[1]).abs().amax(-1) >= 1e-6)
    with model.clamp(
        ac.Add(site, 4.0, units=[2], when=is_one),
        ac.Add(site, 3.0, units=[5], when=not_one),
        ac.Add(site, 6.0, units=[7]),
    ):
        found = direction_neurons(model, 7 * direction, shown, hidden, 2, sites="blocks.*.mlp.act", over="last")
        # Brute force: what the layer adds along the direction, where the behaviour shows less where it does not.
        out = [model.record(x, "blocks.0.mlp.out")["blocks.0.mlp.out"][:, -1] @ direction for x in (shown, hidden)]
    assert found.neurons == [Neuron(site, 2), Neuron(site, 5)]
    row = found.frame.set_index(["site", "unit"])
    assert row.loc[(site, 2), "attribution"] == pytest.approx(8, abs=1.5)
    assert row.loc[(site, 5), "attribution"] == pytest.approx(4.5, abs=1.5)
    assert row.loc[(site, 2), "cosine"] == pytest.approx(1)
    assert row.loc[(site, 5), "cosine"] == pytest.approx(-1)
    assert row.loc[(site, 7), "writes"] == pytest.approx(3)
    first = found.frame[found.frame["site"] == site]
    assert first["attribution"].sum() == pytest.approx(float(out[0].mean() - out[1].mean()), abs=1e-4)
    # Shown and hidden the other way round: attributions turn, so neither of the two is chosen.
    with model.clamp(ac.Add(site, 4.0, units=[2], when=is_one)):
        turned = direction_neurons(model, direction, hidden, shown, 2)
    assert Neuron(site, 2) not in turned.neurons


@pytest.fixture(scope="module")
def found():
    config = SubjectConfig(vocab=20, d_model=24, layers=2, heads=2, context=8, init=2.0)
    model = ac.wrap(Subject.fresh(config, seed=3))
    g = torch.Generator().manual_seed(1)
    shown, hidden = torch.randint(0, 3, (30, 5), generator=g), torch.randint(10, 13, (30, 5), generator=g)
    site = "blocks.0.resid.post"
    vector = (model.record(shown, site)[site][:, -1].mean(0)) - (model.record(hidden, site)[site][:, -1].mean(0))
    return model, vector, shown, hidden, direction_neurons(model, vector, shown, hidden, 6, before=site)


def test_boosting_adds_the_sum_of_the_attributions_and_ablating_takes_them_to_their_mean(found):
    model, vector, shown, hidden, neurons = found
    unit = vector / vector.norm()
    out, act = "blocks.0.mlp.out", "blocks.0.mlp.act"
    assert {one.site for one in neurons.neurons} == {act}  # only what comes before the vector
    assert len(neurons.neurons) == 6
    assert neurons.frame["attribution"].is_monotonic_decreasing
    before = model.record(hidden, [out, act])
    for scale in (1.0, -2.0):
        with model.clamp(*neurons.boost(scale=scale)):
            moved = (model.record(hidden, out)[out] - before[out]) @ unit
        wanted = scale * neurons.frame[neurons.frame["chosen"]]["attribution"].sum()
        torch.testing.assert_close(moved, torch.full_like(moved, wanted), rtol=1e-3, atol=1e-4)
    chosen = [one.unit for one in neurons.neurons]
    for how in ("mean", "zero"):
        with model.clamp(*neurons.ablate(how=how)):
            after = model.record(hidden, act)[act]
        held = before[act][:, -1].mean(0)[chosen] if how == "mean" else torch.zeros(6)
        torch.testing.assert_close(after[..., chosen], held.expand(30, 5, 6), rtol=1e-4, atol=1e-5)
        rest = [i for i in range(after.shape[-1]) if i not in chosen]
        assert after[..., rest].equal(before[act][..., rest])
    # Where the behaviour shows, ablating takes from what the layer writes along the direction; random ones do not.
    clean = float((model.record(shown, out)[out][:, -1] @ unit).mean())
    losses = {}
    for name, some in (("chosen", None), ("random", neurons.random(seed=1))):
        with model.clamp(*neurons.ablate(some)):
            losses[name] = clean - float((model.record(shown, out)[out][:, -1] @ unit).mean())
    assert losses["chosen"] == pytest.approx(neurons.frame[neurons.frame["chosen"]]["attribution"].sum(), rel=1e-3)
    assert abs(losses["random"]) < losses["chosen"] / 2


def test_the_size_of_a_difference_is_that_of_welch(found):
    from scipy.stats import ttest_ind

    model, _, shown, hidden, neurons = found
    act = "blocks.0.mlp.act"
    x, y = (model.record(some, act)[act][:, -1].double().numpy() for some in (shown, hidden))
    by_unit = neurons.frame.set_index("unit").sort_index()
    assert by_unit["z"].to_numpy() == pytest.approx(ttest_ind(x, y, equal_var=False).statistic, rel=1e-4)
    kept = neurons.frame["chosen"]
    assert (neurons.frame[kept]["z"].abs() >= 3).all()
    assert (neurons.frame[kept]["cosine"].abs() >= 0.1).all()


def test_random_neurons_are_as_many_and_none_of_the_chosen(found):
    *_, neurons = found
    drawn = neurons.random(seed=3)
    assert len(set(drawn)) == 6
    assert not set(drawn) & set(neurons.neurons)
    assert drawn == neurons.random(seed=3) != neurons.random(seed=4)


def test_sets_of_two_directions(found):
    model, vector, shown, hidden, neurons = found
    other = direction_neurons(model, vector, shown, hidden, 4, before="blocks.0.resid.post")
    sets = neuron_sets(neurons, other)
    assert sets.shared == neurons.neurons[:4]
    assert sets.intrinsic == neurons.neurons[4:]
    assert sets.prompted == []
    against = direction_neurons(model, -vector, shown, hidden, 6)
    assert not neuron_sets(neurons, against).shared
    with pytest.raises(MeasureError, match="no neuron to clamp"):
        neurons.boost(sets.prompted)


def test_clamps_are_saved_and_compose(found, tmp_path):
    model, _, shown, _, neurons = found
    clamps = [*neurons.ablate(), *neurons.boost(scale=2.0)]
    again = load_clamps(save_clamps(tmp_path / "neurons", clamps, model=model), model)
    with model.clamp(*clamps):
        wanted = model.logits(shown)
    with model.clamp(*again):
        assert model.logits(shown).equal(wanted)
    assert not wanted.allclose(model.logits(shown))


def test_batch_size_and_half_precision_change_nothing_much(found):
    model, vector, shown, hidden, neurons = found
    other = direction_neurons(model, vector, shown, hidden, 6, before="blocks.0.resid.post", batch_size=30)
    assert other.neurons == neurons.neurons
    half = ac.wrap(Subject.fresh(model.module.config, seed=3).to(torch.bfloat16))
    again = direction_neurons(half, vector, shown, hidden, 6, before="blocks.0.resid.post")
    assert len(set(again.neurons) & set(neurons.neurons)) >= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.zeros(24)}, "finite and not zero"),
        ({"vector": torch.ones(5)}, "the vector is 5 wide, and blocks.0.mlp.act writes into a stream of 24"),
        ({"shown": [[1, 2]] * 3}, "shown: give a list of 8 examples"),
        ({"k": 0}, "k=0"),
        ({"before": "blocks.0.resid.pre"}, "no site of blocks.* comes before blocks.0.resid.pre"),
        ({"sites": "blocks.*.resid.mid"}, "enters no projection"),
    ],
)
def test_what_does_not_fit_is_refused(found, change, message):
    model, vector, shown, hidden, neurons = found
    given = {"vector": vector, "shown": shown, "hidden": hidden} | change
    with pytest.raises(MeasureError, match=message):
        direction_neurons(model, **given)
    with pytest.raises(MeasureError, match=r"unit 99 of .* was not looked at"):
        neurons.ablate([Neuron("blocks.0.mlp.act", 99)])
    with pytest.raises(MeasureError, match="how='median'"):
        neurons.ablate(how="median")
