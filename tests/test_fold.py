"""Folds beyond one site's tensor: rows that are kept, sites that are measured together, features with labels."""

import functools
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import actome as ac
from actome.core.errors import MeasureError
from actome.core.fold import Fold
from actome.core.measure import Measure, real_tokens

KEPT = 5


class Lowest(Fold):
    """The rows with the smallest keys: a sample that does not depend on the order of the stream."""

    reductions: ClassVar = {"rows": "cat", "count": "sum"}

    def statistics(self, x):
        return {"rows": x, "count": torch.tensor(len(x))}

    def bounded(self, name, rows):
        return rows[rows[:, 0].argsort()[:KEPT]]

    def values(self, stats):
        return dict(stats)


def _rows(count, seed):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99))
def test_kept_rows_are_bounded_and_do_not_depend_on_how_the_stream_was_cut(cuts, seed):
    rows = _rows(40, seed)
    ends = sorted(cuts)
    folds = [Lowest() for _ in range(len(ends) + 1)]
    for one, start, end in zip(folds, [0, *ends], [*ends, 40], strict=True):
        if end > start:
            one.update(rows[start:end])
    total = Lowest()
    for one in reversed(folds):
        total.merge_state(one)
    expected = rows[rows[:, 0].argsort()[:KEPT]]
    got = total.compute()
    assert torch.equal(got["rows"], expected)
    assert int(got["count"]) == 40


def test_a_fold_refuses_what_it_cannot_merge_and_what_has_seen_nothing():
    with pytest.raises(MeasureError, match="seen nothing"):
        Lowest().compute()
    with pytest.raises(MeasureError, match="lacks"):
        Lowest().merge_state({"count": torch.tensor(3)})


def _gather(rank, ranks, rows, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    one = Lowest()
    # The last process has seen nothing.
    if rank < ranks - 1:
        one.update(rows[rank :: ranks - 1])
    expected = rows[rows[:, 0].argsort()[:KEPT]]
    got = one.compute()
    assert torch.equal(got["rows"], expected)
    assert int(got["count"]) == len(rows)
    torch.distributed.destroy_process_group()


def test_kept_rows_are_gathered_from_all_processes(tmp_path):
    torch.multiprocessing.spawn(
        functools.partial(_gather, ranks=3, rows=_rows(30, 1), file=tmp_path / "meet"), nprocs=3
    )


class Angles(Measure):
    """Mean cosine between the states of sites, whatever runs between them."""

    layout = "sites"
    reductions: ClassVar = {"cosine": "sum", "tokens": "sum"}
    value_dims: ClassVar = {"cosine": ("site",)}

    def site_statistics(self, x, mask=None, tokens=None):
        unit = torch.stack([nn.functional.normalize(one.double(), dim=-1) for one in x])
        cosine = torch.einsum("lbtu,mbtu->lmbt", unit, unit)
        keep = torch.ones(x[0].shape[:2], dtype=torch.bool) if mask is None else mask
        return {"cosine": cosine[..., keep].sum(-1), "tokens": keep.sum()}

    def values(self, stats):
        return {"cosine": stats["cosine"] / stats["tokens"]}


def test_sites_are_measured_together():
    model = ac.demo()
    texts = ["The value of the expression is", "for i in range(10):", "x"]
    table = model.measure(texts, {"blocks.*.resid.post": Angles()}, batch_size=2)
    states = [model.record(one, "blocks.*.resid.post")["blocks.*.resid.post"][:, 0].double() for one in texts]
    unit = nn.functional.normalize(torch.cat(states, 1), dim=-1)
    expected = torch.einsum("ltu,mtu->lm", unit, unit) / unit.shape[1]
    # float32 forwards of other batch shapes differ in their rounding.
    assert torch.allclose(table.value("cosine"), expected, atol=1e-4)
    assert [site.name for site in table.sites("cosine")] == [f"blocks.{i}.resid.post" for i in range(4)]


class KeptRows(Measure):
    """Rows at single sites: their number may differ from site to site."""

    reductions: ClassVar = {"rows": "cat"}
    value_dims: ClassVar = {"largest": ()}

    def site_statistics(self, x, mask=None, tokens=None):
        kept = real_tokens(x, mask)
        return {"rows": kept.x.flatten(0, 1).amax(-1, keepdim=True)}

    def bounded(self, name, rows):
        return rows.sort(0, descending=True).values[:3]

    def values(self, stats):
        return {"largest": stats["rows"].amax((-1, -2))}


def test_rows_that_are_kept_give_one_result_for_each_site():
    model = ac.demo()
    table = model.measure("The value of the expression", {"blocks.*.resid.post": KeptRows()})
    states = model.record("The value of the expression", "blocks.*.resid.post")["blocks.*.resid.post"]
    assert torch.equal(table.value("largest").float(), states.amax((1, 2, 3)))


# -- with labels ------------------------------------------------------------------------------------------------------


class ClassMeans(Fold):
    reductions: ClassVar = {"total": "sum", "count": "sum"}

    def statistics(self, x, y):
        one_hot = nn.functional.one_hot(y, 3).double()
        return {"total": one_hot.T @ x.double(), "count": one_hot.sum(0)}

    def values(self, stats):
        return {"means": stats["total"] / stats["count"][:, None], "count": stats["count"]}


TEXTS = ["The value of the expression is", "for i in range(10):", "a list"]


def _states(text):
    return ac.demo().record(text, "blocks.1.resid.post")["blocks.1.resid.post"][0].double()


def test_labels_of_tokens_and_of_rows_go_with_the_features():
    model, wanted = ac.demo(), {"blocks.1.resid.post": ClassMeans()}
    states = [_states(text) for text in TEXTS]
    by_row = model.fold([(TEXTS, torch.tensor([0, 1, 2]))], wanted)["blocks.1.resid.post"].compute()
    assert by_row["count"].tolist() == [len(one) for one in states]
    assert torch.allclose(by_row["means"], torch.stack([one.mean(0) for one in states]), atol=1e-4)
    length = max(map(len, states))
    by_token = model.fold([(TEXTS, torch.arange(length).expand(3, -1) % 3)], wanted)["blocks.1.resid.post"].compute()
    first = torch.cat([one[::3] for one in states]).mean(0)
    assert torch.allclose(by_token["means"][0], first, atol=1e-4)


@pytest.mark.parametrize(("pool", "pick"), [("last", -1), (-2, -2), (1, 1), ("mean", None)])
def test_tokens_are_pooled_as_asked_whatever_the_padding(pool, pick):
    model = ac.demo()
    out = model.fold([(TEXTS, torch.tensor([0, 1, 2]))], {"blocks.1.resid.post": ClassMeans()}, pool=pool)
    states = [_states(text) for text in TEXTS]
    expected = torch.stack([one.mean(0) if pick is None else one[pick] for one in states])
    assert torch.allclose(out["blocks.1.resid.post"].compute()["means"], expected, atol=1e-4)


def test_folding_with_labels_refuses_what_does_not_fit():
    model, wanted = ac.demo(), {"blocks.1.resid.post": ClassMeans()}
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(MeasureError, match="no batch"):
        model.fold([], wanted)
    with pytest.raises(MeasureError, match="not in every row"):
        model.fold([(TEXTS, labels)], wanted, pool=30)
    with pytest.raises(MeasureError, match="do not belong"):
        model.fold([(TEXTS, torch.zeros(5, dtype=torch.long))], wanted)
    with pytest.raises(MeasureError, match="choose"):
        model.fold([(TEXTS, labels)], wanted, pool="median")
