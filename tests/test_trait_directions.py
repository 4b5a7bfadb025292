"""Where a contrast acts, what two directions share, and which neurons write one: against what was planted."""

from __future__ import annotations

from dataclasses import replace

import personas
import pytest
import torch

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import MeasureError
from actome.explain import direction_neurons, neuron_clamps
from actome.steer import Contrast, Pairs, SplitDirections, cosines, evaluate, odds, select_layer
from actome.tasks import Subject, SubjectConfig


@pytest.fixture(scope="module")
def lab():
    model, examples, pairs, _ = personas.persona()
    return model, Contrast().fit(model, examples), examples, pairs


# -- layers -----------------------------------------------------------------------------------------------------------


def test_the_layer_chosen_is_the_one_with_the_largest_effect(lab):
    model, clamp, _, pairs = lab
    found = select_layer(model, clamp, pairs, strengths=(1.0,), allowed=9.0)
    gains = {}
    for site in clamp.directions:
        with model.clamp(clamp.to(site, 1.0)):
            gains[site] = float((odds(model, pairs).preference).mean())
    assert found.site == max(gains, key=gains.get)
    assert found.clamp.site == found.site
    steered = found.table.query("strength == 1").set_index("site").preference
    for site, gain in gains.items():
        assert steered[site] == pytest.approx(gain, abs=1e-4)


def test_a_site_that_does_nothing_is_passed_over_however_well_it_separates(lab):
    model, clamp, _, pairs = lab
    # The separation stays what it was; what is added at the others is a hundredth of it.
    weak = replace(clamp, gaps={site: gap * (0.01 if "1" not in site else 1.0) for site, gap in clamp.gaps.items()})
    assert select_layer(model, weak, pairs, strengths=(1.0,)).site == "blocks.1.resid.post"


def test_damage_forbids_a_site(lab):
    model, clamp, _, pairs = lab
    asked = {"count": 0}

    def task(steered):
        asked["count"] += 1
        shown = steered.logits(pairs.prompts)[:, -1]
        return torch.ones(len(shown)) if asked["count"] == 1 else torch.zeros(len(shown))  # all that is done harms

    found = select_layer(model, clamp, pairs, strengths=(1.0,), task=task)
    assert (found.clamp, found.site, found.strength) == (None, None, None)
    assert "more damage than" in found.why


def test_ablation_is_chosen_by_what_it_takes_away(lab):
    model, clamp, examples, pairs = lab
    asked = Pairs(torch.as_tensor(examples.positive)[:12], pairs.unwanted[:12], pairs.wanted[:12])
    found = select_layer(model, clamp, asked, how="ablate")
    best = found.table.query("strength == 1").set_index("site").preference.idxmax()
    assert found.site == best
    with model.clamp(found.clamp):
        ablated = float(odds(model, asked).preference.mean())
    assert ablated == pytest.approx(found.table.query("strength == 1").preference.max(), abs=1e-4)
    assert ablated > float(odds(model, asked).preference.mean())


def test_it_chooses_as_evaluate_does(lab):
    model, clamp, _, pairs = lab
    found = evaluate(model, clamp, pairs, strengths=(0.5, 1.0), sites=list(clamp.directions), random=0, new_tokens=0)
    from actome.tasks.trials import split

    half = pairs.part(split(len(pairs), [0.5, 0.5], 0)[0].tolist())
    chosen = select_layer(model, clamp, half, strengths=(0.5, 1.0))
    assert (chosen.site, chosen.strength) == (found.site, found.strength)


def test_bad_input_of_layers(lab):
    model, clamp, _, pairs = lab
    with pytest.raises(MeasureError, match="as Contrast gives"):
        select_layer(model, ac.Add("blocks.1.resid.post", torch.ones(64)), pairs)
    with pytest.raises(MeasureError, match="choose 'add' or 'ablate'"):
        select_layer(model, clamp, pairs, how="both")
    with pytest.raises(MeasureError, match="give numbers above 0"):
        select_layer(model, clamp, pairs, strengths=(0.0, 1.0))
    with pytest.raises(MeasureError, match="was not fitted at"):
        select_layer(model, clamp, pairs, sites=["blocks.7.resid.post"])


def test_cosines_by_hand():
    vectors = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [-2.0, 0.0]}
    table = cosines({name: ac.Add("blocks.1.resid.post", torch.tensor(one)) for name, one in vectors.items()})
    assert table.loc["a", "b"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert table.loc["a", "c"] == pytest.approx(-1.0, abs=1e-6)
    assert cosines({"a": ac.Scale("x"), "b": ac.Scale("x")}).isna().all(axis=None)


# -- shared and unique ------------------------------------------------------------------------------------------------


def planted(asked=1.0, width=32, count=400, seed=0):
    """Value along channel 0; own along 1 where it is unasked, and `asked` along 2 where it is asked for."""
    noise = torch.randn(4, count, width, generator=torch.Generator().manual_seed(seed))
    axis = torch.eye(width) * 3
    return noise[0] + axis[0] + axis[1], noise[1], noise[2] + axis[0] + asked * axis[2], noise[3]


def test_shared_and_unique_axes_are_those_that_were_planted():
    found = SplitDirections("blocks.1.resid.post").of_states(*planted())
    assert found.cosine.value == pytest.approx(0.5, abs=0.07)
    assert found.cosine.p < 0.05
    units = {name: clamp.value / clamp.value.norm() for name, clamp in found.clamps.items()}
    by_hand = torch.tensor([2.0, 1.0, 1.0]) / 6**0.5  # (1, 1, 0) and (1, 0, 1), added
    assert float(units["shared_"][:3] @ by_hand) > 0.97
    # By the singular value decomposition itself.
    stacked = torch.stack((units["intrinsic"], units["prompted"])).double()
    axis = torch.linalg.svd(stacked, full_matrices=False).Vh[0]
    assert abs(float(axis @ units["shared_"].double())) == pytest.approx(1.0, abs=1e-5)
    assert float(units["unique_int_"] @ units["prompted"]) == pytest.approx(0.0, abs=1e-5)
    assert float(units["unique_pr_"] @ units["intrinsic"]) == pytest.approx(0.0, abs=1e-5)
    assert float(units["unique_pr_"][2]) > 0.7 > abs(float(units["unique_int_"][2]))
    lengths = [float(clamp.value.norm()) for clamp in found.clamps.values()]
    assert lengths == pytest.approx([sum(found.gaps) / 2] * 5, rel=1e-5)


def test_directions_with_nothing_in_common_are_told_by_the_null():
    high, low, asked, free = planted()
    other = asked.roll(16, dims=1)
    found = SplitDirections("blocks.1.resid.post").of_states(high, low, other, free)
    assert found.cosine.p > 0.05
    opposed = SplitDirections("blocks.1.resid.post").of_states(high, low, free, asked)
    assert opposed.cosine.value < 0
    assert float(opposed.shared_.value @ opposed.intrinsic.value) > 0


def test_parts_are_fitted_on_a_model_and_come_back_from_disk(lab, tmp_path):
    model, _, examples, pairs = lab
    shots = torch.cat((torch.as_tensor(examples.positive), torch.as_tensor(examples.negative)))
    same = type(examples)(shots[::2], shots[1::2])
    found = SplitDirections("blocks.1.resid.post", permutations=20).fit(model, examples, same)
    by_hand = model.record(torch.as_tensor(examples.positive), "blocks.1.resid.post", positions=-1)
    low = model.record(torch.as_tensor(examples.negative), "blocks.1.resid.post", positions=-1)
    apart = (by_hand["blocks.1.resid.post"] - low["blocks.1.resid.post"]).float().mean((0, 1))
    assert float(torch.cosine_similarity(apart, found.intrinsic.value, dim=0)) == pytest.approx(1.0, abs=1e-5)
    again = load_clamps(save_clamps(tmp_path / "parts", list(found.clamps.values()), model=model), model)
    for kept, clamp in zip(again, found.clamps.values(), strict=True):
        assert kept.site == clamp.site
        assert torch.equal(kept.value, clamp.value)
    with model.clamp(again[2]):
        loaded = odds(model, pairs).preference
    with model.clamp(found.shared_):
        assert torch.equal(odds(model, pairs).preference, loaded)


def test_bad_input_of_splits(lab):
    high, low, *_ = planted()
    split = SplitDirections("blocks.*.resid.post")
    with pytest.raises(MeasureError, match="is 3 sites; a direction is split at one"):
        split.fit(lab[0], lab[2], lab[2])
    with pytest.raises(MeasureError, match="neither has a part of its own"):
        split.of_states(high, low, high, low)
    with pytest.raises(MeasureError, match="of two sites"):
        split.of_states(high, low, high[:, :8], low[:, 8:16])


# -- neurons ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wired():
    """A subject whose unit 5 of layer 1 writes channel 3, on token 1 and not on token 2; the rest writes as it may."""
    config = SubjectConfig(vocab=8, d_model=16, heads=2, layers=2, context=8, act="relu", norm="none")
    model = ac.wrap(Subject.fresh(config, seed=1))
    mlp = model.module.model.layers[1].mlp if hasattr(model.module, "model") else model.module.blocks[1].mlp
    down = next(module for name, module in mlp.named_modules() if "down" in name)
    up = next(module for name, module in mlp.named_modules() if "up" in name)
    seen = model.record(torch.tensor([[1], [2]]), "blocks.1.resid.mid")["blocks.1.resid.mid"][:, 0]
    with torch.no_grad():
        down.weight[:, 5] = 4 * torch.eye(16)[3]
        up.weight[5] = 20 * (seen[0] - seen[1])
    return model, torch.eye(16)[3], torch.tensor([[1]] * 4), torch.tensor([[2]] * 4)


def test_the_neuron_that_was_wired_is_found_and_its_attributions_add_up(wired):
    model, vector, high, low = wired
    found = direction_neurons(model, 7 * vector, high, low, k=3)
    best = found.frame.iloc[0]
    assert (best["site"], int(best["unit"])) == ("blocks.1.mlp.act", 5)
    assert best["cosine"] == pytest.approx(1.0)
    assert ("blocks.1.mlp.act", 5) in found.chosen
    # All units together bring what the MLP's output moves along the vector.
    for layer in (0, 1):
        out, act = f"blocks.{layer}.mlp.out", f"blocks.{layer}.mlp.act"
        moved = [float((model.record(one, out)[out][:, 0] @ vector).mean()) for one in (high, low)]
        brought = found.frame[found.frame["site"] == act]["attribution"].sum()
        assert brought == pytest.approx(moved[0] - moved[1], abs=1e-4)


def test_taking_the_neuron_out_takes_its_attribution_away(wired):
    model, vector, high, low = wired
    found = direction_neurons(model, vector, high, low, k=1)

    def apart():
        site = "blocks.1.mlp.out"
        return float(
            sum(sign * (model.record(one, site)[site] @ vector).mean() for one, sign in ((high, 1), (low, -1)))
        )

    bare = apart()
    with model.clamp(*neuron_clamps(found.chosen)):
        without = apart()
    with model.clamp(*neuron_clamps(found.chosen, 3.0)):
        boosted = apart()
    attribution = float(found.frame["attribution"].iloc[0])
    assert bare - without == pytest.approx(attribution, rel=1e-4)
    assert boosted - bare == pytest.approx(2 * attribution, rel=1e-4)


def test_sets_of_neurons(wired):
    model, vector, high, low = wired
    one, other = (direction_neurons(model, v, high, low, k=6) for v in (vector, vector + torch.eye(16)[4]))
    parts = one.sets(other)
    assert ("blocks.1.mlp.act", 5) in parts.shared
    assert parts.shared | parts.first_only == one.chosen
    assert parts.shared | parts.second_only == other.chosen
    assert not parts.first_only & other.chosen
    clamps = neuron_clamps({("blocks.0.mlp.act", 3), ("blocks.1.mlp.act", 5), ("blocks.0.mlp.act", 1)}, 2.0)
    assert [(clamp.site, clamp.units, clamp.factor) for clamp in clamps] == [
        ("blocks.0.mlp.act", [1, 3], 2.0),
        ("blocks.1.mlp.act", [5], 2.0),
    ]


def test_bad_input_of_neurons(wired):
    model, vector, high, low = wired
    with pytest.raises(MeasureError, match="no length"):
        direction_neurons(model, 0 * vector, high, low)
    with pytest.raises(MeasureError, match=r"width 8, and units of blocks\.0\.mlp\.act write 16"):
        direction_neurons(model, vector[:8] + 1, high, low)
    with pytest.raises(MeasureError, match="k=0"):
        direction_neurons(model, vector, high, low, k=0)
    with pytest.raises(MeasureError, match="give a list of examples"):
        direction_neurons(model, vector, [], low)
    with pytest.raises(MeasureError, match="no neuron in the set"):
        neuron_clamps(set())
