"""Outcome probes against planted maps, another library, and inputs that know nothing."""

import math

import pytest
import torch

from actome.core.errors import MeasureError
from actome.explain import outcome_probe
from actome.explain.outcome_probe import soft_regression


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def planted():
    h = drawn(0, 600, 6) * torch.tensor([1, 5, 0.2, 1, 1, 1]) + torch.tensor([0, 10.0, 0, 0, 0, -3])
    weight = drawn(1, 6, 4) * torch.tensor([1, 0.2, 5, 1, 0, 0])[:, None]
    return h, (h @ weight + drawn(2, 4)).softmax(-1), weight


def test_a_planted_map_is_found(planted):
    h, o, weight = planted
    found = outcome_probe({"site": h}, o, others={"noise": drawn(3, 600, 6)}, penalties=(1e-8, 1e-4))
    assert found.of("site") < 1e-5
    fitted = found.maps["site"].weight
    torch.testing.assert_close(
        fitted - fitted.mean(1, keepdim=True), weight - weight.mean(1, keepdim=True), rtol=0.05, atol=0.02
    )
    torch.testing.assert_close(found.maps["site"](h), o, rtol=0, atol=5e-3)
    # What knows nothing is no better than the marginal, which is measured by hand here.
    held = found.held_out
    fit = torch.ones(600, dtype=torch.bool)
    fit[held] = False
    mean = o[fit].mean(0)
    by_hand = (o[held] * (o[held].log() - mean.log())).sum(-1).mean()
    assert found.of("marginal") == pytest.approx(float(by_hand))
    assert found.of("noise") > 0.97 * found.of("marginal")
    frame = found.frame.set_index("input")
    assert frame["kind"].to_dict() == {"site": "site", "noise": "other", "marginal": "marginal"}
    assert frame.loc["site", "explained"] > 0.999
    assert frame.loc["marginal", "low"] < frame.loc["marginal", "kl"] < frame.loc["marginal", "high"]


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_soft_regression_is_weighted_logistic_regression(planted, penalty):
    from sklearn.linear_model import LogisticRegression

    h, o, _ = planted
    z = (h - h.mean(0)) / h.std(0)
    # Each row once for each class, with the class's probability as its weight.
    rows, labels = z.repeat_interleave(4, 0), torch.arange(4).repeat(600)
    other = LogisticRegression(C=1 / (penalty * 600), tol=1e-8, max_iter=5000)
    other.fit(rows.numpy(), labels.numpy(), sample_weight=o.flatten().numpy())
    expected = torch.from_numpy(other.predict_proba(z.numpy()))
    torch.testing.assert_close(soft_regression(h, o, penalty)(h), expected, rtol=0, atol=2e-4)


def test_a_start_saves_steps_and_changes_nothing(planted):
    h, o, _ = planted
    smooth = soft_regression(h, o, 1e-1)
    torch.testing.assert_close(
        soft_regression(h, o, 1e-2, smooth)(h), soft_regression(h, o, 1e-2)(h), rtol=0, atol=2e-4
    )


def test_groups_stay_on_one_side():
    # Each group has a distribution of its own that its number tells by heart; nothing carries over to other groups.
    group = torch.arange(60).repeat_interleave(10)
    o = torch.softmax(2 * drawn(0, 60, 3), -1)[group]
    x = torch.nn.functional.one_hot(group).double()
    by_rows = outcome_probe({"x": x}, o, penalties=(1e-4,))
    by_groups = outcome_probe({"x": x}, o, groups=group, penalties=(1e-4,))
    assert by_rows.of("x") < 0.1 * by_rows.of("marginal")
    assert by_groups.of("x") > 0.9 * by_groups.of("marginal")
    held = set(group[by_groups.held_out].tolist())
    assert len(by_groups.held_out) == 10 * len(held)


def test_dtypes_constant_units_and_impossible_outcomes(planted):
    h, o, _ = planted
    o = o.clone()
    o[:, 3] = 0
    o = o / o.sum(-1, keepdim=True)
    x = torch.cat([h, torch.full((600, 1), 7.0)], 1).to(torch.bfloat16)
    found = outcome_probe({"x": x}, o)
    assert math.isfinite(found.of("x"))
    assert found.of("x") < 0.05
    assert float(found.maps["x"].weight[-1].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, o: ({"x": h[:10]}, o, {}), r"x has the shape \(10, 6\), and there are 600"),
        (lambda h, o: ({"x": h}, 2 * o, {}), "no distribution"),
        (lambda h, o: ({"x": h}, o[:, 0], {}), "distributions"),
        (lambda h, o: ({"x": h * math.inf}, o, {}), "not finite"),
        (lambda h, o: ({}, o, {}), "no site to probe"),
        (lambda h, o: ({"x": h}, o, {"others": {"x": h}}), "'x' is used twice"),
        (lambda h, o: ({"marginal": h}, o, {}), "'marginal' is used twice"),
        (lambda h, o: ({"x": h}, o, {"groups": torch.arange(600) // 60}), "10 rows or groups"),
        (lambda h, o: ({"x": h}, o, {"test": 0.5}), "a share below a half"),
        (lambda h, o: ({"x": h}, o, {"groups": torch.arange(3)}), r"groups has the shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(planted, change, message):
    states, outcomes, options = change(*planted[:2])
    with pytest.raises(MeasureError, match=message):
        outcome_probe(states, outcomes, **options)


def test_an_unknown_input_is_named_with_those_there_are(planted):
    h, o, _ = planted
    with pytest.raises(MeasureError, match="'y' was not looked at; there are x, marginal"):
        outcome_probe({"x": h}, o, penalties=(1e-2,)).of("y")
