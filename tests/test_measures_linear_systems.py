"""Linear systems: attention, state space models and gated recurrences against plain recurrences, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actome.core.errors import MeasureError
from actome.measures import (
    DSF,
    as_dsf,
    attention_to_dsf,
    gated_rnn,
    random_features,
    selective_ssm,
    taylor_features,
)
from actome.tasks.associative_recall import AssociativeRecall

T, K, C, N = 17, 4, 5, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    # Float64 with a few dozen additions: 1e-10 is far above rounding and far below any mistake.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_linear_attention_with_its_normaliser():
    q, k, v = draw(T, K), draw(T, K, seed=1), draw(T, C, seed=2)
    system = attention_to_dsf(q, k)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).T).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    close(system(v), weights @ v)
    close(system.mix()[0], weights)
    close(system.mix()[0] @ v, system(v))
    assert not torch.allclose(system.decay[1:], torch.ones_like(system.decay[1:]))  # the normaliser is what forgets
    plain = attention_to_dsf(q, k, normaliser="none")
    assert bool((plain.decay[1:] == 1).all())
    close(plain(v), ((F.elu(q) + 1) @ (F.elu(k) + 1).T).tril() @ v)


def test_taylor_features_approach_softmax_with_each_order():
    q, k, v = (F.normalize(draw(T, 3, seed=s), dim=-1) for s in range(3))  # |q k| <= 1
    softmax = (q @ k.T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    for normaliser in ("features", "softmax"):
        errors = [
            float((attention_to_dsf(q, k, taylor_features(p), normaliser=normaliser, scale=1.0)(v) - softmax @ v)
                  .abs().max())
            for p in range(1, 7)
        ]  # fmt: skip
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 < errors[0]
    close(attention_to_dsf(q, k, taylor_features(12), normaliser="softmax", scale=1.0).mix()[0][:1], softmax[:1])


def test_softmax_attention_of_torch_is_what_high_orders_give():
    q, k, v = draw(T, 2) / 2, draw(T, 2, seed=1) / 2, draw(T, C, seed=2)
    wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    got = attention_to_dsf(q, k, taylor_features(9), normaliser="softmax")(v)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_random_features_are_right_on_average():
    q, k = draw(6, K) / 3, draw(6, K, seed=1) / 3
    exact = (q @ k.T).exp()
    error = [float((random_features(K, m)(q) @ random_features(K, m)(k).T - exact).abs().mean()) for m in (64, 16384)]
    assert error[1] < 0.05
    assert error[1] < error[0] / 2  # 16 for light tails; these are heavy, and the draws are fixed


def selective(delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, u: Tensor) -> Tensor:
    h, out = torch.zeros(C, N, dtype=torch.float64), []
    for t in range(T):
        for channel in range(C):
            for n in range(N):
                h[channel, n] = math.exp(delta[t, channel] * a[channel, n]) * h[channel, n]
                h[channel, n] += delta[t, channel] * b[t, n] * u[t, channel]
        out.append(h @ c[t] + skip * u[t])
    return torch.stack(out)


def test_selective_ssm_is_its_recurrence():
    delta, a, skip, u = F.softplus(draw(T, C)), -draw(C, N, seed=1).exp(), draw(C, seed=2), draw(T, C, seed=3)
    b, c = draw(T, N, seed=4), draw(T, N, seed=5)
    system = selective_ssm(delta, a, b, c, skip)
    wanted = selective(delta, a, b, c, skip, u)
    close(system(u), wanted)
    close(torch.einsum("cij,jc->ic", system.mix(), u), wanted)


def test_a_transformers_mamba_layer_is_the_system_between_convolution_and_gate():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    mixer = MambaMixer(MambaConfig(hidden_size=6, state_size=4, num_hidden_layers=1), layer_idx=0).double().eval()
    hidden = draw(T, 6)
    system, u = as_dsf(mixer, hidden)
    with torch.no_grad():
        gate = mixer.act(mixer.in_proj(hidden).chunk(2, -1)[1])
        got = mixer.out_proj(system(u) * gate)
        wanted = mixer(hidden[None])
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(got, wanted.reshape(got.shape), rtol=0, atol=1e-5)


def test_mixers_with_norms_between_their_parts_are_refused():
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    mixer = JambaMambaMixer(JambaConfig(hidden_size=8, mamba_d_state=4, num_hidden_layers=1), layer_idx=0)
    with pytest.raises(MeasureError, match="JambaMambaMixer with norms"):
        as_dsf(mixer, torch.zeros(3, 8))


def test_gated_recurrence_and_gru_like_gate():
    gate, u = torch.sigmoid(draw(T, C)), draw(T, C, seed=1)
    h, out = torch.zeros(C, dtype=torch.float64), []
    for t in range(T):
        h = gate[t] * h + (1 - gate[t]) * u[t]
        out.append(h)
    close(gated_rnn(gate, 1 - gate)(u), torch.stack(out))
    read = draw(T, C, seed=2)
    close(gated_rnn(gate, 1 - gate, read)(u), torch.stack(out) * read)


def test_a_recurrent_gemma_unit_is_a_gated_recurrence():
    # RG-LRU: a = exp(-c softplus(lambda) sigmoid(gate)), input scaled by sqrt(1 - a^2).
    a = torch.exp(-8 * F.softplus(draw(C)) * torch.sigmoid(draw(T, C, seed=1)))
    u = draw(T, C, seed=2)
    state, out = torch.zeros(C, dtype=torch.float64), []
    for t in range(T):
        state = a[t] * state + (1 - a[t] ** 2).sqrt() * u[t]
        out.append(state)
    close(gated_rnn(a, (1 - a**2).sqrt())(u), torch.stack(out))


def test_attention_and_a_state_space_model_with_matching_decay_are_one():
    # S6 with exp(delta A) = eta_{i-1} / eta_i and the matching write and read is the normalised attention.
    q, k, v = draw(T, K).abs(), draw(T, K, seed=1).abs(), draw(T, 1, seed=2)
    attention = attention_to_dsf(q, k, lambda x: x)
    eta = (q * k.cumsum(0)).sum(-1)
    step = torch.cat([torch.ones(1, dtype=torch.float64), (eta[1:] / eta[:-1]).log()])[:, None]
    ssm = selective_ssm(step, -torch.ones(1, K, dtype=torch.float64), k / eta[:, None] / step, q)
    close(ssm(v), attention(v))


def test_memory_rank_and_moduli_by_hand():
    decay = torch.full((200, 1, 1), 0.9, dtype=torch.float64)
    system = DSF(decay, torch.ones_like(decay), torch.ones_like(decay))
    # The mean of a geometric distribution: 0.9 / 0.1.
    assert float(system.memory()[0, -1]) == pytest.approx(9.0, abs=1e-4)
    assert float(system.memory()[0, 0]) == 0
    assert system.moduli().unique().tolist() == [0.9]
    # The first transition acts on an empty state, and may be anything.
    turning = DSF(torch.tensor([7.0, -0.5, 0.25])[:, None, None], torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    assert turning.moduli().tolist() == [0.25, 0.5]
    small = selective_ssm(F.softplus(draw(T, 1)), -draw(1, N, seed=1).exp(), draw(T, N, seed=2), draw(T, N, seed=3))
    assert small.rank().tolist() == [N]
    assert int(torch.linalg.matrix_rank(small.mix()[0])) == T  # the whole says nothing of the state
    unused = DSF(small.decay, small.write * torch.tensor([1.0, 0, 0])[:, None], small.read)
    assert unused.rank().tolist() == [1]
    assert float(unused.effective_rank()[0]) <= T
    identity = DSF(torch.zeros(4, 1, 1), torch.ones(4, 1, 1), torch.ones(4, 1, 1))
    assert float(identity.effective_rank()[0]) == pytest.approx(4)
    assert identity.rank().tolist() == [0]


def test_bad_input_is_told():
    q = draw(T, K)
    with pytest.raises(MeasureError, match="key width"):
        attention_to_dsf(q, draw(T, K + 1))
    with pytest.raises(MeasureError, match="none of them 0"):
        attention_to_dsf(q, q, normaliser=torch.zeros(T, dtype=torch.float64))
    with pytest.raises(MeasureError, match="too large"):
        attention_to_dsf(1e3 * q.abs(), 1e3 * q.abs(), normaliser="softmax")
    with pytest.raises(MeasureError, match="normaliser='sum'"):
        attention_to_dsf(q, q, normaliser="sum")
    with pytest.raises(MeasureError, match="order=-1"):
        taylor_features(-1)
    with pytest.raises(MeasureError, match="Mamba"):
        as_dsf(torch.nn.Linear(2, 2), torch.zeros(3, 2))
    with pytest.raises(MeasureError, match="channel or 1"):
        DSF(torch.ones(3), torch.ones(3), torch.ones(3))
    with pytest.raises(MeasureError, match="positions"):
        DSF(torch.ones(3, 1, 1), torch.ones(3, 1, 1), torch.ones(3, 1, 1))(torch.ones(4, 1))


def test_recall_asks_for_the_value_of_every_key_once():
    world = AssociativeRecall(keys=20, values=5, pairs=7)
    recall = world.sample(50, seed=3)
    assert recall.inputs.shape == (50, world.length, world.width)
    keys, values = recall.inputs[..., :20].argmax(-1), recall.inputs[..., 20:]
    assert torch.equal(keys, recall.keys)
    assert bool((recall.inputs[..., :20].sum(-1) == 1).all())
    for b in range(50):
        known = {int(keys[b, t]): int(values[b, t].argmax()) for t in range(7)}
        assert len(known) == 7
        asked = [int(key) for key in keys[b, 7:]]
        assert sorted(asked) == sorted(known)
        assert recall.targets[b, 7:].tolist() == [known[key] for key in asked]
    assert not values[:, 7:].any()  # the answer is not shown
    assert bool((recall.targets[:, :7] == -100).all())
    assert torch.equal(recall.inputs, world.sample(50, seed=3).inputs)
    assert not torch.equal(recall.inputs, world.sample(50, seed=4).inputs)
    with pytest.raises(ValueError, match="keys=3"):
        AssociativeRecall(keys=3, pairs=4)
