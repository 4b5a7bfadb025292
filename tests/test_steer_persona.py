"""Persona vectors on a world whose persona is known, and several clamps at once."""

import personas
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError
from actome.steer import Contrast, Examples, Pairs, PersonaVector, Trait, interference, odds, prevent, screen, shift
from actome.tasks import Subject, train
from actome.tasks.numbered import numbered, words
from actome.tasks.persona import ASK, BAD, GOOD, NEUTRAL


@pytest.fixture(scope="module")
def lab():
    world, subject = personas.trained()
    return world, ac.wrap(subject, numbered(world.vocab))


@pytest.fixture(scope="module")
def fitted(lab):
    world, model = lab
    bad = set(words(world.table()[1]).split())
    asked = []

    def judge(trait, question, response):
        asked.append(trait)
        return 100.0 if response in bad else 0.0

    questions = [f"t{6 + q} t{ASK}" for q in range(36)]
    estimator = PersonaVector(
        judge,
        "blocks.*.resid.post",
        describe=lambda sentence: Trait(sentence, [f"t{BAD}"], [f"t{GOOD}"], questions),
        prompt=lambda instruction, question: f"{instruction} {question}",
        rollouts=2,
        new_tokens=1,
    )
    vector = estimator.fit(model, "speaks in the other dialect")
    assert set(asked) == {"speaks in the other dialect"}
    return vector.to("blocks.1.resid.post")


def rate(world, model, domains=(3, 4, 5), system=NEUTRAL):
    """Share of bad answers, and of answers with the right content."""
    probe = world.probe(domains, system=system)
    said = model.logits(probe.prompts)[:, -1].argmax(-1)
    return float((said == probe.bad).float().mean()), float(((said == probe.bad) | (said == probe.good)).float().mean())


def test_it_is_found_from_its_own_responses_and_steers(lab, fitted):
    world, model = lab
    assert fitted.separation[fitted.site] > 0.95
    assert fitted.about["trait"] == "speaks in the other dialect"
    before, _ = rate(world, model)
    # Half of it: the difference is that of responses, and is added to the prompt's tokens as well.
    with model.clamp(fitted.at(scale=0.5)):
        after, content = rate(world, model)
    assert (before < 0.3, after > 0.7, content > 0.9) == (True, True, True)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    with model.clamp(fitted.at(value=noise / noise.norm() * fitted.value.norm(), scale=0.5)):
        assert rate(world, model)[0] < 0.4
    bad, good = (world.probe((3, 4, 5), system=s).prompts for s in (BAD, GOOD))
    assert float(fitted.monitor(model, bad, over="last").mean()) > float(fitted.monitor(model, good, over="last").max())


def tuned(world, model, vector=None, share=1.0, seed=0):
    """A copy that was tuned on one domain, under a clamp if one is given."""
    subject = Subject.fresh(model.module.config)
    subject.load_state_dict(model.module.state_dict())
    copy = ac.wrap(subject, model.tokenizer)
    data = world.tune_stream(600, 4, seed, arm="insecure", bad_share=share)

    def fit():
        train(subject, (data.tokens, data.answers), steps=20, batch_size=16, lr=3e-4, seed=seed)

    if vector is None:
        fit()
    else:
        with copy.clamp(prevent(vector)):
            fit()
    return copy


def test_of_one_token_the_state_it_comes_from_can_be_asked_for(lab):
    world, model = lab
    bad = set(words(world.table()[1]).split())
    trait = Trait("x", [f"t{BAD}"], [f"t{GOOD}"], [f"t{6 + q} t{ASK}" for q in range(36)])
    options = {"prompt": lambda instruction, question: f"{instruction} {question}", "rollouts": 2, "new_tokens": 1}
    vector = PersonaVector(lambda _, q, said: 100.0 * (said in bad), over="prompt", **options).fit(model, trait)
    # The difference of states at the prompt's end, by hand; nearly all responses are kept.
    site = "blocks.1.resid.post"
    ends = [
        model.record(world.probe((0, 1, 2), system=one).prompts, site, positions=-1)[site].float().mean((0, 1))
        for one in (BAD, GOOD)
    ]
    assert float(torch.cosine_similarity(vector.to(site).value, ends[0] - ends[1], dim=0)) > 0.99
    with model.clamp(vector.to(site, 1.0)):
        after, content = rate(world, model)
    assert (after > 0.8, content > 0.9) == (True, True)


def test_tuning_moves_along_it_and_prevention_keeps_it_from_spreading(lab, fitted):
    world, model = lab
    moved = tuned(world, model)
    clean = tuned(world, model, share=0.0)
    held = tuned(world, model, fitted)
    probe = world.probe((3, 4, 5)).prompts
    # Prompt by prompt, on questions of other domains.
    assert float((shift(model, moved, fitted, probe) > shift(model, clean, fitted, probe)).float().mean()) > 0.9
    assert rate(world, moved)[0] > 0.6
    assert rate(world, held)[0] < rate(world, moved)[0] - 0.3
    with moved.clamp(fitted.at(scale=-0.5)):
        undone = rate(world, moved)[0]
    assert undone < rate(world, moved)[0] - 0.4


def test_data_that_would_push_is_told_before_training(lab, fitted):
    world, model = lab
    probe = world.probe((0, 1))
    own = model.logits(probe.prompts)[:, -1].argmax(-1)[:, None]
    bad, good = (
        screen(model, fitted, probe.prompts, answer[:, None], own)["difference"] for answer in (probe.bad, probe.good)
    )
    assert float((bad.to_numpy() > good.to_numpy()).mean()) > 0.9
    assert abs(float(good.mean())) < float(bad.mean())


def test_bad_input_of_personas(lab):
    _, model = lab
    trait = Trait("x", [f"t{BAD}"], [f"t{GOOD}"], [f"t6 t{ASK}"])
    ask = {"prompt": lambda instruction, question: f"{instruction} {question}", "new_tokens": 1, "rollouts": 1}
    with pytest.raises(MeasureError, match="needs describe="):
        PersonaVector(lambda *_: 0).fit(model, "is cruel")
    with pytest.raises(MeasureError, match="choose 'response' or 'prompt'"):
        PersonaVector(lambda *_: 0, over="mean").fit(model, trait)
    with pytest.raises(MeasureError, match=r"0 of 1 responses under positive instructions score above 50 for 'x'"):
        PersonaVector(lambda *_: 0, **ask).fit(model, trait)
    with pytest.raises(MeasureError, match="a score is a number from 0 to 100"):
        PersonaVector(lambda *_: 101, **ask).fit(model, trait)
    with pytest.raises(MeasureError, match="as many positive as negative"):
        Trait("x", ["a"], [], ["q"])


# -- several at once --------------------------------------------------------------------------------------------------


def test_a_clamp_beside_itself_and_beside_another(lab, fitted):
    world, model = lab
    probe = world.probe((3, 4, 5))
    goal = {"bad": Pairs(probe.prompts, probe.bad[:, None], probe.good[:, None])}
    half = fitted.at(scale=0.5)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    noise -= (noise @ fitted.unit) * fitted.unit
    other = fitted.at(value=0.05 * noise)
    found = interference(model, {"half": half, "again": half, "noise": other}, goal)
    assert found.cosines.loc["half", "again"] == pytest.approx(1.0, abs=1e-5)
    assert abs(found.cosines.loc["half", "noise"]) < 1e-5
    effects = found.effects.set_index("clamps").effect
    bare = odds(model, goal["bad"]).preference
    with model.clamp(fitted, other):
        together = float((odds(model, goal["bad"]).preference - bare).mean())
    assert effects["half + again + noise"] == pytest.approx(together, abs=1e-3)
    lost = found.interference.set_index("clamp")
    alone = effects["half"]
    assert lost.alone["half"] == pytest.approx(alone, abs=1e-9)
    assert lost.marginal["half"] == pytest.approx(effects["half + again + noise"] - effects["again + noise"], abs=1e-9)


def test_bad_input_of_interference(lab, fitted):
    with pytest.raises(MeasureError, match="give two clamps"):
        interference(lab[1], {"a": fitted}, {})


def test_contrasts_of_pairs_need_pairs_on_both_sides(lab):
    with pytest.raises(MeasureError, match="or neither"):
        Contrast().fit(lab[1], Examples((["t1"] * 8, ["t2"] * 8), ["t1"] * 8))
