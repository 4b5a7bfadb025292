"""Convergence to the final state against numpy, ranks of weights, and nets that converge as they were made to."""

import numpy as np
import pytest
import torch
from tiny import TINY, inputs

import actome as ac
from actome import dynamics as dyn
from actome.dynamics.convergence import associated, output_weights
from actome.tasks.nets import MLP

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


def nets(distances) -> dict[int, MLP]:
    """A net at chosen distances from its final weights, along a straight way."""
    last, first, out = MLP([6, 12, 12, 3], seed=0), MLP([6, 12, 12, 3], seed=1), {}
    for step, far in enumerate(distances):
        out[step] = MLP([6, 12, 12, 3], seed=0)
        with torch.no_grad():
            for w, a, b in zip(out[step].parameters(), last.parameters(), first.parameters(), strict=True):
                w.copy_((1 - far) * a + far * b)
    return out


def cka_by_gram(a: np.ndarray, b: np.ndarray) -> float:
    """Debiased CKA from (N, N) matrices (Song et al. 2012)."""

    def hsic(one, other):
        n = len(one)
        one, other = (gram - np.diag(np.diag(gram)) for gram in (one, other))
        trace, rows = np.trace(one @ other), one.sum(1) @ other.sum(1)
        return (trace + one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))

    a, b = a @ a.T, b @ b.T
    return hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))


@torch.no_grad()
def hidden(net: MLP) -> np.ndarray:
    return net.linear[0](X).relu().double().numpy()


def test_curves_against_gram_matrices():
    made = nets([1.0, 0.6, 0.3, 0.1, 0.0])
    found = dyn.Convergence("module:act.*").trace(made, X)
    curve = found.trace.curve("convergence", "module:act.0")
    final = hidden(made[4])
    assert curve.tolist() == pytest.approx([cka_by_gram(hidden(made[s]), final) for s in range(4)] + [1.0], abs=1e-4)
    row = found.summary.set_index("site").loc["module:act.0"]
    y = curve.to_numpy()
    cut = max(i for i, one in enumerate(y) if one <= 0.9)
    assert (row["low"], row["high"]) == (cut / 4, (cut + 1) / 4)
    assert row["low"] <= row["t90"] <= row["high"]
    assert row["roughness"] == pytest.approx(np.abs(np.diff(y)).sum() - abs(y[-1] - y[0]))
    biased = dyn.Convergence("module:act.0", debiased=False).trace(made, X[:10]).trace.curve("convergence")
    fair = dyn.Convergence("module:act.0").trace(made, X[:10]).trace.curve("convergence")
    assert biased[0] > fair[0] + 0.05  # few rows flatter a wide layer


def test_what_stays_is_at_once_there_and_what_wanders_is_rough():
    steady = dyn.Convergence("module:act.0").trace(nets([0.0] * 5), X).summary.iloc[0]
    assert (steady["t90"], steady["roughness"]) == (0.0, pytest.approx(0.0, abs=1e-6))
    wandering = dyn.Convergence("module:act.0").trace(nets([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]), X).summary.iloc[0]
    assert wandering["t90"] > 0.8
    assert wandering["roughness"] > 1.0


def test_ranks_of_weights_and_of_their_changes():
    assert dyn.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))) == pytest.approx(3.0)
    values = np.array([3.0, 2.0, 1.0])
    share = values / values.sum()
    expected = np.exp(-(share * np.log(share)).sum()) / 3
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q[:, :3]
    assert dyn.effective_rank(q * torch.tensor(values).float(), proportional=True) == pytest.approx(expected, rel=1e-5)
    made = nets([1.0, 0.5, 0.0])
    found = dyn.Convergence("module:linear.1").trace(made, X)
    assert found.trace.curve("weight_rank_share").tolist() == pytest.approx(
        [dyn.effective_rank(net.linear[1].weight, True) for net in made.values()]
    )
    summary = dyn.Convergence("module:linear.*").trace(made, X)
    assert len(summary.summary) == 3
    told = summary.rank_correlation(permutations=9, resamples=9)
    expected = associated(summary.summary["weight_rank_share"], summary.summary["t90"], 9, 9)
    assert {key: repr(one) for key, one in told.items()} == {key: repr(one) for key, one in expected.items()}
    change = dyn.effective_rank(made[1].linear[1].weight - made[0].linear[1].weight, True)
    assert found.trace.curve("update_rank_share")[1] == pytest.approx(change, rel=1e-4)
    with pytest.raises(ac.MeasureError, match="rank of a matrix"):
        dyn.effective_rank(torch.ones(3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_of_attention_and_mlp(family):
    module = TINY[family]()
    model = ac.wrap(module)
    heads = model.info["head"]
    (down,), most = output_weights(model, "blocks.0.mlp.out")
    products, width = output_weights(model, "blocks.0.attn.out")
    if family == "llama":
        layer = module.model.layers[0]
        assert torch.equal(down, layer.mlp.down_proj.weight)
        assert (len(products), width) == (heads, layer.self_attn.o_proj.in_features // heads)
        # Two heads share each value head.
        one = layer.self_attn.o_proj.weight[:, width : 2 * width] @ layer.self_attn.v_proj.weight[:width]
        torch.testing.assert_close(products[1], one)
    else:  # keys, queries and values in one map: the output map alone
        assert torch.equal(down, module.transformer.h[0].mlp.c_proj.weight.T)
        assert torch.equal(products[0], module.transformer.h[0].attn.c_proj.weight.T)
    assert most == min(down.shape)
    found = dyn.Convergence().trace({step: TINY[family]() for step in range(3)}, inputs(family))
    assert set(found.summary["site"].str.rpartition(".")[2]) == {"out"}
    assert found.trace.curve("convergence", "blocks.0.mlp.out").tolist() == pytest.approx([1, 1, 1])


def test_bad_input():
    with pytest.raises(ac.MeasureError, match="needs three or more"):
        dyn.Convergence("module:act.0").trace(nets([1.0, 0.0]), X)
    with pytest.raises(ac.MeasureError, match="threshold=2"):
        dyn.Convergence(threshold=2)
    other = nets([1.0, 0.5, 0.0]) | {1: MLP([6, 5, 12, 3])}
    with pytest.raises(ac.MeasureError, match="several architectures"):
        dyn.Convergence("module:act.0").trace(other, X)
    with pytest.raises(ac.MeasureError, match="three pairs"):
        associated([1, 2], [2, 3])
