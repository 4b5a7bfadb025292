"""A run in a terminal: alarms on top, then the status, the loss, the other numbers, and panels by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from actome.dynamics.digest import RunDigest
from actome.report.console import MARK, STYLE, printed
from actome.report.plots import braille, bridged, pooled, spark
from actome.report.run_view import NORMS, Line, Panel, alarm_groups, chosen, lines, named, panels, status_facts
from actome.report.words import evidence_of, word

_MOST_ALARMS, _MOST_LAYERS = 3, 6
_LINE, _PANEL, _GAP = 56, 37, 2  # columns that a number and a panel take at least, and between two of them
_WIDE_SPAN = 30  # a ratio that spans more than this is drawn by its logarithm
_STATUS = {"running": "green", "finished": "bold", "failed": "bold red", "killed": "bold red"}


class LiveView:
    """What is known of a run, as rich draws it in the width of the console.

    Args:
        digest: of the run; drawn as it is when the view is printed.
        measures: names or patterns of what to show; everything when empty.
        screen: leave out what does not fit the console's height, and say so.

    Raises:
        RunError: nothing was logged under such a name; the message names the nearest.
    """

    def __init__(self, digest: RunDigest, measures: Sequence[str] = (), *, screen: bool = False):
        self.digest, self.measures, self.screen = digest, tuple(measures), screen
        chosen(digest, self.measures)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = console.height if self.screen else None
        drawn = _View(self.digest, self.measures, options.max_width, height, options.ascii_only)
        for line in drawn.lines():
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


class _View:
    def __init__(self, digest: RunDigest, measures: Sequence[str], width: int, height: int | None, ascii: bool):
        self.digest, self.width, self.height, self.ascii = digest, max(width, 40), height, ascii
        self.names = chosen(digest, measures)

    def lines(self) -> list[Text]:
        out = [*self._alarms(), *self._status(), Text("")]
        if not self.names:
            words = "Nothing is logged yet." if self.digest.status == "running" else "Nothing was logged."
            units = f" {self.digest.units:,} series of single units are not shown." if self.digest.units else ""
            return [*out, Text(words + units)]
        plain = lines(self.digest, self.names)
        main = next((one for one in plain if one.measure == self.names[0] == "loss"), None)
        room = None if self.height is None else self.height - len(out)
        if main is not None and (room is None or room > 8):
            out += self._plot(main, 8 if room is None or room >= 34 else 5 if room >= 22 else 3)
        rest = [one for one in plain if one is not main]
        rest.sort(key=lambda one: self.digest.places[one.series].site not in (None, "logits"))
        grid = sorted(panels(self.digest, self.names), key=lambda one: one.measure in NORMS)
        return [*out, *self._fitted(rest, grid, None if self.height is None else self.height - len(out))]

    def _fitted(self, rest: list[Line], grid: list[Panel], room: int | None) -> Iterator[Text]:
        """Numbers and panels, as many as there are lines for; the last line says what is left out."""
        across = max(1, (self.width + _GAP) // (_LINE + _GAP))
        shown, left = rest, 0
        if room is not None and room < 5:
            shown, grid, left = [], [], len(rest) + len(grid)
        elif room is not None:
            # At most half of the room for plain numbers, if there is enough for panels too.
            half = grid and room >= 2 * (_MOST_LAYERS + 2)
            fits = max(1, (room // 2 if half else room) - 3) * across
            shown, left = (rest, 0) if len(rest) <= fits else (rest[:fits], len(rest) - fits)
        used = 0
        if shown:
            count = -(-len(shown) // across)
            width = (self.width - _GAP * (across - 1)) // across
            columns = [
                [self._heading(width), *(self._line(one, width) for one in shown[i : i + count])]
                for i in range(0, len(shown), count)
            ]
            yield from _beside(columns, width)
            yield Text("")
            used = count + 2
        across = max(1, (self.width + _GAP) // (_PANEL + _GAP))
        width = (self.width - _GAP * (across - 1)) // across
        for i in range(0, len(grid), across):
            row = [self._panel(one, width) for one in grid[i : i + across]]
            tall = max(map(len, row)) + 1
            if room is not None and used + tall + 1 > room:
                left += len(grid) - i
                break
            yield from _beside(row, width)
            yield Text("")
            used += tall
        if left:
            yield Text(f"{left} more not shown: choose with --measures, or make the window larger", style="dim")

    def _alarms(self) -> list[Text]:
        """All of them where there is room; on a screen the first ones, and no more than half of it."""
        groups = alarm_groups(self.digest)
        most = len(groups) if self.height is None else min(len(groups), _MOST_ALARMS)
        room = math.inf if self.height is None else self.height // 2 - most - 1
        out = []
        for some in groups[:most]:
            last, style = some[-1], STYLE[some[-1]["level"]]
            line = Text.assemble((f"{MARK[last['level']]} {last['level']:<8} ", style), (last["name"], "bold"))
            one = f"  step {last['step']:,}"
            line.append(one if len(some) == 1 else f"  {len(some)} at steps {some[0]['step']:,}–{last['step']:,}")
            line.append(f"  {last['site']}" if last["site"] else "")
            out.append(line)
            said = [*self._wrapped(last["message"], "")]
            if self.height is None and last["evidence"]:
                said += self._wrapped(evidence_of(last["evidence"]), "dim")
            if last["advice"]:
                said += self._wrapped(last["advice"], "italic")
            if len(said) <= room:
                out, room = out + said, room - len(said)
        if len(groups) > most:
            out.append(Text(f"  and {len(groups) - most} more kinds of alarm; --once shows all", style="dim"))
        return [*out, Text("")] if out else []

    def _wrapped(self, words: str, style: str) -> Iterator[Text]:
        text = Text(words, style=style)
        for part in text.wrap(Console(width=self.width), self.width - 2):
            yield Text("  ").append_text(part)

    def _status(self) -> Iterator[Text]:
        digest = self.digest
        status, *facts = status_facts(digest)
        line = Text.assemble((digest.name, "bold"), "  ", (status, _STATUS[status]))
        yield line.append("".join(f" · {fact}" for fact in facts))
        if digest.error:
            yield from self._wrapped(digest.error, "red")
        if status == "killed":
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(digest.ended))
            words = f"Its writer is gone; last sign of life {when}. RunStore.resume goes on with it."
            yield from self._wrapped(words, "dim")

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _plot(self, main: Line, height: int) -> Iterator[Text]:
        digest = self.digest
        low, high = (digest.table([main.series], of)[0] for of in ("low", "high"))
        shown = word(main.measure)
        head = Text.assemble((named(main.measure), "bold"), "  ", self._now(main), "  ", change := self._change(main))
        yield head.append(" in the last tenth" if "%" in change.plain else "", "dim")
        finite = np.isfinite(low)
        if not finite.any():
            return
        top, bottom = shown.show(float(high[finite].max())), shown.show(float(low[finite].min()))
        margin = max(len(top), len(bottom), 6)
        rows = braille(low, high, self.width - margin - 1, height, ascii=self.ascii)
        for i, row in enumerate(rows):
            label = top if i == 0 else bottom if i == len(rows) - 1 else ""
            yield Text.assemble((label.rjust(margin) + " ", "dim"), (row, "cyan"))
        first, last = f"{digest.first_step:,}", f"{digest.last_step:,}"
        gap = self.width - margin - 1 - len(first)
        yield Text(" " * (margin + 1) + first + last.rjust(gap), style="dim")
        yield Text("")

    def _heading(self, width: int) -> Text:
        return Text(f"{'':<{self._label(width)}}{'now':>10}{'last tenth':>12}  over the run", style="dim")

    def _label(self, width: int) -> int:
        return max(16, width // 3)

    def _line(self, one: Line, width: int) -> Text:
        room = self._label(width)
        name = one.label if len(one.label) < room else one.label[: room - 2] + ("." if self.ascii else "…")
        bad = self.digest.not_finite(one.series)
        line = Text.assemble(name.ljust(room), _right(self._now(one), 10), _right(self._change(one), 12), "  ")
        left = width - line.cell_len
        values = np.array(bridged(pooled(self.digest.table([one.series])[0], left)))
        line.append(spark(_scaled(values, one.measure), ascii=self.ascii), "red" if bad else "cyan")
        return line

    def _now(self, one: Line) -> Text:
        digest = self.digest
        bad, now = digest.not_finite(one.series), digest.latest(one.series)
        if bad and not np.isfinite(now):
            return Text("NaN" if np.isnan(now) else word(one.measure).show(now), style="bold red")
        return Text(word(one.measure).show(now), style="bold")

    def _change(self, one: Line) -> Text:
        """Against the mean of the bin a tenth of the run ago."""
        step, mean, *_ = self.digest.curve(one.series)
        bad = self.digest.not_finite(one.series)
        if bad:
            gone = not np.isfinite(self.digest.latest(one.series))
            return Text(f"from {bad[1]}" if gone else f"{bad[0]} not fin.", style="red")
        if len(step) < 3:
            return Text("")
        before = mean[max(0, np.searchsorted(step, step[-1] - (step[-1] - step[0]) / 10, side="right") - 1)]
        if before == 0 or not np.isfinite(mean[-1] / before):
            return Text("")
        change = mean[-1] / before - 1
        if before < 0:
            change = -change
        return Text(f"{change:+.1%}".replace("%", " %") if abs(change) < 10 else f"x{1 + change:.3g}", style="dim")

    # -- layers -------------------------------------------------------------------------------------------------------

    def _panel(self, panel: Panel, width: int) -> list[Text]:
        """A line for each layer, all on one scale."""
        table, latest, shown = panel.table(self.digest), panel.latest(self.digest), word(panel.measure)
        kept = _representative(latest, _MOST_LAYERS)
        title = Text(panel.title, style="bold")
        out = [title]
        notes = [panel.says] if panel.says else []
        if len(kept) < len(panel.layers):
            notes.append(f"{len(kept)} of {len(panel.layers)} layers")
        numbers = [shown.show(float(latest[i])) for i in kept]
        names = [f"L{panel.layers[i]}" for i in kept]
        left, right = max(map(len, names)) + 1, max(map(len, numbers)) + 1
        scaled = _scaled(table, panel.measure)
        finite = scaled[np.isfinite(scaled)]
        if scaled is not table:
            notes.append("log scale")
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        for i, name, number in zip(kept, names, numbers, strict=True):
            row = np.array(bridged(pooled(scaled[i], width - left - right)))
            drawn = spark(row, low, high, ascii=self.ascii)
            bad = any(self.digest.not_finite(one) for one in panel.members[i])
            colour = "red" if bad else "cyan"
            out.append(Text.assemble((name.ljust(left), "dim"), (drawn, colour), number.rjust(right)))
        if notes:
            title.append(f"  {', '.join(notes)}", "not bold dim")
        return out


def _scaled(values: np.ndarray, measure: str) -> np.ndarray:
    """By their logarithm where a ratio spans orders of magnitude."""
    finite = values[np.isfinite(values)]
    wide = len(finite) and finite.min() > 0 and finite.max() / finite.min() > _WIDE_SPAN
    return np.log(values) if wide and word(measure).look != "share" else values


def _representative(latest: np.ndarray, most: int) -> list[int]:
    """Rows to show: all, or the first, the last, that of the largest value, and others evenly between."""
    count = len(latest)
    if count <= most:
        return list(range(count))
    even = np.rint(np.linspace(0, count - 1, most)).astype(int)
    largest = int(np.nanargmax(latest)) if np.isfinite(latest).any() else 0
    if largest not in even:  # in the place of its nearest neighbour that is no end
        even[1 + int(np.abs(even[1:-1] - largest).argmin())] = largest
    return sorted(set(even.tolist()))


def _right(text: Text, width: int) -> Text:
    return Text(" " * max(0, width - text.cell_len)).append_text(text)


def _beside(columns: list[list[Text]], width: int) -> Iterator[Text]:
    """Columns of lines, each in its width."""
    for i in range(max(map(len, columns))):
        line = Text("")
        for n, column in enumerate(columns):
            cell = column[i].copy() if i < len(column) else Text("")
            cell.truncate(width, overflow="ellipsis", pad=n < len(columns) - 1)
            line.append_text(cell).append(" " * _GAP if n < len(columns) - 1 else "")
        yield line


def print_run(digest: RunDigest, console: Console | None = None, measures: Sequence[str] = ()) -> None:
    """Prints what is known of a run, once; plain text when piped."""
    view = LiveView(digest, measures)
    printed(lambda to: to.print(view), console or Console())


def follow(digest: RunDigest, console: Console | None = None, measures: Sequence[str] = (), every: float = 1.0) -> None:
    """Shows a run while it is written, on a screen of its own, until it has ended; what is known then stays printed.

    Args:
        digest: of the run.
        console: a terminal.
        measures: names or patterns of what to show; everything when empty.
        every: seconds between looks.
    """
    console = console or Console()
    digest.refresh()
    view = LiveView(digest, measures, screen=True)
    with Live(view, console=console, screen=True, auto_refresh=False) as screen:
        while digest.status == "running":
            time.sleep(every)
            digest.refresh()
            screen.refresh()
    print_run(digest, console, measures)
