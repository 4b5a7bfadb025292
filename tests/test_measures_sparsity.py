"""Unit frequencies, temporal sparsity, truncation errors, PPL-p sparsity and gradient signs, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from measured import generator
from torch import Tensor, nn
from torch.nn import functional as F

import actome as ac
from actome.core.errors import MeasureError
from actome.measures import NextTokenLoss, Sparsity
from actome.measures.cett import CETT, cett, down_projection
from actome.measures.delta import DeltaSparsity
from actome.measures.gradient_sign import GradientSign, gradient_sign
from actome.measures.ppl_sparsity import ppl_sparsity, silenced
from actome.measures.sparsity import UnitFrequency
from actome.tasks.corpus import documents

ACT = "blocks.*.mlp.act"


def values(measure, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    measure.update(x, mask)
    return measure.compute()


def ids(seed: int, rows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(5, 400, (rows, length), generator=generator(seed))


def text(start: int) -> Tensor:
    """Real text that the demo model was not trained on, (4, 64); what is silenced must cost something."""
    words = " ".join(one.text for one in itertools.islice(documents("heldout"), 4))
    known = torch.tensor(ac.demo().tokenizer(words).input_ids[start : start + 256])
    return known.view(4, 64)


# -- unit frequency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("active", "share"), [(99, 1.0), (98, 0.0)])
def test_a_unit_active_at_just_the_given_share_is_always_active(active, share):
    x = torch.zeros(1, 100, 1)
    x[:, :active] = 1.0
    assert float(UnitFrequency(always=0.99).statistics(x)["active"]) == active
    assert float(values(UnitFrequency(always=0.99), x)["always_active"]) == share


def test_unit_frequencies_are_counts():
    x = F.relu(torch.randn(4, 25, 40, generator=generator()))
    x[..., [3, 8]] = 0.0
    x[..., 11] = 1.0
    got, active = values(UnitFrequency(), x), (x != 0).double()
    frequency = active.mean((0, 1))
    assert torch.equal(got["unit_frequency"], frequency)
    assert float(got["active"]) == pytest.approx(float(active.mean()), abs=1e-12)
    assert float(got["never_active"]) == 2 / 40
    assert float(got["always_active"]) == 1 / 40
    assert float(got["silence_of_dead"]) == pytest.approx(200 / float((x == 0).sum()))
    # 100 tokens: a bin is five of them wide, and the last one holds its end as well.
    want = np.bincount(np.minimum(active.sum((0, 1)).long().numpy() // 5, 19), minlength=20)
    np.testing.assert_allclose(got["frequency_histogram"], want / 40, atol=1e-12)


def test_the_relative_threshold_is_that_of_sparsity():
    x = F.gelu(torch.randn(2, 9, 33, generator=generator()))
    got, known = values(UnitFrequency(near=0.2), x), values(Sparsity(near=0.2), x)
    assert torch.equal(got["unit_frequency"], known["frequency"])
    assert float(got["active"]) == pytest.approx(1 - float(known["near_zeros"]), abs=1e-12)


def test_lazy_units_are_told_from_dead_ones():
    lazy = F.relu(torch.randn(8, 64, 100, generator=generator()) - 1.3)
    dead = F.relu(torch.randn(8, 64, 100, generator=generator()) + 3)
    dead[..., :90] = 0
    lazy, dead = values(UnitFrequency(), lazy), values(UnitFrequency(), dead)
    assert float(lazy["active"]) == pytest.approx(float(dead["active"]), abs=0.01)
    assert float(lazy["silence_of_dead"]) == 0
    assert float(dead["silence_of_dead"]) > 0.99


# -- delta --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 0.5])
def test_temporal_zeros_are_those_of_differences(step):
    x = torch.randn(3, 50, 12, generator=generator()).cumsum(1) * 0.1
    got = values(DeltaSparsity(step=step), x)
    a = x.double().numpy()
    steps = step or 0.1 * np.sqrt((a**2).mean((1, 2), keepdims=True))
    q = np.round(a / steps)
    d = np.diff(q, axis=1, prepend=0)
    # The step in float32 may move an entry that lies on an edge.
    assert float(got["temporal_zeros"]) == pytest.approx((d == 0).mean(), abs=2e-3)
    assert float(got["spatial_zeros"]) == pytest.approx((q == 0).mean(), abs=2e-3)
    assert float(got["delta_work"]) == pytest.approx((3 * 12 + (d[:, 1:] != 0).sum()) / a.size, abs=2e-3)


def test_pieces_of_a_long_row_are_the_row(monkeypatch):
    x = torch.randn(2, 37, 8, generator=generator()).cumsum(1)
    whole = values(DeltaSparsity(), x)
    for chunk in (8, 40, 80):
        monkeypatch.setattr("actome.measures.delta._CHUNK", chunk)
        assert {k: float(v) for k, v in values(DeltaSparsity(), x).items()} == {k: float(v) for k, v in whole.items()}


def test_a_still_stream_is_temporally_sparse_and_a_shuffled_one_is_not():
    frames = torch.randn(4, 1, 64, generator=generator()) + 0.02 * torch.randn(4, 30, 64, generator=generator(1))
    still = values(DeltaSparsity(), frames)
    assert float(still["temporal_zeros"]) > 2 * float(still["spatial_zeros"])
    shuffled = torch.randn(4, 30, 64, generator=generator())
    mixed = values(DeltaSparsity(), shuffled)
    assert float(mixed["temporal_zeros"]) <= float(mixed["spatial_zeros"]) + 0.05


def test_the_position_after_a_lost_one_is_compared_with_the_one_before():
    x = torch.tensor([[[1.0, 2.0], [torch.nan, 0.0], [1.0, 2.0]]])
    assert float(values(DeltaSparsity(step=1.0), x)["temporal_zeros"]) == 0.5
    with pytest.raises(MeasureError, match="step is 0"):
        DeltaSparsity(step=0)


# -- CETT ---------------------------------------------------------------------------------------------------------


def brute_cett(z: Tensor, weight: Tensor, threshold: float) -> tuple[float, float]:
    n_NFD = z.flatten(0, 1).double()[:, :, None] * weight.double().T
    size = n_NFD.norm(dim=-1)
    lost = (n_NFD * (size < threshold)[..., None]).sum(1).norm(dim=-1)
    kept = (size >= threshold) & (size > 0)
    return float((lost / n_NFD.sum(1).norm(dim=-1)).mean()), float(kept.double().mean())


def test_cett_is_what_summing_contributions_says():
    z = F.relu(torch.randn(2, 11, 20, generator=generator()))
    weight = torch.randn(6, 20, generator=generator(1))
    thresholds = [0.0, 0.7, 2.0, 4.0, 1e3]
    got = values(CETT(weight, thresholds, every=1), z)
    for i, threshold in enumerate(thresholds):
        error, kept = brute_cett(z, weight, threshold)
        assert float(got["cett"][i]) == pytest.approx(error, rel=1e-5, abs=1e-7)
        assert float(got["cett_kept"][i]) == pytest.approx(kept, abs=1e-12)


def test_a_threshold_for_an_error_gives_that_error():
    z = torch.randn(4, 40, 30, generator=generator())
    weight = torch.randn(8, 30, generator=generator(1))
    measure = CETT(weight, torch.linspace(0, 12, 100), error=0.3, every=1)
    measure.update(z)
    threshold = measure.threshold_at(0.3)
    error, kept = brute_cett(z, weight, threshold)
    assert error == pytest.approx(0.3, abs=0.01)  # a hundredth of the range of thresholds
    assert float(measure.compute()["kept_at_error"]) == pytest.approx(kept, abs=0.01)
    assert measure.threshold_at(1.0) == float("inf")
    # On the activations themselves the same units are dropped.
    dropped = z.abs().double() < measure.units_thresholds(threshold)
    assert torch.equal(dropped, z.abs().double() * weight.double().norm(dim=0) < threshold)


def test_units_without_a_column_are_the_first_to_go():
    weight = torch.tensor([[1.0, 0.0]])
    measure = CETT(weight, [0.5], every=1)
    assert measure.units_thresholds(0.0).tolist() == [0.0, 0.0]
    assert measure.units_thresholds(0.5).tolist() == [0.5, float("inf")]


@pytest.mark.parametrize(
    ("weight", "thresholds", "what"),
    [(torch.ones(3), [1.0], "d_model, unit"), (torch.ones(2, 2), [1.0, 1.0], "ascend"), (torch.ones(2, 2), [], "one")],
)
def test_weights_and_thresholds_are_checked(weight, thresholds, what):
    with pytest.raises(MeasureError, match=what):
        CETT(weight, thresholds)


def test_a_weight_of_another_width_is_told():
    with pytest.raises(MeasureError, match="20 units, and the down projection 6"):
        values(CETT(torch.ones(3, 6), [1.0]), torch.ones(1, 2, 20))


def test_the_down_projection_is_found_behind_any_linear_map():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(3, 5)
    nn.init.normal_(conv.bias)
    point = ac.core.taps.HookPoint(conv, "in")
    site = ac.core.sites.Site("blocks.0.mlp.act", ("batch", "pos", "d_mlp"), (None, None, 5), 0, True, point)
    torch.testing.assert_close(down_projection(site), conv.weight.T, rtol=1e-5, atol=1e-6)
    model = ac.demo()
    (site,) = model.match("blocks.1.mlp.act")
    assert down_projection(site).shape == (model.d_model, site.sizes[-1])
    with pytest.raises(MeasureError, match="no projection"):
        down_projection(model.match("blocks.1.resid.post")[0])


def test_cett_of_a_model_is_that_of_its_recording():
    model, text = ac.demo(), ids(0)
    (result,) = [r for r in cett(model, text, thresholds=6) if r.sites[0].name == "blocks.2.mlp.act"]
    z = model.record(text, "blocks.2.mlp.act")["blocks.2.mlp.act"]
    weight = down_projection(result.sites[0])
    for i, threshold in enumerate(result.measure.thresholds.tolist()):
        error, kept = brute_cett(z, weight, threshold)
        assert float(result.values["cett"][0, i]) == pytest.approx(error, rel=1e-4, abs=1e-6)
        # The grid lies on contributions themselves, which may round to either side of it.
        assert float(result.values["cett_kept"][0, i]) == pytest.approx(kept, abs=2e-5)


# -- silencing ----------------------------------------------------------------------------------------------------


def test_ppl_sparsity_keeps_within_its_budget_and_grows_with_it():
    model, heldout = ac.demo(), text(256)
    curves = cett(model, text(0), thresholds=24)
    one, five = (ppl_sparsity(model, curves, heldout, p=p, tolerance=0.01) for p in (1.0, 20.0))
    assert one.ratio <= 1.01
    assert five.ratio <= 1.2
    assert five.setting > one.setting
    assert five.mean_kept < one.mean_kept
    # The next step of the bisection would have been too much.
    assert any(setting > one.setting and ratio > 1.01 for setting, ratio, _ in one.tried)
    # And the model is as it was.
    dense = float(model.measure(heldout, {"logits": NextTokenLoss()}).value("loss"))
    assert dense == one.dense_loss


def test_what_ppl_sparsity_reports_is_what_a_forward_with_those_units_at_zero_gives():
    model, heldout = ac.demo(), text(256)
    found = ppl_sparsity(model, text(0), heldout, p=10.0, tolerance=0.05)
    assert 0 < found.sparsity < 1
    kept = {}

    def drop(site, bound):
        def write(x):
            y = torch.where(x.abs() * down_projection(site).norm(dim=0) < bound, torch.zeros(()), x)
            kept[site.name] = float((y != 0).double().mean())
            return y

        return site.address, write, "write"

    with model.tap([drop(site, found.thresholds[site.name]) for site in model.match(ACT)]):
        logits = model.logits(heldout)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), heldout[:, 1:].flatten())
    assert found.loss == pytest.approx(float(loss), abs=1e-5)
    assert found.kept == pytest.approx(kept, abs=1e-4)


def test_an_mlp_that_does_nothing_can_be_dropped():
    model = ac.demo()
    weights = [down_projection(site) for site in model.match(ACT)]
    before = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight *= 1e-6
        assert ppl_sparsity(model, ids(0), ids(1), tolerance=0.1).sparsity == 1
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


def test_rules_keep_the_share_that_was_asked_for():
    model = ac.demo()
    found = {rule: silenced(model, ids(0, 8), ids(1), rule, 0.3) for rule in ("cett", "fat", "topk")}
    for one in found.values():
        assert one.mean_kept == pytest.approx(0.3, abs=0.03)  # fitted on 192 other tokens
        assert one.loss != one.dense_loss
    assert set(found["fat"].thresholds.values()) == {found["fat"].setting}
    assert len(set(found["cett"].thresholds.values())) == model.layers
    zero = silenced(model, ids(0), ids(1), "zero")
    assert zero.loss == zero.dense_loss


@pytest.mark.parametrize("rule", ["cett", "fat"])
def test_thresholds_are_fitted_on_the_calibration_text_alone(rule):
    model = ac.demo()
    one, same, other = (
        silenced(model, ids(fitted, 2, 16), ids(tested, 2, 16), rule, 0.3)
        for fitted, tested in ((0, 1), (0, 2), (3, 1))
    )
    assert one.thresholds == same.thresholds
    assert one.setting == same.setting
    assert one.loss != same.loss
    assert one.setting != other.setting


def test_silencing_checks_what_it_is_given():
    model = ac.demo()
    with pytest.raises(MeasureError, match="no rule"):
        silenced(model, ids(0), ids(1), "best")
    with pytest.raises(MeasureError, match="kept is 0"):
        silenced(model, ids(0), ids(1), kept=0)
    with pytest.raises(MeasureError, match="p is 0"):
        ppl_sparsity(model, ids(0), ids(1), p=0)
    text = ids(0)
    with pytest.raises(MeasureError, match="flatter"):
        ppl_sparsity(model, text, text)


# -- gradient sign ------------------------------------------------------------------------------------------------


def test_gradient_sign_is_what_autograd_says():
    model, text = ac.demo(), ids(2, rows=3)
    kept = {}

    def keep(x):
        x.retain_grad()
        kept["x"] = x

    (site,) = model.match("blocks.1.mlp.act")
    with model.tap([(site.address, keep, "keep")]), torch.enable_grad():
        logits = model.module(input_ids=text).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="sum").backward()
    model.module.zero_grad(set_to_none=True)
    rows = (kept["x"] * kept["x"].grad).double().detach()
    got = gradient_sign(model, text, "blocks.1.mlp.act", batch_size=2).iloc[0]
    assert got["pull"] == pytest.approx(float(rows.sum() / text.numel()), rel=1e-4)
    per_row = rows.sum((1, 2)).numpy() / text.shape[1]
    assert got["pull_error"] == pytest.approx(per_row.std(ddof=1) / np.sqrt(3), rel=1e-3)
    assert got["positive_rows"] == (per_row > 0).mean()
    assert all(p.grad is None for p in model.module.parameters())


def test_frozen_parameters_and_padding_change_no_sign():
    model = ac.demo()
    text = ids(2, rows=2, length=10)
    want = gradient_sign(model, text, ACT)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[:, 10:] = 0
    padded = F.pad(text, (0, 4), value=7)
    for p in model.module.parameters():
        p.requires_grad_(False)
    got = gradient_sign(model, {"input_ids": padded, "attention_mask": mask}, ACT)
    for p in model.module.parameters():
        p.requires_grad_(True)
    np.testing.assert_allclose(got["pull"], want["pull"], rtol=1e-3, atol=1e-6)


def test_a_loss_that_grows_with_activations_pulls_them_down():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(6, 4, generator=generator())
    for sign in (1, -1):
        got = gradient_sign(ac.wrap(net), [x], "module:1", loss=lambda out, *_, s=sign: s * (out - net[2].bias).sum())
        # The gradient of a linear map times its input is the map's own output.
        want = sign * (net(x) - net[2].bias).sum().item() / 6
        assert got["pull"][0] == pytest.approx(want, rel=1e-4)


def test_merging_rows_is_having_them_together():
    a, g = (torch.randn(6, 5, 4, generator=generator(i)) for i in (0, 1))
    whole, one, other = GradientSign(), GradientSign(), GradientSign()
    whole.update(a, g)
    one.update(a[:2], g[:2])
    other.update(a[2:], g[2:])
    one.merge_state(other)
    for name, value in whole.compute().items():
        torch.testing.assert_close(one.compute()[name], value)


def test_losses_that_do_not_fit_are_told():
    model = ac.demo()
    with pytest.raises(MeasureError, match="give a scalar"):
        gradient_sign(model, ids(0), ACT, loss=lambda out, *_: out.logits.sum((1, 2)))
    with pytest.raises(MeasureError, match="alike"):
        GradientSign().update(torch.ones(1, 2, 3), torch.ones(1, 2))


def test_random_last_layers_pull_activations_down_on_average():
    # The theorem: zero-mean independent last-layer weights; mean over them, not for each.
    x = F.relu(torch.randn(64, 1, 32, generator=generator()))
    pulls = []
    for seed in range(40):
        net = nn.Sequential(nn.Identity(), nn.Linear(32, 10, bias=False))
        nn.init.normal_(net[1].weight, generator=generator(seed))
        y = torch.randint(10, (64,), generator=generator(seed))
        got = gradient_sign(
            ac.wrap(net), [x], "module:0", loss=lambda out, *_, y=y: F.cross_entropy(out[:, 0], y, reduction="sum")
        )
        pulls.append(got["pull"][0])
    assert np.mean(pulls) > 5 * np.std(pulls) / np.sqrt(len(pulls))
