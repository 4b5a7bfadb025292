"""At which layer a contrast acts, and how alike directions are: against what was planted and what `evaluate` says."""

from __future__ import annotations

from dataclasses import replace

import personas
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError
from actome.steer import Contrast, Pairs, cosines, evaluate, odds, select_layer


@pytest.fixture(scope="module")
def lab():
    model, examples, pairs, _ = personas.persona()
    return model, Contrast().fit(model, examples), examples, pairs


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


@pytest.mark.parametrize("how", ["add", "ablate"])
def test_directions_of_chance_are_not_chosen(lab, how):
    model, clamp, examples, pairs = lab
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    units = dict(zip(clamp.directions, noise / noise.norm(dim=1, keepdim=True), strict=True))
    chance = replace(clamp, directions=units, value=units[clamp.site])
    some = pairs
    if how == "ablate":
        some = Pairs(torch.as_tensor(examples.positive)[:12], pairs.unwanted[:12], pairs.wanted[:12])
    found = select_layer(model, chance, some, how=how, strengths=(1.0,), random=6)
    assert found.site is None
    assert "controls raise preference as much" in found.why or "no strength" in found.why


def test_it_chooses_as_evaluate_does(lab):
    model, clamp, _, pairs = lab
    found = evaluate(model, clamp, pairs, strengths=(0.5, 1.0), sites=list(clamp.directions), new_tokens=0)
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
    with pytest.raises(MeasureError, match="random=-1"):
        select_layer(model, clamp, pairs, random=-1)


def test_cosines_by_hand():
    vectors = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [-2.0, 0.0]}
    table = cosines({name: ac.Add("blocks.1.resid.post", torch.tensor(one)) for name, one in vectors.items()})
    assert table.loc["a", "b"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert table.loc["a", "c"] == pytest.approx(-1.0, abs=1e-6)
    assert cosines({"a": ac.Scale("x"), "b": ac.Scale("x")}).isna().all(axis=None)
