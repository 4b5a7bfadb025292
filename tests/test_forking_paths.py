"""Forking paths against enumeration of every path; change points against enumeration of every parting."""

import itertools
import math

import pytest
import torch

import actome as ac
from actome.core.continuations import continuations
from actome.core.errors import MeasureError
from actome.decode import change_points, forking_paths
from actome.tasks import Subject, SubjectConfig

VOCAB, STOP = 4, 3


@pytest.fixture(scope="module")
def model():
    config = SubjectConfig(vocab=VOCAB, d_model=16, layers=1, heads=2, context=12, init=4.0)
    return ac.wrap(Subject.fresh(config, seed=3))


def parity(ids):
    return sum(ids) % 2


def enumerated(model, prefix, left, temperature=1.0):
    """P(outcome) after a prefix of new tokens, by going through every path."""
    if left == 0 or (len(prefix) > 1 and prefix[-1] == STOP):
        return torch.tensor([1.0 - parity(prefix[1:]), parity(prefix[1:])], dtype=torch.float64)
    p = (model.logits(torch.tensor([prefix]))[0, -1].double() / temperature).softmax(-1)
    return sum(p[w] * enumerated(model, [*prefix, w], left - 1, temperature) for w in range(VOCAB))


def columns(found):
    """Chances of outcomes 0 and 1, whatever the order in which they were met."""
    index = {one: i for i, one in enumerate(found.outcomes)}
    none = torch.zeros(len(found.base), dtype=torch.float64)
    return torch.stack([found.distribution[:, index[o]] if o in index else none for o in (0, 1)], 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distributions_are_those_of_all_paths(model, temperature):
    found = forking_paths(
        model, [0], parity, max_new_tokens=4, samples=400, threshold=0.0, stop=STOP, base=[1, 0, 2, 1],
        temperature=temperature, batch_size=2000, seed=1,
    )  # fmt: skip
    exact = torch.stack([enumerated(model, [0, *[1, 0, 2][:t]], 4 - t, temperature) for t in range(4)])
    torch.testing.assert_close(found.mass, torch.ones(4, dtype=torch.float64))
    # At least 400 draws: three standard errors are 0.075.
    assert float((columns(found) - exact).abs().max()) < 0.075
    # Before the last token nothing is left to sample.
    torch.testing.assert_close(columns(found)[3], exact[3], rtol=1e-6, atol=1e-6)


def test_only_what_is_likely_is_followed_and_the_path_itself_always(model):
    base = [2, 2, 2]
    p = model.logits(torch.tensor([[0, *base]]))[0, :-1].double().softmax(-1)
    found = forking_paths(model, [0], parity, max_new_tokens=3, samples=3, threshold=0.3, stop=STOP, base=base)
    for t, some in found.frame.groupby("pos"):
        wanted = {w for w in range(VOCAB) if p[t, w] > 0.3} | {2}
        assert set(some["token"]) == wanted
        assert float(found.mass[t]) == pytest.approx(float(p[t, sorted(wanted)].sum()), abs=1e-6)
        assert set(some[some["base"]]["token"]) == {2}
    top = forking_paths(model, [0], parity, max_new_tokens=3, samples=3, top=2, stop=STOP, base=base)
    for t, some in top.frame.groupby("pos"):
        assert set(some["token"]) == {*p[t].topk(2).indices.tolist(), 2}
    shares = found.frame.groupby(["pos", "token"])["share"].sum()
    assert shares.round(9).eq(1).all()


def test_the_base_path_is_greedy_and_ends_at_a_stop(model):
    greedy = model.generate(torch.tensor([[0]]), max_new_tokens=6, eos_token_id=STOP).new[0].tolist()
    found = forking_paths(model, [0], parity, max_new_tokens=6, samples=2, stop=STOP)
    assert list(found.base) == greedy
    assert found.outcomes[0] == parity(greedy)
    assert found.table["token"].tolist() == greedy
    assert (found.table["p"] > 1 / VOCAB).all()


def test_a_sure_path_is_worth_its_samples_and_two_even_ones_twice_as_many(model):
    found = forking_paths(model, [0], parity, max_new_tokens=3, samples=5, top=1, stop=STOP)
    torch.testing.assert_close(found.effective, torch.full((len(found.base),), 5.0, dtype=torch.float64))
    both = forking_paths(model, [0], parity, max_new_tokens=3, samples=5, top=2, stop=STOP)
    assert (both.effective >= 5 - 1e-9).all()
    assert (both.effective <= 10 + 1e-9).all()


def test_seeds_and_the_callers_random_state(model):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (
        forking_paths(model, [0], parity, max_new_tokens=4, samples=8, stop=STOP, seed=seed).distribution
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_is_judged_as_text():
    seen = []

    def outcome(text):
        seen.append(text)
        return text.count("e") > 1

    found = forking_paths(ac.demo(), "import ", outcome, max_new_tokens=3, samples=2, top=2)
    assert all(isinstance(one, str) for one in seen)
    assert set(found.outcomes) <= {True, False}


def test_clamps_hold_on_every_path(model):
    with model.clamp(ac.Set("logits", torch.tensor([0.0, 50.0, 0.0, 0.0]))):
        found = forking_paths(model, [0], parity, max_new_tokens=3, samples=4, stop=STOP)
    assert found.base == (1, 1, 1)
    assert found.outcomes == (1,)


def test_continuations_are_drawn_from_the_whole_distribution(model):
    drawn = [one[0] for one in continuations(model, [[0]], 4000, 1, batch_size=4000)[0]]
    p = model.logits(torch.tensor([[0]]))[0, -1].double().softmax(-1)
    counted = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / 4000
    assert float((counted - p).abs().max()) < 4 * 0.5 / math.sqrt(4000)


def test_what_a_generation_configuration_cuts_and_punishes_does_not_hold():
    config = SubjectConfig(vocab=200, d_model=8, layers=1, heads=2, context=12)
    subject = Subject.fresh(config, seed=0)
    with torch.no_grad():
        subject.unembed.weight.zero_()  # every token as likely as every other
    for name, value in {"top_k": 3, "top_p": 0.1, "min_p": 0.9, "repetition_penalty": 5.0}.items():
        setattr(subject.generation_config, name, value)
    found = continuations(ac.wrap(subject), [[0]], 2000, 1, batch_size=2000)[0]
    counted = torch.bincount(torch.tensor(found)[:, 0], minlength=200)
    assert int((counted > 0).sum()) == 200
    assert 0.7 < float((counted - 10.0).square().mean() / 10) < 1.35  # a multinomial's variance


def test_half_precision_and_several_texts():
    config = SubjectConfig(vocab=VOCAB, d_model=16, layers=1, heads=2, context=12)
    half = ac.wrap(Subject.fresh(config, seed=0).to(torch.bfloat16))
    found = forking_paths(half, [0], parity, max_new_tokens=3, samples=2, stop=STOP)
    assert found.distribution.dtype == torch.float64
    texts = ["import ", "def f(x, y):"]
    some = continuations(ac.demo(), texts, 2, 3, temperature=0)
    for text, rows in zip(texts, some, strict=True):
        assert rows[0] == rows[1] == ac.demo().generate(text, max_new_tokens=3).new[0].tolist()


def test_prompts_of_several_lengths_keep_their_order(model):
    rows = [[0], [1, 2, 1], [2, 0]]
    found = continuations(model, rows, 2, 3, temperature=0, stop=STOP)
    for row, some in zip(rows, found, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=3, eos_token_id=STOP).new[0].tolist()
        assert some == [alone, alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"top": 0}, "top=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"base": [0] * 9}, "base path of 9 tokens"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(MeasureError, match=message):
        forking_paths(model, [0], parity, **{"max_new_tokens": 4, "stop": STOP} | options)


def test_bad_prompts_and_outcomes_are_refused(model):
    with pytest.raises(MeasureError, match="one prompt at a time, not 2"):
        forking_paths(model, [[0], [1]], parity)
    with pytest.raises(MeasureError, match="a list, which cannot be counted"):
        forking_paths(model, [0], lambda ids: ids, max_new_tokens=2)


# -- change points ----------------------------------------------------------------------------------------------------


def by_enumeration(counts, prior, concentration):
    """Posterior of a change at each position, the best parting, and the Bayes factor, over all partings."""
    T, C = counts.shape

    def stretch(n):
        a = n.sum(0) + concentration
        return float(
            torch.lgamma(a).sum() - torch.lgamma(a.sum())
            - C * math.lgamma(concentration) + math.lgamma(C * concentration)
        )  # fmt: skip

    weights = {}
    for flags in itertools.product([0, 1], repeat=T - 1):
        starts = [0, *(i + 1 for i, flag in enumerate(flags) if flag)]
        ends = [*starts[1:], T]
        log = sum(stretch(counts[a:b]) for a, b in zip(starts, ends, strict=True))
        log += sum(flags) * math.log(prior) + (T - 1 - sum(flags)) * math.log(1 - prior)
        weights[tuple(starts)] = log
    logs = torch.tensor(list(weights.values()), dtype=torch.float64)
    post = logs.softmax(0)
    change = torch.zeros(T, dtype=torch.float64)
    for p, starts in zip(post, weights, strict=True):
        change[list(starts)] += p
    change[0] = 0
    none = (0,)
    prior_none = (T - 1) * math.log(1 - prior)
    rest = torch.logsumexp(logs[[i for i, s in enumerate(weights) if s != none]], 0)
    factor = float(rest) - math.log(1 - math.exp(prior_none)) - (weights[none] - prior_none)
    return change, max(weights, key=weights.get), factor


@pytest.mark.parametrize(("prior", "concentration"), [(0.1, 0.5), (0.4, 1.0), (0.02, 2.0)])
def test_change_points_are_those_of_all_partings(prior, concentration):
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.7, 0.2, 0.1]] * 4 + [[0.1, 0.2, 0.7]] * 4)
    counts = torch.multinomial(p, 6, replacement=True, generator=g)
    counts = torch.nn.functional.one_hot(counts, 3).sum(1).double() * 0.7  # need not be whole
    change, starts, factor = by_enumeration(counts, prior, concentration)
    found = change_points(counts, prior=prior, concentration=concentration)
    torch.testing.assert_close(found.probability, change, rtol=1e-8, atol=1e-10)
    assert found.starts == starts
    assert found.expected == pytest.approx(float(change.sum()))
    assert found.evidence == pytest.approx(factor, rel=1e-6)


def test_a_planted_change_is_found_and_none_is_found_where_there_is_none():
    g = torch.Generator().manual_seed(1)

    def counted(shares):
        drawn = torch.multinomial(torch.tensor(shares), 20, replacement=True, generator=g)
        return torch.nn.functional.one_hot(drawn, 2).sum(1)

    jump, flat = counted([[0.8, 0.2]] * 9 + [[0.2, 0.8]] * 9), counted([[0.8, 0.2]] * 18)
    assert change_points(jump).starts == (0, 9)
    assert change_points(jump).evidence > 5
    assert change_points(flat).starts == (0,)
    assert change_points(flat).evidence < 0


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (torch.ones(1, 3), {}, "at least two positions"),
        (-torch.ones(3, 3), {}, "finite counts"),
        (torch.ones(3, 3), {"prior": 1.0}, "prior=1.0"),
        (torch.ones(3, 3), {"concentration": 0.0}, "concentration=0.0"),
    ],
)
def test_what_is_no_series_of_counts_is_refused(counts, options, message):
    with pytest.raises(MeasureError, match=message):
        change_points(counts, **options)
