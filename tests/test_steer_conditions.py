"""Conditions on the prompt: by hand, latched through generation, with rules, on disk, and on planted categories."""

import pytest
import torch

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError
from actome.steer.conditions import Condition, Rule, Similar, best_threshold, similarity, when
from actome.steer.likelihood import response_nll
from actome.steer.serving.rows import Rows
from actome.tasks import Subject, SubjectConfig
from actome.tasks.trials import auroc


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return ac.wrap(Subject.fresh(SubjectConfig(vocab=40, d_model=32, heads=2, layers=2, context=64), seed=1))


def prompts(first, n, seed, length=6):
    """Random tokens behind one that says the category."""
    tokens = torch.randint(5, 40, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = first
    return tokens


@pytest.mark.parametrize("over", ["mean", "last"])
def test_scoring_judges_the_prompt_and_not_the_response(model, over):
    """A response read with its prompt is steered as it is when it is generated token by token."""
    asked = [row.tolist() for length in (3, 6) for row in prompts(1, 6, length, length)]
    responses = torch.randint(5, 40, (12, 5), generator=torch.Generator().manual_seed(8))
    before, site = ac.Add("blocks.0.resid.mid", 0.5 * drawn(4, 32)), "blocks.0.resid.post"
    with model.clamp(before):
        seen = [model.record(torch.tensor(row), site)[site][0] for row in asked]
    pooled = torch.stack([x.mean(0) if over == "mean" else x[-1] for x in seen])
    middle = float(similarity(pooled, drawn(3, 32)).median())
    steered = when(
        ac.Add("blocks.1.resid.mid", 4 * drawn(5, 32)),
        Similar(site, direction=drawn(3, 32), threshold=middle, over=over),
    )
    clamps = [before, steered]
    got = response_nll(model, asked, responses, clamps=clamps, batch_size=5).nll
    bare = response_nll(model, asked, responses, clamps=[before]).nll
    for i, row in enumerate(asked):
        rows, nll = Rows(model, alone=True), 0.0
        logits = rows.join(row, clamps)
        for token in responses[i].tolist():
            nll -= float(logits.double().log_softmax(-1)[token])
            logits = rows.step([token])[0]
        assert float(got[i]) == pytest.approx(nll, rel=1e-4)
    assert int(((got - bare).abs() > 1e-3).sum()) == 6
    # Of the rows that it is for, those that meet the condition.
    some = response_nll(model, asked, responses, clamps=[before, steered.at(rows=[0, 1, 2])], batch_size=12).nll
    assert torch.allclose(some[3:], bare[3:], rtol=1e-4)
    assert torch.allclose(some[:3], got[:3], rtol=1e-4)


def test_similarity_by_hand():
    h, c = drawn(0, 5, 7), drawn(1, 7)
    P = torch.outer(c, c) / (c @ c)
    for row, found in zip(h, similarity(h, c), strict=True):
        inside = torch.tanh(P @ row)
        assert float(found) == pytest.approx(float(row @ inside / row.norm() / inside.norm()), rel=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_the_threshold_is_the_best_of_all_by_brute_force(flip):
    high, low = drawn(0, 30) + (-1 if flip else 1), drawn(1, 40)
    threshold, above, f1 = best_threshold(high, low)
    assert above is not flip

    def score(cut, up):
        called, other = ((x > cut) if up else (x < cut) for x in (high, low))
        right = int(called.sum())
        return 2 * right / max(right + int(other.sum()) + len(high), 1)

    cuts = torch.linspace(-6, 6, 4001).tolist()
    assert f1 == pytest.approx(score(threshold, above))
    assert f1 >= max(score(cut, up) for cut in cuts for up in (True, False)) - 1e-12


@pytest.mark.parametrize("over", ["mean", "last"])
def test_a_condition_sees_real_tokens_only_and_both_sides_of_its_threshold(model, over):
    site = "blocks.0.resid.post"
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    alone = [model.record(torch.tensor(row), site)[site][0] for row in rows]
    pooled = torch.stack([x.mean(0) if over == "mean" else x[-1] for x in alone])
    c = drawn(3, 32)
    found = similarity(pooled, c)
    middle = float(found.sort().values[1:].mean())
    for above in (True, False):
        condition = Similar(site, direction=c, threshold=middle, above=above, over=over)
        clamp = when(ac.Add("blocks.1.resid.post", 3 * drawn(4, 32)), condition)
        with model.clamp(clamp):
            got = model.logits(rows)
        bare = model.logits(rows)
        changed = [not torch.allclose(got[i, : len(row)], bare[i, : len(row)]) for i, row in enumerate(rows)]
        assert changed == ((found > middle) if above else (found < middle)).tolist()


def test_the_prompt_decides_for_the_whole_sequence(model):
    site = "blocks.0.resid.post"
    ids = torch.cat([prompts(1, 2, 0), prompts(2, 2, 0)])
    condition = Condition(site).fit(model, prompts(1, 20, 1), prompts(2, 20, 2))
    assert condition.f1 == 1.0
    add = ac.Add("blocks.1.resid.post", 4 * drawn(5, 32))
    with model.clamp(when(add, condition)):
        got = model.generate(ids, max_new_tokens=10, eos_token_id=None).new
    with model.clamp(add):
        always = model.generate(ids, max_new_tokens=10, eos_token_id=None).new
    never = model.generate(ids, max_new_tokens=10, eos_token_id=None).new
    assert torch.equal(got[:2], always[:2])
    assert torch.equal(got[2:], never[2:])
    assert not torch.equal(always[:2], never[:2])
    # Without the latch the tokens that come are judged too, and they are not like a prompt of the category.
    from dataclasses import replace

    with model.clamp(when(add, replace(condition, latch=False))):
        anew = model.generate(ids, max_new_tokens=10, eos_token_id=None).new
    assert not torch.equal(anew[:2], always[:2])


def test_prompts_on_the_other_side_count_as_the_category_unless_signs_are_kept(tmp_path):
    """The first token's embedding is one vector for the category, and its opposite for the others."""
    model = ac.wrap(Subject.fresh(SubjectConfig(vocab=40, d_model=32, heads=2, layers=2, context=64), seed=2))
    model.module.get_input_embeddings().weight.data[3] = -model.module.get_input_embeddings().weight.data[1]
    site = "embed"
    plain, signed = (
        Condition(site, over="last", signed=flag).fit(model, prompts(1, 20, 1, 1), prompts(3, 20, 2, 1))
        for flag in (False, True)
    )
    assert plain.f1 == pytest.approx(2 / 3)  # all of them or none
    assert signed.f1 == 1.0
    rows = torch.tensor([[1], [3]])
    assert signed.holds(model.record(rows, site)[site], None).tolist() == [True, False]
    clamp = when(ac.Add("blocks.1.resid.post", drawn(1, 32)), signed)
    (loaded,) = load_clamps(save_clamps(tmp_path / "signed", clamp), model)
    assert loaded.when.signed
    assert loaded.when.holds(model.record(rows, site)[site], None).tolist() == [True, False]


def test_a_condition_tells_prompts_that_it_was_not_fitted_on(model):
    condition = Condition("blocks.0.resid.post").fit(model, prompts(1, 30, 1), prompts(2, 30, 2))
    high, low = (model.record(prompts(k, 50, 10 + k), condition.site)[condition.site].mean(1) for k in (1, 2))
    scores = similarity(torch.cat([high, low]), condition.direction) * (1 if condition.above else -1)
    assert auroc(scores, [1] * 50 + [0] * 50) > 0.95
    shuffled = Condition("blocks.0.resid.post").fit(model, prompts(1, 30, 1), prompts(1, 30, 2))
    scores = similarity(torch.cat([high, low]), shuffled.direction)
    assert 0.1 < auroc(scores, [1] * 50 + [0] * 50) < 0.9


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("a", [1, 1, 0, 0]),
        ("a or b", [1, 1, 1, 0]),
        ("a and b", [1, 0, 0, 0]),
        ("a and not b", [0, 1, 0, 0]),
        ("not (a or b)", [0, 0, 0, 1]),
    ],
)
def test_rules(rule, wanted):
    flags = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}
    made = Rule(rule=rule, conditions={name: Similar("embed", direction=torch.ones(2)) for name in "ab"})
    assert made.combine(tuple(flags[name] for name in made.conditions)).int().tolist() == wanted


def test_a_rule_over_two_sites_in_a_model(model):
    def short(first, n, seed):
        return prompts(first, n, seed, length=2)

    one = Condition("blocks.0.resid.mid").fit(model, short(1, 30, 1), short(2, 30, 2))
    two = Condition("blocks.0.resid.post").fit(model, short(3, 30, 3), short(2, 30, 4))
    assert min(one.f1, two.f1) == 1.0
    rule = Rule(rule="not one and not two", conditions={"one": one, "two": two})
    ids = torch.cat([short(k, 3, 9) for k in (1, 3, 2)])
    with model.clamp(when(ac.Add("blocks.1.resid.post", 3 * drawn(4, 32)), rule)):
        got = model.logits(ids)
    changed = (got != model.logits(ids)).flatten(1).any(1)
    assert changed.tolist()[6:] == [True] * 3
    assert not changed[:6].any()


def test_conditions_are_saved_with_their_clamp(model, tmp_path):
    one = Condition("blocks.0.resid.post").fit(model, prompts(1, 20, 1), prompts(2, 20, 2))
    rule = Rule(rule="one", conditions={"one": one})
    ids = torch.cat([prompts(1, 2, 0), prompts(2, 2, 0)])
    for condition in (one, rule):
        clamp = when(ac.Add("blocks.1.resid.post", 3 * drawn(4, 32)), condition)
        (loaded,) = load_clamps(save_clamps(tmp_path / type(condition).__name__, clamp), model)
        with model.clamp(clamp):
            wanted = model.logits(ids)
        with model.clamp(loaded):
            assert torch.equal(model.logits(ids), wanted)


@pytest.mark.parametrize("rule", ["a +", "a + b", "f(a)", "", "a; b", "a if b else a", "1"])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ClampError, match="is not a rule"):
        Rule(rule=rule, conditions={name: Similar("embed", direction=torch.ones(2)) for name in "ab"})


def test_bad_conditions(model):
    with pytest.raises(ClampError, match=r"names 'harn'.*nearest: harm"):
        Rule(rule="harn", conditions={"harm": Similar("embed", direction=torch.ones(2))})
    one = Similar("embed", direction=torch.ones(2))
    with pytest.raises(ClampError, match="'inner' is a rule itself"):
        Rule(rule="not inner", conditions={"inner": Rule(rule="one", conditions={"one": one})})
    with pytest.raises(ClampError, match="direction"):
        Similar("embed")
    with pytest.raises(ClampError, match="direction"):
        Similar("embed", direction=torch.zeros(3))
    with pytest.raises(MeasureError, match="3 prompts of the category are too few"):
        Condition().fit(model, prompts(1, 3, 0), prompts(2, 9, 0))
    wide = when(ac.Add("blocks.1.resid.post", 1.0), Similar("embed", direction=torch.ones(5)))
    with pytest.raises(ClampError, match="width 5"), model.clamp(wide):
        model.logits(prompts(1, 2, 0))
    late = when(ac.Add("blocks.0.resid.post", 1.0), Similar("blocks.1.resid.post", direction=torch.ones(32)))
    with pytest.raises(ac.SiteError, match="reached after"):
        model.clamp(late)
