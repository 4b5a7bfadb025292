"""The report in a terminal: findings first, then the layers, then the heads; plain text when piped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from actome.report.console import MARK, STYLE, printed
from actome.report.plots import spark
from actome.report.scan import Scan, read_line
from actome.report.words import evidence_of, grouped, kind_of, place_of, word

if TYPE_CHECKING:
    from actome.report.compare import Comparison

_MOST_LAYERS = 40
_MOST_CHANGES = 20

# (value, kind of site) in the order in which columns appear, and whether a bar goes beside the number. Columns that
# do not fit the terminal are left out from the end.
_COLUMNS = [
    ("rms", "resid.post", True),
    ("movement", "resid.post", False),
    ("effective_rank_share", "resid.post", False),
    ("massive_ratio", "resid.post", False),
    ("near_zeros", "mlp.act", False),
    ("dead", "mlp.act", False),
    ("outlier_channels", "resid.post", False),
    ("used", "resid.post", False),
    ("zeros", "mlp.act", False),
]


def print_scan(scan: Scan, console: Console | None = None) -> None:
    """Prints a scan.

    Args:
        console: where to; the terminal by default.
    """
    printed(lambda to: _print(scan, to), console or Console())


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints what differs between two scans.

    Args:
        console: where to; the terminal by default.
    """
    printed(lambda to: _print_comparison(comparison, to), console or Console())


def _print(scan: Scan, console: Console) -> None:
    console.print(_header(scan))
    console.print(_findings(scan))
    for stack in _stacks(scan.frame):
        for part in (_layers(scan, stack, console), _heads(scan, stack, console)):
            if part is not None:
                console.print(part)
    rest = _elsewhere(scan)
    if rest is not None:
        console.print(rest)
    for reason in scan.skipped:
        console.print(Text(f"not measured: {reason}", style="dim"))


def _print_comparison(comparison: Comparison, console: Console) -> None:
    names = [str(scan.model.get("name", "model")) for scan in (comparison.this, comparison.other)]
    console.print(Text.assemble("Compared with ", (names[1], "bold"), f", of {comparison.other.run.get('started')}"))
    for note in comparison.notes:
        console.print(_indented(Text(note, style="yellow")))
    for title, mark, some in (("new", "+", comparison.gained), ("gone", "-", comparison.lost)):
        for finding in some:
            line = Text.assemble((f"{mark} {title:<5}", "bold"), (f"{finding.severity:<9}", STYLE[finding.severity]))
            line.append(f"{finding.id}  {finding.site}  ").append(place_of(finding.where), "dim")
            console.print(_indented(line))
    if not comparison.gained and not comparison.lost:
        console.print(_indented(Text("The same findings.")))
    changes = comparison.changes()
    changed = changes[changes["change"] > 0]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("mean over layers", "site"):
        table.add_column(name, overflow="fold")
    for name in ("other", "this", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in changed.head(_MOST_CHANGES).itertuples():
        shown = word(row.measure)
        by = "from 0" if math.isinf(row.relative) else f"{row.relative:+.1%}".replace("%", " %")
        table.add_row(shown.title, row.kind, shown.show(row.other), shown.show(row.value), by)
    console.print(Text(""))
    if len(changed):
        console.print(table)
    left = len(changes) - min(len(changed), _MOST_CHANGES)
    console.print(Text(f"{left} more values changed less, or not at all." if left else "", style="dim"))


def _header(scan: Scan) -> Group:
    model = scan.model
    facts = [
        f"{model['parameters']:,} parameters" if "parameters" in model else "",
        f"{model['layers']} layers" if model.get("layers") else "",
        f"{model['head']} heads" if model.get("head") else "",
        f"width {model['d_model']}" if model.get("d_model") else "",
        model.get("dtype", ""),
        model.get("device", ""),
    ]
    loss, perplexity = (scan.values(name) for name in ("loss", "perplexity"))
    quality = [f"loss {word('loss').show(loss['value'].iloc[0])}" if len(loss) else ""]
    quality += [f"perplexity {word('perplexity').show(perplexity['value'].iloc[0])}" if len(perplexity) else ""]
    return Group(
        Text.assemble((str(model.get("name", "model")), "bold"), f"  {model.get('class', '')}"),
        Text(" · ".join(filter(None, facts)), style="dim"),
        Text(f"read {read_line(scan.text)}", style="dim"),
        Text(" · ".join(filter(None, [*quality, f"{scan.run.get('seconds', 0):.1f} s"]))),
        Text(""),
    )


def _findings(scan: Scan) -> Group:
    if not scan.findings:
        return Group(Text("Nothing stands out.", style="green"), Text(""))
    lines: list[Text | Padding] = []
    for group in grouped(scan.findings):
        first, style = group[0], STYLE[group[0].severity]
        lines.append(Text.assemble((f"{MARK[first.severity]} {first.severity:<8} ", style), (first.id, "bold")))
        for finding in group:
            place = Text.assemble(finding.site, (f"  {place_of(finding.where)}", "dim"))
            lines += [_indented(place), _indented(Text(evidence_of(finding.evidence)), 4)]
        lines += [_indented(Text(f"{first.advice} [{first.source}]", style="dim")), Text("")]
    return Group(*lines)


def _indented(text: Text, by: int = 2) -> Padding:
    return Padding(text, (0, 0, 0, by), expand=False)


def _layers(scan: Scan, stack: str, console: Console) -> Group | None:
    columns = []
    for measure, kind, bar in _COLUMNS:
        rows = scan.values(measure, "layer")
        rows = rows[rows["site"].map(kind_of) == f"{stack} {kind}".strip()]
        if len(rows):
            columns.append((measure, bar, dict(zip(rows["layer"], rows["value"], strict=True))))
    if not columns:
        return None
    layers = sorted({layer for *_, values in columns for layer in values})
    shown = _thinned(layers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    cells: list[list[Text]] = []
    room = console.width - 7
    for measure, bar, values in columns:
        numbers = [word(measure).show(values.get(layer, math.nan)) for layer in shown]
        heading = word(measure).short or measure
        width = max(len(heading), max(map(len, numbers))) + (8 if bar else 0) + 2
        if width > room:
            break
        room -= width
        table.add_column(f"{heading}", justify="left" if bar else "right", no_wrap=True)
        top = max((v for v in values.values() if math.isfinite(v)), default=0)
        bars = [_bar(values.get(layer, math.nan), top, 6, console) if bar else "" for layer in shown]
        digits = max(map(len, numbers))
        cells.append(
            [
                Text.assemble(n.rjust(digits), (f"  {b}" if b else "", "cyan"))
                for n, b in zip(numbers, bars, strict=True)
            ]
        )
    for i, layer in enumerate(shown):
        table.add_row(str(layer), *(column[i] for column in cells))
    title = f"Layers{f' of the {stack}' if stack else ''}"
    note = f", {len(shown)} of {len(layers)} shown" if len(shown) < len(layers) else ""
    return Group(Text(title + note, style="bold"), table, Text(""))


def _heads(scan: Scan, stack: str, console: Console) -> Group | None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    columns = []
    for measure, top in (("sink_excess", 1.0), ("attention_entropy", 1.0)):
        rows = scan.values(measure, "layer", "head")
        rows = rows[rows["site"].map(kind_of) == f"{stack} attn.pattern".strip()]
        if len(rows):
            columns.append((rows.pivot(index="layer", columns="head", values="value"), top))
            table.add_column(f"{word(measure).title.lower()}, by head", no_wrap=True)
    if not columns or any(len(grid.columns) * 2 > console.width for grid, _ in columns):
        return None
    layers = sorted(set().union(*(grid.index for grid, _ in columns)))
    for layer in _thinned(layers):
        cells = []
        for grid, top in columns:
            values = grid.loc[layer].tolist() if layer in grid.index else []
            largest = max((v for v in values if not pd.isna(v)), default=math.nan)
            drawn = spark(values, 0.0, top, ascii=console.options.ascii_only)
            cells.append(Text.assemble((drawn, "cyan"), f"  max {largest:.2f}"))
        table.add_row(str(layer), *cells)
    return Group(Text(f"Heads{f' of the {stack}' if stack else ''}", style="bold"), table, Text(""))


def _elsewhere(scan: Scan) -> Group | None:
    """Values of sites that belong to no layer, such as those of plain modules."""
    frame = scan.frame
    rows = frame[frame["layer"].isna() & frame["unit"].isna() & frame["head"].isna() & (frame["site"] != "logits")]
    rows = rows[rows["site"].str.startswith("module:")]
    if rows.empty:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    wide = rows.pivot_table(index="site", columns="measure", values="value", sort=False)
    shown = [measure for measure in ("rms", "max_abs", "zeros", "near_zeros", "dead") if measure in wide]
    table.add_column("module")
    for measure in shown:
        table.add_column(word(measure).short or word(measure).title.lower(), justify="right")
    for site, values in wide.iterrows():
        table.add_row(str(site).removeprefix("module:"), *(word(one).show(values[one]) for one in shown))
    return Group(Text("Modules", style="bold"), table, Text(""))


def _stacks(frame: pd.DataFrame) -> list[str]:
    sites = frame.loc[frame["layer"].notna(), "site"].unique()
    return list(dict.fromkeys(site.partition("blocks.")[0].removesuffix(".") for site in sites))


def _thinned(layers: Sequence[int]) -> list[int]:
    """All layers, or an even choice with the first and the last when there are very many."""
    if len(layers) <= _MOST_LAYERS:
        return list(layers)
    step = (len(layers) - 1) / (_MOST_LAYERS - 1)
    return [layers[round(i * step)] for i in range(_MOST_LAYERS)]


def _bar(value: float, top: float, width: int, console: Console) -> str:
    if not math.isfinite(value) or top <= 0:
        return " " * width
    full = value / top * width
    if console.options.ascii_only:
        return ("#" * round(full)).ljust(width)
    eighths = " ▏▎▍▌▋▊▉"[int(full % 1 * 8)]
    return ("█" * int(full) + eighths.strip()).ljust(width)
