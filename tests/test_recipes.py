"""Quantise against arithmetic by hand, and recipes against planted effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import actome as ac
from actome.clamps import Quantise, round_to
from actome.core.errors import ClampError, MeasureError
from actome.core.load import wrap
from actome.dynamics import QuantisationProbe, Recipes, recipe_grid, weight_outliers
from actome.measures import Kurtosis
from actome.tasks import Subject, SubjectConfig

TOKENS = torch.randint(0, 16, (6, 12), generator=torch.Generator().manual_seed(0))


def subject(seed: int = 0, **options):
    return wrap(Subject.fresh(SubjectConfig(vocab=16, d_model=16, heads=2, context=16, norm="layer", **options), seed))


def by_hand(x: torch.Tensor, bits: int, dims: tuple[int, ...]) -> torch.Tensor:
    """With Python's integers, group by group."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dims, keepdim=True) / top
    return torch.where(scale > 0, torch.round(x / scale).clamp(-top, top) * scale, 0.0)


@pytest.mark.parametrize(("per", "dims"), [("tensor", (1, 2)), ("token", (2,)), ("channel", (1,))])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_rounds_by_its_group(per, dims, bits):
    model, site = subject(), "blocks.0.resid.post"
    before = model.record(TOKENS, site)[site]
    with model.clamp(Quantise(site, bits, per)):
        after = model.record(TOKENS, site)[site]
    torch.testing.assert_close(after, by_hand(before, bits, dims))
    grid = len(after[0].unique()) if per == "tensor" else len(after[0, 3].unique())
    assert per == "channel" or grid <= 2**bits - 1


def test_padding_and_other_rows_have_no_part_in_a_scale():
    model, site = subject(positions="rotary"), "blocks.0.mlp.act"
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    with model.clamp(Quantise(site, 4)):
        together = model.record({"input_ids": TOKENS, "attention_mask": mask}, site)[site][0, 5:]
        alone = model.record(TOKENS[:1, 5:], site)[site][0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_gradients_pass_straight_through():
    model = subject()
    steered = torch.zeros(16, requires_grad=True)
    with model.clamp(ac.Add("blocks.0.resid.post", steered), Quantise("blocks.0.resid.post", 4)):
        model.module(TOKENS).logits.square().sum().backward()
    assert bool((steered.grad != 0).any())
    x = torch.tensor([0.0, 0.0])
    assert round_to(x, torch.tensor(0.0), 4).tolist() == [0.0, 0.0]
    assert round_to(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor(1.0), 4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 1}, "2 bits or more, not 1"), ({"bits": 2.5}, "not 2.5"), ({"per": "row"}, 'per="tensor", "token"')],
)
def test_what_quantise_will_not(options, says):
    with pytest.raises(ClampError, match=says):
        Quantise("blocks.0.resid.post", **options)


# -- the probe --------------------------------------------------------------------------------------------------------


def loss(module, tokens) -> float:
    with torch.no_grad():
        logits = module(tokens).logits[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("per", ["tensor", "vector"])
def test_the_probe_of_weights_is_a_module_with_rounded_weights(per):
    model, other = subject(), subject()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = QuantisationProbe(weights=3, per=per)(model, TOKENS, batch_size=4)
    with torch.no_grad():
        for name, one in other.module.named_modules():
            if isinstance(one, nn.Linear) and name != "unembed":
                one.weight.copy_(by_hand(one.weight, 3, (0, 1) if per == "tensor" else (1,)))
    assert found["clean"] == pytest.approx(loss(model.module, TOKENS))
    assert found["rise"] == pytest.approx(loss(other.module, TOKENS) - found["clean"], abs=1e-6)
    assert found["relative"] == pytest.approx(found["rise"] / found["clean"])
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_the_probe_of_activations_rounds_what_enters_each_map():
    model, other = subject(), subject()
    found = QuantisationProbe(activations=3)(model, TOKENS)
    for name, one in other.module.named_modules():
        if isinstance(one, nn.Linear) and name != "unembed":
            one.register_forward_pre_hook(lambda _, x: (by_hand(x[0], 3, tuple(range(1, x[0].ndim))),))
    assert found["rise"] == pytest.approx(loss(other.module, TOKENS) - found["clean"], abs=1e-6)


def test_what_the_probe_will_not():
    with pytest.raises(MeasureError, match="give their bits"):
        QuantisationProbe()
    with pytest.raises(MeasureError, match='per="tensor" or "vector"'):
        QuantisationProbe(weights=8, per="row")
    assert QuantisationProbe(weights=8, activations=8, per="vector").name == "w8a8_vector"
    with pytest.raises(MeasureError, match=r"no nn\.Linear"):
        QuantisationProbe(weights=8)(wrap(nn.Sequential(nn.Conv1d(1, 1, 1))), TOKENS)


def test_outliers_of_weights():
    model = subject(layers=1)
    with torch.no_grad():
        for one in model.module.modules():
            if isinstance(one, nn.LayerNorm):
                one.weight.copy_(torch.tensor([1.0, 3.0] * 8))
            if isinstance(one, nn.Linear):
                one.weight.fill_(1.0)
                one.weight[0, 0] = 5.0
    found = weight_outliers(model)
    assert found["gain_spread"] == pytest.approx(0.5)
    sizes = [
        one.weight.numel()
        for name, one in model.module.named_modules()
        if isinstance(one, nn.Linear) and name != "unembed"
    ]
    assert found["weight_max_rms"] == pytest.approx(np.mean([5 / ((n + 24) / n) ** 0.5 for n in sizes]), rel=1e-5)


# -- the grid ---------------------------------------------------------------------------------------------------------


def planted(seed: int, outlier: float, clip: float | None):
    """A model one channel of whose stream is as large as asked; `clip` does nothing."""
    model = subject(seed)
    with torch.no_grad():
        model.module.embed.weight[:, 3] = outlier
    return model


def test_a_grid_finds_what_was_planted():
    done: list[int] = []
    found = recipe_grid(
        planted, {"outlier": [0.0, 4.0, 30.0], "clip": [None, 1.0]}, {"blocks.*.resid.post": Kurtosis(every=1)},
        [QuantisationProbe(activations=4), QuantisationProbe(activations=8, per="vector")], TOKENS, seeds=[0, 1],
        progress=done.append,
    )  # fmt: skip
    assert done == list(range(1, 13))
    assert len(found.table) == 12
    assert {"clean", "rise", "a4_tensor_rise", "a8_vector_rise", "kurtosis", "gain_spread"} <= set(found.table)
    assert (found.table["rise"] == found.table["a4_tensor_rise"]).all()
    kurtosis = found.effect("outlier", "kurtosis")
    assert kurtosis.index.tolist() == [0.0, 4.0, 30.0]
    assert kurtosis.is_monotonic_increasing
    none, clipped = found.effect("clip", "kurtosis")
    assert none == clipped
    rho, p = found.association("kurtosis", "outlier", permutations=200)
    assert rho > 0.9
    assert p < 0.02
    assert len(found.means()) == 6


def test_the_spread_compares_only_recipes_of_one_loss():
    table = pd.DataFrame(
        {
            "lr": [1, 1, 2, 2, 3, 3],
            "seed": [0, 1] * 3,
            "clean": [1.0, 1.0, 1.02, 1.04, 2.0, 2.0],
            "rise": [0.2, 0.2, 0.5, 0.7, 9.0, 9.0],
        }
    )
    found = Recipes(table, ("lr",))
    spread = found.spread("rise")
    assert (spread.best, spread.worst) == ({"lr": 1}, {"lr": 2})
    assert (spread.ratio, spread.difference, spread.clean) == pytest.approx((3.0, 0.4, 0.03))
    assert found.spread("rise", within=2.0).worst == {"lr": 3}
    # The other seed chooses lr 1 and 2 both times.
    assert found.held_out_spread("rise") == pytest.approx((0.7 + 0.5) / (0.2 + 0.2))
    with pytest.raises(MeasureError, match="two seeds or more"):
        Recipes(table[table["seed"] == 0], ("lr",)).held_out_spread("rise")
    with pytest.raises(MeasureError, match=r"no two recipes have a clean within 0\.001"):
        found.spread("rise", within=0.001)
    with pytest.raises(MeasureError, match="no 'ries'; nearest: rise"):
        found.association("ries", "clean")


@pytest.mark.parametrize("grid", [{}, {"lr": []}])
def test_an_empty_grid(grid):
    with pytest.raises(MeasureError, match="a value or more for each setting, a seed and a probe"):
        recipe_grid(planted, grid, {}, QuantisationProbe(weights=4), TOKENS)
