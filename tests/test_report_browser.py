"""The page of a scan in a real browser: figures drawn, tips, filter, pages of layers, the text, and no error."""

import json

import pytest
from browser import CHROMIUM, Browser
from scans import HOSTILE, invented

from actome.report.figures import figures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
SHOWN = "[...document.querySelectorAll({})].filter((one) => one.checkVisibility()).length"


def shown(browser: Browser, selector: str) -> int:
    """How many elements can be seen."""
    return browser.run(SHOWN.format(json.dumps(selector)))


@pytest.fixture(scope="module")
def scan():
    return invented(layers=4, heads=4, name=HOSTILE, more=2)


@pytest.fixture(scope="module")
def address(scan, tmp_path_factory):
    return scan.save_html(tmp_path_factory.mktemp("page") / "scan.html").as_uri()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started, address):
    started.problems.clear()
    started.asked.clear()
    started.resize(1200, 900)
    started.open("about:blank")
    started.open(address)
    yield started
    assert started.problems == []
    assert [one for one in started.asked if not one.startswith(("file:", "data:", "about:"))] == []


def test_every_figure_is_drawn_and_has_marks(browser, scan):
    wanted = {figure.key for figure in figures(scan)}
    assert len(wanted) >= 12
    drawn = browser.run(
        "Object.fromEntries([...document.querySelectorAll('#view-overview [data-figure]')].map((one) => "
        "[one.dataset.figure, one.querySelectorAll('svg .role-mark path').length]))"
    )
    assert set(drawn) == wanted
    assert all(drawn.values())
    assert browser.run("document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("[data-figure='depth-rms'] .mark-symbol path", "Activation scale"),
        ("[data-figure='heads-sink_excess-attn-pattern'] .mark-rect path", "head"),
        ("[data-figure='histogram-mlp-act'] .mark-rect path", "of all activations"),
    ],
)
def test_hovering_a_mark_tells_its_value(browser, mark, says):
    browser.hover(*browser.middle(mark, 2))
    browser.until("document.querySelector('#vg-tooltip-element.visible')")
    told = browser.run("document.querySelector('#vg-tooltip-element').innerText")
    assert says in told
    assert any(digit in told for digit in "0123456789")


def test_clicking_a_cell_opens_its_layer(browser):
    browser.click(*browser.middle("[data-figure='heads-sink_excess-attn-pattern'] .mark-rect path", 0))
    browser.until("location.hash.startsWith('#layer-')")


def test_the_filter_hides_what_is_not_asked_for(browser):
    all_figures = shown(browser, "#view-overview figure")
    browser.run("document.getElementById('seek').focus()")
    browser.type("mlp.act")
    browser.until("document.querySelector('.hits').textContent")
    assert shown(browser, ".finding") == 1
    assert 0 < shown(browser, "#view-overview figure") < all_figures
    assert browser.run("[...document.querySelectorAll('details.numbers')].filter((d) => !d.hidden).length") == 1
    assert shown(browser, "details.numbers tbody tr") == 4
    browser.run("document.getElementById('seek-layers').focus()")
    browser.type("1-2")
    assert shown(browser, "details.numbers tbody tr") == 2
    assert shown(browser, ".finding") == 0
    for box in ("seek", "seek-layers"):
        browser.run(
            f"{{ const e = document.getElementById('{box}'); e.value = ''; e.dispatchEvent(new Event('input')) }}"
        )
    assert shown(browser, "#view-overview figure") == all_figures
    assert shown(browser, "details.numbers tbody tr") == 0  # closed again, as before


def test_the_filter_takes_stars_and_names_of_values(browser):
    browser.run("document.getElementById('seek').focus()")
    browser.type("blocks.*.attn.pattern")
    assert shown(browser, ".finding") == 1
    browser.run("document.getElementById('seek').select()")
    browser.type("rms")
    browser.settle()
    heads = browser.run(
        "[...document.querySelectorAll('details.numbers')].filter((one) => !one.hidden)"
        ".map((one) => [...one.querySelectorAll('thead th')].filter((th) => !th.hidden).length)"
    )
    assert heads == [2] * len(heads)
    assert len(heads) == 4


def test_a_severity_is_switched_off_and_on_by_keyboard(browser):
    browser.run("document.querySelector('.toggle.critical').focus()")
    before = shown(browser, ".finding")
    browser.press("Enter")
    assert shown(browser, ".finding") == before - 1
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "false"
    browser.press("Enter")
    assert shown(browser, ".finding") == before


def test_the_page_of_a_layer_opens_by_its_address(browser, address):
    browser.open("about:blank")
    browser.open(f"{address}#layer-3")
    assert browser.run("document.getElementById('layer').textContent") == "Layer 3"
    assert shown(browser, "#view-overview") == 0
    assert shown(browser, "#view-layer .finding") == 1
    assert shown(browser, "#view-layer figure svg") == 8  # a histogram and a spectrum at each of four sites
    assert shown(browser, "#view-layer table.filled tbody tr") == 4
    assert browser.run("document.querySelector('.title a').textContent") == "← layer 2"
    rank = browser.run("document.querySelector('#view-layer table.layer tbody tr').children[3].textContent")
    assert rank.endswith(" of 4")
    browser.click(*browser.middle(".title a"))
    browser.until("document.getElementById('layer').textContent === 'Layer 2'")
    browser.run("history.back()")
    browser.until("document.getElementById('layer').textContent === 'Layer 3'")
    browser.run("location.hash = '#depth'")
    browser.until("!document.getElementById('view-overview').hidden")
    browser.settle()


def test_numbers_are_written_as_python_writes_them(browser):
    from actome.report.words import Word

    values = [0.0, 1.0, -1.0, 0.0312, -0.0004, 0.5, 12345.6, 3.14159, 1e-5, 2.5e-12, 123456789.0, 0.00123, 99.95, -7.25]
    for look in ("number", "share", "ratio"):
        word = Word("", "", look)
        wanted = [word.show(value) for value in values]
        assert browser.run(f"{json.dumps(values)}.map((x) => actome.show(x, {json.dumps(look)}))") == wanted


def test_the_text_follows_its_menu_and_its_slider(browser, scan):
    heat = "[...document.querySelectorAll('.passage [data-token]')].map((one) => one.style.getPropertyValue('--heat'))"
    assert browser.run("document.querySelector('.passage').dataset.painted") == "token_loss"
    assert browser.run("document.getElementById('token-layer').disabled")
    seen = [browser.run(heat)]
    browser.run(
        "{ const e = document.getElementById('token-value'); e.value = 1; e.dispatchEvent(new Event('change')) }"
    )
    assert browser.run("document.querySelector('.passage').dataset.painted") == "rms 3"
    seen.append(browser.run(heat))
    browser.run("document.getElementById('token-layer').focus()")
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('.passage').dataset.painted") == "rms 2"
    seen.append(browser.run(heat))
    assert seen[0] != seen[1] != seen[2]
    values = scan.passage["values"][1]["values"][2]
    hottest = max(range(len(values)), key=values.__getitem__)
    assert seen[2][hottest] == "100%"


def test_tokens_are_text_and_tell_their_values_and_marks(browser, scan):
    joined = browser.run("document.querySelector('.passage').textContent")
    assert joined == "".join(scan.passage["tokens"])
    browser.hover(*browser.middle(".passage [data-token]", 2))
    browser.until("!document.getElementById('tip').hidden")
    told = browser.run("document.getElementById('tip').innerText")
    assert "position 2" in told
    assert "layer 1 unit 447" in told
    assert "Loss of this token" in told
    assert browser.run("getComputedStyle(document.querySelector('[data-massive]'), '::before').content") == '"▴"'
    assert browser.run("document.querySelector('[data-sink]').dataset.token") == "0"
    browser.run("document.querySelector('.passage').focus()")
    browser.press("ArrowRight")
    browser.until("document.getElementById('token-now').textContent.includes('position 3')")


@pytest.mark.parametrize("where", ["", "#layer-1"])
def test_nothing_is_wider_than_a_narrow_screen(browser, address, where):
    browser.resize(400, 800)
    browser.open("about:blank")
    browser.open(address + where)
    assert browser.run("document.documentElement.scrollWidth") <= 400


def test_the_dark_page_is_drawn_anew_in_its_own_colours(browser):
    ink = "document.querySelector(\"[data-figure='depth-rms'] .mark-line path\")?.getAttribute('stroke')"
    before = browser.run(ink)
    browser.scheme("dark")
    browser.until(f"{ink} && {ink} !== {json.dumps(before)}")
    browser.scheme("light")
    browser.until(f"{ink} === {json.dumps(before)}")


def test_two_scans_are_drawn_over_each_other(browser, scan, tmp_path):
    for i, other in enumerate(
        (invented(layers=4, heads=4, seed=1, more=2), invented(layers=6, heads=2, seed=1, more=2))
    ):
        path = scan.compare(other).save_html(tmp_path / f"{i}.html")
        browser.open(path.as_uri())
        lines = browser.run("document.querySelectorAll(\"[data-figure='depth-rms'] .mark-line path\").length")
        assert lines == 8  # four kinds of sites, each twice
        paths = "[...document.querySelectorAll(\"[data-figure='depth-rms'] .mark-line path\")]"
        assert len(set(browser.run(f"{paths}.map((one) => one.getAttribute('stroke-dasharray'))"))) == 2
        assert shown(browser, "table.changes tbody tr") >= 20
        assert browser.run("document.querySelectorAll('[data-figure$=\"-other\"] svg').length") == 2
        told = browser.run("document.getElementById('depth').parentElement.innerText")
        assert ("share of the depth" in told) == bool(i)
