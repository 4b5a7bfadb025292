"""The histogram of magnitudes against numpy on the whole tensor, and the algebra of a measure."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actome.core.errors import MeasureError
from actome.measures.histogram import QUANTILES, Histogram

EDGES = np.array(Histogram.axis("bin"))


def lognormal(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randn(shape, generator=generator).sign()
    return torch.randn(shape, generator=generator).mul(spread).exp() * sign


def measured(x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    histogram = Histogram()
    histogram.update(x, mask)
    return histogram.compute()


def by_numpy(x: torch.Tensor) -> np.ndarray:
    """Shares on the same edges, by comparison; the first bin is open at zero, the last at the top."""
    magnitude = np.abs(x.double().numpy()).ravel()
    counts = np.histogram(magnitude[magnitude > 0], np.append(EDGES, np.inf))[0]
    return counts / magnitude.size


def test_edges_double_every_four_and_are_exact_in_binary():
    assert EDGES[0] == 0
    assert (EDGES[1], EDGES[-1]) == (2.0**-24, 2.0**24)
    inner = EDGES[1:]
    assert np.array_equal(inner[4:] / inner[:-4], np.full(len(inner) - 4, 2.0))
    assert {b / a for a, b in pairwise(inner)} == {5 / 4, 6 / 5, 7 / 6, 8 / 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts_agree_with_numpy(dtype):
    x = lognormal(3, 40, 17).to(dtype)
    x[0, 0, :5] = 0
    # All of these are exact in float32, so shares differ by rounding of one division.
    x = x.float().to(dtype)
    values = measured(x)
    np.testing.assert_allclose(values["histogram"].numpy(), by_numpy(x.float()), rtol=1e-12)
    assert float(values["exact_zeros"]) == float((x == 0).double().mean())
    assert float(values["positive"]) == pytest.approx(float((x > 0).sum() / (x != 0).sum()), abs=1e-6)
    assert float(values["histogram"].sum() + values["exact_zeros"]) == pytest.approx(1, abs=1e-12)


def test_a_number_on_an_edge_belongs_to_the_bin_above_it_and_the_ends_take_the_rest():
    tiny, huge = 2.0**-127, 2.0**100  # the first is subnormal in float32
    values = measured(torch.tensor([[[2.0**-24, 2.0**24, 1.25, -1.25, tiny, huge, -0.0, 2.0**-25]]]))
    shares = {EDGES[i]: float(values["histogram"][i]) for i in values["histogram"].nonzero().flatten()}
    assert shares == {0.0: 2 / 8, 2.0**-24: 1 / 8, 1.25: 2 / 8, 2.0**24: 2 / 8}
    assert float(values["exact_zeros"]) == 1 / 8


def test_quantiles_are_within_the_stated_error_of_those_of_the_whole_tensor():
    x = lognormal(2, 500, 31, spread=2.0)
    x[0, :100] = 0
    values, magnitude = measured(x), x.abs().double().numpy().ravel()
    for name, q in QUANTILES.items():
        true = np.quantile(magnitude, q, method="inverted_cdf")
        assert true / math.sqrt(1.25) - 1e-9 <= float(values[name]) <= true * math.sqrt(1.25) + 1e-9


def test_quantiles_without_a_middle():
    assert float(measured(torch.zeros(1, 3, 4))["abs_p50"]) == 0
    assert math.isnan(float(measured(torch.full((1, 3, 4), 1e30))["abs_p50"]))
    mostly_zero = torch.zeros(1, 10, 10)
    mostly_zero[0, 0, 0] = 1.0
    values = measured(mostly_zero)
    assert float(values["abs_p99"]) == 0  # the 99th of a hundred numbers is still zero
    assert float(values["abs_p999"]) == pytest.approx(math.sqrt(1.25))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 30))
def test_merging_is_the_same_as_seeing_everything(seed, rows, length):
    x = lognormal(rows + 1, length, 3, seed=seed)
    x[x.abs() < 0.01] = 0
    whole, first, second = Histogram(), Histogram(), Histogram()
    whole.update(x)
    first.update(x[:1])
    second.update(x[1:])
    first.merge_state(second)
    for name, value in whole.compute().items():
        assert torch.equal(value.nan_to_num(-1), first.compute()[name].nan_to_num(-1))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30, 0.0])
def test_padding_never_changes_a_number(junk):
    x = lognormal(2, 6, 5)
    x[0, 0, 0] = 0
    padded = torch.cat([x, torch.full((2, 3, 5), junk)], 1)
    mask = torch.arange(9).expand(2, 9) < 6
    for name, value in measured(x).items():
        assert torch.equal(value, measured(padded, mask)[name])


def test_tokens_that_are_not_finite_are_left_out():
    x = lognormal(1, 6, 5)
    broken = torch.cat([x, torch.tensor([[[1.0, math.nan, 2.0, 0.0, math.inf]]])], 1)
    for name, value in measured(x).items():
        assert torch.equal(value, measured(broken)[name])


def test_nothing_left_is_not_a_number():
    values = measured(torch.full((1, 2, 3), math.nan))
    assert all(bool(value.isnan().all()) for value in values.values())


def test_a_stack_is_its_entries_one_by_one():
    x = lognormal(3, 2, 4, 5)
    stacked = measured(x)
    for i in range(3):
        for name, value in measured(x[i]).items():
            assert torch.equal(stacked[name][i], value)


def test_integers_are_refused():
    with pytest.raises(MeasureError, match="floating-point"):
        Histogram().update(torch.ones(1, 2, 3, dtype=torch.long))


def test_it_is_taken_on_a_model_beside_other_measures():
    import actome as ac

    table = ac.demo().measure("The value of the expression", {"blocks.*.mlp.act": Histogram()})
    shares = table.value("histogram")
    assert shares.shape == (4, 194)
    assert shares.sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-12)  # nothing is exactly zero after SiLU
    assert "histogram" not in set(table.frame["measure"])
    assert "abs_p99" in set(table.frame["measure"])
