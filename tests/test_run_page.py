"""The page of a run: what is on it, for every kind of run; its figures against all rows; and in a real browser."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from runs import training, written

from actome.cli.main import main
from actome.core.errors import RunError
from actome.dynamics import RunDigest, RunStore, merge
from actome.report.run_figures import run_figures
from actome.report.run_page import run_page
from actome.report.run_view import chosen

HOSTILE = "</script><b>\"a\" & 'b'"


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    kept, os.fsync = os.fsync, lambda _: None
    yield
    os.fsync = kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run") / "a")


def rows_of(figure) -> list[dict[str, str]]:
    """The numbers that a figure draws."""
    spec = figure.spec
    datasets = [spec.get("data"), *(layer.get("data") for layer in spec.get("layer", ()))]
    text = next(one["values"] for one in datasets if one and isinstance(one.get("values"), str))
    return list(csv.DictReader(io.StringIO(text)))


def figure_of(digest: RunDigest, key: str):
    return next(one for one in run_figures(digest, chosen(digest)) if one.key == key)


class Parser(html.parser.HTMLParser):
    """Every element closed in order, and what is loaded."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(finished):
    page = run_page(finished).html
    parser = Parser()
    parser.feed(page)
    assert (parser.open, parser.loads) == ([], [])
    assert len(set(parser.ids)) == len(parser.ids)
    assert len(page) < 2_000_000
    order = [page.index(f'id="{key}"') for key in ("alarms", "loss", "curves", "layers", "heads", "events", "numbers")]
    assert order == sorted(order)
    for words in ("Wortsman et al. 2023", "2 times, steps 200 to 300", "step100.pt", "AdamW", "will cross 50 at 1200"):
        assert words in page
    named = set(re.findall('data-figure="([^"]+)"', page))
    specs = json.loads(re.search('id="specs">(.*?)</script>', page, re.DOTALL)[1])
    assert named == set(specs)
    assert {"curve-loss", "layers-dead-mlp-act", "heads-induction-attn-pattern"} <= named


def test_whatever_things_are_called_is_text(tmp_path):
    with RunStore.create(tmp_path / "a", config={HOSTILE: HOSTILE}, name=HOSTILE) as run:
        for step in range(3):
            run.log(step, {HOSTILE: 1.0 + step})
            run.log(step, {"dead": 0.1}, site=f"blocks.0.{HOSTILE}")
        run.alarm(1, HOSTILE, HOSTILE, site=HOSTILE, advice=HOSTILE, evidence={HOSTILE: HOSTILE})
        run.event(HOSTILE, 1, what=HOSTILE)
    page = run_page(tmp_path / "a").html
    assert "</script><b>" not in page
    parser = Parser()
    parser.feed(page)
    assert parser.open == []


@pytest.mark.parametrize("steps", [700, 5000])
def test_thinning_keeps_means_and_extremes(tmp_path, steps):
    """Every row is in one column of the figure; each column has the mean, least and greatest of its rows."""
    rng = np.random.default_rng(steps)
    values = rng.standard_normal(steps)
    values[steps // 3] = 99.0
    with RunStore.create(tmp_path / "a") as run:
        for step, value in enumerate(values):
            run.log(step, {"loss": value, "accuracy": value})
    digest = RunDigest(RunStore.open(tmp_path / "a"))
    digest.refresh()
    for key, most in (("curve-loss", 480), ("curve-accuracy", 160)):
        rows = rows_of(figure_of(digest, key))
        assert len(rows) <= most
        assert int(rows[0]["from"]) == 0
        assert int(rows[-1]["to"]) == steps - 1
        for row, after in zip(rows, [*rows[1:], {"from": steps}], strict=True):
            assert int(row["to"]) + 1 == int(after["from"])
            part = values[int(row["from"]) : int(row["to"]) + 1]
            drawn = [float(row[name]) for name in ("mean", "low", "high")]
            np.testing.assert_allclose(drawn, [part.mean(), part.min(), part.max()], rtol=5e-5)  # five digits


def test_a_long_run_gives_a_small_page(tmp_path):
    """Not by how many rows there are, but by how many columns of how many series."""
    with RunStore.create(tmp_path / "a") as run:
        for _ in training(run, 600, layers=24, heads=4, every=20):
            pass
    short = run_page(tmp_path / "a").html
    assert len(short) < 3_000_000
    digest = RunDigest(RunStore.open(tmp_path / "a"))
    digest.refresh()
    (panel,) = (one for one in run_figures(digest, ["attention_logit_max"]))
    assert panel.spec["mark"]["type"] == "rect"
    assert len({row["name"] for row in rows_of(panel)}) == 24


def test_a_map_of_heads_shows_the_largest_of_each_layer(finished):
    digest = RunDigest(RunStore.open(finished))
    digest.refresh()
    last = [row for row in rows_of(figure_of(digest, "layers-sink_excess-attn-pattern")) if row["name"] == "2"][-1]
    assert [float(last[key]) for key in ("mean", "low", "high")] == pytest.approx([0.6, 0.3, 0.6])


def test_what_is_not_finite_is_said(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        for step in range(20):
            run.log(step, {"loss": 2.0 if step < 12 else np.nan})
            run.log(step, {"rms": np.inf if step == 4 else 1.0}, site="blocks.0.resid.post", layer=0)
    page = run_page(tmp_path / "a").html
    assert "8 not finite, the first at step 12" in page
    assert "layer 0: 1 not finite, the first at step 4" in page


def test_runs_that_say_little(tmp_path):
    with RunStore.create(tmp_path / "a") as run:
        page = run_page(run).html
        assert "Nothing is logged yet." in page
        assert "Still written when this page was made." in page
        assert "No alarm was raised." in page
        run.log(0, {"loss": np.nan})
        run.log(0, {"rate": 1.0}, unit=4)
        assert "Not shown: 1 series of single units" in run_page(run).html
    with pytest.raises(ValueError, match="bad"), RunStore.create(tmp_path / "b"):
        raise ValueError("bad")
    assert "ValueError: bad" in run_page(tmp_path / "b").html


def test_one_of_several(finished, tmp_path):
    other = written(tmp_path / "b", 20)
    merge([finished, other], tmp_path / "both")
    with pytest.raises(RunError, match="name one of them"):
        run_page(tmp_path / "both")
    assert "<title>b – actome run</title>" in run_page(tmp_path / "both", "b").html


def test_the_command_writes_it(finished, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert main(["watch", str(finished), "--html", str(out), "--measures", "loss"]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    page = out.read_text()
    assert "curve-loss" in page
    assert "curve-lr" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_in_a_browser(finished, tmp_path):
    """Everything drawn in light and dark and on a narrow screen, tips, the filter, and no error."""
    address = run_page(finished).save_html(tmp_path / "a.html").as_uri()
    with Browser(tmp_path / "profile") as browser:
        browser.open(address)
        drawn = browser.run(
            "Object.fromEntries([...document.querySelectorAll('[data-figure]')].map((one) => "
            "[one.dataset.figure, one.querySelectorAll('svg .role-mark path').length]))"
        )
        assert all(drawn.values()), drawn
        tones = "getComputedStyle(document.documentElement).getPropertyValue('--critical').trim()"
        rules = (
            "[...document.querySelectorAll('[data-figure=curve-loss] .mark-rule line')]"
            ".map((one) => one.getAttribute('stroke'))"
        )
        assert browser.run(tones) in browser.run(rules)
        browser.hover(*browser.middle("[data-figure='layers-dead-mlp-act'] .mark-rect path", 9))
        browser.until("document.querySelector('#vg-tooltip-element.visible')")
        assert "greatest" in browser.run("document.querySelector('#vg-tooltip-element').innerText")
        browser.run("document.getElementById('seek').focus()")
        browser.type("dead")
        browser.until("document.querySelector('.hits').textContent.startsWith('Shown: alarms 1, figures 1,')")
        browser.scheme("dark")
        browser.resize(400, 800)
        browser.open("about:blank")
        browser.open(address)
        assert browser.run("document.documentElement.scrollWidth") == 400
        assert browser.problems == []
        assert [one for one in browser.asked if not one.startswith(("file:", "data:", "about:"))] == []
