"""Panels: what measures share within one must not show in what any of them says."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from tiny import TINY

import actome as ac
from actome.core import stream
from actome.core.real import all_norms, real_tokens, shared, shared_tokens, token_norms, unit_peaks
from actome.measures.panels import PANELS

LENGTH = 20


def batch(vocab: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocab, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        # Both sides, and a row without padding; what the ids of padding are must not matter.
        mask[0, 13:] = 0
        mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def model(name: str) -> ac.Model:
    return ac.demo() if name == "demo" else ac.wrap(TINY[name]())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["demo", "mixtral"])
@pytest.mark.parametrize("panel", ["health", "all"])
def test_a_measure_says_the_same_alone_and_in_a_panel(panel, name, padded, monkeypatch):
    m = model(name)
    given = batch(30, padded)
    together = m.measure([given], PANELS[panel])
    assert len(together.results) >= 10
    # Alone, and without anything that is shared.
    monkeypatch.setattr(stream, "shared_tokens", contextlib.nullcontext)
    for result in together.results:
        measure = copy.deepcopy(result.measure)
        measure.reset()
        alone = m.measure([given], {tuple(site.name for site in result.sites): measure}).results
        assert len(alone) == 1
        for key, value in result.values.items():
            said = alone[0].values[key]
            # To the last bit: the same arithmetic on the same tensors.
            assert torch.equal(value.nan_to_num(), said.nan_to_num()), (type(measure).__name__, key, result.sites[0])
            assert torch.equal(value.isnan(), said.isnan()), (type(measure).__name__, key)


@pytest.mark.parametrize("panel", ["health", "all"])
def test_a_panel_changes_nothing_in_the_model(panel):
    m = model("demo")
    given = batch(30, padded=True)
    before = m.module(**given).logits
    seen: list[torch.Tensor] = []
    (site,) = m.match("logits")
    with torch.no_grad(), m.tap([(site.address, lambda x: seen.append(x.clone()), "read")]):
        m.measure([given], PANELS[panel])
    assert torch.equal(seen[0], before)
    assert torch.equal(m.module(**given).logits, before)


def test_what_is_shared_is_made_once_for_a_tensor_and_anew_for_any_other():
    x, mask, made = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), []

    def make() -> int:
        made.append(1)
        return len(made)

    with shared_tokens():
        assert shared("a", x, mask, make) == shared("a", x.detach(), mask, make) == 1
        assert shared("b", x, mask, make) == 2  # another name
        assert shared("a", x, None, make) == 3  # another mask
        assert shared("a", x, mask.clone(), make) == 4
        mask[0, 0] = False  # another in the same place
        assert shared("a", x, mask, make) == 5
        x.mul_(2)
        assert shared("a", x, mask, make) == 6
        assert shared("a", x + 0, mask, make) == 7
    assert shared("a", x, mask, make) == 8


def test_norms_and_peaks_are_those_of_the_tokens_that_count():
    x, mask = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    x[0, 4], x[0, 5] = torch.nan, 1e30
    x[1, 2, 0], x[1, 3] = torch.inf, 2e19  # the second is finite, and its float32 norm is not
    keep = mask & x.isfinite().all(-1)
    kept = x.where(keep[..., None], 0.0)
    for context in (contextlib.nullcontext, shared_tokens):
        with context():
            assert torch.equal(real_tokens(x, mask).keep, keep)
            assert torch.equal(unit_peaks(x, mask), kept.abs().amax(1))
            norms = token_norms(x, mask)
            ordinary = torch.ones_like(keep)
            ordinary[1, 3] = False
            assert torch.allclose(norms[ordinary], kept.norm(dim=-1)[ordinary])
            assert bool(norms[1, 3].isinf())
            assert not bool(norms[~keep].any())
            assert bool(all_norms(x)[0, 4].isnan())
