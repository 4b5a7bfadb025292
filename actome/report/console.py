"""What everything that is printed shares: marks and colours of severities, and plain text where it is piped."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

STYLE = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
MARK = {"critical": "✖", "warning": "▲", "info": "●"}
_PLAIN = str.maketrans({"✖": "x", "▲": "!", "●": "*", "·": "-", "–": "-", "−": "-", "→": "->", "×": "x", "∞": "inf"})


def printed(write: Callable[[Console], None], console: Console) -> None:
    """Writes to a console; to a file without padding, and in ASCII where its encoding has no more."""
    ascii_only = console.options.ascii_only
    if console.is_terminal and not ascii_only:
        write(console)
        return
    with console.capture() as caught:
        write(console)
    # Padding to the full width is of no use in a file, nor is a sign that its encoding does not have.
    text = "\n".join(line.rstrip() for line in caught.get().split("\n"))
    console.file.write(text.translate(_PLAIN).encode("ascii", "replace").decode() if ascii_only else text)
