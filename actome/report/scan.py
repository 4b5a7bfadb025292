"""A scan: one pass over a text, what was measured on the way, and what in it is worth a person's attention."""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from actome import __version__
from actome.core.errors import ActomeError
from actome.core.table import PLACES
from actome.core.text import Text
from actome.measures.findings import IDS, Finding, find, thresholds_of
from actome.measures.panels import PANELS
from actome.report.arrays import arrays_of
from actome.report.passage import Peek, passage_of
from actome.report.plain import COLUMNS, frame_of, lines, records, strict, typed, write
from actome.tasks.corpus import documents

if TYPE_CHECKING:
    from rich.console import Console

    from actome.core.model import Model
    from actome.report.compare import Comparison

SHIPPED_TEXT = "held-out manual and library source of Python"
_MOST_UNITS = 100
# Arguments of a forward that text does not give.
_SENSES = {"pixel_values", "input_features", "input_values"}


@dataclass(frozen=True)
class Scan:
    """What one pass over a text said about a model.

    Attributes:
        model: facts about the model: name, family, class, parameters, dtype, device, layers, d_model, ...
        text: facts about the text: source, context, and in `counts` how much of it was read.
        run: panel, seconds, time of day and versions of what ran.
        frame: one row for each number: site, layer, head, unit, expert (missing where they do not apply), measure,
            value. Of single units only those that a finding names have rows, a hundred a finding at most; a model may
            have a million others.
        findings: what stands out, the most severe first.
        skipped: what the panel measures and this model has no place for, with the reason.
        arrays: values that are lists, such as histograms and spectra; see `actome.report.arrays.arrays_of`.
        passage: a piece of the text with values of each token; see `actome.report.passage.passage_of`.
    """

    model: dict[str, Any]
    text: dict[str, Any]
    run: dict[str, Any]
    frame: pd.DataFrame = field(repr=False)
    findings: tuple[Finding, ...] = ()
    skipped: tuple[str, ...] = ()
    arrays: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    passage: dict[str, Any] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The scan as plain data; keys are absent where they do not apply, and what is not a number is ``None``."""
        return {
            "actome": __version__,
            "model": strict(self.model),
            "text": strict(self.text),
            "run": strict({**self.run, "skipped": list(self.skipped)}),
            "rows": records(self.frame),
            "findings": [strict(finding.to_dict()) for finding in self.findings],
            **({"arrays": [strict(one) for one in self.arrays]} if self.arrays else {}),
            **({"passage": strict(self.passage)} if self.passage else {}),
        }

    def to_json(self) -> str:
        """`to_dict` as strict JSON: no NaN and no infinity in it, one row to a line."""
        data = self.to_dict()
        parts = [
            f"{json.dumps(key)}: {lines(value) if isinstance(value, list) else json.dumps(value, allow_nan=False)}"
            for key, value in data.items()
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, source: str | Path) -> Scan:
        """A scan read back from JSON, given as the text itself or as the path of a file.

        Raises:
            ActomeError: when that is no scan.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        try:
            data = json.loads(source if is_text else Path(source).read_text(encoding="utf-8"))
            run = dict(data["run"])
            return cls(
                data["model"],
                data["text"],
                {key: value for key, value in run.items() if key != "skipped"},
                frame_of(data["rows"]),
                tuple(Finding.from_dict(one) for one in data["findings"]),
                tuple(run.get("skipped", ())),
                tuple(data.get("arrays", ())),
                data.get("passage"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = "this text" if is_text else str(source)
            raise ActomeError(f"{where} is no scan written by actome: {type(error).__name__} {error}") from error

    def save_json(self, path: str | Path) -> Path:
        """Writes `to_json` to a file, whose folders are made; returns its path."""
        return write(path, self.to_json())

    def to_html(self) -> str:
        """The scan as one page that needs no network."""
        from actome.report.html import page

        return page(self)

    def save_html(self, path: str | Path) -> Path:
        """Writes `to_html` to a file, whose folders are made; returns its path."""
        return write(path, self.to_html())

    def print(self, console: Console | None = None) -> None:
        """Prints the report to the terminal, or to a console of the rich library."""
        from actome.report.terminal import print_scan

        print_scan(self, console)

    def compare(self, other: Scan) -> Comparison:
        """This scan beside another, such as that of an earlier checkpoint; differences are this less the other.

        Example:
            >>> import actome as ac
            >>> text = ["The value of the expression is returned. " * 20]
            >>> after, before = ac.scan(ac.demo(), text), ac.scan(ac.demo(0), text)
            >>> rows = after.compare(before).frame
            >>> bool(rows.loc[rows["measure"] == "loss", "difference"].item() < 0)
            True
        """
        from actome.report.compare import compare

        return compare(self, other)

    def values(self, measure: str, *places: str) -> pd.DataFrame:
        """The rows of one measure that have exactly these places, in order.

        Args:
            measure: name of the value, such as ``"rms"``.
            places: out of layer, head, unit, expert; ``"site"`` is always there.

        Returns:
            A frame with columns site, *places, value; empty when nothing of the kind was measured.
        """
        rows = self.frame[self.frame["measure"] == measure]
        for place in PLACES:
            rows = rows[rows[place].notna() if place in places else rows[place].isna() | (place == "layer")]
        return rows[["site", *places, "value"]].reset_index(drop=True)


def scan(
    model: Model,
    text: Any = None,
    panel: str = "health",
    thresholds: Mapping[str, float] | None = None,
    progress: Callable[[int], None] | None = None,
    passage: bool = True,
) -> Scan:
    """Reads a text once and reports what the model's activations are like on it.

    Args:
        model: what `load`, `wrap` or `demo` gave.
        text: a `Text`; or a file, folder or list of strings to make one of; by default held-out text that ships with
            Python, up to 32768 tokens. For models that read something else, whatever `Model.measure` takes: a tensor,
            or an iterable of batches such as a data loader.
        panel: name of a set of measures.
        thresholds: for findings, by name; those not given keep their defaults.
        progress: called with the number of tokens read so far.
        passage: whether to read the beginning of the text once more, for values of each token (`Scan.passage`). It
            costs about a second for a small model.

    Raises:
        ActomeError: for a panel that does not exist, a text without text, or a model that takes none.

    Example:
        >>> import actome as ac
        >>> result = ac.scan(ac.demo(), ["The value of the expression is returned. " * 20])
        >>> result.frame.columns.tolist()
        ['site', 'layer', 'head', 'unit', 'expert', 'measure', 'value']
    """
    if panel not in PANELS:
        raise ActomeError(f"there is no panel {panel!r}; there are: {', '.join(PANELS)}")
    if text is None:
        text = default_text(model, limit=32_768)
    elif isinstance(text, str | Path) or (isinstance(text, list) and all(isinstance(one, str) for one in text)):
        text = Text(text, model.tokenizer, context=min(model.context or 512, 512))
    limits = thresholds_of(thresholds)
    peek = Peek(text) if isinstance(text, Text) else text
    started, start = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    try:
        table = model.measure(peek, PANELS[panel], progress=progress)
    except (AttributeError, TypeError) as error:
        senses = sorted(_SENSES & set(inspect.signature(model.module.forward).parameters))
        if not senses or not isinstance(text, Text):
            raise
        raise ActomeError(
            f"{model.name} does not run on text alone, it also reads {', '.join(senses)}: scan it from Python, with "
            "actome.scan(model, inputs), where inputs are its forward arguments"
        ) from error
    found = find(table, limits)
    shown = passage_of(model, peek.first, table, limits) if passage and isinstance(peek, Peek) else None
    run = {
        "panel": panel,
        "started": started,
        "seconds": round(time.perf_counter() - start, 2),
        "thresholds": dict(thresholds or {}),
        "versions": _versions(),
    }
    rows = _shown(table.frame, found)
    return Scan(
        model.info, _source(text), run, rows, tuple(found), tuple(table.skipped), arrays_of(table), shown
    )  # fmt: skip


def _source(text: Any) -> dict[str, Any]:
    if not isinstance(text, Text):
        shape = f" {tuple(text.shape)}" if hasattr(text, "shape") else ""
        return {"source": f"{type(text).__name__}{shape}"}
    return {**text.describe(), **({"source": SHIPPED_TEXT} if isinstance(text, _ShippedText) else {})}


def read_line(text: dict[str, Any]) -> str:
    """What was read, in one line."""
    counts = text.get("counts")
    if not counts:
        return str(text.get("source", "text"))
    size = f"{counts['tokens']:,} tokens in {counts['sequences']:,} rows of up to {text.get('context')}"
    return f"{text.get('source', 'text')}: {size}"


class _ShippedText(Text):
    """Marks the default text, which would otherwise be described as so many texts from a list."""


def default_text(model: Model, **options: Any) -> Text:
    """Held-out text that ships with Python, English first, for a model's tokenizer; options are those of `Text`."""
    options.setdefault("context", min(model.context or 512, 512))
    return _ShippedText([(one.title, one.text) for one in documents("heldout")], model.tokenizer, **options)


def _shown(frame: pd.DataFrame, found: list[Finding]) -> pd.DataFrame:
    """The rows without a unit, and those of units that a finding names."""
    frame = frame.reindex(columns=COLUMNS)
    named = pd.DataFrame(
        [place for one in found for place in one.units()[:_MOST_UNITS]], columns=["site", "unit"]
    ).drop_duplicates()
    units = frame[frame["unit"].notna()].merge(named.astype({"unit": "Int64"}), on=["site", "unit"])
    return typed(pd.concat([frame[frame["unit"].isna()], units], ignore_index=True))


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def finding_ids() -> list[str]:
    """The ids that a finding may have, such as ``dead-units``."""
    return list(IDS)


def panel_names() -> list[str]:
    """The panels that there are."""
    return list(PANELS)
