"""The algebra that every measure obeys, whatever it measures, and the state that torchmetrics wraps around it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import SUBJECTS, activations, assert_same, generator, ids, measured
from torch import Tensor

from actome.core.errors import MeasureError, SiteError
from actome.core.measure import TOGETHER, Measure, MeasureResult, MeasureTable, real_tokens
from actome.core.sites import Site
from actome.measures import ActivationScale, EffectiveRank, Movement, SinkScore, Sparsity

every = pytest.mark.parametrize("name", SUBJECTS)
some = settings(max_examples=12, deadline=None)


def resid(layer: int, width: int = 4) -> Site:
    return Site(f"blocks.{layer}.resid.post", ("batch", "pos", "d_model"), (None, None, width), layer)


@every
@given(seed=st.integers(0, 10_000), batch=st.integers(2, 5), length=st.integers(2, 9), data=st.data())
@some
def test_merging_two_parts_is_measuring_the_whole(name, seed, batch, length, data):
    subject, g = SUBJECTS[name], generator(seed)
    x, tokens = subject.inputs(g, batch, length), ids(g, batch, length)
    cut = data.draw(st.integers(1, batch - 1))
    parts = [subject.make(), subject.make()]
    sizes = [cut, batch - cut]
    for part, piece, t in zip(parts, x.split(sizes, subject.batch_dim), tokens.split(sizes), strict=True):
        part.update(piece, None, t)
    whole = measured(subject, x, None, tokens)
    one_after_the_other = subject.make()
    for piece, t in zip(x.split(sizes, subject.batch_dim), tokens.split(sizes), strict=True):
        one_after_the_other.update(piece, None, t)
    assert_same(one_after_the_other.compute(), whole)
    parts[0].compute()  # which must not be what is given after the merge
    parts[0].merge_state(parts[1])
    assert_same(parts[0].compute(), whole)


@every
@given(
    seed=st.integers(0, 10_000),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    what=st.sampled_from(["nan", "inf", "big"]),
)
@some
def test_padding_never_changes_a_number(name, seed, left, right, what):
    subject, g = SUBJECTS[name], generator(seed)
    x, tokens = subject.inputs(g, 3, 6), ids(g, 3, 6)
    dims = {"pattern": (2, 3), "depth": (2,), "sites": (2,)}.get(subject.make().layout, (1,))
    shape = list(x.shape)
    inner = [slice(None)] * x.ndim
    for dim in dims:
        shape[dim] += left + right
        inner[dim] = slice(left, left + 6)
    padded = torch.full(shape, {"nan": torch.nan, "inf": -torch.inf, "big": 1e30}[what])
    padded[tuple(inner)] = x
    mask = torch.zeros(3, 6 + left + right, dtype=torch.bool)
    mask[:, left : left + 6] = True
    padded_ids = torch.full(mask.shape, 50_000)
    padded_ids[mask] = tokens.flatten()
    assert_same(measured(subject, padded, mask, padded_ids), measured(subject, x, None, tokens))


@every
@given(seed=st.integers(0, 10_000))
@some
def test_rows_of_different_lengths_are_measured_as_if_alone(name, seed):
    subject, g = SUBJECTS[name], generator(seed)
    x, tokens = subject.inputs(g, 3, 6), ids(g, 3, 6)
    lengths = torch.tensor([6, 3, 1])
    together = measured(subject, x, torch.arange(6) < lengths[:, None], tokens)
    alone = subject.make()
    for row, n in enumerate(lengths.tolist()):
        piece = x.narrow(subject.batch_dim, row, 1)
        for dim in {"pattern": (2, 3), "depth": (2,), "sites": (2,)}.get(alone.layout, (1,)):
            piece = piece.narrow(dim, 0, n)
        alone.update(piece, None, tokens[row : row + 1, :n])
    assert_same(together, alone.compute())


@every
def test_the_order_of_rows_does_not_matter(name):
    subject, g = SUBJECTS[name], generator(1)
    x, tokens = subject.inputs(g, 6, 5), ids(g, 6, 5)
    order = torch.randperm(6, generator=g)
    assert_same(
        measured(subject, x.index_select(subject.batch_dim, order), None, tokens[order]),
        measured(subject, x, None, tokens),
    )


@every
def test_a_stack_is_measured_like_its_layers(name):
    subject, g = SUBJECTS[name], generator(2)
    if subject.make().layout in TOGETHER:
        pytest.skip("all layers are one input already")
    xs, tokens = [subject.inputs(g, 3, 5) for _ in range(4)], ids(g, 3, 5)
    stacked = measured(subject, torch.stack(xs).unflatten(0, (2, 2)), None, tokens)
    for i, x in enumerate(xs):
        one = measured(subject, x, None, tokens)
        assert_same({key: value[i // 2, i % 2] for key, value in stacked.items()}, one)
        assert all(value.ndim == len(subject.make().value_dims[key]) for key, value in one.items())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_or_better_whatever_the_input(name, dtype):
    subject, g = SUBJECTS[name], generator(3)
    x, tokens = subject.inputs(g, 4, 8).to(dtype), ids(g, 4, 8)
    if x.dtype == torch.float64:
        x = x.float().double()
    # The same numbers in float32 must give the same, so nothing was rounded on the way.
    assert_same(measured(subject, x, None, tokens), measured(subject, x.float(), None, tokens))


@every
def test_only_padding_says_nothing(name):
    subject, g = SUBJECTS[name], generator(4)
    x, tokens = subject.inputs(g, 2, 5), ids(g, 2, 5)
    empty = subject.make()
    empty.update(x, torch.zeros(2, 5, dtype=torch.bool), tokens)
    values = empty.compute()
    assert not any(value.isinf().any() for value in values.values())
    if name not in ("DeadUnits", "Movement"):
        assert all(value.isnan().all() for value in values.values())
    # And adds nothing to what was seen.
    empty.update(x, None, tokens)
    assert_same(empty.compute(), measured(subject, x, None, tokens))


@every
def test_one_token(name):
    subject, g = SUBJECTS[name], generator(5)
    values = measured(subject, subject.inputs(g, 1, 1), None, ids(g, 1, 1))
    assert not any(value.isinf().any() for value in values.values())


@every
def test_a_token_that_is_not_finite_is_left_out(name):
    subject, g = SUBJECTS[name], generator(6)
    x, tokens = subject.inputs(g, 3, 6), ids(g, 3, 6)
    layout, batch = subject.make().layout, x.shape[subject.batch_dim]
    mask = torch.ones(batch, 6, dtype=torch.bool)
    # The last token, so that leaving it out is the same as its being padding.
    mask[1, 5] = False
    broken = x.clone()
    if layout in TOGETHER:
        broken[:, 1, 5, 0] = torch.nan
    elif layout == "pattern":
        broken[1, 0, 5, 2] = torch.nan
    else:
        broken[1, 5, 0] = torch.inf
    ours, without = measured(subject, broken, None, tokens), measured(subject, x, mask, tokens)
    for key in ("non_finite", "non_finite_tokens"):
        if key in ours:
            assert float(ours.pop(key)) == pytest.approx(1 / (x.numel() if key == "non_finite" else mask.numel()))
            without.pop(key)
    if layout == "logits":
        # The token is still there to be predicted, and nothing is predicted from the last one.
        of_all = ("log_z", "max_logit", "repetition")  # what is over positions and not over predictions
        without |= {key: value for key, value in measured(subject, x, None, tokens).items() if key not in of_all}
        without.pop("non_finite_tokens", None)
    assert_same(ours, without)


@every
def test_merging_with_one_that_has_seen_nothing(name):
    subject, g = SUBJECTS[name], generator(7)
    x, tokens = subject.inputs(g, 2, 5), ids(g, 2, 5)
    whole = measured(subject, x, None, tokens)
    full, empty = subject.make(), subject.make()
    full.update(x, None, tokens)
    full.merge_state(subject.make())
    assert_same(full.compute(), whole)
    empty.merge_state(full)
    assert_same(empty.compute(), whole)
    full.update(x, None, tokens)  # what was merged is a copy
    assert_same(empty.compute(), whole)


@every
def test_pickle_clone_reset_and_forward(name):
    subject, g = SUBJECTS[name], generator(8)
    x, tokens = subject.inputs(g, 2, 5), ids(g, 2, 5)
    measure = subject.make()
    measure.update(x, None, tokens)
    whole = measure.compute()
    copy = pickle.loads(pickle.dumps(measure))
    assert_same(copy.compute(), whole)
    copy.update(x, None, tokens)
    assert_same(measure.compute(), whole)
    copy.reset()
    with pytest.raises(MeasureError, match="seen nothing"), pytest.warns(UserWarning, match="before the"):
        copy.compute()
    assert_same(copy(x, None, tokens), whole)  # forward gives the values of the batch
    assert_same(copy.compute(), whole)


@every
def test_the_state_does_not_grow_with_the_stream(name):
    subject, g = SUBJECTS[name], generator(9)
    measure = subject.make()
    measure.update(subject.inputs(g, 2, 4), None, ids(g, 2, 4))
    size = len(pickle.dumps(measure))
    for length in (9, 5, 30):
        measure.update(subject.inputs(g, 2, length), None, ids(g, 2, length))
    assert len(pickle.dumps(measure)) <= size + 256  # what was computed last may differ a little


@every
def test_gradients_and_inference_mode_do_not_matter(name):
    subject, g = SUBJECTS[name], generator(10)
    x, tokens = subject.inputs(g, 2, 5), ids(g, 2, 5)
    measure = subject.make()
    with torch.inference_mode():
        measure.update(x, None, tokens)
    measure.update(x.clone().requires_grad_(), None, tokens)
    twice = subject.make()
    for _ in range(2):
        twice.update(x, None, tokens)
    assert_same(measure.compute(), twice.compute())
    assert not any(value.requires_grad for value in measure.metric_state.values())


@every
def test_statistics_leave_the_input_alone(name):
    subject, g = SUBJECTS[name], generator(11)
    x, tokens = subject.inputs(g, 2, 5), ids(g, 2, 5)
    before = x.clone()
    measured(subject, x, None, tokens)
    measured(subject, x, torch.arange(5) < torch.tensor([[4], [5]]), tokens)
    assert torch.equal(x, before)


def _rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for subject in SUBJECTS.values():
        g = generator(12)
        x, tokens = subject.inputs(g, 4, 6), ids(g, 4, 6)
        # How many of the four rows each process gets; one may see nothing at all.
        for sizes in ([2, 2], [4, 0]):
            measure = subject.make()
            if sizes[rank]:
                part = x.split(sizes, subject.batch_dim)[rank]
                measure.update(part, None, tokens.split(sizes)[rank])
            assert_same(measure.compute(), _without_processes(subject.make(), x, tokens))
            # Afterwards each goes on with its own part.
            assert measure.update_count == (1 if sizes[rank] else 0)
    dist.barrier()
    dist.destroy_process_group()


def _without_processes(measure: Measure, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    if measure.layout == "depth":
        x = torch.stack([measure.prepare(x[i], x[i - 1] if i else None) for i in range(len(x))])
    elif measure.layout == "sites":
        x = [measure.prepare(one, None) for one in x]
    stats = measure.statistics(x, None, tokens)
    kept = {name: measure.bounded(name, stats[name]) for name, how in measure.reductions.items() if how == "cat"}
    return measure.values({**stats, **kept})


@pytest.mark.filterwarnings("ignore")
def test_two_processes_are_measured_as_one(tmp_path: Path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)


def test_sums_stay_exact_over_a_long_stream():
    scale = ActivationScale()
    x = torch.full((1, 1, 1), 0.1)
    stats = scale.statistics(x)
    big = {name: value.clone() for name, value in stats.items()}
    big["square"] = big["square"] * 1e9
    scale.fold(big)
    for _ in range(1000):
        scale.fold(stats)
    # In float32 a thousand additions of 0.01 to 1e7 would be lost.
    assert float(scale.square) == pytest.approx(0.01 * 1e9 + 1000 * 0.01, rel=1e-7)
    counts = Sparsity()
    part = counts.statistics(torch.ones(2, 1, 1, 3))
    counts.fold({name: value * (2**40 + 1) for name, value in part.items()})
    counts.fold(part)
    assert counts.active.tolist() == [[2**40 + 2] * 3] * 2


def test_rows_name_site_layer_head_and_unit():
    sinks = SinkScore()
    sinks.update(torch.eye(3).expand(2, 1, 2, 3, 3).clone())
    sites = [
        Site(f"blocks.{i}.attn.pattern", ("batch", "head", "query", "key"), (None, 2, None, None), i) for i in (4, 5)
    ]
    rows = sinks.rows(sites)
    assert list(rows.columns) == ["site", "layer", "head", "measure", "value"]
    assert rows[(rows.layer == 5) & (rows["head"] == 1) & (rows.measure == "sink")].value.item() == pytest.approx(1 / 3)
    with pytest.raises(MeasureError, match="one for each entry"):
        sinks.rows(sites[:1])


def test_units_of_heads_and_experts_are_told_apart():
    sparsity = Sparsity()
    sparsity.update(torch.arange(6.0).expand(1, 1, 6))
    z = Site("blocks.0.attn.z", ("batch", "pos", "head", "d_head"), (None, None, 2, 3), 0)
    rows = sparsity.rows([z]).query("measure == 'frequency'")
    assert rows["head"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["unit"].tolist() == [0, 1, 2, 0, 1, 2]
    router = Site("blocks.0.moe.router", ("batch", "pos", "expert"), (None, None, 6), 0)
    rows = sparsity.rows([router])
    assert "unit" not in rows
    assert rows.query("measure == 'frequency'")["expert"].tolist() == list(range(6))


def test_a_table_gives_values_frames_and_records():
    def result(measure: Measure, x: Tensor, sites: list[Site]) -> MeasureResult:
        measure.update(x)
        return MeasureResult(measure, tuple(sites), measure.compute())

    x = torch.randn(3, 2, 5, 4, generator=generator())
    x[2, 0, 0, 0] = torch.nan
    act = Site("blocks.0.mlp.act", ("batch", "pos", "d_mlp"), (None, None, 6), 0)
    table = MeasureTable(
        [
            result(ActivationScale(), x, [resid(i) for i in range(3)]),
            result(Movement(), x, [resid(i) for i in range(3)]),
            result(Sparsity(), torch.ones(1, 2, 6), [act]),
        ]
    )
    assert table.value("rms").shape == (3,)
    assert float(table.value("rms", "blocks.1.resid.post")) == pytest.approx(float(x[1].square().mean().sqrt()))
    assert table.value("frequency", act.name).tolist() == [1.0] * 6
    assert [site.layer for site in table.sites("movement")] == [0, 1, 2]
    assert list(table.frame.columns) == ["site", "layer", "unit", "measure", "value"]
    assert len(table.frame) == 3 * 4 + 3 * 3 + 2 + 6
    records = table.records()
    assert len(records) == 3 * 4 + 3 * 3 + 2
    assert len(table.records(units=True)) == len(table.frame)
    first = next(r for r in records if r["measure"] == "movement" and r["layer"] == 0)
    assert first == {"site": "blocks.0.resid.post", "layer": 0, "measure": "movement", "value": None}
    with pytest.raises(MeasureError, match="nearest: rms"):
        table.value("rmse")
    with pytest.raises(SiteError, match="not measured at"):
        table.value("rms", "blocks.7.resid.post")


def test_one_layer_keeps_its_dim():
    scale = ActivationScale()
    scale.update(torch.ones(1, 1, 1, 1))
    assert scale.compute()["rms"].shape == (1,)


@pytest.mark.parametrize(
    ("x", "mask", "match"),
    [
        (torch.ones(2, 3), None, r"takes \(batch, pos, unit\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), None, "floating-point"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"shape \(2, 3\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), "bool mask"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, mask, match):
    with pytest.raises(MeasureError, match=match):
        ActivationScale().update(x, mask)


def test_sites_of_another_width_are_refused():
    sparsity = Sparsity()
    sparsity.update(torch.ones(1, 2, 4))
    with pytest.raises(MeasureError, match="one measure for each shape"):
        sparsity.update(torch.ones(1, 2, 5))


def test_too_wide_a_site_is_refused_with_what_it_would_take():
    rank = EffectiveRank(max_width=8, sketch=None)
    assert rank.fits(resid(0, 8)) is None
    assert "max_width=8" in (rank.fits(resid(0, 9)) or "")
    with pytest.raises(MeasureError, match="9 units"):
        rank.update(torch.ones(1, 2, 9))


def test_a_maximum_that_overflows_a_sum_is_still_finite():
    x = torch.full((1, 2, 4), 3e38)
    kept = real_tokens(x)
    assert int(kept.count) == 2
    assert int(kept.non_finite) == 0
    assert activations(generator(), 1, 2).isfinite().all()
