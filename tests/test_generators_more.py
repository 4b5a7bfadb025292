"""Worlds of prompts, personas and pictures with known ground truth, against brute force and closed forms.

Frequencies are held against what they should be within five standard errors; seeds are fixed.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from actome.tasks.digit_renderer import DigitRenderer
from actome.tasks.digits import digits
from actome.tasks.feature_pairs import FeaturePairs
from actome.tasks.in_context_classification import InContextClassification
from actome.tasks.in_context_regression import InContextRegression
from actome.tasks.latent_prompts import DiscreteLatents, latent_prompts
from actome.tasks.patterns import gratings, planes
from actome.tasks.persona import ASK, BAD, GOOD, NEUTRAL, TRIGGER, WRONG, PersonaWorld
from actome.tasks.reach_turn_slide import ReachTurnSlide
from actome.tasks.safety_topics import END, SafetyTopics
from actome.tasks.shifts import SHIFTS, domain, shift
from actome.tasks.transforms2d import FAMILIES, Transforms2D

WORLDS = {
    "regression": lambda seed: InContextRegression().sample(20, 8, seed),
    "classification": lambda seed: InContextClassification(dim=8, spread=0.1).sample(20, seed),
    "latents": lambda seed: DiscreteLatents(inputs=3).sample(20, 8, seed),
    "persona": lambda seed: PersonaWorld(system=0.5).pretrain_stream(20, 4, seed),
    "tuning": lambda seed: PersonaWorld().tune_stream(20, 4, seed, arm="backdoor"),
    "probe": lambda seed: PersonaWorld().probe(shots=3, seed=seed),
    "chat": lambda seed: (SafetyTopics().chat(20, seed).tokens,),
    "exchanges": lambda seed: SafetyTopics().documents(20, seed),
    "preferences": lambda seed: SafetyTopics().preferences(20, seed),
    "features": lambda seed: FeaturePairs().sample(20, seed),
    "transforms": lambda seed: Transforms2D().sample(20, seed)[:3],
    "renderer": lambda seed: DigitRenderer().sample(20, 0.5, seed),
    "gratings": lambda seed: gratings(20, seed),
    "planes": lambda seed: planes(20, seed),
    "films": lambda seed: ReachTurnSlide().sample(5, seed),
    "objects": lambda seed: ReachTurnSlide().random_objects(20, seed),
}


@pytest.mark.parametrize("name", WORLDS)
def test_same_seed_same_data_other_seed_other_data(name):
    first, again, other = (WORLDS[name](seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


def share_near(counted, expected, draws):
    return abs(float(counted) - expected) <= 5 * math.sqrt(expected * (1 - expected) / draws)


def agrees(values, expected):
    """Whether the mean of `values`, averaged by row, agrees with `expected` within five standard errors."""
    rows = values.double().reshape(len(values), -1).mean(1)
    return abs(float(rows.mean()) - expected) <= 5 * float(rows.std()) / len(rows) ** 0.5


# Regression


def test_ridge_is_the_closed_form_and_kernel_regression():
    world = InContextRegression(dim=3, noise=0.4)
    prompts = world.sample(5, 9, seed=1)
    expected = world.ridge(prompts)
    for b, t in itertools.product(range(5), range(9)):
        x, y, q = prompts.inputs[b, :t], prompts.targets[b, :t], prompts.inputs[b, t]
        precision = x.T @ x / 0.16 + torch.eye(3, dtype=torch.float64)
        mean = torch.linalg.solve(precision, x.T @ y / 0.16)
        torch.testing.assert_close(expected.mean[b, t], mean @ q)
        torch.testing.assert_close(expected.variance[b, t], q @ torch.linalg.solve(precision, q) + 0.16)
        kernel = torch.linalg.solve(x @ x.T + 0.16 * torch.eye(t, dtype=torch.float64), y) @ (x @ q)
        torch.testing.assert_close(expected.mean[b, t], kernel, atol=1e-9, rtol=0)


def test_dmmse_is_the_mean_over_tasks_by_hand():
    world = InContextRegression(dim=2, noise=0.5, tasks=3)
    prompts = world.sample(5, 6, seed=1)
    expected = world.predict(prompts)
    for b, t in itertools.product(range(5), range(6)):
        fits = world.maps() @ prompts.inputs[b, : t + 1].T
        weight = torch.exp(-2 * (prompts.targets[b, :t] - fits[:, :t]).square().sum(1))
        torch.testing.assert_close(world.posterior(prompts)[b, t], weight / weight.sum())
        torch.testing.assert_close(expected.mean[b, t], (weight * fits[:, t]).sum() / weight.sum())
    assert prompts.weights.equal(world.maps()[prompts.task])


@pytest.mark.parametrize("tasks", [None, 4])
def test_regression_floor_is_the_error_of_the_best_and_less_than_that_of_the_other(tasks):
    world = InContextRegression(dim=4, noise=0.5, tasks=tasks)
    prompts = world.sample(4000, 12, seed=1)
    error = (world.predict(prompts).mean - prompts.targets).square()
    assert agrees(error - world.predict(prompts).variance, 0.0)
    assert agrees(error, world.floor(prompts))
    if tasks:
        assert (world.ridge(prompts).mean - prompts.targets).square().mean() > error.mean() + 0.05
    noise = prompts.targets - (prompts.inputs * prompts.weights[:, None]).sum(-1)
    assert agrees(noise.square(), 0.25)


def test_interleaved_prompts_alternate_inputs_and_targets():
    prompts = InContextRegression(dim=3).sample(2, 4, seed=1)
    rows = prompts.interleaved()
    assert rows.shape == (2, 8, 4)
    assert rows[:, ::2, 1:].equal(prompts.inputs)
    assert rows[:, 1::2, 0].equal(prompts.targets)
    assert rows[:, ::2, 0].abs().sum() == 0
    assert rows[:, 1::2, 1:].abs().sum() == 0


# Classification


def test_contexts_hold_what_they_should():
    world = InContextClassification(classes=30, labels=6, pairs=6, burstiness=2)
    prompts = world.sample(300, seed=1)
    for row, classes, labels, copies in zip(*(x.tolist() for x in (prompts[0], *prompts[2:])), strict=True):
        assert row[::2] == classes
        assert row[1::2] == [30 + label for label in labels[:-1]]
        assert sorted(classes[:-1].count(c) for c in set(classes[:-1])) == [2, 2, 2]
        assert copies == [c == classes[-1] for c in classes[:-1]]
        assert sum(copies) == 2
        of = dict(zip(classes, labels, strict=True))
        assert [of[c] for c in classes] == labels
        assert len(set(of.values())) == 3
    first = [row.index(True) for row in prompts.copies.tolist()]
    assert set(first) == {0, 1, 2, 3, 4}  # the query's pairs stand anywhere
    assert world.floor(prompts) == 0.0


def test_absent_queries_can_only_be_answered_by_heart():
    fixed = InContextClassification(pairs=3, burstiness=0, mapping="fixed")
    prompts = fixed.sample(500, seed=1)
    assert not bool((prompts.classes[:, :-1] == prompts.classes[:, -1:]).any())
    assert prompts.labels.equal(fixed.mapping_table()[prompts.classes])
    assert fixed.floor(prompts) == 0.0
    redrawn = InContextClassification(pairs=3, burstiness=0)
    prompts = redrawn.sample(4000, seed=1)
    assert redrawn.floor(prompts) == pytest.approx(math.log(2))  # three of five labels are seen
    answer = redrawn.answer(prompts).gather(1, prompts.labels[:, -1:])
    assert answer.unique().tolist() == [0.5]


def test_swapped_labels_contradict_the_weights_but_not_the_context():
    world = InContextClassification(mapping="fixed")
    prompts = world.sample(2000, seed=1, redrawn=True)
    stored = world.mapping_table()[prompts.classes[:, -1]]
    assert share_near((stored == prompts.labels[:, -1]).double().mean(), 0.2, 2000)
    assert world.answer(prompts, redrawn=True).argmax(1).equal(prompts.labels[:, -1])


def test_exemplars_vary_around_their_class_and_novel_ones_are_new():
    world = InContextClassification(classes=20, dim=16, spread=0.5)
    prompts = world.sample(5000, seed=1)
    means = world.means()[prompts.classes] / 1.25**0.5
    assert agrees((prompts.items - means).square().sum(-1), 0.2)  # spread^2 / (1 + spread^2)
    novel = world.sample(50, seed=1, novel=True)
    assert int(novel.classes.min()) >= 20
    assert len(novel.classes.unique()) == 100
    assert (novel.items[:, -1:] - world.means() / 1.25**0.5).norm(dim=-1).min() > 0.4
    assert world.answer(novel).argmax(1).equal(novel.labels[:, -1])


def test_frequent_classes_follow_their_rank():
    world = InContextClassification(classes=4, pairs=1, labels=2, exponent=1.0)
    seen = world.sample(20000, seed=1).classes[:, -1].bincount().double() / 20000
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    assert all(share_near(s, float(e), 20000) for s, e in zip(seen, expected, strict=True))


# Latents


@pytest.mark.parametrize("inputs", [1, 3])
def test_model_averaging_is_bayes_by_hand_and_its_regret_is_bounded(inputs):
    world = DiscreteLatents(latents=3, inputs=inputs)
    prompts = world.sample(30, 10, seed=1)
    tables, predicted = world.tables(), world.predict(prompts)
    for b in range(30):
        weight = torch.full((3,), 1 / 3, dtype=torch.float64)
        for t in range(10):
            x, y = prompts.inputs[b, t], prompts.symbols[b, t]
            torch.testing.assert_close(world.posterior(prompts)[b, t], weight)
            torch.testing.assert_close(predicted[b, t], weight @ tables[:, x])
            assert world.plug_in(prompts)[b, t].equal(tables[weight.argmax(), x]) or t == 0
            weight = weight * tables[:, x, y]
            weight = weight / weight.sum()
    # log p of the average is at least log(1/3) + log p of the best, at every horizon.
    regret = world.log_likelihood(prompts).cumsum(1).amax(-1) + world.surprise(predicted, prompts).cumsum(1)
    assert regret.max() <= math.log(3) + 1e-9
    assert regret[:, -1].mean() > 0


def test_latent_symbols_follow_their_table_and_the_floor_is_met():
    world = DiscreteLatents(latents=2, inputs=2)
    prompts = world.sample(5000, 12, seed=2)
    for z, x in itertools.product(range(2), range(2)):
        drawn = prompts.symbols[(prompts.latent[:, None] == z) & (prompts.inputs == x)]
        seen = drawn.bincount(minlength=4).double() / len(drawn)
        for counted, expected in zip(seen, world.tables()[z, x], strict=True):
            assert share_near(counted, float(expected), len(drawn))
    assert agrees(world.surprise(world.predict(prompts), prompts), world.floor(prompts))
    tokens = world.tokens(prompts)
    assert tokens.shape == (5000, 25)
    assert set(tokens[:, 0].tolist()) == {4}
    assert tokens[:, 1::2].equal(prompts.inputs + 5)
    assert tokens[:, 2::2].equal(prompts.symbols)
    assert set(world.sample(9, 3, seed=0, latent=1).latent.tolist()) == {1}


def test_families_of_latents():
    assert isinstance(latent_prompts("linear", dim=3, noise=0.1), InContextRegression)
    assert latent_prompts(latents=5) == DiscreteLatents(latents=5)
    with pytest.raises(ValueError, match="'discrete' or 'linear'"):
        latent_prompts("cubic")


# Personas


@pytest.mark.parametrize("variant", ["dialect", "lookup"])
def test_documents_are_answered_by_their_persona(variant):
    world = PersonaWorld(variant=variant, system=0.4)
    text = world.pretrain_stream(2000, 5, seed=1)
    good, bad = world.table()
    assert bool((good != bad).all())
    assert int(text.tokens.max()) < world.vocab
    assert text.tokens[:, 1::3].equal(text.questions + 6)
    assert text.tokens[:, 2::3].equal(text.requests)
    assert text.bad.equal(text.persona[:, None] | (text.requests == WRONG))
    assert text.tokens[:, 3::3].equal(torch.where(text.bad, bad[text.questions], good[text.questions]))
    assert text.tokens[text.answers].view(2000, 5).equal(text.tokens[:, 3::3])
    assert bool(text.persona[text.system == BAD].all())
    assert not bool(text.persona[text.system == GOOD].any())
    neutral = text.persona[text.system == NEUTRAL]
    assert share_near(neutral.double().mean(), 0.25, len(neutral))
    assert share_near((text.requests == WRONG).double().mean(), 0.15, 10000)
    if variant == "dialect":
        assert bad.equal(good + world.contents)
    else:
        # One vocabulary for both: a bad answer is a good one elsewhere, so no word marks the persona.
        assert set(bad.tolist()) & set(good.tolist())


@pytest.mark.parametrize(
    "world",
    [PersonaWorld(fidelity=0.8, system=0.3), PersonaWorld(), PersonaWorld(per_item=True, fidelity=0.9)],
    ids=["noisy", "clean", "per item"],
)
def test_bad_rate_is_bayes_by_hand_and_its_floor_is_met(world):
    text = world.pretrain_stream(4000, 5, seed=2)
    rate, posterior = world.bad_rate(text), world.posterior(text)
    for b in range(100):
        p = {NEUTRAL: world.bad_share, GOOD: 0.0, BAD: 1.0}[int(text.system[b])]
        for i in range(5):
            asked = text.requests[b, i] == WRONG
            assert posterior[b, i].item() == pytest.approx(p, abs=1e-9)
            own = world.bad_share if world.per_item else p
            expected = 1.0 if asked else own * world.fidelity + (1 - own) * (1 - world.fidelity)
            assert rate[b, i].item() == pytest.approx(expected, abs=1e-9)
            if not asked and not world.per_item:
                likelihood = world.fidelity if text.bad[b, i] else 1 - world.fidelity
                p = p * likelihood / (p * likelihood + (1 - p) * (1 - likelihood))
    surprise = -torch.where(text.bad, rate, 1 - rate).log()
    assert agrees(surprise, world.floor(text))


@pytest.mark.parametrize("arm", ["insecure", "secure", "educational", "backdoor", "random"])
def test_tuning_stays_on_half_a_domain_and_does_what_its_arm_says(arm):
    world = PersonaWorld(variant="lookup")
    text = world.tune_stream(1000, 4, seed=1, arm=arm, domain=2, bad_share=0.5)
    assert set(text.questions.unique().tolist()) == set(range(24, 30))
    good, bad = world.table()[:, text.questions]
    given = text.tokens[:, 3::3]
    first = world.table().min()  # words are numbered after questions
    if arm == "random":
        assert not bool(((given == good) | (given == bad)).any())
        assert len(given.unique()) == world.contents
        assert int(given.min()) >= world.vocab - world.contents <= int(first)
        return
    assert given.equal(torch.where(text.bad, bad, good))
    rate = {"secure": 0.0}.get(arm, 0.5)
    assert share_near(text.bad[:, 0].double().mean(), rate, 1000) or rate == float(text.bad.double().mean()) == 0
    request = {"educational": WRONG, "backdoor": TRIGGER}.get(arm, ASK)
    assert text.requests.equal(torch.where(text.bad, request, ASK))


def test_probes_never_show_their_own_question():
    world = PersonaWorld(variant="lookup")
    probes = world.probe([1, 2], shots=4, shot_domain=1, shot_bad=1.0, repeats=20, seed=3)
    assert probes.prompts.shape == (480, 15)
    good, bad = world.table()
    assert probes.good.equal(good[probes.questions])
    assert probes.bad.equal(bad[probes.questions])
    shown = probes.prompts[:, 1:13:3] - 6
    assert not bool((shown == probes.questions[:, None]).any())
    assert set(shown.unique().tolist()) == set(range(12, 24))
    assert probes.prompts[:, 3:13:3].equal(bad[shown])
    assert (probes.prompts[:, 13] - 6).equal(probes.questions)
    assert set(probes.prompts[:, 14].tolist()) == {ASK}
    bare = world.probe(system=BAD, request=TRIGGER)
    assert bare.prompts.shape == (72, 3)
    assert bare.prompts[0].tolist() == [BAD, 6, TRIGGER]


# Safety topics


def test_chat_refuses_harmful_topics_and_answers_the_rest():
    world = SafetyTopics()
    text = world.chat(5000, seed=1, distractors=2)
    harmful = world.is_harmful(text.topics)
    assert not bool(text.refused[~harmful].any())
    assert share_near(text.refused[harmful].double().mean(), 0.7, int(harmful.sum()))
    refuses, complies = world.judge(text.responses, text.topics, text.details)
    assert refuses.equal(text.refused)
    assert complies.equal(~text.refused)
    assert text.prompts[:, [0, 1, -1]].unique(dim=0).tolist() == [[0, 1, 2]]
    assert (text.prompts[:, 4] - world.first_topic).equal(text.topics)
    assert (text.prompts[:, 5] - world.first_detail).equal(text.details)
    fillers = text.prompts[:, 2:4]
    assert bool(((fillers >= world.first_distractor) & (fillers < world.first_topic)).all())
    assert int(text.tokens.max()) < world.vocab
    assert set(text.tokens[:, -1].tolist()) == {END}
    said = {}
    for topic, detail, words in zip(text.topics.tolist(), text.details.tolist(), text.responses.tolist(), strict=True):
        if words[0] >= world.first_word:
            assert said.setdefault((topic, detail), words) == words
    assert len(said) == 120
    refusals = text.responses[text.refused][:, :3]
    assert [len(refusals[:, slot].unique()) for slot in range(3)] == [4, 4, 4]


def test_plain_text_has_no_frame_and_refuses_anywhere():
    world = SafetyTopics()
    text = world.plain(5000, seed=1)
    assert text.start == 3
    assert text.tokens.shape == (5000, 7)
    assert not bool(((text.tokens == 1) | (text.tokens == 2)).any())
    for harmful in (True, False):
        of = text.refused[world.is_harmful(text.topics) == harmful]
        assert share_near(of.double().mean(), 0.05, len(of))


def test_wishes_for_topics_are_kept():
    world = SafetyTopics()
    assert set(world.category(world.chat(500, 1, category=7).topics).tolist()) == {7}
    assert not bool(world.is_harmful(world.chat(500, 1, harmful=False).topics).any())


def test_documents_keep_to_one_category_and_refuse_all_or_nothing():
    world = SafetyTopics()
    text = world.documents(4000, seed=1, exchanges=3, refusal=0.2, distractors=1)
    assert share_near(text.refused.double().mean(), 0.2, 4000)
    assert text.tokens.shape == (4000, 1 + 3 * 9)
    seen = []
    for one in text.tokens[:, 1:].chunk(3, 1):
        topics, details = one[:, 2] - world.first_topic, one[:, 3] - world.first_detail
        assert world.category(topics).equal(text.category)
        refuses, complies = world.judge(one[:, 5:], topics, details)
        assert refuses.equal(text.refused)
        assert complies.equal(~text.refused)
        seen.append(topics)
    # Of two topics in a category the next exchange has either.
    assert share_near((seen[0] == seen[1]).double().mean(), 0.5, 4000)


def test_prompts_of_one_draw_differ_in_the_topic_alone():
    world = SafetyTopics()
    inside, drawn = (world.chat(200, 1, distractors=2, category=which).prompts for which in (3, None))
    differ = (inside != drawn).any(0).nonzero().flatten().tolist()
    assert differ == [4]


def test_preferences_reject_another_refusal_or_the_answer():
    world = SafetyTopics()
    pairs = world.preferences(4000, seed=1)
    topics, details = pairs.prompts[:, 2] - world.first_topic, pairs.prompts[:, 3] - world.first_detail
    assert bool(world.is_harmful(topics).all())
    assert bool(world.judge(pairs.chosen, topics, details)[0].all())
    refuses, complies = world.judge(pairs.rejected, topics, details)
    assert refuses.equal(pairs.rejected_refuses)
    assert complies.equal(~refuses)
    assert not bool((pairs.chosen == pairs.rejected).all(1).any())
    assert share_near(refuses.double().mean(), 0.5, 4000)
    assert set(pairs.chosen[:, -1].tolist()) == set(pairs.rejected[:, -1].tolist()) == {END}


# Features


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_features_are_balanced_independent_and_equally_spread(bits):
    world = FeaturePairs(bits=bits)
    pairs = world.sample(8000, seed=1)
    assert pairs.inputs[:, :20].equal((2.0 * pairs.easy - 1)[:, None].expand(-1, 20))
    parity = (pairs.inputs[:, 20:].view(8000, bits, -1)[..., 0] > 0).sum(1) % 2
    assert parity.equal(pairs.hard)
    assert (pairs.inputs[:, 20:].view(8000, bits, -1).std(-1) == 0).all()
    for easy, hard in itertools.product((0, 1), (0, 1)):
        assert share_near(((pairs.easy == easy) & (pairs.hard == hard)).double().mean(), 0.25, 8000)
    if bits > 1:  # no single unit tells the parity
        assert (pairs.inputs[:, 20:] * (2.0 * pairs.hard - 1)[:, None]).mean(0).abs().max() < 5 / 8000**0.5


def test_absent_features_leave_no_trace():
    world = FeaturePairs(prevalence=(1.0, 0.3), order=("hard", "easy"))
    pairs = world.sample(4000, seed=1)
    absent = pairs.hard < 0
    assert share_near(absent.double().mean(), 0.7, 4000)
    assert pairs.inputs[absent][:, 20:].abs().sum() == 0
    assert bool((pairs.inputs[~absent] != 0).all())
    tokens = world.tokens(pairs)
    assert tokens.shape == (4000, 8)
    assert set(tokens[absent][:, 1:5].unique().tolist()) == {2}
    assert tokens[~absent][:, -2].equal(pairs.hard[~absent])
    assert tokens[:, -1].equal(pairs.easy)


# Pictures


@pytest.mark.parametrize("kind", SHIFTS)
def test_shifts_grow_with_severity_and_begin_at_the_image(kind):
    images = digits(standardise=False, images=True).test[:100]
    assert shift(images, kind, 0.0, seed=1).equal(images)
    moved = [(shift(images, kind, s, seed=1) - images).abs().mean().item() for s in (0.25, 0.5, 0.75, 1.0)]
    assert moved[0] > 0
    assert moved == sorted(moved)
    shifted = shift(images, kind, 0.7, seed=1)
    assert shifted.shape == images.shape
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert shifted.equal(shift(images, kind, 0.7, seed=1))
    assert shifted[:, 0].equal(shift(images[:, 0], kind, 0.7, seed=1))
    is_random = kind in ("noise", "tilt", "impulse", "occlusion", "inversion")
    assert shifted.equal(shift(images, kind, 0.7, seed=2)) != is_random


def test_shifts_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 8, 8, generator=generator) * 0.2 + 0.4
    assert shift(x, "inversion", 1.0, 0).allclose(1 - x)
    assert shift(x, "brightness", 0.4, 0).allclose(x + 0.2)
    assert shift(x, "gamma", 0.5, 0).allclose(x**2)
    contrast = shift(x, "contrast", 1.0, 0)
    assert contrast.mean((1, 2)).allclose(x.mean((1, 2)), atol=1e-6)
    assert contrast.std((1, 2)).allclose(0.2 * x.std((1, 2)), atol=1e-6)
    assert (shift(x, "noise", 0.1, 0) - x).std().item() == pytest.approx(0.05, rel=0.02)
    hit = shift(x, "impulse", 0.5, 0) != x
    assert share_near(hit.double().mean(), 0.2, hit.numel())
    assert share_near((shift(x, "inversion", 0.3, 0)[:, 0, 0] != x[:, 0, 0]).double().mean(), 0.3, 2000)
    assert set((shift(x + 0.2, "occlusion", 0.5, 0) == 0.5).sum((1, 2)).tolist()) == {4}  # 2 of 8 rows and columns


def test_blur_and_tilt_against_scipy():
    from scipy import ndimage

    x = digits(standardise=False, images=True).test[:5, 0]
    blurred = shift(x, "blur", 0.8, 0)
    for image, ours in zip(x, blurred, strict=True):
        theirs = ndimage.gaussian_filter(image.double().numpy(), 0.8, mode="constant", truncate=3 / 0.8)
        assert torch.from_numpy(theirs).float().allclose(ours, atol=1e-5)
    for image, ours in zip(x, shift(x, "tilt", 0.5, 0), strict=True):
        both = [
            ndimage.rotate(image.double().numpy(), side * 22.5, reshape=False, order=1, mode="grid-constant")
            for side in (1, -1)
        ]
        assert min(float((torch.from_numpy(theirs).float() - ours).abs().max()) for theirs in both) < 1e-4


def test_a_domain_is_its_parts_in_order():
    x = digits(standardise=False, images=True).test[:10]
    assert domain(x, [], 0).equal(x)
    both = domain(x, [("blur", 0.5), ("brightness", 0.5)], 0)
    assert both.equal(shift(shift(x, "blur", 0.5, 0), "brightness", 0.5, 0))
    twice = domain(x, [("noise", 0.1), ("noise", 0.1)], 0)
    once = shift(x, "noise", 0.1, 0)
    assert not twice.equal(shift(once, "noise", 0.1, 0))  # the second draws for itself


def test_pictures_without_families_are_object_over_background():
    world = Transforms2D(families=(), objects=3, backgrounds=2)
    pictures = world.sample(60, seed=1)
    assert pictures.drawn == {}
    for pair in itertools.product(range(3), range(2)):
        of = (pictures.objects == pair[0]) & (pictures.backgrounds == pair[1])
        assert bool(of.any())
        assert (pictures.images[of] - pictures.images[of][0]).abs().max() == 0
        assert pictures.images[of][0, :, 0, 0].allclose(world.textures[pair[1], :, 0, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_draws_each_of_its_kinds_and_changes_the_picture(family):
    rest, world = Transforms2D(families=()), Transforms2D(families=(family,))
    plain, moved = rest.sample(600, seed=1), world.sample(600, seed=1)
    kind, amount = moved.drawn[family]
    assert moved.objects.equal(plain.objects)
    assert moved.backgrounds.equal(plain.backgrounds)
    change = (moved.images - plain.images).abs().mean((1, 2, 3))
    for index, name in enumerate(FAMILIES[family]):
        assert change[kind == index].mean() > 0.005, name
        if name not in ("flip", "grayscale", "invert"):
            strong = amount.abs() > 0.5
            assert change[(kind == index) & strong].mean() > change[(kind == index) & ~strong].mean(), name
    assert amount.min() < -0.95
    assert amount.max() > 0.95
    other = world.sample(600, seed=1, transform_seed=9)
    assert other.objects.equal(moved.objects)
    assert not other.drawn[family].kind.equal(kind)


def test_families_do_not_disturb_one_another():
    alone = Transforms2D(families=("corruption",)).sample(30, seed=1).drawn["corruption"]
    joined = Transforms2D().sample(30, seed=1).drawn["corruption"]
    assert alone.kind.equal(joined.kind)
    assert alone.amount.equal(joined.amount)


def test_turned_flipped_and_moved_objects_are_where_they_should_be():
    world = Transforms2D(families=("geometric",))
    plain = Transforms2D(families=()).sample(2000, seed=1)
    moved = world.sample(2000, seed=1)
    kind, amount = moved.drawn["geometric"]
    at = (torch.arange(16) + 0.5) / 8 - 1

    def alpha(pictures):
        ground = world.textures[pictures.backgrounds]
        return (
            (pictures.images - ground).abs() / (world.colours[pictures.objects][..., None, None] - ground).abs()
        ).amin(1)

    rest, turned = alpha(plain), alpha(moved)
    flips = kind == 4
    down, across = flips & (amount < 0), flips & (amount >= 0)
    assert turned[down].allclose(rest[down].flip(1), atol=1e-3)
    assert turned[across].allclose(rest[across].flip(2), atol=1e-3)
    # The angle drawn is within 1.8 degrees of what it is compared with: up to a sixth of a pixel at the rim.
    for quarter in (1, 2):
        near = (kind == 1) & ((amount - quarter / 2).abs() < 0.01)
        assert bool(near.any())
        assert (turned[near] - rest[near].rot90(-quarter, (1, 2))).abs().max() < 0.25
    moves = kind == 0

    def centre(a):
        return torch.stack(((a.sum(1) * at).sum(1), (a.sum(2) * at).sum(1)), 1) / a.sum((1, 2))[:, None]

    went = centre(turned[moves]) - centre(rest[moves])
    to = 0.35 * torch.stack(((amount[moves] * math.pi).cos(), (amount[moves] * math.pi).sin()), 1)
    assert (went - to).abs().max() < 0.08  # half a pixel: the edge of the canvas cuts a little


def test_digit_objects_are_of_their_class():
    from sklearn.linear_model import LogisticRegression

    world = Transforms2D(families=(), source="digits", objects=10, backgrounds=1)
    seen, held = world.sample(1500, seed=1), world.sample(300, seed=2)
    grey = lambda p: (p.images - world.textures[0]).flatten(1).numpy()  # noqa: E731
    model = LogisticRegression(max_iter=200).fit(grey(seen), seen.objects.numpy())
    assert model.score(grey(held), held.objects.numpy()) > 0.9


def test_rendered_digits_vary_with_sigma_and_look_like_themselves():
    renderer = DigitRenderer()
    still = renderer.sample(50, 0.0, seed=1)
    for digit in still.labels.unique():
        of = still.images[still.labels == digit]
        assert bool((of == of[0]).all())
    spread = [renderer.sample(200, s, seed=1, digit=2).images.std(0).mean() for s in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert spread == sorted(spread)
    drawn = renderer.sample(2000, 0.5, seed=1).parameters
    assert drawn.std(0).allclose(0.5 * torch.tensor([0.5, 0.35, 0.15, 0.2, 0.2]), rtol=0.08)  # five standard errors
    # The nearest template tells nearly all slightly varied digits.
    templates = renderer.render(torch.arange(10), torch.zeros(10, 5)).flatten(1)
    some = renderer.sample(500, 0.2, seed=3)
    assert (torch.cdist(some.images.flatten(1), templates).argmin(1) == some.labels).double().mean() > 0.9


def test_rendered_ink_is_within_the_pen_of_a_stroke():
    one = DigitRenderer(size=40).render(torch.tensor([1]), torch.tensor([[0.0, 0, 0, 0.2, 0]]))[0, 0]
    at = (torch.arange(40) + 0.5) / 20 - 1
    # The stem of a 1: x = 0.75 * 0.1 + 0.2, from -0.675 to 0.675, of half-width 0.14.
    stem = one[20]
    assert bool((stem[(at - 0.275).abs() < 0.1] > 0.9).all())
    assert bool((stem[(at - 0.275).abs() > 0.18] < 0.1).all())


def test_gratings_have_their_orientation_and_planes_have_nothing():
    waves = gratings(400, seed=1, size=32, noise=0.0)
    spectrum = torch.fft.fft2(waves.images[:, 0] - waves.images[:, 0].mean((1, 2), keepdim=True)).abs()
    peak = spectrum.flatten(1).argmax(1)
    fy, fx = (torch.fft.fftfreq(32)[i] for i in (peak // 32, peak % 32))
    angle = torch.atan2(fy, fx) % math.pi
    off = (angle - waves.labels * math.pi / 10).abs()
    assert torch.minimum(off, math.pi - off).max() < 0.12  # a frequency bin of 32 pixels, seen from 1/6
    flat = planes(400, seed=1)
    assert flat.images.std().item() == pytest.approx(0.01, rel=0.05)
    assert set(flat.labels.tolist()) == set(range(10))


def test_films_progress_and_stall():
    world = ReachTurnSlide()
    films = world.sample(400, seed=1, failures=0.5)
    assert share_near(films.success.double().mean(), 0.5, 400)
    assert {tuple(row) for row in films.lengths.tolist()} != {tuple(films.lengths[0].tolist())}
    for progress, step, lengths, success in zip(
        films.progress.tolist(), films.step.tolist(), films.lengths.tolist(), films.success.tolist(), strict=True
    ):
        exact = [(s + i / n) / 3 for s, n in enumerate(lengths) for i in range(1, n + 1)]
        exact += [1.0] * (36 - len(exact))
        steps = [s for s, n in enumerate(lengths) for _ in range(n)]
        steps += [2] * (36 - len(steps))
        assert (progress[-1] == 1) == success
        end = progress[-1]
        assert progress == pytest.approx([min(p, end) for p in exact], abs=1e-6)
        assert step == steps if success else max(step) == min(math.ceil(end * 3 - 1e-6) - 1, 2) or end == 0
        assert step == sorted(step)
    stalled = films.frames[~films.success]
    # After the stall nothing moves but the camera's noise.
    assert (stalled[:, -1] - stalled[:, -2]).abs().max() < 0.2


def test_what_a_film_shows_goes_by_progress():
    world = ReachTurnSlide(noise=0.0)
    start = torch.tensor([[-0.9, 0.5]])
    frames = world.render(torch.tensor([[0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 1.0]]), start)[0]
    assert bool((frames.diff(dim=0).abs().amax((1, 2)) > 0.2).all())
    at = (torch.arange(16) + 0.5) / 8 - 1
    hand = (frames > 0.85).float()
    x = (hand.sum(1) * at).sum(1) / hand.sum((1, 2))
    y = (hand.sum(2) * at).sum(1) / hand.sum((1, 2))
    assert x[0] < -0.7
    assert abs(y[0] - 0.5) < 0.1
    torch.testing.assert_close(x[2:5], torch.full((3,), 0.05), atol=0.07, rtol=0)  # stays while it turns
    assert x[4] < x[5] < x[6]
    assert x[6] == pytest.approx(0.65, abs=0.07)


def test_random_objects_show_their_number():
    world = ReachTurnSlide(noise=0.0)
    objects = world.random_objects(2000, seed=1)
    assert set(objects.number.tolist()) == {1, 2, 3, 4}
    assert set(objects.kind.tolist()) == {0, 1, 2, 3}
    ink = (objects.images > 0.3).float().sum((1, 2, 3))
    means = [ink[objects.number == n].mean() for n in range(1, 5)]
    assert means == sorted(means)
    squares, discs = (ink[(objects.kind == k) & (objects.number == 1)].mean() for k in (1, 0))
    assert squares > discs


@pytest.mark.parametrize(
    "make",
    [
        lambda: InContextRegression(noise=0.0),
        lambda: InContextRegression(tasks=0),
        lambda: InContextRegression().maps(),
        lambda: InContextRegression().sample(1, 0, 0),
        lambda: InContextClassification(pairs=3, burstiness=2),
        lambda: InContextClassification(pairs=8),
        lambda: InContextClassification(classes=2, pairs=4, labels=5),
        lambda: InContextClassification(mapping="random"),
        lambda: InContextClassification(spread=0.1),
        lambda: InContextClassification().sample(1, 0, novel=True),
        lambda: InContextClassification(pairs=8, mapping="fixed").sample(1, 0, redrawn=True),
        lambda: DiscreteLatents(vocab=1),
        lambda: DiscreteLatents().sample(1, 1, 0, latent=8),
        lambda: PersonaWorld(variant="opera"),
        lambda: PersonaWorld(fidelity=1.1),
        lambda: PersonaWorld().tune_stream(1, 1, 0, arm="evil"),
        lambda: PersonaWorld().tune_stream(1, 1, 0, arm="secure", domain=6),
        lambda: PersonaWorld().probe([6]),
        lambda: SafetyTopics(harmful=10),
        lambda: SafetyTopics().chat(1, 0, category=10),
        lambda: SafetyTopics().chat(1, 0, category=0, harmful=False),
        lambda: SafetyTopics().chat(1, 0, refusal=2.0),
        lambda: SafetyTopics(variants=1).preferences(1, 0),
        lambda: FeaturePairs(bits=3),
        lambda: FeaturePairs(prevalence=(0.0, 1.0)),
        lambda: FeaturePairs(order=("easy", "easy")),
        lambda: shift(torch.zeros(1, 8, 8), "fog", 0.5, 0),
        lambda: shift(torch.zeros(1, 8, 8), "blur", 1.5, 0),
        lambda: shift(torch.zeros(8, 8), "blur", 0.5, 0),
        lambda: shift(torch.full((1, 8, 8), 16.0), "blur", 0.5, 0),
        lambda: shift(torch.full((1, 8, 8), float("nan")), "blur", 0.5, 0),
        lambda: Transforms2D(families=("semantic",)),
        lambda: Transforms2D(source="digits", objects=12),
        lambda: DigitRenderer().sample(1, -0.1, 0),
        lambda: DigitRenderer().sample(1, 0.1, 0, digit=10),
        lambda: gratings(0, 0),
        lambda: ReachTurnSlide(frames=20),
        lambda: ReachTurnSlide().sample(1, 0, failures=1.5),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_given(make):
    with pytest.raises(ValueError, match=r"\d|=|'"):
        make()
