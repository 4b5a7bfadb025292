"""Preference pairs and gradients of single examples, against hand-computed cases and plain backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import actome as ac
from actome.core.errors import MeasureError, SiteError
from actome.measures import GradientSpectrum, ches, layer_gradients
from actome.measures.preference import response_states
from actome.tasks import Subject, SubjectConfig

IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class Bag(nn.Module):
    """The state of a token is its embedding, so that sums can be done by hand."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table)
        self.unembed = nn.Linear(table.shape[1], len(table))

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembed(self.embed(ids))


def bag() -> ac.Model:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    return ac.wrap(Bag(table))


# -- CHES -------------------------------------------------------------------------------------------------------


def test_the_sums_run_from_the_last_prompt_token_to_the_last_but_one_of_the_response():
    # Prompt [4, 0]; preferred [1, 2] has the states of 0, 1; dispreferred [3, 2, 4] those of 0, 3, 2.
    # S+ = (1, 1), S- = (1, 0) + (0, 3) + (2, 0) = (3, 3): <S+, S-> - |S+|^2 = 6 - 2 = 4.
    args = (bag(), [[4, 0]], [[1, 2]], [[3, 2, 4]])
    assert float(ches(*args, normalise=False, site="module:embed")) == 4.0
    # Means: (1/2, 1/2) and (1, 1): 1 - 1/2.
    assert float(ches(*args, site="module:embed")) == 0.5


def test_responses_of_one_token_score_nothing():
    assert ches(bag(), [[4], [2, 0]], [[1], [0]], [[3], [2]], site="module:embed").tolist() == [0.0, 0.0]


def test_scores_do_not_depend_on_the_batch_that_a_pair_is_padded_in():
    model, g = ac.demo(), torch.Generator().manual_seed(0)

    def rows(lengths: list[int]) -> list[list[int]]:
        return [torch.randint(200, (n,), generator=g).tolist() for n in lengths]

    prompts, good, bad = rows([3, 8, 1, 5]), rows([4, 1, 7, 2]), rows([2, 6, 3, 2])
    whole = ches(model, prompts, good, bad, batch_size=4)
    alone = torch.cat([ches(model, [p], [a], [b]) for p, a, b in zip(prompts, good, bad, strict=True)])
    # Float32 states of a normed stream of norm about sqrt(width), so scores of a few hundred.
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-2)


def test_it_is_what_the_final_norm_gives():
    model = ac.demo()
    prompt, good, bad = [5, 6, 7], [8, 9, 10], [11, 12]
    state = {
        tuple(r): model.record(torch.tensor(prompt + r), "final_norm")["final_norm"][0].double() for r in (good, bad)
    }
    plus, minus = state[tuple(good)][2:5].mean(0), state[tuple(bad)][2:4].mean(0)
    got = ches(model, [prompt], [good], [bad])
    assert float(got) == pytest.approx(float(plus @ minus - plus @ plus), rel=1e-5)
    assert torch.allclose(response_states(model, [prompt], [good], mean=False)[0], 3 * plus, rtol=1e-5)


def test_a_pair_whose_responses_are_alike_scores_higher_than_one_whose_differ():
    model = bag()
    alike, apart = ([[0, 0, 1]], [[0, 0, 2]]), ([[0, 0, 1]], [[1, 1, 2]])
    scores = [float(ches(model, [[0]], *pair, site="module:embed")) for pair in (alike, apart)]
    assert scores[0] > scores[1]


def test_pairs_that_do_not_fit_are_refused():
    model = ac.demo()
    with pytest.raises(MeasureError, match="2 preferred and 1 dispreferred"):
        ches(model, ["a", "b"], ["c", "d"], ["e"])
    with pytest.raises(MeasureError, match="1 prompts and 2 responses"):
        ches(model, ["a"], ["c", "d"], ["e", "f"])
    with pytest.raises(SiteError):
        ches(bag(), [[1]], [[1]], [[1]])


# -- gradients --------------------------------------------------------------------------------------------------


def subject() -> ac.Model:
    config = SubjectConfig(vocab=12, d_model=16, heads=2, layers=4, context=16)
    return ac.wrap(Subject.fresh(config))


def plain_gradients(model: ac.Model, prompt: list[int], response: list[int]) -> tuple[float, dict[str, Tensor]]:
    model.module.zero_grad()
    ids = torch.tensor([prompt + response])
    logits = model.module(ids).logits[0, len(prompt) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(response))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


def test_gradients_are_those_of_each_example_alone():
    model = subject()
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    got = layer_gradients(model, prompts, responses)
    assert got.parts == ("q", "k", "v", "o")
    assert got.layers == (0, 1, 2, 3)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        loss, grads = plain_gradients(model, prompt, response)
        assert float(got.loss[i]) == pytest.approx(loss, rel=1e-5)
        for layer in range(4):
            three = grads[f"blocks.{layer}.attn.qkv.weight"].split(16)
            for part, g in enumerate([*three, grads[f"blocks.{layer}.attn.out.weight"]]):
                # Of a difference of nearly equal rows little is left in float32, hence the absolute part.
                near = {"rel": 1e-4, "abs": 1e-6}
                assert float(got.nuclear[i, layer, part]) == pytest.approx(
                    float(torch.linalg.matrix_norm(g, "nuc")), **near
                )
                assert float(got.sigma1[i, layer, part]) == pytest.approx(float(torch.linalg.matrix_norm(g, 2)), **near)
                assert float(got.frobenius[i, layer, part]) == pytest.approx(float(g.norm()), **near)


def test_curves_differences_and_fluctuation():
    nuclear = torch.tensor([1.0, 2.0, 4.0, 3.0, 3.0, 9.0])[None, :, None].expand(2, -1, 2).double()
    one = GradientSpectrum(nuclear, nuclear / 2, nuclear, torch.tensor([2.0, 2.0]), tuple(range(6)), ("q", "k"))
    other = GradientSpectrum(3 * nuclear, nuclear, nuclear, torch.tensor([2.0, 2.0]), tuple(range(6)), ("q", "k"))
    assert one.mad().tolist() == [2.0, 2.0]  # (1 + 2 + 1 + 0 + 6) / 5
    assert [float(one.mad(part)[0]) for part in ("early", "middle", "late")] == [1.0, 1.0, 6.0]
    assert one.relative_difference(other).tolist() == [2.0, 2.0]
    assert bool((one.ratio == 0.5).all())
    assert torch.equal(one.per_loss, nuclear / 2)
    with pytest.raises(MeasureError, match="cannot be compared"):
        one.relative_difference(GradientSpectrum(nuclear, nuclear, nuclear, one.loss, (1, 2), ("q", "k")))
    with pytest.raises(MeasureError, match="choose"):
        one.mad("last")


def test_nothing_of_the_module_is_changed():
    model = subject()
    module = model.module.train()
    module.blocks[1].attn.out.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in module.named_parameters()}
    layer_gradients(model, [[1, 2]], [[3]])
    assert module.training
    assert not module.blocks[1].attn.out.weight.requires_grad
    assert module.blocks[0].attn.out.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_what_is_learnt_already_has_small_gradients():
    model = subject()
    prompts, responses = [[1, 2, 3]], [[4, 5]]
    before = layer_gradients(model, prompts, responses)
    optimizer = torch.optim.Adam(model.module.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model.module(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 2:4]
        F.cross_entropy(logits, torch.tensor([4, 5])).backward()
        optimizer.step()
    after = layer_gradients(model, prompts, responses)
    assert float(after.loss) < 0.1 * float(before.loss)
    assert bool((after.curve() < 0.5 * before.curve()).all())


SMALL = {"vocab_size": 20, **IDS}
FUSED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **SMALL)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **SMALL)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=16,
            **SMALL,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=16,
            **SMALL,
        )
    ),
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_cut_where_the_family_cuts_them(family):
    torch.manual_seed(0)
    model = ac.wrap(FUSED[family]().eval())
    got = layer_gradients(model, [[3, 4, 5, 6]], [[7, 8, 9]])
    assert got.parts == ("q", "k", "v", "o")
    # Without moving the values, queries and keys do not matter: only their gradients vanish, so each was cut right.
    name = "attn" if family == "gpt2" else "attention" if family == "gpt_neox" else "self_attn"
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "bloom": "transformer.h"}.get(
        family, "model.layers"
    )
    name = "self_attention" if family == "bloom" else name
    out = {"gpt2": "c_proj", "gpt_neox": "dense", "bloom": "dense"}.get(family, "o_proj")
    with torch.no_grad():
        for layer in range(2):
            model.module.get_submodule(f"{blocks}.{layer}.{name}.{out}").weight.zero_()
    dark = layer_gradients(model, [[3, 4, 5, 6]], [[7, 8, 9]])
    assert bool((dark.nuclear[..., :3] == 0).all())
    assert bool((dark.nuclear[..., 3] > 0).all())
    # With one token to attend to, queries and keys do not matter, and values do.
    single = layer_gradients(ac.wrap(FUSED[family]().eval()), [[3]], [[7]])
    assert bool((single.nuclear[..., :2] < 1e-6 * single.nuclear[..., 2:3]).all())


def test_a_fused_matrix_of_unknown_layout_is_one_part():
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **SMALL)
    got = layer_gradients(ac.wrap(FalconForCausalLM(config).eval()), [[3, 4]], [[5]])
    assert got.parts == ("qkv", "o")


def test_other_matrices_by_their_names():
    model = subject()
    got = layer_gradients(model, [[1, 2]], [[3]], ["blocks.*.mlp.down.weight", "blocks.*.mlp.up.weight"])
    assert got.parts == ("mlp.up.weight", "mlp.down.weight")
    with pytest.raises(MeasureError, match="nearest"):
        layer_gradients(model, [[1, 2]], [[3]], "blocks.*.mlp.dwn.weight")
    with pytest.raises(MeasureError, match="others do"):
        layer_gradients(model, [[1, 2]], [[3]], ["blocks.0.mlp.down.weight", "blocks.*.mlp.up.weight"])
