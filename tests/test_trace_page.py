"""The page of a trace: escaped, small, with a slider that everything follows, in a real browser where there is one."""

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Browser
from scans import HOSTILE

from actome.dynamics import Trace
from actome.report.trace import page
from actome.report.trace_data import page_data

STEPS = [0, 10, 30, 100, 300, 1000, 3000]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


def invented(layers: int = 4, heads: int = 3, steps=STEPS) -> Trace:
    draw = np.random.default_rng(0)
    rows = [{"step": step, "measure": "loss", "value": 5.0 - i / 2} for i, step in enumerate(steps)]
    for i, step in enumerate(steps):
        for layer in range(layers):
            place = {"step": step, "site": f"blocks.{layer}.resid.post", "layer": layer}
            rank = 10 + abs(i - 2) * (layer + 1) + 0.01 * draw.random()
            rows += [{**place, "measure": "effective_rank", "value": rank}]
            rows += [{**place, "measure": "effective_rank_share", "value": rank / 100}]
            rows += [{**place, "measure": "rms", "value": np.nan if step == 30 else float(i + layer)}]
            pattern = {"step": step, "site": f"blocks.{layer}.attn.pattern", "layer": layer}
            rows += [{**pattern, "head": h, "measure": "induction", "value": i * h / 20} for h in range(heads)]
    about = {"source": HOSTILE, "panel": "geometry", "model": {"class": HOSTILE, "layers": layers}}
    return Trace(pd.DataFrame(rows), about, {77: HOSTILE}, (HOSTILE,))


def test_what_the_page_draws():
    data = page_data(invented())
    assert data["steps"] == STEPS
    stacks = {(one["measure"], one["place"]): one for one in data["stacks"]}
    rms = stacks["rms", None]
    assert rms["steps"] == [step for step in STEPS if step != 30]  # where nothing is finite there is no cell
    assert [row[0] for row in rms["values"]] == [0, 1, 2, 3]
    heads = stacks["induction", "head"]
    assert np.shape(heads["values"]) == (4, 7, 3)
    assert heads["values"][2][4][1] == pytest.approx(0.2)
    assert [one["measure"] for one in data["lines"]] == ["loss"]


def test_the_page_is_escaped_and_stays_small_for_long_runs():
    html = page(invented())
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html
    assert "warm-up collapse" in html
    long = page(invented(layers=3, heads=2, steps=list(range(0, 100_000, 100))))
    assert len(long) < 5_000_000
    lonely = page(Trace(pd.DataFrame({"step": [1], "measure": "loss", "value": [2.0]})))
    assert 'id="step"' not in lonely


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "trace.html"
    invented().to_html(path)
    return path.as_uri()


@pytest.fixture
def browser(address, tmp_path):
    with Browser(tmp_path) as started:
        started.open(address)
        yield started
        assert started.problems == []
        assert [one for one in started.asked if not one.startswith(("file:", "data:", "about:"))] == []


PROFILE = "document.querySelector('[data-figure=\"profile-rms-resid-post-layer\"]')"


def told(browser: Browser) -> float:
    """The value of the last point of the profile."""
    return browser.run(f"[...{PROFILE}.querySelectorAll('.mark-symbol.role-mark path')].at(-1).__data__.datum.value")


def choose(browser: Browser, name: str, value: str, event: str) -> None:
    """Sets a control as a reader does."""
    code = (
        f"const one = document.getElementById('{name}'); one.value = '{value}'; one.dispatchEvent(new Event('{event}'))"
    )
    browser.run(f"(() => {{ {code} }})()")


@needs_browser
def test_everything_follows_the_slider(browser):
    assert browser.run("document.querySelectorAll('[data-figure]').length") == 7
    assert told(browser) == 9  # step 3000, layer 3
    browser.run("document.getElementById('step').focus()")
    for _ in range(3):
        browser.press("ArrowLeft")
    browser.until("document.documentElement.dataset.step === '100'")
    assert told(browser) == 6
    assert browser.run("document.getElementById('step-name').textContent") == "100"
    assert browser.run("document.querySelector('#profiles .now').textContent") == "100"
    browser.press("ArrowLeft")  # rms has no value there: the figure stays at the last step that has one
    browser.until("document.documentElement.dataset.step === '30'")
    assert told(browser) == 4

    browser.run("document.getElementById('play').click()")
    browser.until("document.documentElement.dataset.step === '3000'")
    browser.until("document.getElementById('play').getAttribute('aria-pressed') === 'false'")


@needs_browser
def test_maps_axes_filter_and_phases(browser):
    before = browser.run("document.querySelectorAll('#grid-curves .mark-rule line').length")
    assert before >= 2  # the slider's step and a phase in each curve
    choose(browser, "view", "map", "change")
    browser.settle()
    cells = "document.querySelectorAll('[data-figure=\"map-rms-resid-post-layer\"] .mark-rect.role-mark path').length"
    assert browser.run(cells) == 4 * 6 + 4  # and the frames around the slider's step
    choose(browser, "axis", "linear", "change")
    browser.settle()
    choose(browser, "seek", "rms", "input")
    assert browser.run("[...document.querySelectorAll('figure')].filter((one) => !one.hidden).length") == 2
    assert browser.run("document.querySelector('.hits').textContent") == "Shown: figures 2"


@needs_browser
def test_dark_and_narrow(browser):
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.scheme("dark")
    browser.settle()
    assert browser.run("getComputedStyle(document.body).backgroundColor") != light
    browser.resize(400, 800)
    browser.settle()
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.run("getComputedStyle(document.querySelector('nav')).position") == "sticky"
