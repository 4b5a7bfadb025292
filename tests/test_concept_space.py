"""Concept space, elicitation and the world of discs against planted paths, closed forms and pictures drawn by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import actome as ac
from actome.core.errors import MeasureError
from actome.dynamics.concept_space import ConceptSpace, ConceptTrace, concept_signal
from actome.dynamics.elicitation import LatentPush, OverPrompt, elicit, latent_direction, overprompt
from actome.dynamics.walk import over_runs, walk
from actome.tasks import Training, train
from actome.tasks.shapes2d import ShapeDecoder, Shapes2D

COMBOS = [(0, 0), (0, 1), (1, 0), (1, 1)]
SPACE = ConceptSpace({"a": lambda x: x[:, 0], "b": lambda x: x[:, 1]})
PROMPTS = {combo: torch.tensor([[float(one) for one in combo]]) for combo in COMBOS}


class Gains(nn.Module):
    """Gives a prompt's entries times a gain each: what a generator that has learned a share of each concept gives."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([a, b]))
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * self.gain


# -- the world --------------------------------------------------------------------------------------------------------


def test_readouts_say_the_classes_and_nothing_else():
    world = Shapes2D(color_sep=0.4, size_sep=0.3, background_sep=0.2)
    combos = torch.tensor(world.combinations())
    images = world.render(world.values(combos))
    for i, (name, readout) in enumerate(world.readouts().items()):
        found = readout(images)
        assert torch.allclose(found, combos[:, i].float(), atol=0.12), name
    # Displaced by a pixel and a half, and half as bright: colour and size stay where they were.
    dark = Shapes2D(color_sep=0.4, size_sep=0.3)
    four = torch.tensor(dark.combinations())
    moved = 0.5 * dark.render(dark.values(four), torch.full((4, 2), 0.8))
    for name, readout in dark.readouts().items():
        straight = readout(dark.render(dark.values(four)))
        assert torch.allclose(readout(moved), straight, atol=0.08), name


def test_the_disc_has_the_area_and_colour_of_its_factors():
    world = Shapes2D(size=40)
    image = world.render(torch.tensor([[0.25, 0.5]]))[0]
    radius = 0.5 * 40 / 2
    assert float(image.sum((1, 2))[2]) == pytest.approx(0.75 * math.pi * radius**2, rel=0.01)
    assert image[:, 20, 20].tolist() == pytest.approx([0.25, 0.0, 0.75], abs=1e-3)
    assert float(image[:, 0].abs().max()) < 1e-3


def test_samples_are_of_the_combinations_asked_for_and_masks_hide_one_factor_there_only():
    world = Shapes2D()
    shapes = world.sample(300, 1)
    assert shapes.combos.unique(dim=0).tolist() == [[0, 0], [0, 1], [1, 0]]
    assert torch.equal(shapes.images, world.sample(300, 1).images)
    hidden = world.sample(300, 1, masked="color", mask=0.5, mask_combos=[(1, 0)])
    gone = (hidden.conditions[:, :3] == 0).all(1)
    assert torch.equal(hidden.images, shapes.images)
    assert 30 < gone.sum() < 70
    assert bool((hidden.combos[gone] == torch.tensor([1, 0])).all())
    assert torch.equal(hidden.conditions[:, 3], shapes.conditions[:, 3])
    assert Shapes2D(background_sep=0.3).combinations(1) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    with pytest.raises(ValueError, match="give a list of combinations such as"):
        world.sample(3, 0, combos=[(0, 2)])
    with pytest.raises(ValueError, match="is no factor"):
        world.sample(3, 0, masked="shape", mask=0.5)
    with pytest.raises(ValueError, match="color_sep=1\\.5"):
        Shapes2D(color_sep=1.5)


def test_the_signal_is_the_distance_of_pictures_and_grows_with_separation():
    world = Shapes2D(color_sep=0.6)
    low, high = (world.values(torch.full((1, 2), one)) for one in (0, 1))
    signal = concept_signal(world.render, low, high)
    swapped = low.clone()
    swapped[:, 0] = high[:, 0]
    assert float(signal[0]) == pytest.approx(float((world.render(swapped) - world.render(low)).norm()), rel=1e-5)
    half = Shapes2D(color_sep=0.3)
    ends = [half.values(torch.full((1, 2), one)) for one in (0, 1)]
    assert float(concept_signal(half.render, *ends)[0]) == pytest.approx(float(signal[0]) / 2, rel=1e-4)
    with pytest.raises(MeasureError, match="want \\(n, concepts\\)"):
        concept_signal(world.render, low, high[0])


# -- traces -----------------------------------------------------------------------------------------------------------


def test_dates_order_and_lead_of_planted_learning():
    steps = list(range(0, 101, 10))
    # a is learned linearly by step 50, b by step 100; the second run is as fast in a and never learns b.
    first = {s: Gains(min(1.0, s / 50), s / 100) for s in steps}
    second = {s: Gains(min(1.0, s / 50), 0.0) for s in steps}
    trace = SPACE.trace([first, second], PROMPTS, held_out=[(1, 1)])
    assert trace.learned("a").runs == pytest.approx((40.0, 40.0))
    assert trace.learned("b").runs == pytest.approx((80.0, math.inf))
    assert trace.order() == ("a", "b")
    assert trace.lead("a", "b").runs == pytest.approx((40.0, math.inf))
    assert trace.path((1, 1), "b")[0].tolist() == pytest.approx([s / 100 for s in steps])
    with pytest.raises(MeasureError, match="was not asked for"):
        trace.path((2, 0))
    with pytest.raises(MeasureError, match="'c' is no concept"):
        trace.learned("c")
    with pytest.raises(MeasureError, match="every combination was held out"):
        SPACE.trace(first, {(1, 1): PROMPTS[1, 1]}, held_out=[(1, 1)]).learned("a")


def _path(points: list[tuple[float, float]], per_leg: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    ends = np.array(points)
    at = np.linspace(0, len(ends) - 1, per_leg * (len(ends) - 1) + 1)
    path = np.stack([np.interp(at, np.arange(len(ends)), ends[:, i]) for i in range(2)], 1)
    return path + noise * np.random.default_rng(seed).standard_normal(path.shape)


def _traced(paths: list[np.ndarray]) -> ConceptTrace:
    return ConceptTrace(np.arange(len(paths[0])) * 10.0, ("a", "b"), {(1, 1): np.array(paths)})


def test_a_planted_turn_is_found_at_its_step_with_its_angle_and_straight_paths_have_none():
    bent = _traced([_path([(0.5, 0), (0, 0.5), (1, 1.5)], 20, 0.01, seed) for seed in range(3)])
    turn = bent.turn((1, 1))
    assert turn.at == pytest.approx(200, abs=25)
    assert turn.angle == pytest.approx(90, abs=12)
    assert turn.low <= turn.at <= turn.high
    assert turn.p <= 0.02
    assert turn.detour > 3 * turn.control
    straight = _traced([_path([(0, 0), (1, 1)], 40, 0.02, seed) for seed in range(3)]).turn((1, 1))
    assert straight.p > 0.05
    assert straight.detour < turn.detour / 4
    still = _traced([np.zeros((10, 2))]).turn((1, 1), permutations=3)
    assert (still.angle, still.detour) == (0, 0)
    with pytest.raises(MeasureError, match="a turn needs 8"):
        bent.turn((1, 1), after=390)


def test_turns_of_wandering_paths_are_called_about_as_often_as_the_level():
    rng = np.random.default_rng(1)
    found = [
        _traced([np.cumsum(0.05 * rng.standard_normal((60, 2)), 0) + 0.02 * np.arange(60)[:, None]])
        .turn((1, 1), permutations=39)
        .p
        for _ in range(40)
    ]
    # 5 % of 40 is 2; five standard deviations above would be 9.
    assert sum(p <= 0.05 for p in found) <= 6


def test_learned_readouts_give_classes_and_scaling_refuses_what_reads_nothing():
    world = Shapes2D()
    shapes, others = world.sample(300, 0, combos=COMBOS), world.sample(60, 1, combos=COMBOS)
    space = ConceptSpace.fit(shapes.images, shapes.combos, world.factors)
    assert float((space.coordinates(others.images) - others.combos).abs().mean()) < 0.15
    assert space.concepts == ("color", "size")
    shifted = ConceptSpace({"a": lambda x: 5 + 3 * x[:, 0]}).scaled(torch.tensor([[0.0], [1.0]]), [[0], [1]])
    assert shifted.coordinates(torch.tensor([[0.5]])).item() == pytest.approx(0.5)
    with pytest.raises(MeasureError, match="for both classes"):
        ConceptSpace({"a": lambda x: 0 * x[:, 0]}).scaled(torch.ones(2, 1), [[0], [1]])
    with pytest.raises(MeasureError, match="no example of class 1"):
        ConceptSpace({"a": lambda x: x[:, 0]}).scaled(torch.ones(2, 1), [[0], [0]])
    with pytest.raises(MeasureError, match="one number for each"):
        ConceptSpace({"a": lambda x: x}).coordinates(torch.ones(2, 3))
    with pytest.raises(MeasureError, match="is no combination"):
        SPACE.trace({0: Gains(1.0, 1.0)}, {(1,): torch.ones(1, 2)})
    with pytest.raises(MeasureError, match="a read-out at least"):
        ConceptSpace({})


# -- elicitation ------------------------------------------------------------------------------------------------------


def test_overprompting_wins_by_the_steps_that_its_strength_is_worth():
    steps = list(range(0, 101, 5))
    runs = [{s: Gains(1.0, s / 100) for s in steps}]
    prompt, mean = PROMPTS[1, 1], torch.zeros(2)
    about = torch.tensor([False, True])
    ways = {"over": OverPrompt(prompt, about, mean, (1.5, 2.0))}
    found = elicit(SPACE, runs, (1, 1), prompt, ways, pushed="b")
    # b is past a half from step 55 on; doubled, from step 30 on.
    assert found.dates["naive"].runs == (55.0,)
    assert found.dates["over"].runs == (30.0,)
    assert found.leads["over"].median == 25.0
    assert found.hidden == pytest.approx(5 / len(steps))
    # Pushed where it breaks the other concept it is no success.
    both = {"over": OverPrompt(prompt, torch.tensor([True, True]), mean, (2.0,))}
    assert elicit(SPACE, runs, (1, 1), prompt, both, pushed="b").dates["over"].censored == 1
    with pytest.raises(MeasureError, match="pushed='c'"):
        elicit(SPACE, runs, (1, 1), prompt, ways, pushed="c")
    with pytest.raises(MeasureError, match="no way was given"):
        elicit(SPACE, runs, (1, 1), prompt, {}, pushed="b")
    with pytest.raises(MeasureError, match="is no combination"):
        elicit(SPACE, runs, (1, 2), prompt, ways, pushed="b")
    with pytest.raises(MeasureError, match="another name"):
        elicit(SPACE, runs, (1, 1), prompt, {"naive": ways["over"]}, pushed="b")


def test_a_latent_push_adds_the_mean_difference_at_the_site_and_leaves_the_module_alone():
    runs = {0: Gains(1.0, 0.3), 1: Gains(1.0, 0.3)}
    high, low = torch.tensor([[0.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert latent_direction(ac.wrap(runs[0]), "module:inner", high, low).tolist() == [0.0, 3.0]
    push = LatentPush(PROMPTS[1, 1], "module:inner", high, low, (0.5,))
    (outputs,) = push(SPACE, runs[0])
    assert outputs.tolist()[0] == pytest.approx([1.0, 0.3 * (1 + 0.5 * 3)])
    found = elicit(SPACE, runs, (1, 1), PROMPTS[1, 1], {"latent": push}, pushed="b")
    assert (found.dates["latent"].at, found.dates["naive"].at) == (0.0, math.inf)
    assert found.leads["latent"].median == math.inf
    assert runs[0](PROMPTS[1, 1]).tolist()[0] == pytest.approx([1.0, 0.3])
    with pytest.raises(MeasureError, match="names 2 sites"):
        latent_direction(ac.wrap(nn.Sequential(nn.Identity(), nn.Identity())), "module:*", high, low)
    with pytest.raises(MeasureError, match="for conditions of 2 entries"):
        overprompt(high, torch.tensor([True]), torch.zeros(1), 2.0)


def test_a_latent_direction_of_texts_is_over_their_tokens_and_not_over_padding():
    model, site = ac.demo(), "blocks.1.resid.post"
    high, low = ["x", "The value of the expression is returned"], ["import os"]
    states = [torch.cat([model.record(text, site)[site][0] for text in texts]) for texts in (high, low)]
    expected = states[0].mean(0) - states[1].mean(0)
    torch.testing.assert_close(latent_direction(model, site, high, low), expected, rtol=1e-4, atol=1e-4)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_runs_may_be_trainings_mappings_or_streams_and_must_agree():
    world = Shapes2D()
    shapes = world.sample(64, 0)
    training = train(
        ShapeDecoder(), (shapes.conditions, shapes.images), 4, batch_size=16, checkpoints=[0, 2, 4],
        loss=lambda net, given, images: (net(given) - images).square().mean(),
    )  # fmt: skip
    space = ConceptSpace(world.readouts())
    prompts = {combo: world.conditions(world.values(torch.tensor([combo]))) for combo in COMBOS}
    whole = space.trace(training, prompts)
    streamed = space.trace(((step, training.at(step)) for step in (0, 2, 4)), prompts)
    assert np.allclose(whole.path((1, 1)), streamed.path((1, 1)))
    assert whole.steps.tolist() == [0, 2, 4]
    with pytest.raises(MeasureError, match="runs of different checkpoints"):
        space.trace([training, {0: training.at(0)}], prompts)
    with pytest.raises(MeasureError, match="rising order"):
        list(walk(iter([(3, None), (2, None)])))
    with pytest.raises(MeasureError, match="without checkpoints"):
        list(walk(Training(nn.Identity(), torch.zeros(0))))
    with pytest.raises(MeasureError, match="no run"):
        over_runs([], lambda module: module)
