"""The research that actome covers: one entry and one reproduction a paper.

`registry` holds what an entry and a reproduction are, and finds them; every other module is one paper, named after
its slug. A reproduction measures, against a control, whether the paper's claim shows at a small scale; it never
states an outcome that it has not measured.
"""

from actome.papers.registry import Entry, PaperError, Reproduction, entries, find, run

__all__ = ["Entry", "PaperError", "Reproduction", "entries", "find", "run"]
