"""Clamps against the same change made by hand: by a plain hook, by editing weights, or on the recorded tensor."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import TINY
from torch import Tensor

import actome as ac

SITE = "blocks.1.resid.post"
WIDTH, LENGTH = 24, 7


@pytest.fixture(scope="module")
def model() -> ac.Model:
    return ac.wrap(TINY["llama"]())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def by_hook(model: ac.Model, ids: Tensor, change, layer: int = 1) -> Tensor:
    """Logits with the output of one block changed by a plain hook of our own."""

    def hook(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = model.module.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.module(ids).logits
    finally:
        handle.remove()


def under(model: ac.Model, ids: Tensor, *clamps: ac.Clamp) -> Tensor:
    with model.clamp(*clamps):
        return model.logits(ids)


vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
basis = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))


def project_out(x: Tensor) -> Tensor:
    return x - x @ torch.linalg.pinv(basis) @ basis


def only_top(x: Tensor) -> Tensor:
    kth = x.abs().sort(dim=-1, descending=True).values[..., 4:5]
    return torch.where(x.abs() >= kth, x, 0.0)


def shorten(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1.5, x / norm * 1.5, x)


CASES = {
    "add": (ac.Add(SITE, vector), lambda x: x + vector),
    "add scaled": (ac.Add(SITE, vector, scale=-2.0), lambda x: x - 2 * vector),
    "set": (ac.Set(SITE, vector), lambda x: vector.expand_as(x)),
    "set number": (ac.Set(SITE, 0.5), lambda x: torch.full_like(x, 0.5)),
    "scale": (ac.Scale(SITE, 0.3), lambda x: x * 0.3),
    "mask": (ac.Mask(SITE, vector > 0), lambda x: x * (vector > 0)),
    "zero": (ac.Ablate(SITE), torch.zeros_like),
    "batch mean": (ac.Ablate(SITE, "mean"), lambda x: x.mean(dim=(0, 1), keepdim=True).expand_as(x)),
    "out of": (ac.Project(SITE, basis), project_out),
    "onto": (ac.Project(SITE, basis, "onto"), lambda x: x - project_out(x)),
    "clip": (ac.Clip(SITE, low=-0.2, high=0.4), lambda x: x.clamp(-0.2, 0.4)),
    "clip norm": (ac.Clip(SITE, norm=1.5), shorten),
    "top k": (ac.TopK(SITE, 5), only_top),
    "units": (
        ac.Add(SITE, 3.0, units=[2, -1]),
        lambda x: x + 3.0 * torch.eye(WIDTH)[[2, WIDTH - 1]].sum(0),
    ),
    "positions": (
        ac.Add(SITE, vector, positions=[0, -2]),
        lambda x: x + vector * torch.eye(LENGTH)[[0, LENGTH - 2]].sum(0)[None, :, None],
    ),
    "slice": (
        ac.Set(SITE, 0.0, positions=slice(3, None)),
        lambda x: torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], dim=1),
    ),
    "rows": (ac.Scale(SITE, 0.0, rows=[1]), lambda x: x * torch.tensor([1.0, 0.0, 1.0])[:, None, None]),
    "value by position": (
        ac.Add(SITE, basis, positions=[1, 4]),
        lambda x: x + torch.zeros(LENGTH, WIDTH).index_copy(0, torch.tensor([1, 4]), basis),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_clamp_does_what_the_same_change_by_hand_does(name, model, ids):
    clamp, change = CASES[name]
    wanted = by_hook(model, ids, change)
    assert not torch.allclose(wanted, model.logits(ids)), "the case must change something"
    torch.testing.assert_close(under(model, ids, clamp), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "identity",
    [
        ac.Add(SITE, torch.zeros(WIDTH)),
        ac.Scale(SITE, 1.0),
        ac.Mask(SITE, True),
        ac.TopK(SITE, WIDTH),
        ac.Clip(SITE, low=-1e9, high=1e9),
        ac.Scale("blocks.*.attn.pattern", 1.0),
        ac.Scale("blocks.*.attn.scores", 1.0),
    ],
    ids=lambda c: f"{type(c).__name__}-{c.site}",
)
def test_clamping_with_the_identity_changes_nothing(identity, model, ids):
    torch.testing.assert_close(under(model, ids, identity), model.logits(ids), rtol=1e-4, atol=1e-5)


def test_clamps_compose_in_order(model, ids):
    both = under(model, ids, ac.Add(SITE, vector), ac.Scale(SITE, 2.0))
    torch.testing.assert_close(both, by_hook(model, ids, lambda x: (x + vector) * 2.0))
    with model.clamp(ac.Scale(SITE, 2.0)), model.clamp(ac.Add(SITE, vector)):
        nested = model.logits(ids)
    torch.testing.assert_close(nested, by_hook(model, ids, lambda x: x * 2.0 + vector))


def test_each_row_may_carry_its_own_clamp(model, ids):
    together = under(model, ids, ac.Add(SITE, vector, rows=[0]), ac.Set(SITE, 0.0, rows=[2]))
    torch.testing.assert_close(together[0], under(model, ids[:1], ac.Add(SITE, vector))[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], model.logits(ids[1:2])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[2], under(model, ids[2:], ac.Set(SITE, 0.0))[0], rtol=1e-4, atol=1e-5)


def test_ablating_a_head_equals_zeroing_its_columns_of_the_output_projection(ids):
    module = TINY["llama"]()
    model = ac.wrap(module)
    clamped = under(model, ids, ac.Ablate("blocks.0.attn.z", "zero", heads=[2]))
    size = WIDTH // 4
    with torch.no_grad():
        module.model.layers[0].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0.0
    torch.testing.assert_close(clamped, model.logits(ids), rtol=1e-4, atol=1e-5)


def test_masking_an_expert_equals_zeroing_its_parameters(ids):
    module = TINY["mixtral"]()
    model = ac.wrap(module)
    weights = model.record(ids, "blocks.0.moe.weights")["blocks.0.moe.weights"]
    expert = int(weights.sum(dim=(0, 1)).argmax())
    clamped = under(model, ids, ac.Ablate("blocks.0.moe.weights", "zero", units=[expert]))
    with torch.no_grad():
        module.model.layers[0].mlp.experts.down_proj[expert] = 0.0
    torch.testing.assert_close(clamped, model.logits(ids), rtol=1e-4, atol=1e-5)


def test_router_logits_choose_the_experts(ids):
    model = ac.wrap(TINY["mixtral"]())
    with model.clamp(ac.Add("blocks.0.moe.router", 100.0, units=[1])):
        chosen = model.record(ids, "blocks.0.moe.chosen")["blocks.0.moe.chosen"]
    assert bool((chosen == 1).any(dim=-1).all())
    with pytest.raises(ac.ClampError, match=r"clamp moe\.router"), model.clamp(ac.Set("blocks.0.moe.weights", 0.5)):
        model.logits(ids)


def test_patching_everything_gives_the_other_run(model, ids):
    other = ids.flip(0)
    rec = model.record(other, "blocks.0.resid.pre")
    torch.testing.assert_close(under(model, ids, ac.Patch("blocks.0.resid.pre", rec)), model.logits(other))


def test_patching_one_place_leaves_the_past_alone(model, ids):
    rec = model.record(ids.flip(0), SITE)
    patched = under(model, ids, ac.Patch(SITE, rec, positions=4))
    bare = model.logits(ids)
    torch.testing.assert_close(patched[:, :4], bare[:, :4])
    assert not torch.allclose(patched[:, 4:], bare[:, 4:])
    with pytest.raises(ac.ClampError, match="same positions"), model.clamp(ac.Patch(SITE, rec)):
        model.logits(ids[:, :5])


def test_mean_and_resample_from_a_recording(model, ids):
    rec = model.record(ids, SITE)
    tokens = rec.flat(SITE)
    torch.testing.assert_close(
        under(model, ids, ac.Ablate(SITE, "mean", rec)),
        by_hook(model, ids, lambda x: tokens.mean(0).expand_as(x)),
        rtol=1e-4,
        atol=1e-5,
    )
    with model.clamp(ac.Ablate(SITE, "resample", rec, seed=4)):
        drawn = model.record(ids, SITE)[SITE].flatten(0, 1)
    # Each drawn vector is one of the recorded ones, and they are not all the same.
    distance = torch.cdist(drawn, tokens).min(dim=1)
    assert float(distance.values.max()) < 1e-3
    assert len(distance.indices.unique()) > 1
    same = under(model, ids, ac.Ablate(SITE, "resample", rec, seed=4))
    torch.testing.assert_close(same, under(model, ids, ac.Ablate(SITE, "resample", rec, seed=4)))


def test_a_condition_on_another_site_gates_rows(model, ids):
    first = model.record(ids, "blocks.0.resid.post")["blocks.0.resid.post"]
    level = first[:, 0, 0].sort().values[1]
    when = ac.When("blocks.0.resid.post", lambda x: x[:, 0, 0] > level)
    clamped = under(model, ids, ac.Add(SITE, vector, when=when))
    flag = (first[:, 0, 0] > level).float()
    assert 0 < flag.sum() < 3
    torch.testing.assert_close(clamped, by_hook(model, ids, lambda x: x + vector * flag[:, None, None]))


def test_a_condition_that_is_never_true_is_an_answer_and_not_an_error(model, ids):
    never = ac.When("blocks.0.resid.post", lambda x: torch.zeros(len(x), dtype=torch.bool))
    torch.testing.assert_close(under(model, ids, ac.Add(SITE, vector, when=never)), model.logits(ids))


def test_a_condition_must_come_first(model):
    late = ac.When("blocks.2.resid.post", lambda x: x[:, 0, 0] > 0)
    with pytest.raises(ac.SiteError, match="reached after"):
        model.clamp(ac.Add("blocks.0.resid.post", vector, when=late))


def test_padding_has_no_part_in_a_mean(model, ids):
    mask = torch.ones_like(ids)
    mask[1:, 4:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    real = model.record(padded, SITE)[SITE][mask.bool()]
    with model.clamp(ac.Ablate(SITE, "mean")):
        ablated = model.record(padded, SITE)[SITE][mask.bool()]
    torch.testing.assert_close(ablated, real.mean(0).expand_as(ablated))


def test_padding_does_not_count_as_positions(model, ids):
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    padded = {"input_ids": ids, "attention_mask": mask}
    with model.clamp(ac.Add(SITE, vector, positions=-1)):
        both = model.logits(padded)
        changed = model.record(padded, SITE)[SITE]
    plain = model.record(padded, SITE)[SITE]
    where = (changed - plain).abs().sum(-1) > 1e-4
    assert where.nonzero().tolist() == [[0, 6], [1, 4], [2, 2]]
    short = under(model, ids[1:2, :5], ac.Add(SITE, vector, positions=-1))
    torch.testing.assert_close(both[1:2, :5], short, rtol=1e-4, atol=1e-5)


def test_gradients_reach_a_steering_vector_and_the_weights(ids):
    model = ac.wrap(TINY["llama"]())
    steer = torch.zeros(WIDTH, requires_grad=True)
    with model.clamp(ac.Add(SITE, steer, positions=2)):
        loss = model.module(ids, labels=ids).loss
    loss.backward()
    assert float(steer.grad.norm()) > 0
    assert float(model.module.model.layers[0].self_attn.q_proj.weight.grad.norm()) > 0
    # A finite difference along a random direction says the same.
    step = 1e-2 * vector / vector.norm()
    ahead, behind = (_loss(model, ids, ac.Add(SITE, sign * step, positions=2)) for sign in (1.0, -1.0))
    torch.testing.assert_close((ahead - behind) / 2, steer.grad @ step, rtol=0.05, atol=1e-5)


def _loss(model: ac.Model, ids: Tensor, clamp: ac.Clamp) -> Tensor:
    with torch.no_grad(), model.clamp(clamp):
        return model.module(ids, labels=ids).loss


def test_training_under_a_clamp_keeps_the_clamped_units_still(ids):
    model = ac.wrap(TINY["llama"]())
    model.module.train()
    weight = model.module.model.layers[1].mlp.down_proj.weight
    with model.clamp(ac.Ablate("blocks.1.mlp.act", "zero", units=[0, 3])):
        model.module(ids, labels=ids).loss.backward()
    assert float(weight.grad[:, [0, 3]].abs().max()) == 0.0
    assert float(weight.grad[:, [1, 2]].abs().max()) > 0.0


def test_pattern_clamps_work_under_every_attention_implementation(ids):
    out = {}
    for kind in ("sdpa", "eager"):
        module = TINY["llama"]()
        module.config._attn_implementation = kind
        out[kind] = under(ac.wrap(module), ids, ac.Ablate("blocks.*.attn.pattern", "zero", heads=[1]))
        assert not torch.allclose(out[kind], ac.wrap(module).logits(ids))
    torch.testing.assert_close(out["sdpa"], out["eager"], rtol=1e-4, atol=1e-5)


def test_knocking_out_attention_by_scores(model, ids):
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    keep[5, 2] = False
    with model.clamp(ac.Mask("blocks.0.attn.scores", keep)):
        pattern = model.record(ids, "blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    assert float(pattern[:, :, 5, 2].max()) == 0.0
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, LENGTH))


def test_compiled_modules_are_not_silently_unclamped(ids):
    module = TINY["llama"]()
    model = ac.wrap(module)
    wanted = under(model, ids, ac.Add(SITE, vector))
    module.forward = torch.compile(module.forward, backend="eager")
    with torch.no_grad():
        module(ids)
    torch.testing.assert_close(under(model, ids, ac.Add(SITE, vector)), wanted)


BAD = {
    "wrong width": (ac.Add(SITE, torch.zeros(WIDTH - 1)), "does not fit"),
    "a shape that would broadcast": (ac.Add(SITE, torch.zeros(3, 1, 1)), "does not fit"),
    "too many dims": (ac.Add(SITE, torch.zeros(1, 1, 1, WIDTH)), "does not fit"),
    "a position that is not there": (ac.Add(SITE, vector, positions=50), "never fired"),
    "a phase that never comes": (ac.Add(SITE, vector, phase="generated"), "never fired"),
    "a wrong basis": (ac.Project(SITE, torch.ones(3)), "has width 3"),
    "too large a k": (ac.TopK(SITE, 99), "keeps 1 to"),
    "a tensor to Patch": (ac.Patch(SITE, torch.zeros(3)), "takes a Recording"),
    "heads where there are none": (ac.Scale(SITE, 1.0, heads=[0]), "has no heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clamps_raise_and_leave_nothing_behind(name, model, ids):
    clamp, message = BAD[name]
    before = model.logits(ids)
    with pytest.raises(ac.ClampError, match=message):
        under(model, ids, clamp)
    torch.testing.assert_close(model.logits(ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_unknown_sites_heads_and_units_are_named(model, ids):
    with pytest.raises(ac.SiteError, match=r"nearest: blocks\.\*\.resid\.post"):
        model.clamp(ac.Scale("blocks.*.resid.pots", 0.0))
    with pytest.raises(ac.SiteError, match="blocks 0 to 2"):
        model.clamp(ac.Scale("blocks.7.resid.post", 0.0))
    with pytest.raises(ac.SiteError, match="head 9 does not exist; there are 4"):
        model.clamp(ac.Scale("blocks.0.attn.z", 0.0, heads=[9]))
    with pytest.raises(ac.SiteError, match="d_model unit 24"):
        model.clamp(ac.Scale(SITE, 0.0, units=[24]))
    with pytest.raises(ac.SiteError, match="row 3 does not exist"):
        under(model, ids, ac.Scale(SITE, 0.0, rows=[3]))


def test_a_shape_changing_clamp_raises(model, ids):
    class Halve(ac.Clamp):
        def transform(self, x: Tensor, place: object) -> Tensor:
            return x[..., :3]

    with pytest.raises(ac.ClampError, match="changed the shape"):
        under(model, ids, Halve(SITE))


def test_gates_of_generation(model, ids):
    prompt = ids[:2]
    with model.clamp(ac.Add(SITE, vector, phase="generated")) as active:
        rec = model.generate(prompt, max_new_tokens=5, record=SITE).recording
    assert active.fired == 4
    with model.clamp(ac.Add(SITE, vector, steps=range(2, 4))) as active:
        model.generate(prompt, max_new_tokens=5)
    assert active.fired == 2
    # Position 8 is read by the second generated forward (positions 7, 8, ...), whatever the prompt.
    with model.clamp(ac.Add(SITE, vector, positions=8)) as active:
        one = model.generate(prompt, max_new_tokens=5, record=SITE)
    assert active.fired == 1
    bare = model.record(one.ids[:, :-1], SITE)[SITE]
    moved = (one.recording[SITE] - bare).abs().sum(-1) > 1e-3
    assert moved[0].nonzero().flatten().tolist() == [8]
    assert rec[SITE].shape == (2, LENGTH + 4, WIDTH)


def test_left_padded_prompts_generate_what_they_generate_alone(model, ids):
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    clamp = ac.Add(SITE, vector, positions=[-1])
    with model.clamp(clamp):
        together = model.generate(prompts, max_new_tokens=4, record=SITE)
    for row, prompt in enumerate(prompts):
        with model.clamp(clamp):
            alone = model.generate(prompt, max_new_tokens=4, record=SITE)
        assert together.new[row].tolist() == alone.new[0].tolist()
        torch.testing.assert_close(
            together.recording.sequence(row, SITE), alone.recording.sequence(0, SITE), rtol=1e-3, atol=1e-4
        )


def test_generation_equals_transformers_own(ids):
    transformers.logging.set_verbosity_error()
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    for name in ("llama", "gpt2", "mamba", "t5"):
        module = t5 if name == "t5" else TINY[name]()
        model = ac.wrap(module)
        wanted = module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        site = "blocks.0.resid.post" if name != "t5" else "decoder.blocks.0.resid.post"
        got = model.generate(ids, max_new_tokens=6, record=site)
        assert torch.equal(got.ids, wanted)
        assert got.recording[site].shape[1] == got.ids.shape[1] - 1


def test_what_cannot_be_generated_from_is_said(model, ids):
    with pytest.raises(ac.TextError, match="integer token ids"):
        model.generate(ids.float())
    with pytest.raises(ac.SiteError, match="cannot generate"):
        ac.wrap(TINY["bert"]()).generate(ids)


def test_a_value_made_anew_in_each_forward_is_never_taken_for_an_earlier_one(model, ids):
    class Grow(ac.Clamp):
        def transform(self, x: Tensor, place) -> Tensor:
            sizes.append(float(len(sizes)))
            # Of another dtype, so that it is converted; freed at once, so that its place in memory may be used again.
            return torch.zeros_like(x) + place.fit(torch.full((WIDTH,), sizes[-1], dtype=torch.float64), x)

    sizes: list[float] = []
    with model.clamp(Grow(SITE)):
        for size in range(5):
            assert bool((model.record(ids, SITE)[SITE] == size).all())


def test_a_vector_that_is_edited_in_place_counts_as_edited(model, ids):
    level = torch.zeros(WIDTH, dtype=torch.float64)
    with model.clamp(ac.Set(SITE, level)):
        for size in range(3):
            level.fill_(size)
            assert bool((model.record(ids, SITE)[SITE] == size).all())
