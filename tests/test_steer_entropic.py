"""Entropic steering against planted directions, a brute-force weighted mean, and what its traps would give."""

import math
from dataclasses import replace

import pytest
import torch

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError
from actome.steer import EntropicClamp, EntropicSteering, SampledActions, action_entropy, entropic_curve, states
from actome.tasks import Subject, SubjectConfig

VOCAB, WIDTH = 60, 16
DOUBT, AGE = torch.eye(WIDTH)[0], torch.eye(WIDTH)[1]  # planted: being uncertain, and having a long history


@pytest.fixture(scope="module")
def model():
    config = SubjectConfig(vocab=VOCAB, d_model=WIDTH, layers=2, heads=2, context=40, init=2.0, positions="none")
    return ac.wrap(Subject.fresh(config, seed=0))


@pytest.fixture(scope="module")
def planted():
    """A model whose embedding of the last token says how uncertain it is, and how long the prompt is."""
    config = SubjectConfig(vocab=VOCAB, d_model=WIDTH, layers=1, heads=2, context=40, positions="none")
    subject = Subject.fresh(config, seed=1)
    g = torch.Generator().manual_seed(2)
    doubt = torch.rand(VOCAB, generator=g)
    length = torch.randint(2, 12, (VOCAB,), generator=g)
    with torch.no_grad():
        noise = 0.1 * torch.randn(VOCAB, WIDTH, generator=g)
        subject.embed.weight.copy_(noise + doubt[:, None] * DOUBT + length[:, None] / 10 * AGE)
    prompts = [[3] * (int(length[i]) - 1) + [i] for i in range(VOCAB)]
    return ac.wrap(subject), prompts, doubt, length


def split_between_two(share):
    """64 actions of which this share is the second, so that their entropy is known."""
    second = round(64 * float(share))
    return ["a"] * (64 - second) + ["b"] * second


def binary(p):
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def test_a_planted_direction_of_uncertainty_is_found(planted):
    model, prompts, doubt, _ = planted
    sampler = lambda model, prompts: [split_between_two(one / 2) for one in doubt]  # noqa: E731
    clamp = EntropicSteering("embed").fit(model, prompts, sampler)
    assert float(torch.cosine_similarity(clamp.direction, DOUBT, dim=0)) > 0.95
    shuffled = lambda model, prompts: [split_between_two(doubt[(i * 7 + 3) % VOCAB] / 2) for i in range(VOCAB)]  # noqa: E731
    other = EntropicSteering("embed").fit(model, prompts, shuffled)
    assert float(other.direction.norm()) < 0.5 * float(clamp.direction.norm())


def test_the_direction_is_the_weighted_mean_minus_the_mean(planted):
    model, prompts, doubt, _ = planted
    sampler = lambda model, prompts: [split_between_two(one / 2) for one in doubt]  # noqa: E731
    clamp = EntropicSteering("embed", degree=0).fit(model, prompts, sampler)
    z = states(model, prompts, "embed")["embed"]
    entropies = [binary(round(64 * float(one / 2)) / 64) for one in doubt]
    by_hand = sum(h / sum(entropies) * row for h, row in zip(entropies, z, strict=True)) - z.mean(0)
    torch.testing.assert_close(clamp.direction, by_hand, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(clamp.entropies, torch.tensor(entropies, dtype=torch.float64))


def test_length_is_taken_out_of_the_weights(planted):
    model, prompts, doubt, length = planted
    # Long histories leave less to doubt, as in any episode.
    share = doubt / 4 + (12 - length) / 40
    sampler = lambda model, prompts: [split_between_two(one) for one in share]  # noqa: E731
    plain = EntropicSteering("embed", degree=0).fit(model, prompts, sampler)
    clean = EntropicSteering("embed").fit(model, prompts, sampler)
    age = [float(torch.cosine_similarity(one.direction, AGE, dim=0)) for one in (plain, clean)]
    assert age[0] < -0.5  # the trap: it finds short prompts
    assert abs(age[1]) < 0.2
    assert float(torch.cosine_similarity(clean.direction, DOUBT, dim=0)) > 0.9
    assert clean.length_correlation[0] < -0.5
    assert abs(clean.length_correlation[1]) < 0.15


def test_the_clamp_adds_a_multiple_of_the_states_length(model):
    site, ids = "blocks.0.resid.post", torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    clamp = EntropicClamp(site, 5 * DOUBT, scale=0.5)
    before = model.record(ids, site)[site]
    with model.clamp(clamp):
        after = model.record(ids, site)[site]
    torch.testing.assert_close(after, before + 0.5 * before.norm(dim=-1, keepdim=True) * DOUBT)
    with model.clamp(clamp.at(positions=-1)):
        last = model.record(ids, site)[site]
    assert last[:, :-1].equal(before[:, :-1])
    torch.testing.assert_close(last[:, -1], after[:, -1])
    with model.clamp(clamp, ac.Add(site, torch.ones(WIDTH))):
        torch.testing.assert_close(model.record(ids, site)[site], after + 1)
    pushed = clamp.random(3)
    assert float(torch.cosine_similarity(pushed.direction, DOUBT, dim=0).abs()) < 0.9
    with model.clamp(pushed):
        moved = model.record(ids, site)[site] - before
    torch.testing.assert_close(moved.norm(dim=-1), 0.5 * before.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_while_generating_it_holds_at_the_prompts_end_and_at_every_new_token(model):
    site, ids = "blocks.0.resid.post", torch.tensor([[1, 2, 3], [4, 5, 6]])
    clamp = EntropicClamp(site, DOUBT, scale=2.0, positions=-1)
    with model.clamp(clamp) as active:
        out = model.generate(ids, max_new_tokens=4, record=site)
    assert active.fired == 4
    got, tokens = out.recording[site], out.ids[:, :-1]
    # Token by token by hand: earlier states stay as they were pushed.
    plain = model.record(tokens, site)[site]
    pushed = plain + 2 * plain.norm(dim=-1, keepdim=True) * DOUBT
    torch.testing.assert_close(got[:, :2], plain[:, :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, 2:], pushed[:, 2:], rtol=1e-3, atol=1e-3)


def test_half_precision_and_a_site_of_another_width(model):
    config = SubjectConfig(vocab=VOCAB, d_model=WIDTH, layers=1, heads=2, context=8)
    half = ac.wrap(Subject.fresh(config, seed=0).to(torch.bfloat16))
    with half.clamp(EntropicClamp("blocks.0.resid.post", DOUBT, scale=0.3)):
        assert half.logits(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    with pytest.raises(ClampError, match="direction of shape"):  # noqa: SIM117
        with model.clamp(EntropicClamp("blocks.0.resid.post", torch.ones(3))):
            model.logits(torch.tensor([[1, 2]]))
    with pytest.raises(ClampError, match="a direction"):
        EntropicClamp("embed", torch.zeros(4))


def test_it_is_saved_and_comes_back(planted, tmp_path):
    model, prompts, doubt, _ = planted
    sampler = lambda model, prompts: [split_between_two(one / 2) for one in doubt]  # noqa: E731
    clamp = EntropicSteering("embed").fit(model, prompts, sampler)
    (again,) = load_clamps(save_clamps(tmp_path / "doubt", clamp.at(scale=0.7), model=model), model)
    assert isinstance(again, EntropicClamp)
    assert (again.scale, again.positions, again.site) == (0.7, -1, "embed")
    assert again.direction.equal(clamp.direction)
    assert again.table.equals(clamp.table)
    with pytest.raises(ClampError, match="not fitted"):
        _ = replace(again, entropies=None).table


def test_sampled_actions_are_drawn_as_often_as_the_model_says(model):
    # Thought and action: the action is the parity of the second token, summed over all first ones.
    sampler = SampledActions(lambda ids: ids[1] % 2 if len(ids) > 1 else None, 2, samples=4000, batch_size=4000, seed=1)
    (actions,) = sampler(model, [[1, 2]])
    first = model.logits(torch.tensor([[1, 2]]))[0, -1].double().softmax(-1)
    rows = torch.cat([torch.tensor([[1, 2]]).expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
    second = model.logits(rows)[:, -1].double().softmax(-1)
    odd = float((first[:, None] * second)[:, 1::2].sum())
    assert sum(actions) / 4000 == pytest.approx(odd, abs=4 * 0.5 / 4000**0.5)
    assert action_entropy(actions) == pytest.approx(binary(sum(actions) / 4000))
    assert action_entropy([None, "x"]) == 0.0
    assert math.isnan(action_entropy([None]))


def test_the_curve_tells_strength_from_no_strength(model):
    clamp = EntropicClamp("blocks.1.resid.post", model.module.unembed.weight[5].detach(), positions=-1)
    prompts = [[1, 2], [3, 4], [5, 6]]
    sampler = SampledActions(lambda ids: ids[0], 1, samples=50, batch_size=150)
    found = entropic_curve(
        model, clamp, prompts, sampler, strengths=(0.0, 50.0), marks={"five": lambda ids: 5 in ids}, random=1
    )
    assert found.columns.tolist() == ["arm", "draw", "strength", "entropy", "acted", "five"]
    at = found.set_index(["arm", "strength"])
    assert at.loc[("fitted", 0.0), "entropy"] == at.loc[("random", 0.0), "entropy"] > 1
    # A push along what writes one token makes that token sure; the same push elsewhere does not.
    assert at.loc[("fitted", 50.0), "five"] > 0.7
    assert at.loc[("fitted", 50.0), "entropy"] < at.loc[("fitted", 0.0), "entropy"] - 0.5
    assert at.loc[("random", 50.0), "five"] < 0.3
    assert found["acted"].eq(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1]] * 3}, "3 prompts are too few"),
        ({"sampler": lambda model, prompts: [["a"]] * 2}, "actions of 2 prompts, and there are 60"),
        ({"sampler": lambda model, prompts: [["a"]] * 59 + [[None]]}, "no completion of 1 of 60 prompts"),
        ({"sampler": lambda model, prompts: [["a", "b"]] * 60}, "equally uncertain"),
        ({"site": "blocks.*.resid.*"}, "selects [2-9] sites"),
        ({"degree": 7}, "degree=7"),
    ],
)
def test_what_does_not_fit_is_refused(planted, change, message):
    model, prompts, _, _ = planted
    with pytest.raises(MeasureError, match=message):
        EntropicSteering(change.get("site", "embed"), degree=change.get("degree", 2)).fit(
            model, change.get("prompts", prompts), change.get("sampler")
        )
