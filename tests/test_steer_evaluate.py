"""Evaluation: dose and response, placings, controls and recommendations, on a persona that was planted."""

import personas
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError, TextError
from actome.measures import ngram_repetition
from actome.steer import (
    ActivationTransport,
    Choices,
    Contrast,
    EntropicClamp,
    Examples,
    ExpertTuner,
    Pairs,
    Similar,
    accuracy,
    evaluate,
    interference,
    preference_utility,
)
from actome.steer.likelihood import response_nll
from actome.steer.placing import while_generating


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", name="persona")
def persona_():
    return personas.persona()


def test_evaluation_tells_the_fitted_direction_from_chance(persona):
    model, examples, pairs, _ = persona
    estimator = Contrast("blocks.*.resid.post")
    clamp = estimator.fit(model, examples).to("blocks.1.resid.post")
    options = {"strengths": (-1, 0.5, 1, 4), "random": 3, "shuffled": 2, "estimator": estimator, "data": examples}
    found = evaluate(model, clamp, pairs, new_tokens=0, **options)
    assert (found.site, found.strength is not None) == ("blocks.1.resid.post", True)
    low = found.held_out["gain"][1]
    assert low > max(found.held_out["random_gains"]) + 1
    wrong = found.curve("preference", arm="shuffled").set_index("strength")
    fitted = found.curve("preference").set_index("strength")
    assert fitted.value[1.0] - fitted.value[0.0] > 2 * (wrong.high[1.0] - wrong.value[0.0]) + 1
    off = found.curve("off_manifold").set_index("strength").value
    assert off[4.0] > off[1.0] > off[0.0]
    again = evaluate(model, clamp, pairs, new_tokens=0, **options)
    assert again.frame.equals(found.frame)


def test_a_sweep_over_sites_recommends_one_of_them(persona):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.*.resid.post").fit(model, examples)
    sites = list(clamp.directions)
    found = evaluate(model, clamp, pairs, sites=sites, strengths=(1,), random=1, new_tokens=0)
    assert set(found.frame["site"]) == set(sites)
    gains = {site: found.curve("preference", site=site).value.diff().iloc[-1] for site in sites}
    assert found.site == max(gains, key=gains.get)
    with pytest.raises(MeasureError, match="was not fitted at"):
        evaluate(model, clamp, pairs, sites=["embed"])


def test_a_direction_that_does_nothing_is_not_recommended(persona):
    model, _, pairs, _ = persona
    found = evaluate(model, ac.Add("blocks.1.resid.post", 1e-4 * drawn(4, 64)), pairs, strengths=(1,), new_tokens=0)
    assert found.site is None
    assert "controls raise" in found.why or "no strength" in found.why


def test_damage_forbids_a_strength(persona):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    text = torch.cat([pairs.prompts, pairs.unwanted], 1)
    found = evaluate(model, clamp, pairs, text=text, strengths=(0.1, 40), random=1, new_tokens=4, allowed=0.0)
    assert (found.site, found.positions, found.strength) == (None, None, None)
    assert "every strength does more damage than 0" in found.why
    # At 40 times its length the model has come apart, at a tenth of it not.
    assert found.collapsed["strength"].tolist() == [40.0]
    assert float(found.collapsed["nll"].iloc[0]) > 1
    assert [one["strength"] for one in found.samples] == [0.0, 1.0, 40.0]


def test_damage_to_a_task_forbids_a_strength(persona):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    options = {"strengths": (1.0,), "random": 1, "new_tokens": 0}
    answers = torch.stack([pairs.unwanted, pairs.wanted], 1)
    # To answer as before is just what the clamp takes away.
    task = Choices(pairs.prompts, list(answers), [0] * len(pairs))
    found = evaluate(model, clamp, pairs, task=task, **options)
    assert found.strength is None
    bare, steered = found.curve("accuracy").set_index("strength").value
    assert bare > 0.9
    assert steered < 0.5
    assert found.collapsed["strength"].tolist() == [1.0]

    def as_a_function(model):
        return accuracy(model, task)

    again = evaluate(model, clamp, pairs, task=as_a_function, **options)
    assert again.curve("accuracy").equals(found.curve("accuracy"))
    with pytest.raises(MeasureError, match="finite score"):
        evaluate(model, clamp, pairs, task=lambda model: [float("nan")], **options)


def test_accuracy_against_the_likelihoods_of_the_answers(persona):
    model, _, pairs, _ = persona
    words = torch.stack([pairs.wanted, pairs.unwanted, pairs.wanted.roll(1, 0)], 1)
    logits = model.logits(pairs.prompts)[:, -1]
    right = torch.tensor([0, 1, 2]).repeat(len(pairs))[: len(pairs)]
    want = logits.gather(1, words.flatten(1)).argmax(1) == right
    # Ties, where the third answer is the first one too, go to the first.
    assert torch.equal(accuracy(model, Choices(pairs.prompts, list(words), right.tolist())).bool(), want)


def test_bad_choices():
    with pytest.raises(MeasureError, match="2 prompts, 1 sets and 1 right"):
        Choices(["a", "b"], [["c", "d"]], [0])
    with pytest.raises(MeasureError, match="question 0 has 1 answers"):
        Choices(["a"], [["c"]], [0])
    with pytest.raises(MeasureError, match="number 2 is said to be right"):
        Choices(["a"], [["c", "d"]], [2])


@pytest.mark.parametrize("placing", ["all", "prompt", "last", "response"])
def test_placings_against_masks_by_hand(persona, placing):
    """Prompts of 3 tokens with responses of 2: where each placing acts, told to the core as positions."""
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    responses = torch.cat([pairs.wanted, pairs.prompts[:, 1:2]], 1)
    positions = {"all": None, "prompt": [0, 1, 2], "last": [2], "response": [2, 3]}[placing]
    both = torch.cat([pairs.prompts, responses], 1)
    with model.clamp(clamp.at(positions=positions)):
        logits = model.logits(both)[:, 2:-1]
    want = -logits.log_softmax(-1).gather(2, responses[..., None])[..., 0].double().sum(1)
    got = response_nll(model, pairs.prompts, responses, clamps=[clamp], placing=placing, batch_size=5).nll
    assert torch.allclose(got, want, atol=1e-4)


def test_placings_while_generating_are_those_while_scoring(persona):
    """Greedy continuations are the likeliest ones, token by token, under the same placing."""
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples).at(scale=1.5)
    for placing in ("all", "prompt", "last", "response"):
        with model.clamp(*while_generating([clamp], placing)):
            new = model.generate(pairs.prompts, max_new_tokens=2).new
        best = response_nll(model, pairs.prompts, new, clamps=[clamp], placing=placing).nll
        for second in range(0, 60, 7):
            other = torch.stack([new[:, 0], (new[:, 1] + 1 + second) % 70], 1)
            worse = response_nll(model, pairs.prompts, other, clamps=[clamp], placing=placing).nll
            assert bool((worse >= best - 1e-4).all())


def test_a_sweep_over_positions(persona):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    told = []
    found = evaluate(
        model, clamp, pairs, positions=("all", "prompt", "last"), strengths=(1,), random=2, new_tokens=4,
        progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert told == [(i + 1, 18) for i in range(18)]
    gains = {at: found.curve("preference", positions=at).value.diff().iloc[-1] for at in ("all", "prompt", "last")}
    assert found.positions in gains
    assert gains[found.positions] >= 0.9 * max(gains.values())
    # An answer of one token: the response is predicted from the prompt alone, so that these two are the same.
    assert gains["all"] == pytest.approx(gains["prompt"], abs=1e-3)
    with pytest.raises(MeasureError, match="no placing 'first'; choose all, prompt, last, response"):
        evaluate(model, clamp, pairs, positions=("first",))
    with pytest.raises(MeasureError, match="says itself where it acts"):
        evaluate(model, clamp.at(positions=-1), pairs, positions=("all", "last"))


def test_several_clamps_and_other_kinds_are_evaluated(persona):
    model, examples, pairs, _ = persona
    estimator = ActivationTransport("blocks.{0..1}.resid.post", over="last")
    clamps = estimator.fit(model, examples)
    options = {"strengths": (0.5, 1.0), "new_tokens": 0, "estimator": estimator, "data": examples, "shuffled": 1}
    found = evaluate(model, clamps, pairs, **options)
    assert found.frame["arm"].unique().tolist() == ["fitted", "shuffled"]
    assert found.frame["site"].unique().tolist() == ["blocks.0.resid.post + blocks.1.resid.post"]
    assert found.strength is not None
    assert found.held_out["gain"][1] > max(found.held_out["shuffled_gains"]) + 1
    never = Similar("blocks.0.resid.post", direction=torch.ones(64), threshold=0.9999)
    idle = evaluate(
        model, Contrast("blocks.1.resid.post").fit(model, examples).at(when=never), pairs, strengths=(1,),
        random=0, new_tokens=0,
    )  # fmt: skip
    assert idle.strength is None  # a condition that never holds does nothing, and is no error


def test_ngram_repetition_by_hand():
    ids = torch.tensor([[7] * 24, list(range(24)), [1, 2, 3] * 8])
    got = ngram_repetition(ids)
    assert got.tolist() == pytest.approx([20 / 21, 0.0, 18 / 21])
    assert ngram_repetition(ids[:, :2]).tolist() == [0.0, 0.0, 0.0]
    assert bool(ngram_repetition(ids[:, :0]).isnan().all())


def test_several_at_once_of_any_kind(persona):
    model, examples, pairs, _ = persona
    vector = Contrast("blocks.1.resid.post").fit(model, examples)
    maps = ActivationTransport("blocks.{1..2}.resid.post", over="last").fit(model, examples)
    found = interference(model, {"vector": vector, "maps": maps}, {"persona": pairs})
    assert found.effects["effect"].min() > 1
    assert found.cosines.isna().to_numpy().tolist() == [[False, True], [True, True]]
    # Each leads to the same place, so that the second adds little.
    assert bool((found.interference["marginal"] < found.interference["alone"]).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strengths": ["a"]}, "finite numbers"),
        ({"strengths": [float("nan")]}, "finite numbers"),
        ({"strengths": [0]}, "one at least that is not zero"),
        ({"random": -1}, "numbers of draws"),
        ({"text": torch.tensor([[3]])}, "no token that follows another"),
        ({"text": []}, "no token that follows another"),
    ],
)
def test_bad_options_of_evaluation(persona, options, words):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    with pytest.raises(MeasureError, match=words):
        evaluate(model, clamp, pairs, **{"strengths": (1,), "random": 0, "new_tokens": 0, **options})


def test_what_is_no_data_is_refused(persona):
    model, examples, *_ = persona
    for estimator in (Contrast("blocks.1.resid.post"), ActivationTransport("blocks.1.resid.post"), ExpertTuner()):
        with pytest.raises(MeasureError, match="fit takes Examples"):
            estimator.fit(model, (examples.positive, examples.negative))
    with pytest.raises(MeasureError, match="prompts='a' is one text"):
        Pairs("a", ["b"], ["c"])
    with pytest.raises(TextError, match=r"token id [0-9]+ is not among the 126"):
        Contrast("blocks.1.resid.post").fit(model, Examples(examples.positive + 999 - 2, examples.negative))
    with pytest.raises(TextError, match="token id -1 is not among the"):
        model.logits([[-1, 3]])


def test_a_clamp_that_draws_its_own_control(persona):
    model, _, pairs, _ = persona
    clamp = EntropicClamp("blocks.1.resid.post", torch.randn(64, generator=torch.Generator().manual_seed(0)), scale=0.3)
    found = evaluate(model, clamp.at(positions=-1), pairs, strengths=(1,), random=2, new_tokens=0)
    drawn = found.frame.query("arm == 'random' and strength == 1 and measure == 'preference'")["value"]
    assert len(drawn) == 2
    assert drawn.nunique() == 2


def test_bad_input_of_evaluation(persona):
    model, examples, pairs, _ = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    with pytest.raises(MeasureError, match="3 pairs are too few"):
        evaluate(model, clamp, pairs.part([0, 1, 2]))
    with pytest.raises(MeasureError, match="Scale has no scale"):
        evaluate(model, ac.Scale("embed", 2.0), pairs)
    with pytest.raises(MeasureError, match="both estimator"):
        evaluate(model, clamp, pairs, estimator=Contrast())
    with pytest.raises(MeasureError, match="has no scale"):
        preference_utility(model, ac.Mask("embed", True), pairs, (1.0,))
