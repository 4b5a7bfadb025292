"""How each value is shown: its name for people, what it says in one sentence, its number format and its group.

The table is `actome.report.vocabulary`. A value without an entry is shown too, under its own name and in a format that
its name suggests, so a new measure appears in reports by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actome.report.vocabulary import GROUPS, WORDS, Look, Word

if TYPE_CHECKING:
    from actome.measures.findings import Finding

__all__ = [
    "GROUPS", "WORDS", "Word", "cited", "evidence_of", "grouped", "kind_of", "layer_page", "place_of", "spans",
    "stack_of", "word",
]  # fmt: skip

_MOST_SPANS = 6


# What the end of a name says of a value without an entry.
_ENDINGS: dict[str, Look] = {
    "_share": "share", "_rate": "share", "_fraction": "share", "_probability": "share", "_frequency": "share",
    "_count": "count", "_ratio": "ratio", "_unit": "index", "_position": "index", "_index": "index",
}  # fmt: skip


_ACRONYMS = {"cka", "cca", "svcca", "rsa", "sui", "nc1", "nc2", "nc3", "nc4", "ece", "kl", "snr"}


def word(measure: str) -> Word:
    """How a value is shown; one without an entry goes by its own name.

    >>> word("expert_load_share").title, word("expert_load_share").look
    ('Expert load share', 'share')
    """
    if measure in WORDS:
        return WORDS[measure]
    look = next((look for ending, look in _ENDINGS.items() if measure.endswith(ending)), "number")
    spoken = " ".join(part.upper() if part in _ACRONYMS else part for part in measure.split("_"))
    return Word(spoken[:1].upper() + spoken[1:], "", look, spoken, drawn=look != "index")


def place_of(where: Mapping[str, Sequence[int]]) -> str:
    """Where a finding is, in words; runs of neighbours written short, and long lists by their beginning.

    >>> place_of({"layers": [3], "heads": [0, 1, 2, 5]})
    'layer 3, heads 0-2, 5'
    >>> place_of({"units": range(0, 400, 2)})
    '200 units (0, 2, 4, 6, 8, 10, ...)'
    """
    return ", ".join(_place(name, numbers) for name, numbers in where.items())


def _place(name: str, numbers: Sequence[int]) -> str:
    written = spans(numbers)
    parts = written.split(", ")
    if len(parts) > _MOST_SPANS:
        return f"{len(numbers)} {name} ({', '.join(parts[:_MOST_SPANS])}, ...)"
    return f"{name.removesuffix('s') if len(numbers) == 1 else name} {written}"


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers with runs of neighbours written short.

    >>> spans([5, 0, 1, 2])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one kind and severity together, so that their advice need be read only once; order is kept."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.id), []).append(finding)
    return list(groups.values())


def evidence_of(evidence: Mapping[str, Any]) -> str:
    """The numbers that a finding rests on, in words.

    >>> evidence_of({"dead": 0.25, "tokens": 4096, "at": "blocks.3.mlp.act"})
    'dead units 25 %, tokens 4096, at blocks.3.mlp.act'
    """
    return ", ".join(
        f"{cited(name)} {word(name).show(x) if isinstance(x, int | float) else x}" for name, x in evidence.items()
    )


def cited(name: str) -> str:
    """What a value is called among the numbers of a finding.

    >>> cited("sink_excess"), cited("dead"), cited("int8_tensor_error"), cited("something_new")
    ('beyond an even spread', 'dead units', 'int8 error, one scale a tensor', 'something new')
    """
    one = word(name)
    return one.cited or one.title[:1].lower() + one.title[1:]


def kind_of(site: str) -> str:
    """What a person calls a site when its layer is said elsewhere.

    >>> kind_of("encoder.blocks.3.attn.pattern"), kind_of("logits")
    ('encoder attn.pattern', 'logits')
    """
    stack, blocks, rest = site.partition("blocks.")
    if not blocks:
        return site
    return f"{stack.removesuffix('.')} {rest.partition('.')[2]}".strip()


def stack_of(site: str) -> str:
    """The stack of blocks that a site belongs to; empty for models that have one.

    >>> stack_of("encoder.blocks.3.attn.pattern"), stack_of("blocks.0.mlp.act"), stack_of("logits")
    ('encoder', '', '')
    """
    stack, blocks, _ = site.partition("blocks.")
    return stack.removesuffix(".") if blocks else ""


def layer_page(stack: str, layer: int) -> str:
    """The address of a layer within the page of a report.

    >>> layer_page("", 3), layer_page("encoder", 0)
    ('layer-3', 'encoder-layer-0')
    """
    return f"{stack}-layer-{layer}" if stack else f"layer-{layer}"
