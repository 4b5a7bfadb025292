"""The reproductions at the scale that their claims are stated for; minutes each, so a few at a time, by rotation.

`make test-slow` runs all; with ROTATION=n in the environment only n of them, others each day.
"""

import datetime
import json
import os

import pytest

from actome.papers import find
from actome.papers.registry import slugs


def due(day: int) -> list[str]:
    """The papers whose turn it is."""
    known, count = slugs(), int(os.environ.get("ROTATION", 0))
    return [known[(day * count + i) % len(known)] for i in range(min(count, len(known)))] if count else known


@pytest.mark.slow
@pytest.mark.parametrize("slug", due(datetime.date.today().toordinal()))
def test_the_claim_is_put_to_the_test_at_its_own_scale(slug):
    got = find(slug).reproduce(seed=10, scale="small")
    json.dumps(got.to_dict(), allow_nan=False)
    assert got.checks
    assert got.control
    assert got.held == all(got.checks.values())


def test_every_paper_has_its_turn(monkeypatch):
    monkeypatch.setenv("ROTATION", "2")
    days = range(700_000, 700_000 + len(slugs()))
    assert {slug for day in days for slug in due(day)} == set(slugs())
    monkeypatch.setenv("ROTATION", "0")
    assert due(1) == slugs()
