"""The page of an evaluation: what it says, and that it draws in a real browser."""

import json
import re

import pandas as pd
import personas
import pytest
from browser import CHROMIUM, Browser

from actome.report.steering_page import steering_page
from actome.steer import Contrast, evaluate


@pytest.fixture(scope="module")
def found():
    model, examples, pairs, _ = personas.persona()
    estimator = Contrast("blocks.{0..1}.resid.post")
    clamp = estimator.fit(model, examples)
    text = personas.trained()[0].pretrain_stream(32, 6, seed=99).tokens
    return evaluate(
        model, clamp, pairs, text=text, sites=list(clamp.directions), positions=("all", "last"), strengths=(0.5, 1, 30),
        random=2, shuffled=1, estimator=estimator, data=examples, new_tokens=6, allowed=9.0,
    )  # fmt: skip


def specs(html):
    return json.loads(re.search(r'<script type="application/json" id="specs">(.*?)</script>', html, re.S).group(1))


def numbers(spec):
    """The rows that a figure is drawn from: the most of all that it holds."""
    return max((*spec.get("datasets", {}).values(), spec.get("data", {}).get("values", [])), key=len)


def test_the_page_says_what_was_found(found):
    html = steering_page(found, "the <other> persona").html
    assert "the &lt;other&gt; persona" in html
    assert "<other>" not in html
    assert found.why.split(":")[0].split("(")[0].strip() in html
    assert f"{found.held_out['gain'][0]:+.2f}" in html
    assert 30.0 in found.collapsed.query("site == 'blocks.0.resid.post' and positions == 'all'")["strength"].tolist()
    assert "The model comes apart at blocks.0.resid.post (all), strength" in html
    assert len(found.samples) == len({0.0, found.strength, 30.0})
    assert str(found.samples[0]["prompts"][0]) in html
    drawn = specs(html)
    assert {"dose-preference", "dose-nll", "trade-nll", "trade-utility", "sweep-preference"} <= set(drawn)
    # What is drawn is what was measured, at the place that is recommended.
    rows = pd.DataFrame(numbers(drawn["dose-preference"]))
    want = found.curve("preference")
    got = rows[rows["arm"] == "fitted"].sort_values("strength")
    assert got["value"].tolist() == pytest.approx(want["value"].tolist(), rel=1e-4)
    assert len(rows[rows["arm"] == "random"]) == 2 * 4
    assert len(numbers(drawn["sweep-preference"])) == 2 * 2 * 4


def test_nothing_recommended_is_said():
    model, examples, pairs, _ = personas.persona()
    clamp = Contrast("blocks.1.resid.post").fit(model, examples)
    found = evaluate(model, clamp.at(scale=1e-6), pairs, strengths=(1,), random=1, new_tokens=0)
    html = steering_page(found).html
    assert "Nothing is recommended" in html
    assert found.samples == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_all_of_it(found, tmp_path):
    path = steering_page(found).save_html(tmp_path / "page.html")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        drawn = browser.run(
            "Object.fromEntries([...document.querySelectorAll('[data-figure]')].map((one) => "
            "[one.dataset.figure, one.querySelectorAll('svg .role-mark path').length]))"
        )
        assert set(drawn) == set(specs(path.read_text()))
        assert all(drawn.values()), drawn
        assert browser.problems == []
        assert [one for one in browser.asked if not one.startswith(("file:", "data:", "about:"))] == []
