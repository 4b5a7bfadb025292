"""The subject against computations by hand, its training, and the cache of trained subjects."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SUBJECTS
from torch import Tensor, nn
from torch.nn import functional as F

import actome as ac
from actome.tasks import (
    Subject,
    SubjectConfig,
    Training,
    TrainingError,
    cached,
    log_spaced,
    next_token_loss,
    target_loss,
    train,
)
from actome.tasks.cache import CacheError, clear, folder_of_cache

torch.set_num_threads(1)

SMALL = {"vocab": 11, "d_model": 12, "layers": 2, "heads": 2, "context": 16, "d_mlp": 20}
VARIANTS = {name.removeprefix("subject-"): options for name, options in SUBJECTS.items()}


def made(variant: str = "", seed: int = 0, **options: object) -> Subject:
    chosen = SMALL | VARIANTS.get(variant, {}) | options
    if chosen.get("d_head") and "d_head" not in options:
        chosen["d_head"] = 6
    # Larger weights than one would train from: patterns that are nearly even would hide a wrong one.
    return Subject.fresh(SubjectConfig(**chosen | {"init": 1.5}), seed=seed)


def ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab"], (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    # Float32 sums of tens of terms of order one, in another order.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance)


# -- against a forward written out by hand ---------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float | None = 1e-6) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(subject: Subject, tokens: Tensor, change: dict[str, Tensor] | None = None) -> Tensor:
    """Logits row by row, head by head, query by query; `change` is added at sites of block 0."""
    config, change = subject.config, change or {}
    weights = {name: value.detach().double() for name, value in subject.state_dict().items()}
    act = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}[config.act]

    def norm(x: Tensor, at: str) -> Tensor:
        if config.norm == "none":
            return x
        if config.norm == "rms":
            return rms(x, weights[f"{at}.weight"])
        return F.layer_norm(x, (config.d_model,), weights[f"{at}.weight"], weights[f"{at}.bias"], 1e-6)

    def mapped(x: Tensor, at: str) -> Tensor:
        out = x @ weights[f"{at}.weight"].T
        return out + weights[f"{at}.bias"] if f"{at}.bias" in weights else out

    def turned(x: Tensor, t: int) -> Tensor:
        half = config.d_head // 2
        angles = torch.tensor([t * 10000 ** (-2 * i / config.d_head) for i in range(half)], dtype=torch.float64)
        pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    def attention(x: Tensor, at: str, changed: bool) -> Tensor:
        T, heads, d_head = len(x), config.heads, config.d_head
        q, k, v = mapped(x, f"{at}.qkv").view(T, 3, heads, d_head).unbind(1)
        out = torch.zeros(T, heads, d_head, dtype=torch.float64)
        for h in range(heads):
            qs, ks = list(q[:, h]), list(k[:, h])
            if config.qk_norm:
                qs = [rms(x, weights[f"{at}.q_norm.weight"], None) for x in qs]
                ks = [rms(x, weights[f"{at}.k_norm.weight"], None) for x in ks]
            if config.positions == "rotary":
                qs, ks = [turned(x, t) for t, x in enumerate(qs)], [turned(x, t) for t, x in enumerate(ks)]
            if changed and "q" in change:
                qs = [x + change["q"] for x in qs]
            for t in range(T):
                seen = t + 1 if config.causal else T
                scores = torch.stack([qs[t] @ ks[s] / math.sqrt(d_head) for s in range(seen)])
                if config.positions == "alibi":
                    slope = 2 ** (-8 * (h + 1) / heads)
                    scores = scores - slope * torch.arange(t, -1, -1)
                if config.key_bias:
                    free = qs[t] @ weights[f"{at}.key_bias"][h] / math.sqrt(d_head)
                    row = torch.cat([scores, free[None]]).softmax(0)[:-1]
                else:
                    row = {
                        "softmax": lambda x: x.softmax(0),
                        "sigmoid": torch.sigmoid,
                        "relu": torch.relu,
                        "linear": lambda x: x,
                    }[config.attention](scores)
                if config.attention_scale == "keys":
                    row = row / seen
                elif config.attention_scale == "sum":
                    row = row / row.abs().sum()
                full = torch.cat([row, torch.zeros(T - seen, dtype=torch.float64)])
                if changed and "pattern" in change:
                    full = full + change["pattern"][:T]
                out[t, h] = full @ v[:, h]
        return mapped(out.flatten(1), f"{at}.out")

    def mlp(x: Tensor, at: str, changed: bool) -> Tensor:
        def half(up: Tensor) -> Tensor:
            if config.mlp == "gated":
                gate, up = up.chunk(2, dim=-1)
                return act(gate) * up
            return act(up)

        if not config.experts:
            hidden = half(mapped(x, f"{at}.up"))
            if changed and "act" in change:
                hidden = hidden + change["act"]
            return mapped(hidden, f"{at}.down")
        rows = []
        for token in x:
            logits = weights[f"{at}.router.weight"] @ token
            chosen = logits.argsort(descending=True)[: config.active_experts].tolist()
            share = torch.stack([logits[e].exp() for e in chosen])
            share = share / share.sum()
            up, down = weights[f"{at}.experts.gate_up_proj"], weights[f"{at}.experts.down_proj"]
            rows.append(sum(w * (down[e] @ half(up[e] @ token)) for w, e in zip(share, chosen, strict=True)))
        return torch.stack(rows)

    out = []
    for row in tokens:
        x = weights["embed.weight"][row]
        if config.positions == "learned":
            x = x + weights["positions.weight"][: len(row)]
        elif config.positions == "sinusoidal":
            for t in range(len(row)):
                for c in range(config.d_model):
                    angle = t / 10000 ** ((c - c % 2) / config.d_model)
                    x[t, c] += math.cos(angle) if c % 2 else math.sin(angle)
        for i in range(config.layers):
            at = f"blocks.{i}"
            x = x + attention(norm(x, f"{at}.norm_attn"), f"{at}.attn", i == 0)
            if config.mlp != "none":
                x = x + mlp(norm(x, f"{at}.norm_mlp"), f"{at}.mlp", i == 0)
        out.append(norm(x, "norm") @ weights["unembed.weight"].T)
    return torch.stack(out).float()


CONFIGURATIONS = [*VARIANTS, "bidirectional", "plain"]


def configured(name: str) -> Subject:
    return made(causal=False, positions="rotary") if name == "bidirectional" else made(name)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_those_of_a_forward_written_out_by_hand(name: str) -> None:
    subject = configured(name)
    with torch.no_grad():
        close(subject(ids()).logits, by_hand(subject, ids()), 1e-4)


@pytest.mark.parametrize("options", [{"experts": 4}, {"attention": "sigmoid", "attention_scale": "sum"}], ids=str)
def test_choices_that_no_variant_has(options: dict[str, object]) -> None:
    subject = made(**options)
    with torch.no_grad():
        close(subject(ids()).logits, by_hand(subject, ids()), 1e-4)


@pytest.mark.parametrize("name", [*VARIANTS, "plain"])
def test_no_position_sees_a_later_one(name: str) -> None:
    subject, tokens = made(name), ids()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL["vocab"]
    with torch.no_grad():
        a, b = subject(tokens).logits, subject(changed).logits
    close(a[:, :5], b[:, :5])  # experts are grouped anew, so not to the bit
    assert bool((a[:, 5:] - b[:, 5:]).abs().amax((0, 2)).gt(1e-4).all())


def test_a_bidirectional_subject_sees_later_positions() -> None:
    subject, tokens = configured("bidirectional"), ids()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL["vocab"]
    with torch.no_grad():
        assert (subject(tokens).logits[:, 0] - subject(changed).logits[:, 0]).abs().max() > 1e-4
    assert not any(site.causal for site in ac.wrap(subject).sites("blocks.*.attn.pattern"))


@pytest.mark.parametrize("name", [*VARIANTS, "plain"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    subject, tokens = made(name), ids(1, 6)
    other = torch.full((1, 3), 7)
    padded = torch.cat([other, tokens] if side == "left" else [tokens, other], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0 if side == "left" else 1
    mask[:, -3:] = 1 if side == "left" else 0
    with torch.no_grad():
        got = subject(padded, attention_mask=mask).logits
        close(got[:, 3:] if side == "left" else got[:, :6], subject(tokens).logits)


@pytest.mark.parametrize("name", [*VARIANTS, "plain"])
def test_generation_with_a_cache_is_the_argmax_of_whole_forwards(name: str) -> None:
    subject = made(name)
    model, tokens = ac.wrap(subject), ids(3, 4)
    got = model.generate(tokens, max_new_tokens=8).ids
    wanted = tokens
    with torch.no_grad():
        for _ in range(8):
            wanted = torch.cat([wanted, subject(wanted).logits[:, -1].argmax(-1)[:, None]], dim=1)
    assert torch.equal(got, wanted)
    # In one row alone, and beside a longer one with padding on the left.
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    both = torch.cat([F.pad(tokens[:1], (2, 0)), ids(1, 6, seed=4)])
    beside = subject.generate(input_ids=both, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(beside[0, 6:], wanted[0, 4:])


@pytest.mark.parametrize("name", ["gated-rotary", "linear", "alibi", "moe"])
def test_a_prompt_read_in_two_chunks_is_the_prompt_read_at_once(name: str) -> None:
    subject, tokens = made(name), ids(2, 9)
    with torch.no_grad():
        whole = subject(tokens).logits
        first = subject(tokens[:, :4], use_cache=True)
        second = subject(tokens[:, 4:], past_key_values=first.past_key_values, use_cache=True, logits_to_keep=2)
    close(first.logits, whole[:, :4])
    close(second.logits, whole[:, -2:])


# -- sites and clamps ------------------------------------------------------------------------------------------------

STREAM = {"embed", "blocks.*.resid.pre", "blocks.*.resid.post", "final_norm", "logits"}
ATTENTION = {f"blocks.*.attn.{part}" for part in ("q", "k", "v", "scores", "pattern", "z", "out")}
MLP = {"blocks.*.resid.mid", "blocks.*.mlp.out"}
DENSE = {"blocks.*.mlp.pre", "blocks.*.mlp.act"}
MOE = {f"blocks.*.moe.{part}" for part in ("router", "weights", "chosen", "experts")}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_site_is_there(name: str) -> None:
    model = ac.wrap(configured(name))
    wanted = STREAM | ATTENTION
    if name != "attention-only":
        wanted = wanted | MLP | (MOE if name == "moe" else DENSE)
    assert {site.local for site in model.sites()} == wanted
    for local in wanted:
        layers = {site.layer for site in model.sites() if site.local == local}
        assert layers == ({0, 1} if local.startswith("blocks") else {None})
    assert model.family == ("subject, bidirectional" if name == "bidirectional" else "subject")


@pytest.mark.parametrize("name", ["gated-rotary", "sigmoid", "relu", "linear", "key-bias", "alibi"])
@pytest.mark.parametrize("part", ["q", "pattern", "act"])
def test_a_clamp_changes_what_a_plain_computation_says(name: str, part: str) -> None:
    subject = made(name)
    width = {"q": subject.config.d_head, "pattern": 9, "act": subject.config.d_mlp}[part]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    site = "blocks.0.mlp.act" if part == "act" else f"blocks.0.attn.{part}"
    with torch.no_grad(), ac.wrap(subject).clamp(ac.Add(site, vector)):
        got = subject(ids()).logits
    wanted = by_hand(subject, ids(), {part: vector.double()})
    close(got, wanted, 1e-4)
    assert (got - by_hand(subject, ids())).abs().max() > 1e-2


def test_scores_of_keys_that_may_not_be_seen_are_the_lowest_number() -> None:
    for name in ("sigmoid", "relu", "linear", "plain"):
        model = ac.wrap(made(name))
        recording = model.record(ids(), ["blocks.1.attn.scores", "blocks.1.attn.pattern"])
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert bool((recording["blocks.1.attn.scores"][..., future] < -1e30).all())
        assert bool((recording["blocks.1.attn.pattern"][..., future] == 0).all())
        assert bool((recording["blocks.1.attn.scores"][..., ~future].abs() < 1e3).all())


def test_router_weights_sum_to_one_over_the_chosen() -> None:
    recording = ac.wrap(made("moe")).record(ids(), ["blocks.*.moe.weights", "blocks.*.moe.router"])
    for layer in range(2):
        weights = recording[f"blocks.{layer}.moe.weights"]
        close(weights.sum(-1), torch.ones(2, 9))
        assert bool(((weights > 0).sum(-1) == 2).all())
        chosen = recording[f"blocks.{layer}.moe.router"].topk(2).indices
        assert bool((weights.gather(-1, chosen) > 0).all())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_parameter_is_reached_by_the_gradient(name: str) -> None:
    subject = configured(name)
    next_token_loss(subject, ids(16, 12)).backward()
    for path, parameter in subject.named_parameters():
        assert parameter.grad is not None, path
        assert bool((parameter.grad != 0).any()), path
        assert bool(parameter.grad.isfinite().all()), path


def test_continuous_inputs() -> None:
    subject = made(d_in=3, vocab=1)
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    model = ac.wrap(subject)
    assert {site.local for site in model.sites()} == STREAM | ATTENTION | MLP | DENSE
    recording = model.record(x, ["embed", "logits"])
    close(recording["embed"], x @ subject.embed.weight.detach().T)
    assert recording["logits"].shape == (2, 7, 1)
    assert target_loss(subject, x, torch.zeros(2, 7)).shape == ()
    with pytest.raises(ValueError, match="d_in=3, not token ids"):
        subject(ids())
    with pytest.raises(ValueError, match="not a width of 2"):
        subject(inputs_embeds=x[..., :2])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bfloat16_is_close_to_float32(name: str) -> None:
    subject = configured(name)
    with torch.no_grad():
        wanted = subject(ids()).logits
        got = subject.to(torch.bfloat16)(ids()).logits
    assert got.dtype == torch.bfloat16
    # Eight bits through two blocks. Where two experts are nearly as good, rounding may choose the other one.
    error = (got.float() - wanted).abs()
    assert float(error.median()) < 0.02 * float(wanted.std())
    if name != "moe":
        assert float(error.max()) < 0.15 * float(wanted.std())


# -- making, saving and loading --------------------------------------------------------------------------------------


def test_the_seed_alone_decides_the_weights() -> None:
    state = torch.get_rng_state()
    a, b, c = made(seed=1), made(seed=1), made(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.unembed.weight, c.unembed.weight)
    assert a.config is not b.config
    assert not a.training


def test_initial_sizes_are_as_documented() -> None:
    subject = Subject.fresh(SubjectConfig(vocab=256, d_model=128, layers=2, heads=4, init=0.8))
    block = subject.blocks[0]
    for weight, inputs, factor in [
        (block.attn.qkv.weight, 128, 1.0),
        (block.attn.out.weight, 128, 0.5),
        (block.mlp.up.weight, 128, 1.0),
        (block.mlp.down.weight, 512, 0.5),
        (subject.unembed.weight, 128, 1.0),
        (subject.embed.weight, 128, 1.0),
    ]:
        # Some ten thousand draws: the standard error of a standard deviation is below 1 %.
        assert float(weight.detach().std()) == pytest.approx(0.8 * factor / math.sqrt(inputs), rel=0.04)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    subject = configured(name)
    subject.save_pretrained(tmp_path)
    for again in (Subject.from_pretrained(tmp_path), ac.load(tmp_path).module):
        assert type(again) is Subject
        assert again.config.shape == subject.config.shape
        with torch.no_grad():
            assert torch.equal(again(ids()).logits, subject(ids()).logits)


def test_a_fresh_process_loads_it_without_being_told_of_tasks(tmp_path: Path) -> None:
    subject = made("gated-rotary")
    subject.save_pretrained(tmp_path)
    code = (
        "import sys, actome as ac, actome.core.load\n"
        "assert not any(name.startswith('actome.tasks') for name in sys.modules)\n"
        f"model = ac.load({str(tmp_path)!r})\n"
        f"print(model.family, float(model.logits({ids().tolist()!r}).double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    family, total = done.stdout.split()
    assert family == "subject"
    with torch.no_grad():
        assert float(total) == pytest.approx(float(subject(ids()).logits.double().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "tanh"}, "attention='tanh' does not exist; choose 'softmax', 'sigmoid', 'relu' or 'linear'"),
        ({"positions": "rope"}, "positions='rope'"),
        ({"mlp": "glu"}, "mlp='glu'"),
        ({"act": "tanh"}, "act='tanh'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"d_model": 10, "heads": 3}, "no multiple of heads=3; change one of them or give d_head"),
        ({"layers": 0}, "layers=0"),
        ({"attention": "sigmoid", "key_bias": True}, "use attention='softmax'"),
        ({"attention_scale": "sum"}, "leave it at 'none'"),
        ({"d_head": 5, "positions": "rotary"}, "d_head=5 is odd"),
        ({"positions": "alibi", "causal": False}, "choose other positions"),
        ({"experts": 2, "active_experts": 3}, "give a number from 1 to 2, the number of experts"),
        ({"experts": 2, "mlp": "none"}, "or experts=0"),
        ({"d_in": 4, "tied": True}, "leave tied off"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SubjectConfig(**options)


def test_sequences_beyond_learned_positions_are_refused_and_others_go_on() -> None:
    with pytest.raises(ValueError, match="20 positions, but learned ones end at context=16"):
        made()(ids(1, 20))
    for positions in ("rotary", "alibi", "sinusoidal", "none"):
        assert made(positions=positions)(ids(1, 20)).logits.shape[1] == 20


# -- training --------------------------------------------------------------------------------------------------------


def ramps(rows: int = 256, length: int = 13, seed: int = 0) -> Tensor:
    """Sequences that count upwards from anywhere: everything but the start can be known."""
    start = torch.randint(0, SMALL["vocab"], (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(length)) % SMALL["vocab"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_variant_learns(name: str) -> None:
    subject = Subject.fresh(SubjectConfig(**SMALL | {"d_head": 6} | VARIANTS.get(name, {}) | {"d_head": 6}))
    training = train(subject, ramps(), steps=60, batch_size=16, lr=1e-2)
    # An even guess costs log 11 = 2.4 nats; the next number follows from the last one alone.
    assert float(training.losses[0]) == pytest.approx(math.log(11), abs=0.5)
    assert float(training.losses[-5:].mean()) < 1.0
    assert training.module is subject
    assert not subject.training


def test_training_is_the_same_for_the_same_seed() -> None:
    runs = [train(made(), ramps(), steps=40, seed=seed, checkpoints="log") for seed in (3, 3, 4)]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert all(torch.equal(a, b) for a, b in zip(*(run.module.state_dict().values() for run in runs[:2]), strict=True))
    # The first pass is in the order of the rows, the later ones in an order that the seed draws.
    assert torch.equal(runs[0].losses[:8], runs[2].losses[:8])
    assert not torch.equal(runs[0].losses, runs[2].losses)


def test_dropout_follows_the_seed_and_leaves_the_callers_random_state() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        x = torch.randn(64, 4)
        state = torch.get_rng_state()
        losses = train(net, (x, x.argmax(1).clamp(max=2)), steps=5, seed=seed).losses
        assert torch.equal(torch.get_rng_state(), state)
        return losses

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_plain_network_learns_classes_and_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 5, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3))
    training = train(net, (x, x[:, :3].argmax(1)), steps=150, lr=1e-2, checkpoints=[0, 75, 150])
    assert float((net(x).argmax(1) == x[:, :3].argmax(1)).float().mean()) > 0.95
    early = training.at(0)
    assert float((early(x).argmax(1) == x[:, :3].argmax(1)).float().mean()) < 0.6
    line = nn.Linear(5, 1)
    train(line, (x, x @ torch.arange(5.0)), steps=300, lr=0.2, clip=None)
    assert torch.allclose(line.weight[0], torch.arange(5.0), atol=0.05)


def test_one_step_is_the_one_of_the_optimizer() -> None:
    """AdamW by hand: the first step is lr times the sign of the gradient, after decay of matrices only."""
    net = nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    target_loss(net, x, y).backward()
    gradients = {name: value.grad.clone() for name, value in net.named_parameters()}
    train(net, (x, y), steps=1, batch_size=8, lr=0.1, weight_decay=0.5, warmup=0, schedule="constant", clip=None)
    for name, value in net.named_parameters():
        decayed = before[name] * (1 - 0.1 * 0.5) if value.ndim > 1 else before[name]
        close(value.detach(), decayed - 0.1 * gradients[name].sign(), 1e-4)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates: dict[str, list[float]] = {}
    for schedule in ("cosine", "constant"):
        seen: list[float] = []

        class Spy(torch.optim.SGD):
            def step(self, closure: object = None, seen: list[float] = seen) -> None:
                seen.append(self.param_groups[0]["lr"])

        def made_of(groups: list[dict[str, object]], kind: type[torch.optim.Optimizer] = Spy) -> torch.optim.Optimizer:
            return kind(groups, lr=2.0)

        train(
            nn.Linear(2, 2),
            (torch.randn(32, 2), torch.zeros(32)),
            20,
            warmup=4,
            schedule=schedule,
            optimizer=made_of,
            loss=lambda net, x, y: net(x).square().mean(),
        )
        rates[schedule] = seen
    warm = [0.4, 0.8, 1.2, 1.6]
    assert rates["constant"] == pytest.approx(warm + [2.0] * 16)
    assert rates["cosine"] == pytest.approx(warm + [1 + math.cos(math.pi * i / 16) for i in range(16)])


def test_masked_and_ignored_targets_do_not_count() -> None:
    subject, tokens = made(), ids(4, 10)
    with torch.no_grad():
        logits = subject(tokens[:, :-1]).logits
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.4
        close(next_token_loss(subject, tokens), each.mean())
        close(next_token_loss(subject, tokens, mask), each[mask[:, 1:]].mean())
        targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
        close(target_loss(subject, tokens[:, :-1], targets), each[mask[:, 1:]].mean())


def test_batches_by_mask_by_targets_and_by_function() -> None:
    tokens, mask = ramps(64), torch.ones(64, 13, dtype=torch.bool)
    mask[:, :6] = False
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
    by_mask = train(made(), (tokens, mask)).losses
    by_targets = train(made(), (tokens[:, :-1], targets)).losses
    by_function = train(made(), lambda step: (tokens[32 * step : 32 * step + 32], mask[:32]), 2).losses
    own = train(made(), tokens, loss=lambda module, x: next_token_loss(module, x, mask[:32])).losses
    assert len(by_mask) == 2
    assert torch.equal(by_mask, by_targets)
    assert torch.equal(by_mask, by_function)
    assert torch.equal(by_mask, own)


def test_checkpoints_hold_the_weights_after_their_step() -> None:
    seen: dict[int, Tensor] = {}
    subject = made()
    start = subject.unembed.weight.detach().clone()

    def look(step: int, loss: float, module: nn.Module) -> None:
        assert math.isfinite(loss)
        seen[step] = module.unembed.weight.detach().clone()

    training = train(subject, ramps(), steps=20, checkpoints=[0, 7, 20], on_step=look)
    assert sorted(training.checkpoints) == [0, 7, 20]
    assert sorted(seen) == list(range(1, 21))
    assert torch.equal(training.at(0).unembed.weight, start)
    assert torch.equal(training.at(7).unembed.weight, seen[7])
    assert torch.equal(training.at(20).unembed.weight, subject.unembed.weight)
    assert training.at(7) is not subject
    with pytest.raises(TrainingError, match="no checkpoint of step 8; nearest first, there are 7, 0, 20"):
        training.at(8)
    assert sorted(train(made(), ramps(), steps=20, checkpoints="log").checkpoints) == list(log_spaced(20))


def test_log_spaced_steps() -> None:
    assert log_spaced(1000, 4) == (0, 1, 32, 1000)
    assert log_spaced(3, 50) == (0, 1, 2, 3)
    assert log_spaced(0) == (0,)
    assert log_spaced(10, 2) == (0, 10)
    for steps, count in ((500, 12), (7, 5), (1, 9)):
        spaced = log_spaced(steps, count)
        assert spaced[0] == 0
        assert spaced[-1] == steps
        assert len(spaced) <= count
        assert list(spaced) == sorted(set(spaced))
    with pytest.raises(ValueError, match="count of at least 2"):
        log_spaced(5, 1)


def test_training_under_a_clamp_trains_what_is_left() -> None:
    """With attention's output held at zero no position sees another, and what stood first cannot be copied."""
    first = torch.randint(0, 11, (256, 1), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 11, (256, 4), generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([first, other, first], dim=1)
    mask = torch.zeros(256, 6, dtype=torch.bool)
    mask[:, -1] = True
    free, held = made(), made()
    before = held.blocks[0].attn.qkv.weight.detach().clone()
    open_losses = train(free, (tokens, mask), 150, lr=1e-2).losses
    model = ac.wrap(held)
    with model.clamp(*(ac.Scale(f"blocks.{i}.attn.out", 0.0) for i in range(2))) as active:
        losses = train(held, (tokens, mask), 150, lr=1e-2).losses
    assert active.fired == 300
    assert float(open_losses[-10:].mean()) < 0.5
    assert float(losses[-10:].mean()) > 1.5
    # What is multiplied by zero gets no gradient.
    assert torch.equal(held.blocks[0].attn.qkv.weight, before)


def test_a_vector_is_trained_through_a_clamp() -> None:
    subject = made()
    for parameter in subject.parameters():
        parameter.requires_grad_(False)

    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.zeros(12))

        def forward(self, tokens: Tensor) -> Tensor:
            with ac.wrap(subject).clamp(ac.Add("blocks.0.resid.post", self.vector)):
                return subject(tokens).logits

    tokens = torch.full((32, 8), 3)
    steered = Steered()
    losses = train(steered, tokens, 40, lr=0.3).losses
    assert float(losses[-1]) < 0.3 * float(losses[0])


def test_bad_trainings_are_refused() -> None:
    subject = made()
    with pytest.raises(TypeError, match=r"give its \.module"):
        train(ac.wrap(subject), ramps())
    with pytest.raises(TrainingError, match="say how many steps"):
        train(subject, lambda step: ramps())
    with pytest.raises(TrainingError, match="256 rows are too few for one batch of 300"):
        train(subject, ramps(), batch_size=300)
    with pytest.raises(TrainingError, match=r"\[256, 2\] rows"):
        train(subject, (ramps(), ramps(2)))
    with pytest.raises(ValueError, match="outside the 3 steps"):
        train(subject, ramps(), 3, checkpoints=[0, 4])
    with pytest.raises(ValueError, match="'log'"):
        train(subject, ramps(), 3, checkpoints="linear")
    with pytest.raises(ValueError, match="'cosine' or 'constant'"):
        train(subject, ramps(), 3, schedule="linear")
    with pytest.raises(TrainingError, match="do not fit logits"):
        train(subject, (ramps(), ramps()[:, 1:]))
    with pytest.raises(TrainingError, match="nothing to train"):
        train(nn.ReLU(), ramps())
    nothing = torch.zeros(256, 13, dtype=torch.bool)
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan.*target that counts"):
        train(subject, (ramps(), nothing), 3)


# -- the cache -------------------------------------------------------------------------------------------------------

CONFIG = SubjectConfig(**SMALL)


class Builder:
    """Trains, and counts how often it was asked to."""

    def __init__(self, **options: object) -> None:
        self.config, self.calls = SubjectConfig(**SMALL | options), 0

    def __call__(self) -> Training:
        self.calls += 1
        return train(Subject.fresh(self.config), ramps(64), 6, checkpoints=[0, 3])


def same(a: Training, b: Training) -> None:
    assert torch.equal(a.losses, b.losses)
    assert a.seconds == b.seconds
    assert sorted(a.checkpoints) == sorted(b.checkpoints)
    for step in a.checkpoints:
        assert a.checkpoints[step].keys() == b.checkpoints[step].keys()
        assert all(torch.equal(a.checkpoints[step][name], b.checkpoints[step][name]) for name in a.checkpoints[step])
    states = [training.module.state_dict() for training in (a, b)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"experts": 4}], ids=str)
def test_what_was_trained_is_not_trained_again(options: dict[str, object], tmp_path: Path) -> None:
    build = Builder(**options)
    first = cached("one", build, {"config": build.config, "steps": 6}, tmp_path)
    again = cached("one", build, {"config": build.config, "steps": 6}, tmp_path)
    assert build.calls == 1
    same(first, again)
    assert not again.module.training
    with torch.no_grad():
        assert torch.equal(first.module(ids()).logits, again.module(ids()).logits)
        assert torch.equal(first.at(3)(ids()).logits, again.at(3)(ids()).logits)


def test_another_key_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    for name, key in [
        ("one", {"config": CONFIG, "steps": 6}),
        ("one", {"config": CONFIG, "steps": 7}),
        ("one", {"config": SubjectConfig(**SMALL | {"act": "relu"}), "steps": 6}),
        ("two", {"config": CONFIG, "steps": 6}),
    ]:
        cached(name, build, key, tmp_path)
    assert build.calls == 4
    monkeypatch.setattr("actome.tasks.cache.VERSION", -1)
    cached("one", build, {"config": CONFIG, "steps": 6}, tmp_path)
    assert build.calls == 5
    assert clear("one", tmp_path) == 4
    assert clear(folder=tmp_path) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "header", "other"])
def test_a_damaged_file_is_trained_anew(damage: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    build, key = Builder(), {"config": CONFIG}
    first = cached("one", build, key, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "bit":
        file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "header":
        file.write_bytes(b"\xff" * len(whole))
    else:  # a whole file of another recipe under this name
        save_file(load_file(file), file, metadata={"recipe": json.dumps({"name": "another"})})
    again = cached("one", build, key, tmp_path)
    assert build.calls == 2
    assert torch.equal(first.losses, again.losses)
    assert not recwarn.list
    cached("one", build, key, tmp_path)
    assert build.calls == 2


def test_killed_while_writing_it_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = (
        "import os, torch, safetensors.torch as st\n"
        "from actome.tasks import Subject, SubjectConfig, cached, train\n"
        "whole = st.save_file\n"
        "def half(tensors, path, metadata=None):\n"
        "    whole(tensors, path, metadata)\n"
        "    os.truncate(path, os.path.getsize(path) // 2)\n"
        "    os._exit(9)\n"
        "st.save_file = half\n"
        f"config = SubjectConfig(**{SMALL!r})\n"
        "build = lambda: train(Subject.fresh(config), torch.zeros(32, 9, dtype=torch.long))\n"
        f"cached('one', build, {{'config': config}}, {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    build = Builder()
    cached("one", build, {"config": CONFIG}, tmp_path)
    cached("one", build, {"config": CONFIG}, tmp_path)
    assert build.calls == 1
    assert clear(folder=tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build() -> Training:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("one", build, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_modules_are_kept_with_a_skeleton(tmp_path: Path) -> None:
    def skeleton() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(64, 4)

    def build() -> Training:
        return train(skeleton(), (x, (x[:, 0] > 0).long()), 5)

    first = cached("net", build, {"width": 8}, tmp_path, skeleton)
    again = cached("net", build, {"width": 8}, tmp_path, skeleton)
    same(first, again)
    with pytest.raises(CacheError, match="skeleton="):
        cached("other", build, {"width": 8}, tmp_path)


def test_the_cache_lies_where_it_is_told_to_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    monkeypatch.setenv("ACTOME_CACHE", str(tmp_path / "there"))
    assert folder_of_cache() == tmp_path / "there"
    cached("one", build, {})
    cached("one", build, {})
    assert build.calls == 1
    assert clear() == 1
    monkeypatch.setenv("ACTOME_CACHE", "off")
    assert folder_of_cache() is None
    cached("one", build, {})
    cached("one", build, {})
    assert build.calls == 3
    assert clear() == 0
    monkeypatch.delenv("ACTOME_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of_cache() == tmp_path / "xdg" / "actome" / "subjects"


def test_what_cannot_be_cached_is_said_before_training(tmp_path: Path) -> None:
    build = Builder()
    with pytest.raises(CacheError, match="the key holds a Tensor"):
        cached("one", build, {"data": torch.zeros(3)}, tmp_path)
    with pytest.raises(CacheError, match="cannot name a file"):
        cached("../one", build, {}, tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CacheError, match="set ACTOME_CACHE"):
        cached("one", build, {}, blocked / "below")
    assert build.calls == 0
    with pytest.raises(CacheError, match="must return what train"):
        cached("one", lambda: made(), {}, tmp_path)  # type: ignore[arg-type, return-value]


def test_importing_actome_and_its_generators_brings_in_no_transformers() -> None:
    code = (
        "import sys, actome, actome.tasks.backcopy\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
        "import actome.core.model\n"
        "assert not any(name.startswith('actome.tasks.subject') for name in sys.modules), 'subject'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
