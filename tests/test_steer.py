"""Directions against closed forms, and contrasts against a persona that was planted in a small model."""

import numpy as np
import personas
import pytest
import torch

import actome as ac
from actome.core.errors import MeasureError
from actome.steer import (
    Contrast,
    Examples,
    Manifold,
    Pairs,
    direction,
    gap,
    odds,
    states,
)
from actome.steer.likelihood import response_nll, text_nll


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- directions -------------------------------------------------------------------------------------------------------


def planted(n=400, d=12):
    """Two sets that differ along one axis, with a strong nuisance along another that leans on it."""
    true = torch.nn.functional.normalize(drawn(0, d), dim=0)
    other = torch.nn.functional.normalize(drawn(1, d) - (drawn(1, d) @ true) * true, dim=0)
    nuisance = 4 * torch.nn.functional.normalize(other + true, dim=0)
    high = drawn(2, n, d) * 0.3 + drawn(3, n, 1) * nuisance + true
    low = drawn(4, n, d) * 0.3 + drawn(5, n, 1) * nuisance - true
    return high, low, true, nuisance


def test_lda_is_fishers_and_passes_over_what_varies_anyway():
    high, low, true, nuisance = planted()
    means, lda = direction(high, low, "means"), direction(high, low, "lda")
    within = torch.cat([high - high.mean(0), low - low.mean(0)]).double()
    fisher = torch.linalg.solve(within.T @ within / len(within), (high.mean(0) - low.mean(0)).double())
    assert float(lda.double() @ fisher / fisher.norm()) > 0.999  # but for the shrinkage
    nuisance = nuisance / nuisance.norm()
    assert abs(float(lda @ nuisance)) < 0.05
    assert float(means @ true) > 0.9

    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = torch.cat([high, low]).numpy(), np.repeat([1, 0], len(high))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y).coef_[0]
    # Theirs shrinks each class by itself, after standardising.
    assert float(lda @ torch.from_numpy(theirs).float()) / np.linalg.norm(theirs) > 0.99


def test_means_is_the_difference_and_the_gap_its_length():
    high, low, *_ = planted()
    apart = high.double().mean(0) - low.double().mean(0)
    torch.testing.assert_close(direction(high, low).double(), apart / apart.norm(), rtol=1e-5, atol=1e-6)
    assert gap(direction(high, low), high, low) == pytest.approx(float(apart.norm()), rel=1e-5)


def test_pca_takes_pairs_centred_on_themselves_and_turns_upwards():
    base = 5 * drawn(0, 60, 8)  # what pairs share must not matter
    step = torch.zeros(8)
    step[3] = 1.0
    high, low = base + step + 0.1 * drawn(1, 60, 8), base - step + 0.1 * drawn(2, 60, 8)
    assert float(direction(high, low, "pca")[3]) > 0.99
    assert float(direction(low, high, "pca")[3]) < -0.99
    with pytest.raises(MeasureError, match="takes pairs"):
        direction(high, low[:50], "pca")


def test_logistic_agrees_with_scikit_learn_on_plain_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    high, low, *_ = planted()
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    fit.fit(torch.cat([high, low]).double().numpy(), np.repeat([1, 0], len(high)))
    wanted = torch.from_numpy(fit[1].coef_[0] / fit[0].scale_)
    found = direction(high, low, "logistic").double()
    assert float(found @ wanted / wanted.norm()) > 0.9999


@pytest.mark.parametrize(
    ("high", "low", "method", "words"),
    [
        (drawn(0, 1, 4), drawn(1, 9, 4), "means", "two examples at least"),
        (drawn(0, 9, 4), drawn(1, 9, 5), "means", "widths 4 and 5"),
        (drawn(0, 9, 4) * float("nan"), drawn(1, 9, 4), "lda", "not finite"),
        (torch.ones(9, 4), torch.ones(9, 4), "means", "are the same"),
        (drawn(0, 9, 4), drawn(1, 9, 4), "mean", "choose means"),
    ],
)
def test_what_is_no_contrast_is_refused(high, low, method, words):
    with pytest.raises(MeasureError, match=words):
        direction(high, low, method)


# -- states -----------------------------------------------------------------------------------------------------------


def test_states_are_those_of_the_chosen_tokens_whatever_the_padding():
    model = ac.demo()
    rows = [[5, 6, 7, 8], [9, 10]]
    site = "blocks.1.resid.post"
    alone = [model.record(torch.tensor(row), site)[site][0] for row in rows]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(states(model, rows, site)[site], torch.stack([x[-1] for x in alone]), **close)
    mean = states(model, rows, site, over="mean", batch_size=1)[site]
    torch.testing.assert_close(mean, torch.stack([x.mean(0) for x in alone]), **close)
    pairs = ([row[:1] for row in rows], [row[1:] for row in rows])
    for over, pick in [("response", lambda x: x[1:].mean(0)), ("prompt", lambda x: x[0]), ("last", lambda x: x[-1])]:
        found = states(model, pairs, site, over=over)[site]
        torch.testing.assert_close(found, torch.stack([pick(x) for x in alone]), **close)


def test_states_say_what_is_wrong():
    model = ac.demo()
    for examples, options, words in [
        (["a"], {"over": "end"}, "choose last, mean"),
        (["a"], {"over": "response"}, "prompts with responses"),
        ("one text", {}, "list of examples"),
        ((["a"], ["b", "c"]), {}, "1 prompts and 2 responses"),
    ]:
        with pytest.raises(MeasureError, match=words):
            states(model, examples, "blocks.0.resid.post", **options)
    with pytest.raises(MeasureError, match="one vector a token"):
        states(model, ["a"], "blocks.0.attn.pattern")


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        (["a"] * 3, ["b"] * 9, "3 positive examples are too few"),
        (["a"] * 9, [], "no negative example"),
        ("text", ["b"] * 9, "give the positive examples as a list"),
        ((["a"] * 9, ["b"] * 9), ["b"] * 9, "or neither"),
    ],
)
def test_too_few_examples_or_one_kind_only_are_refused(high, low, words):
    with pytest.raises(MeasureError, match=words):
        Examples(high, low)


# -- likelihood -------------------------------------------------------------------------------------------------------


def test_likelihoods_against_a_loop():
    model = ac.demo()
    prompts, responses = [[4, 5, 6], [7]], [[8], [9, 10, 11]]
    found = response_nll(model, prompts, responses)
    for i, (a, b) in enumerate(zip(prompts, responses, strict=True)):
        logp = model.logits(torch.tensor(a + b))[0].double().log_softmax(-1)
        wanted = -sum(float(logp[len(a) - 1 + j, token]) for j, token in enumerate(b))
        assert float(found.nll[i]) == pytest.approx(wanted, rel=1e-4)
    row = torch.tensor([[4, 5, 6, 7, 8]])
    logp = model.logits(row)[0].double().log_softmax(-1)
    wanted = -float(logp[:-1].gather(1, row[0, 1:, None]).sum())
    assert float(text_nll(model, row).nll[0]) == pytest.approx(wanted, rel=1e-4)
    assert int(text_nll(model, row).tokens[0]) == 4


def test_log_odds_by_hand():
    model = ac.demo()
    pairs = Pairs([[4, 5]], [[8]], [[9]])
    p = model.logits(torch.tensor([4, 5]))[0, -1].double().softmax(-1)
    found = odds(model, pairs)
    assert float(found.preference) == pytest.approx(float((p[8] / p[9]).log()), rel=1e-4)
    u = p[8] + p[9]
    assert float(found.utility) == pytest.approx(float((u / (1 - u)).log()), rel=1e-4)


# -- a planted persona ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="persona")
def persona_():
    return personas.persona()


@pytest.mark.parametrize("method", ["means", "lda", "pca", "logistic"])
def test_a_contrast_finds_the_planted_persona(persona, method):
    model, examples, pairs, (bad, good) = persona
    clamp = Contrast("blocks.1.resid.post", method=method).fit(model, examples)
    assert clamp.separation[clamp.site] > 0.95
    # On questions that were not fitted on.
    assert float((clamp.monitor(model, bad)[:, None] > clamp.monitor(model, good)).float().mean()) > 0.95
    before = float(odds(model, pairs).preference.mean())
    with model.clamp(clamp):
        assert float(odds(model, pairs).preference.mean()) > before + 2
    with model.clamp(clamp.at(scale=-1.0)):
        assert float(odds(model, pairs).preference.mean()) < before - 2
    random = drawn(9, 64)
    with model.clamp(clamp.at(value=random / random.norm() * clamp.value.norm())):
        assert abs(float(odds(model, pairs).preference.mean()) - before) < 1.5


def test_taking_the_direction_out_makes_personas_alike(persona):
    model, examples, _, (bad, good) = persona
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    with model.clamp(clamp.ablate()):
        apart = clamp.monitor(model, bad).mean() - clamp.monitor(model, good).mean()
    assert abs(float(apart)) < 1e-3 * float(clamp.value.norm())


def test_off_the_manifold_is_far():
    basis = drawn(0, 3, 20)
    clean = drawn(1, 500, 3) @ basis + 0.1 * drawn(2, 500, 20)
    found = Manifold.fit(clean)
    fresh = drawn(3, 500, 3) @ basis + 0.1 * drawn(4, 500, 20)
    assert 0.8 < float((found.distance(fresh) ** 2).mean()) < 1.25
    assert float(found.distance(fresh + 2 * basis[0]).mean()) < 1.5
    assert float(found.distance(fresh + 2 * drawn(5, 20)).mean()) > 5
