"""Trajectories over tokens and contributions over depth, against loops on the whole tensor and planted ways."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import Contribution, LatentTrajectory, Movement, trajectory_signals

some = settings(max_examples=15, deadline=None)


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def by_hand(x_TD: Tensor, segments: list[Tensor]) -> tuple[float, float, float]:
    h = [x_TD[s].double().mean(0) for s in segments]
    way, steps = h[-1] - h[0], [b - a for a, b in itertools.pairwise(h)]
    net = way.norm() / h[0].norm()
    cumulative = sum(s.norm() / a.norm() for s, a in zip(steps, h, strict=False))
    aligned = torch.stack([cosine_similarity(s, way, dim=0) for s in steps]).mean()
    return float(net), float(cumulative), float(aligned)


def values(measure, *args) -> dict[str, Tensor]:
    measure.update(*args)
    return measure.compute()


# -- trajectories -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "segment"), [(12, 4), (13, 4), (6, 1), (7, 5)])
def test_signals_are_what_a_loop_over_segments_gives(length, segment):
    x = states(0, 3, length, 8)
    got = trajectory_signals(x, segment=segment)
    streamed = values(LatentTrajectory(segment), x)
    want = torch.tensor([by_hand(one, list(torch.arange(length).split(segment))) for one in x])
    torch.testing.assert_close(torch.stack(got, 1), want, rtol=1e-5, atol=1e-6)
    for name, value in zip(("net_change", "cumulative_change", "aligned_change"), want.mean(0), strict=True):
        assert float(streamed[name]) == pytest.approx(float(value), rel=1e-5)


def test_a_straight_way_is_aligned_and_a_circle_goes_nowhere():
    t = torch.linspace(0, 1, 9)[None, :, None]
    straight = torch.cat([torch.ones_like(t), 3 * t], -1)
    net, cumulative, aligned = trajectory_signals(straight)
    assert float(net) == pytest.approx(3.0)
    assert float(aligned) == pytest.approx(1.0)
    there_and_back = torch.cat([straight, straight.flip(1)[:, 1:]], 1)
    net, longer, _ = trajectory_signals(there_and_back)
    assert float(net) == 0
    assert float(longer) > float(cumulative)


def test_boundaries_are_the_segments():
    x = states(1, 2, 7, 4)
    boundaries = torch.tensor([[-1, -1, 0, 0, 1, 2, 2], [0, 1, 1, 1, -1, -1, -1]])
    got = trajectory_signals(x, boundaries=boundaries)
    first = by_hand(x[0], [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5, 6])])
    second = by_hand(x[1], [torch.tensor([0]), torch.tensor([1, 2, 3])])
    torch.testing.assert_close(torch.stack(got, 1), torch.tensor([first, second]), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 999), left=st.integers(0, 3), right=st.integers(0, 3), cut=st.integers(1, 3))
@some
def test_trajectories_merge_and_do_not_see_padding(seed, left, right, cut):
    x = states(seed, 4, 7, 5)
    whole = values(LatentTrajectory(3), x)
    padded = torch.full((cut, left + 7 + right, 5), torch.nan)
    padded[:, left : left + 7] = x[:cut]
    mask = torch.zeros(cut, left + 7 + right, dtype=torch.bool)
    mask[:, left : left + 7] = True
    one, other = LatentTrajectory(3), LatentTrajectory(3)
    one.update(padded, mask), other.update(x[cut:])
    one.merge_state(other)
    for name, value in one.compute().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    # Per sequence as well.
    torch.testing.assert_close(
        trajectory_signals(padded, segment=3, mask=mask).net, trajectory_signals(x[:cut], segment=3).net
    )


def test_rows_without_a_way_are_left_out():
    x = states(2, 3, 6, 4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2:] = False  # one segment only
    mask[2] = False
    got, alone = values(LatentTrajectory(2), x, mask), values(LatentTrajectory(2), x[:1])
    assert all(float(got[name]) == pytest.approx(float(alone[name]), rel=1e-5) for name in got)
    assert trajectory_signals(x, segment=2, mask=mask).net.isnan().tolist() == [False, True, True]
    for nothing in (values(LatentTrajectory(8), x), values(LatentTrajectory(2), x, torch.zeros_like(mask))):
        assert all(value.isnan() for value in nothing.values())
    still = values(LatentTrajectory(1), torch.ones(1, 4, 3))  # a state that never moves has no direction
    assert all(value.isnan() for value in still.values())


def test_a_token_that_is_not_finite_counts_as_padding():
    x = states(3, 2, 9, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4] = False
    want = values(LatentTrajectory(2), x, mask)
    x[0, 4, 1] = torch.inf
    got = values(LatentTrajectory(2), x)
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_half_precision_is_computed_in_float32():
    x = states(4, 2, 8, 16).bfloat16()
    ours, theirs = values(LatentTrajectory(2), x), values(LatentTrajectory(2), x.float())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_recording_and_a_measurement_say_the_same_layer_by_layer():
    model = ac.demo()
    ids = torch.randint(200, (3, 20), generator=torch.Generator().manual_seed(0))
    recording = model.record(ids, "blocks.*.resid.post")
    signals = trajectory_signals(recording, segment=5)
    assert signals.net.shape == (model.layers, 3)
    table = model.measure(ids, {"blocks.*.resid.post": LatentTrajectory(5)})
    torch.testing.assert_close(table.value("net_change").float(), signals.net.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table.value("aligned_change").float(), signals.aligned.mean(1), rtol=1e-4, atol=1e-5)


def test_segments_that_do_not_fit_are_refused():
    x = states(5, 2, 6, 4)
    with pytest.raises(MeasureError, match="not both"):
        trajectory_signals(x, segment=2, boundaries=torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(MeasureError, match="segment of each"):
        trajectory_signals(x, boundaries=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(MeasureError, match="at least one token"):
        LatentTrajectory(0)


# -- contributions ----------------------------------------------------------------------------------------------


def test_contributions_are_projections_and_add_up_to_one():
    h = states(6, 5, 3, 4, 8).cumsum(0)
    got, last = values(Contribution(), h), h[-1].double()
    for i in range(5):
        step = (h[i] - h[i - 1] if i else h[0]).double()
        want = ((step * last).sum(-1) / last.square().sum(-1)).mean()
        assert float(got["contribution"][i]) == pytest.approx(float(want), rel=1e-4, abs=1e-5)
        assert float(got["cosine_last"][i]) == pytest.approx(
            float(cosine_similarity(h[i].double(), last, dim=-1).mean()), rel=1e-5
        )
        assert float(got["cosine_first"][i]) == pytest.approx(
            float(cosine_similarity(h[i].double(), h[0].double(), dim=-1).mean()), rel=1e-5
        )
    assert float(got["contribution"].sum()) == pytest.approx(1.0, abs=1e-5)


def test_planted_steps_are_told():
    first = torch.zeros(1, 2, 4)
    first[..., 0] = 1.0
    idle, double, sideways = first, 2 * first, 2 * first + torch.tensor([0.0, 0, 0, 0])
    got = values(Contribution(), torch.stack([first, idle, double, sideways]))
    assert got["contribution"].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert got["cosine_first"].tolist() == [1.0] * 4


@given(seed=st.integers(0, 999), cut=st.integers(1, 3), pad=st.integers(0, 3))
@some
def test_contributions_merge_and_do_not_see_padding(seed, cut, pad):
    h = states(seed, 3, 4, 5, 6)
    whole = values(Contribution(), h)
    one, other = Contribution(), Contribution()
    one.update(
        torch.cat([h[:, :cut], torch.full((3, cut, pad, 6), torch.nan)], 2),
        torch.arange(5 + pad).expand(cut, -1) < 5,
    )
    other.update(h[:, cut:])
    one.merge_state(other)
    for name, value in one.compute().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_every_other_position_is_every_other_position():
    h = states(7, 3, 2, 9, 6)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    got, want = values(Contribution(every=2), h, mask), values(Contribution(), h[:, :, ::2], mask[:, ::2])
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_a_token_that_is_not_finite_somewhere_is_left_out_everywhere():
    h = states(8, 3, 2, 5, 6)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    want = values(Contribution(), h, mask)
    h[1, 1, 3, 0] = torch.inf
    got = values(Contribution(), h)
    assert all(torch.allclose(got[name], want[name], rtol=1e-6) for name in got)
    nothing = values(Contribution(), h, torch.zeros_like(mask))
    assert all(value.isnan().all() for value in nothing.values())


@pytest.mark.parametrize("site", [0, 1, 2])
def test_a_token_that_is_zero_somewhere_is_left_out_everywhere(site):
    h = states(7, 3, 1, 6, 4)
    want = values(Contribution(), torch.cat([h[:, :, :2], h[:, :, 3:]], 2))
    h[site, :, 2] = 0.0
    got = values(Contribution(), h)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_attention_and_mlp_share_the_contribution_of_their_block():
    model = ac.demo()
    ids = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(1))
    fine = ("blocks.0.resid.pre", "blocks.*.resid.{mid,post}")
    coarse = ("blocks.0.resid.pre", "blocks.*.resid.post")
    table = model.measure(ids, {fine: Contribution(), coarse: Contribution()})
    parts, blocks = (result.per_site("contribution") for result in table)
    assert len(parts) == 2 * model.layers + 1
    # Sums of float32 products in another order.
    torch.testing.assert_close(parts[1:].view(-1, 2).sum(1), blocks[1:], rtol=1e-4, atol=1e-5)
    moved = model.measure(ids, {coarse: Movement()}).value("cosine")
    assert bool((table.results[1].per_site("cosine_last")[-2] - moved[-1]).abs() < 1e-5)


def test_sites_of_other_widths_are_refused():
    with pytest.raises(MeasureError, match="at least two sites of one residual stream"):
        Contribution().update([torch.ones(1, 2, 3), torch.ones(1, 2, 4)])
