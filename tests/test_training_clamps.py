"""Clamps for training: attention that is told where to look, schedules by step, ablation that keeps patterns."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY
from torch import Tensor, nn

import actome as ac
from actome.clamps import AttendTo, clamp_during, pattern_preserving_ablation
from actome.core.errors import ClampError, SiteError
from actome.tasks import Subject, SubjectConfig, train

PATTERN = "blocks.0.attn.pattern"


def subject(**options) -> Subject:
    shape = {"vocab": 12, "d_model": 16, "heads": 4, "layers": 2, "context": 8, "mlp": "none"}
    return Subject.fresh(SubjectConfig(**{**shape, **options}), seed=1)


@pytest.fixture
def model() -> ac.Model:
    return ac.wrap(subject())


def ids(rows: int = 3, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(12, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- AttendTo ---------------------------------------------------------------------------------------------------------


def test_a_head_told_to_look_back_adds_the_value_of_the_token_before(model):
    with model.clamp(AttendTo(PATTERN, "previous", heads=[2])):
        seen = model.record(ids(), [PATTERN, "blocks.0.attn.v", "blocks.0.attn.z"])
    v_BHTK, z_BTHK = seen["blocks.0.attn.v"], seen["blocks.0.attn.z"]
    torch.testing.assert_close(z_BTHK[:, 1:, 2], v_BHTK[:, 2, :-1])
    torch.testing.assert_close(z_BTHK[:, 0, 2], v_BHTK[:, 2, 0])
    free = model.record(ids(), PATTERN)[PATTERN]
    assert torch.equal(seen[PATTERN][:, [0, 1, 3]], free[:, [0, 1, 3]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token_before_and_its_own_rows_stay(model, side):
    tokens, mask = ids(2, 5), torch.ones(2, 5, dtype=torch.long)
    real = slice(2, 5) if side == "left" else slice(0, 3)
    mask[1] = 0
    mask[1, real] = 1
    batch = {"input_ids": tokens, "attention_mask": mask}
    free = model.record(batch, PATTERN)[PATTERN]
    with model.clamp(AttendTo(PATTERN, "previous")):
        told = model.record(batch, PATTERN)[PATTERN]
    inside = told[1, :, real, real]
    wanted = torch.zeros(3, 3)
    wanted[[0, 1, 2], [0, 0, 1]] = 1.0
    assert torch.equal(inside, wanted.expand(4, 3, 3))
    padding = [t for t in range(5) if not mask[1, t]]
    assert torch.equal(told[1, :, padding], free[1, :, padding])


def test_targets_by_tensor_and_by_function_share_weight_and_leave_other_rows(model):
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[4, [1, 3]] = True
    free = model.record(ids(), PATTERN)[PATTERN]
    with model.clamp(AttendTo(PATTERN, wanted)):
        told = model.record(ids(), PATTERN)[PATTERN]
    assert told[:, :, 4].tolist() == torch.tensor([0, 0.5, 0, 0.5, 0, 0]).expand(3, 4, 6).tolist()
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(told[:, :, rest], free[:, :, rest])
    by_row = torch.zeros(3, 6, 6)
    by_row[[0, 1, 2], 5, [0, 1, 2]] = 0.25
    with model.clamp(AttendTo(PATTERN, lambda x: by_row.to(x))):
        told = model.record(ids(), PATTERN)[PATTERN]
    assert [told[b, 0, 5, b].item() for b in range(3)] == [0.25] * 3
    assert told[:, :, 5].sum(-1).unique().tolist() == [0.25]


def test_no_gradient_reaches_queries_and_keys_of_a_told_head_and_values_learn():
    one = subject(layers=1)
    with ac.wrap(one).clamp(AttendTo(PATTERN, "previous", heads=[0])):
        one(ids()).logits.square().mean().backward()
    q, k, v = one.blocks[0].attn.qkv.weight.grad.unflatten(0, (3, 4, 4)).unbind(0)
    assert not q[0].any()
    assert not k[0].any()
    assert v[0].any()
    assert all(part[h].any() for part in (q, k, v) for h in (1, 2, 3))


def test_in_a_cached_generation_the_newest_token_looks_at_the_one_before(model):
    with model.clamp(AttendTo(PATTERN, "previous")):
        out = model.module.generate(ids(1, 3), max_new_tokens=3, do_sample=False)
        again = model.module(out[:, :-1]).logits[:, 2:].argmax(-1)
    assert torch.equal(out[:, 3:], again)


def test_in_half_precision_and_on_another_family():
    half = ac.wrap(subject().to(torch.bfloat16))
    with half.clamp(AttendTo(PATTERN, "self")):
        assert torch.equal(half.record(ids(), PATTERN)[PATTERN][0, 0].float(), torch.eye(6))
    llama = ac.wrap(TINY["llama"]())
    with llama.clamp(AttendTo("blocks.*.attn.pattern", "self")):
        seen = llama.record(ids() + 3, "blocks.1.attn.pattern")["blocks.1.attn.pattern"]
    assert torch.equal(seen[0, 0], torch.eye(6))


def test_what_attention_cannot_be_told_is_refused(model):
    with pytest.raises(ClampError, match="'previous', 'self', a tensor or a function, not 'next'"):
        AttendTo(PATTERN, "next")
    with pytest.raises(ClampError, match="a tensor or a function, not 3"):
        AttendTo(PATTERN, 3)
    wrong_size, wrong_site = AttendTo(PATTERN, torch.eye(5)), AttendTo("blocks.0.attn.z", "self")
    message = r"shape \(5, 5\) do not fit; give \(query, key\) = \(6, 6\)"
    with pytest.raises(ClampError, match=message), model.clamp(wrong_size):
        model.logits(ids())
    with pytest.raises(ClampError, match=r"attn\.z is no attention pattern"), model.clamp(wrong_site):
        model.logits(ids())


def test_an_encoder_has_its_own_padding_and_another_text_no_token_before():
    model = ac.wrap(TINY["t5"]())
    tokens, mask = ids(2, 5) + 3, torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :3]}
    site = "encoder.blocks.0.attn.pattern"
    free = model.record(batch, site)[site]
    with model.clamp(AttendTo(site, "previous")):
        told = model.record(batch, site)[site]
    assert told[:, 0, 1, 0].tolist() == [1.0, 1.0]
    assert told[0, 0, 4, 3] == 1.0
    assert torch.equal(told[1, :, 3:], free[1, :, 3:])
    cross = AttendTo("decoder.blocks.0.cross.pattern", "self")
    with pytest.raises(ClampError, match="looks at another text, with no 'self' token"), model.clamp(cross):
        model.module(**batch)


def test_scaled_entries_of_linear_attention_scale_what_they_add():
    linear = ac.wrap(subject(attention="linear", heads=1, layers=1))
    needed = torch.zeros(6, 6, dtype=torch.bool)
    needed[5, 2] = True
    names = [PATTERN, "blocks.0.attn.v", "blocks.0.attn.z"]
    free = linear.record(ids(), names)
    with linear.clamp(ac.Scale(PATTERN, torch.where(needed, 10.0, 1.0))):
        z = linear.record(ids(), "blocks.0.attn.z")["blocks.0.attn.z"]
    more = 9 * free[PATTERN][:, 0, 5, 2, None] * free["blocks.0.attn.v"][:, 0, 2]
    torch.testing.assert_close(z[:, 5, 0], free["blocks.0.attn.z"][:, 5, 0] + more)


# -- the mean of a padded batch ---------------------------------------------------------------------------------------


def test_a_mean_over_the_batch_at_hand_leaves_padding_out_without_any_gate(model):
    site, mask = "blocks.0.attn.out", torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    batch = {"input_ids": ids(2), "attention_mask": mask}
    wanted = model.record(batch, site)[site][mask.bool()].mean(0)
    with model.clamp(ac.Ablate(site, "mean")):
        got = model.record(batch, site)[site]
    torch.testing.assert_close(got[0, 0], wanted)


# -- clamp_during -----------------------------------------------------------------------------------------------------


def zero_steps(on, steps: int = 8) -> list[int]:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, seen = ac.wrap(net), []

    def loss(module, x):
        with model.tap([(model.match("module:0")[0].address, lambda h: seen.append(bool((h == 0).all())), "read")]):
            return module(x).square().mean()

    with clamp_during(model, ac.Ablate("module:0"), on=on) as schedule:
        train(net, lambda step: torch.ones(1, 2), steps, loss=loss, on_step=schedule)
    assert schedule.fired == sum(seen)
    return [step for step, zero in enumerate(seen) if zero]


@pytest.mark.parametrize(
    ("on", "wanted"),
    [
        (range(2, 5), [2, 3, 4]),
        (range(0, 8, 3), [0, 3, 6]),
        (slice(5, None), [5, 6, 7]),
        (slice(None, 2), [0, 1]),
        (slice(1, 6, 2), [1, 3, 5]),
        (lambda step: step in (4, 7), [4, 7]),
        (None, list(range(8))),
        (range(3, 8), [3, 4, 5, 6, 7]),
    ],
)
def test_clamps_hold_in_the_forwards_of_exactly_their_steps(on, wanted):
    assert zero_steps(on) == wanted


def test_weights_do_not_learn_while_their_output_is_clamped_and_learn_before():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    states = []
    with clamp_during(ac.wrap(net), ac.Ablate("module:0"), on=slice(2, None)) as schedule:
        train(
            net, lambda step: (torch.ones(1, 2), torch.zeros(1, 2)), 4, clip=None, warmup=0, weight_decay=0.0,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
            on_step=lambda step, loss, module: (states.append(net[0].weight.clone()), schedule(step)),
        )  # fmt: skip
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    assert torch.equal(states[2], states[3])


def test_a_pause_shows_the_model_as_it_is_and_the_clamp_comes_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with torch.no_grad(), clamp_during(ac.wrap(net), ac.Ablate("module:0")) as schedule:
        clamped = net(x)
        with schedule.paused():
            free = net(x)
        again = net(x)
    assert torch.equal(clamped, again)
    assert not torch.equal(clamped, free)
    torch.testing.assert_close(free, net(x))


def test_schedules_that_do_nothing_are_faults():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, clamp = ac.wrap(net), ac.Ablate("module:0")
    with pytest.raises(ClampError, match="was given no clamp"):
        clamp_during(model)
    with pytest.raises(ClampError, match="on=5: give the steps as a range, a slice"):
        clamp_during(model, clamp, on=5)
    untold = clamp_during(model, clamp, on=range(2))
    with pytest.raises(ClampError, match="was never told of a step; give it as train"), untold:
        net(torch.ones(1, 2))
    with pytest.raises(ClampError, match="never came on: the training ended after 8 steps"):
        zero_steps(range(20, 30))
    with pytest.raises(ClampError, match="never fired: no forward"), clamp_during(model, clamp):
        pass
    # One that would come on in the step after the last is none.
    assert zero_steps(lambda step: step in (0, 8)) == [0]


def test_the_module_is_itself_again_after_an_error_inside():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = net(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="mine"), clamp_during(ac.wrap(net), ac.Ablate("module:0")):
        raise RuntimeError("mine")
    assert torch.equal(net(torch.ones(1, 2)), before)


def test_training_ends_where_on_step_says_so():
    net = nn.Linear(2, 2)
    training = train(
        net, lambda step: (torch.ones(1, 2), torch.zeros(1, 2)), 20, checkpoints=[0, 5, 20],
        on_step=lambda step, loss, module: step == 5,
    )  # fmt: skip
    assert len(training.losses) == 5
    assert sorted(training.checkpoints) == [0, 5]
    assert not net.training


# -- ablation that keeps patterns -------------------------------------------------------------------------------------


def test_patterns_stay_and_the_head_is_silent(model):
    patterns = [f"blocks.{layer}.attn.pattern" for layer in range(2)]
    free = model.record(ids(), [*patterns, "blocks.0.attn.z"])
    clamps = pattern_preserving_ablation(model, ids(), {0: [1]})
    with model.clamp(*clamps):
        seen = model.record(ids(), [*patterns, "blocks.0.attn.z"])
    with model.clamp(ac.Ablate("blocks.0.attn.z", heads=[1])):
        plain = model.record(ids(), patterns[1])
    assert all(torch.equal(seen[name], free[name]) for name in patterns)
    assert not torch.equal(plain[patterns[1]], free[patterns[1]])
    assert not seen["blocks.0.attn.z"][:, :, 1].any()
    assert torch.equal(seen["blocks.0.attn.z"][:, :, [0, 2, 3]], free["blocks.0.attn.z"][:, :, [0, 2, 3]])


def test_logits_are_those_of_the_algebra_by_hand(model):
    net = model.module
    with model.clamp(*pattern_preserving_ablation(model, ids(), {0: [1], 1: [2]}, which="only")):
        got = model.logits(ids())
    patterns = model.record(ids(), "blocks.*.attn.pattern")
    with torch.no_grad():
        x = net.embed(ids()) + net.positions(torch.arange(6))
        for layer, head in ((0, 1), (1, 2)):
            block = net.blocks[layer]
            v = block.attn.qkv(block.norm_attn(x)).unflatten(-1, (3, 4, 4))[:, :, 2, head]
            z = patterns[f"blocks.{layer}.attn.pattern"][:, head] @ v
            x = x + z @ block.attn.out.weight[:, 4 * head : 4 * head + 4].T
        wanted = net.unembed(net.norm(x))
    torch.testing.assert_close(got, wanted)


def test_ablations_without_anything_to_do_or_of_no_head_are_refused(model):
    with pytest.raises(ClampError, match="leaves nothing to silence"):
        pattern_preserving_ablation(model, ids(), {})
    with pytest.raises(ClampError, match=r"has the heads 0 to 3, not \[4\]"):
        pattern_preserving_ablation(model, ids(), {0: [4]})
    with pytest.raises(ClampError, match="choose 'silence' or 'only'"):
        pattern_preserving_ablation(model, ids(), {0: [0]}, which="keep")
    with pytest.raises(SiteError):
        pattern_preserving_ablation(model, ids(), {9: [0]})
