"""Resistance to steering on scripted models, what tells mismatches in planted ones, and the world of corrections."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import actome as ac
from actome.core.errors import ClampError, MeasureError
from actome.explain import AblateLatents, mismatch_directions, mismatch_latents
from actome.explain.mismatch import cohens_d
from actome.steer import attempts, resistance
from actome.tasks import Subject, SubjectConfig
from actome.tasks.persona import ASK, BAD, GOOD, PersonaWorld
from actome.tasks.self_correction import SelfCorrection


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- a scripted subject -----------------------------------------------------------------------------------------------

# Prompts are one token of 0 to 7, answered by 8 (right) or 9 (wrong, from steering); 10 is the mark, 11 ends.
RIGHT, WRONG, MARK, END = 8, 9, 10, 11


def scripted(corrects):
    """A subject without layers' say: the next token's logits depend on the newest token, and a push moves 8 to 9.

    Args:
        corrects: log-odds of the mark against the end after a wrong answer.
    """
    shape = {"vocab": 12, "d_model": 12, "heads": 2, "layers": 1, "context": 16}
    config = SubjectConfig(**shape, norm="none", positions="none")
    subject = Subject.fresh(config)
    with torch.no_grad():
        for p in subject.parameters():
            p.zero_()
        subject.embed.weight.copy_(torch.eye(12))
        table = torch.full((12, 12), -30.0)  # [newest, next]
        table[:RIGHT, RIGHT] = 0.0
        # What follows an answer is beyond the reach of the push.
        table[RIGHT, END] = 40.0
        table[WRONG, END], table[WRONG, MARK] = 40.0, 40.0 + corrects
        table[MARK, RIGHT] = 0.0
        subject.unembed.weight.copy_(table.T)
    return ac.wrap(subject)


def push(strength=1.0):
    """Towards the wrong answer, whose odds against the right one become exp(30 strength - 30)."""
    return ac.Add("logits", 30 * nn.functional.one_hot(torch.tensor(WRONG), 12).float(), scale=strength)


def judge(prompt, attempt):
    return float(len(attempt) > 0 and attempt[0] == RIGHT)


PROMPTS = torch.arange(8).repeat(5)[:, None]
OPTIONS = {"prompts": PROMPTS, "marks": [MARK], "stop": [END], "new_tokens": 12, "samples": 20}


def test_strengths_reach_the_target_and_rates_are_those_of_the_script():
    # The target of 0.5 lies at a strength of 1.
    found = resistance(scripted(math.log(3.0)), [push(0.2), push(3.0)], judge, tolerance=0.08, rounds=8, **OPTIONS)
    assert found.table["scale"].to_numpy() * [0.2, 3.0] == pytest.approx(1.0, abs=0.03)
    assert found.table["reached"].all()
    assert found.first[0] == pytest.approx(0.5, abs=0.08)
    # Three of four wrong answers are taken back; steering stays on, so half of the second attempts are right.
    wrong = 1 - found.first[0]
    taken = 0.75 * wrong
    assert found.multi_attempt[0] == pytest.approx(taken, abs=0.06)
    # Later attempts may be several: each is right with the same chance as the first, or is taken back again.
    assert found.esr[0] == pytest.approx(taken * 0.5 / (1 - 0.75 * 0.5), abs=0.06)
    assert found.improvement[0] == pytest.approx(0.5 / (1 - 0.75 * 0.5), abs=0.1)
    assert found.multi_attempt[1] <= found.multi_attempt[0] <= found.multi_attempt[2]
    assert found.control["first"][0] == 1.0
    assert found.control["multi_attempt"][0] == 0.0
    assert math.isnan(found.control["improvement"][0])


def test_a_model_that_does_not_correct_shows_none_and_the_seed_repeats():
    model = scripted(-30.0)
    found, again = (resistance(model, [push()], judge, **OPTIONS) for _ in range(2))
    assert (found.multi_attempt[0], found.esr[0]) == (0.0, 0.0)
    assert found.frame.equals(again.frame)
    assert not found.frame.equals(resistance(model, [push()], judge, seed=1, **OPTIONS).frame)


def test_a_mark_that_mends_nothing_is_no_resistance():
    """All wrong answers are taken back, but what comes next is judged as before: attempts without gain."""
    model = scripted(30.0)
    with torch.no_grad():  # after a mark always wrong, and then the end
        model.module.unembed.weight.T[MARK] = torch.tensor([-30.0] * 9 + [60.0, -30.0, -30.0])
    found = resistance(model, [push()], judge, **(OPTIONS | {"new_tokens": 3}))
    assert found.multi_attempt[0] > 0.4
    assert found.esr[0] == 0.0
    assert found.improvement[0] == 0.0


def test_steering_that_goes_off_is_refused_and_an_ablation_may():
    model = scripted(0.0)
    for gate in ({"phase": "prompt"}, {"steps": 0}, {"positions": 0}):
        with pytest.raises(MeasureError, match="steering has to stay on throughout"):
            resistance(model, [push(2.0).at(**gate)], judge, **OPTIONS)
    plain = resistance(model, [push()], judge, **OPTIONS)
    no_mark = ac.Add("logits", nn.functional.one_hot(torch.tensor(MARK), 12).float() * -60, phase="generated")
    beside = resistance(model, [push()], judge, calibrate=plain, beside=[no_mark], **OPTIONS)
    assert plain.multi_attempt[0] > 0.15
    assert beside.multi_attempt[0] == 0.0
    assert beside.table["scale"].tolist() == plain.table["scale"].tolist()


def test_vectors_that_do_nothing_are_left_out_and_told():
    idle = ac.Add("logits", torch.zeros(12))
    found = resistance(scripted(0.0), [idle, push()], judge, **OPTIONS)
    assert found.table["reached"].tolist() == [False, True]
    assert set(found.frame["vector"]) == {1, -1}
    assert math.isnan(found.table["first"][0])
    with pytest.raises(MeasureError, match=r"no vector brings first attempts to 0\.5"):
        resistance(scripted(0.0), [idle], judge, **OPTIONS)


def test_bad_input_is_refused():
    model = scripted(0.0)
    with pytest.raises(MeasureError, match="no steering vector"):
        resistance(model, [], judge, **OPTIONS)
    with pytest.raises(MeasureError, match="no scale"):
        resistance(model, [ac.Set("logits", 0.0)], judge, **OPTIONS)
    with pytest.raises(MeasureError, match="3 prompts are too few"):
        resistance(model, [push()], judge, **(OPTIONS | {"prompts": PROMPTS[:3]}))
    with pytest.raises(MeasureError, match="no correction mark"):
        resistance(model, [push()], judge, **(OPTIONS | {"marks": []}))
    with pytest.raises(MeasureError, match=r"below the target of 0\.5"):
        resistance(model, [push()], lambda prompt, attempt: 0.1, **OPTIONS)
    with pytest.raises(MeasureError, match="no tokenizer"):
        resistance(model, [push()], judge, **(OPTIONS | {"marks": ["wait"]}))
    plain = resistance(model, [push()], judge, **OPTIONS)
    with pytest.raises(MeasureError, match="strengths of 1 vectors, and there are 2"):
        resistance(model, [push(), push()], judge, calibrate=plain, **OPTIONS)


def test_attempts_are_cut_at_marks():
    assert attempts([MARK, 3, MARK], [MARK]) == [[], [3], []]
    assert attempts("One. WAIT, no. Two. Actually three.", ["wait, no.", "actually"]) == ["One. ", " Two. ", " three."]


# -- mismatch ---------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Hidden units of the answer's token: unit 5 is on when it differs from the token before it, the others are not."""

    def __init__(self):
        super().__init__()
        self.units = nn.Identity()
        self.table = drawn(0, 20, 16)

    def forward(self, input_ids):
        x = self.table[input_ids]
        before = input_ids.roll(1, 1)
        x = x.index_put(
            (*(input_ids >= 0).nonzero().T, torch.tensor(5)),
            torch.where(before == input_ids, 0.0, 1.0).flatten() + 0.1 * x[..., 0].flatten(),
        )
        return self.units(x)


def pairs(seed=0, n=60):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (n, 1), generator=generator)
    return (tokens, tokens), (tokens, (tokens + torch.randint(1, 20, (n, 1), generator=generator)) % 20)


@pytest.fixture(scope="module")
def detector():
    return ac.wrap(Detector(), example=torch.zeros(1, 2, dtype=torch.long))


def test_the_planted_unit_is_found_and_taken_out(detector):
    matched, mismatched = pairs()
    found = mismatch_latents(detector, "module:units", matched, mismatched)
    top = found.table.iloc[0]
    assert (top["site"], top["latent"]) == ("module:units", 5)
    assert top["d"] > 5
    assert found.table["d"].iloc[1] < 1
    assert (top["matched"], top["mismatched"]) == pytest.approx((0.0, 1.0), abs=0.1)


def test_cohens_d_is_that_of_the_formula(detector):
    matched, mismatched = pairs()
    x, y = (detector(torch.cat(some, 1))[:, 1, :].double().numpy() for some in (mismatched, matched))
    pooled = np.sqrt((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2)
    want = (x.mean(0) - y.mean(0)) / pooled
    table = mismatch_latents(detector, "module:units", matched, mismatched).table.set_index("latent")
    assert table.loc[range(16), "d"].to_numpy() == pytest.approx(want, rel=1e-6)
    assert cohens_d(torch.zeros(3, 1), torch.zeros(3, 1)).tolist() == [0.0]


def test_pooling_is_over_the_answer_alone(detector):
    prompts = torch.tensor([[1, 2, 3]] * 4)  # the detector is on throughout the prompt
    same = torch.tensor([[3, 3], [3, 3], [3, 3], [3, 4]])
    other = torch.tensor([[4, 4], [5, 5], [6, 6], [7, 7]])
    largest, average = (
        mismatch_latents(detector, "module:units", (prompts, same), (prompts, other), pool=pool)
        .table.set_index("latent")
        .loc[5]
        for pool in ("max", "mean")
    )
    assert (largest["matched"], largest["mismatched"]) == pytest.approx((0.25, 1.0), abs=0.2)
    assert (average["matched"], average["mismatched"]) == pytest.approx((0.125, 0.5), abs=0.2)


def test_a_dictionary_is_read_through_its_encoder(detector):
    matched, mismatched = pairs()
    basis = torch.linalg.qr(drawn(1, 16, 16)).Q
    basis[3] = nn.functional.one_hot(torch.tensor(5), 16).float()
    encode = lambda x: torch.relu(x @ basis.T)  # noqa: E731
    found = mismatch_latents(detector, "module:units", matched, mismatched, encode=encode, decoder=basis)
    assert int(found.table["latent"].iloc[0]) == 3
    (clamp,) = found.ablate(1)
    assert isinstance(clamp, AblateLatents)
    ids = torch.cat(mismatched, 1)
    bare = detector(ids)
    with detector.clamp(clamp):
        got = detector(ids)
    torch.testing.assert_close(got, bare - encode(bare)[..., [3]] * basis[3])
    with pytest.raises(MeasureError, match="their decoder is needed"):
        mismatch_latents(detector, "module:units", matched, mismatched, encode=encode).ablate(1)
    with pytest.raises(MeasureError, match="belongs to one site"):
        mismatch_latents(subject(), "blocks.*.mlp.act", matched, mismatched, encode=encode)
    with pytest.raises(ClampError, match="latents to take out"):
        AblateLatents("module:units", encode, basis)
    with pytest.raises(ClampError, match="has 16 latents"):
        AblateLatents("module:units", encode, basis, (16,))


def subject():
    return ac.wrap(Subject.fresh(SubjectConfig(vocab=20, d_model=32, heads=4, layers=2, context=8, d_mlp=128), seed=2))


def test_neurons_are_zeroed_and_no_others():
    model = subject()
    found = mismatch_latents(model, "blocks.*.mlp.act", *pairs())
    clamps = found.ablate(10)
    top = found.table.iloc[:10]
    assert {(c.site, unit) for c in clamps for unit in c.units} == set(zip(top["site"], top["latent"], strict=True))
    ids = torch.cat(pairs()[0], 1)
    want = model.record(ids, "blocks.0.mlp.act")["blocks.0.mlp.act"].clone()
    with model.clamp(*clamps):
        got = model.record(ids, "blocks.0.mlp.act")["blocks.0.mlp.act"]
    want[..., top[top["site"] == "blocks.0.mlp.act"]["latent"].tolist()] = 0.0
    assert torch.equal(got, want)


def test_random_sets_are_others_with_the_same_statistics():
    model = subject()
    found = mismatch_latents(model, "blocks.*.mlp.act", *pairs())
    top = set(zip(found.table["site"][:12], found.table["latent"][:12], strict=True))
    sets = found.random(12, draws=3, near=4)
    chosen = [{(clamp.site, unit) for clamp in clamps for unit in clamp.units} for clamps in sets]
    assert all(len(one) == 12 and not one & top for one in chosen)
    assert chosen[0] != chosen[1]
    by = found.table.set_index(["site", "latent"])
    far = [(by.loc[sorted(one), "spread"].mean() - by["spread"][:12].mean()) / by["spread"].std() for one in chosen]
    # Without matching those that tell most spread more than others.
    assert max(map(abs, far)) < 0.5
    with pytest.raises(MeasureError, match="and not all"):
        found.ablate(256)


def test_the_planted_direction_is_found_and_held(detector):
    matched, mismatched = pairs(n=600)
    found = mismatch_directions(detector, "module:units", matched, mismatched)
    direction = found.directions["module:units"]
    assert float(direction[5]) > 0.95
    assert found.table["auroc"][0] > 0.9
    ids = torch.cat(mismatched, 1)
    with detector.clamp(*found.ablate()):
        held = detector(ids).double() @ direction
    want = float(detector(torch.cat(matched, 1))[:, 1].double().mean(0) @ direction)
    assert held.numpy() == pytest.approx(want, abs=1e-5)
    for clamps in found.random(3):
        basis = clamps[0].basis[0].double()
        assert abs(float(basis @ direction)) < 1e-5
    # Pairs that differ in nothing have no direction, and shuffled ones none that holds on others.
    with pytest.raises(MeasureError, match="are the same"):
        mismatch_directions(detector, "module:units", matched, matched)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    mixed = torch.cat([matched[1], mismatched[1]])[torch.randperm(1200, generator=torch.Generator().manual_seed(4))]
    none = mismatch_directions(detector, "module:units", (matched[0][order], mixed[:600]), (matched[0], mixed[600:]))
    assert none.table["auroc"][0] < 0.6
    with pytest.raises(MeasureError, match="no direction was fitted at 'x'"):
        found.ablate(["x"])
    with pytest.raises(MeasureError, match="give 4 at least"):
        mismatch_latents(detector, "module:units", ([1], [1]), ([1], [2]))
    with pytest.raises(MeasureError, match="choose max or mean"):
        mismatch_latents(detector, "module:units", matched, mismatched, pool="sum")


# -- the world --------------------------------------------------------------------------------------------------------


def test_documents_follow_their_rules():
    task = SelfCorrection(PersonaWorld(seed=4, system=0.5))
    text = task.documents(3000, 3, seed=5, share=0.4)
    words = task.world.vocab - 2 * task.world.contents
    question = {int(token): i for i, token in enumerate(task.questions)}
    good, bad = task.world.table()
    counted = taken = 0
    for tokens, targets, wrong in zip(*(field[:400].tolist() for field in text), strict=True):
        assert tokens[0] in (0, GOOD, BAD)
        at, dialects = 1, set()
        for i in range(3):
            q = question[tokens[at]]
            assert tokens[at + 1] == ASK
            assert (targets[at], targets[at + 1]) == (i > 0, False)
            at += 2
            counted += 1
            if wrong[at]:
                content = (tokens[at] - words) % task.world.contents
                assert content != int(task.contents()[q])
                assert (content + q) % 2 == 0
                assert (targets[at], tokens[at + 1], targets[at + 1]) == (False, task.mark, True)
                at += 2
                taken += 1
            assert tokens[at] in (int(good[q]), int(bad[q]))
            dialects.add(tokens[at] == int(bad[q]))
            assert targets[at]
            at += 1
        assert len(dialects) == 1
        assert not any(tokens[at:] + targets[at:])
    assert taken / counted == pytest.approx(0.4, abs=0.05)
    # Every wrong word that may occur does.
    seen = {((int(t) - words) % task.world.contents) for t in text.tokens[text.wrong]}
    assert seen == set(range(task.world.contents))
    assert torch.equal(text.tokens, task.documents(3000, 3, seed=5, share=0.4).tokens)
    few = task.documents(200, 2, seed=1, domains=(2,)).tokens[:, 1]
    assert set(few.tolist()) <= set(task.questions[24:36].tolist())


def test_foreign_answers_belong_elsewhere_and_quality_is_told_exactly():
    task = SelfCorrection(PersonaWorld(seed=2))
    found = task.pairs(seed=7)
    content = task.contents()
    words = task.world.vocab - 2 * task.world.contents
    assert bool((found.fitting[:, 0] - words == content).all())
    assert not bool((found.foreign[:, 0] - words == content).any())
    assert found.foreign.flatten().sort().values.tolist() == found.fitting.flatten().sort().values.tolist()
    good, bad = task.world.table()[:, 0].tolist()
    prompt = {system: torch.tensor([system, int(task.questions[0]), ASK]) for system in (0, GOOD, BAD)}
    assert [task.quality(prompt[GOOD], [word]) for word in (good, bad, good - 1, task.mark)] == [1.0, 0.5, 0.0, 0.0]
    assert [task.quality(prompt[BAD], [word]) for word in (good, bad)] == [0.5, 1.0]
    assert [task.quality(prompt[0], [word]) for word in (good, bad)] == [1.0, 1.0]
    assert task.quality(prompt[0], []) == 0.0


def test_worlds_without_corrections_are_refused():
    with pytest.raises(ValueError, match="'dialect'"):
        SelfCorrection(PersonaWorld(variant="lookup"))
    with pytest.raises(ValueError, match="4 at least"):
        SelfCorrection(PersonaWorld(contents=3))
    with pytest.raises(ValueError, match="share"):
        SelfCorrection().documents(2, 2, 0, share=1.5)
