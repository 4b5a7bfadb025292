"""Shell: what makes a page whole: one file that loads nothing, whatever the page is of.

A page is a template with a style sheet and short scripts beside it; `head.html`, `filter.html`, `tables.html` and
`foot.html` are parts that pages share. The drawing library comes from the wheel of
vl-convert and is put into the page once for all figures. Whatever a model, a text or a path is called is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from actome import __version__
from actome.report.plain import write


@dataclass(frozen=True)
class Page:
    """A report page.

    Attributes:
        html: one page that loads nothing.
    """

    html: str

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, whole or not at all; folders are made."""
        return write(Path(path), self.html)


def whole(
    template: str, *, specs: Mapping[str, Any], data: Any, scripts: Sequence[str], needed: bool = True, **words: Any
) -> str:
    """A page as HTML.

    Args:
        template: its file among the assets.
        specs: the figures as Vega-Lite, by the name under which the page asks for them.
        data: what the scripts need beside them, as plain JSON without NaN.
        scripts: files among the assets, in order.
        needed: whether there is anything to draw; without, the page is without the drawing library.
        words: whatever else the template speaks of.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        version=__version__,
        needed=needed,
        specs=Markup(_in_script(json.dumps(specs, allow_nan=False, separators=(",", ":")))),
        data=Markup(_in_script(json.dumps(data, allow_nan=False, separators=(",", ":")))),
        style=Markup(_asset("page.css")),
        scripts=Markup("\n".join(map(_asset, scripts))),
        vega=Markup(_drawing_library() if needed else ""),
        **words,
    )


def _asset(name: str) -> str:
    return files("actome.report").joinpath("assets", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _in_script(data: str) -> str:
    # In a script element the text is not HTML: nothing in it may look like the end of the element.
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
