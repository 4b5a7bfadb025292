"""The parts of watching: when to look, norms and components, tracing, the probe, and the measures it brought."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from measured import generator
from tiny import TINY
from torch import nn
from watch_loop import LENGTH, PROBE, opened, subject

import actome as ac
from actome.core.errors import MeasureError, RunError
from actome.dynamics import first_non_finite
from actome.dynamics.watching import components
from actome.dynamics.watching.cadence import Cadence
from actome.dynamics.watching.norms import Chosen, by_component, lengths
from actome.dynamics.watching.probe import check_share, probe_batches, repeated_tokens, shares
from actome.dynamics.watching.unwrap import unwrap
from actome.measures import AttentionLogitMax, InductionScore


def simulated(cadence: Cadence, steps: int, seconds, cost, setup: float = 0.0) -> tuple[list[int], float, float]:
    """A run of the clock alone: the steps looked at, the time of the looks and that of the steps."""
    looked, spent, total = [0], setup + cost(0), 0.0
    cadence.spend(setup)
    cadence.look(0, cost(0), None)
    for at in range(1, steps + 1):
        total += seconds(at)
        usual = seconds(at) if at >= 4 else None
        if cadence.next is not None and at >= cadence.next:
            looked.append(at)
            spent += cost(at)
            cadence.look(at, cost(at), usual)
        elif cadence.next is None or at % 50 == 0:
            cadence.plan(at, usual)
    return looked, spent, total


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("cost", [0.1, 1.0, 5.0])
def test_looks_stay_within_their_share(share, cost):
    looked, spent, total = simulated(Cadence(share), 20_000, lambda _: 0.1, lambda _: cost, setup=1.0)
    assert spent <= share * total * 1.000001
    # And make use of it: all but what one look takes, and the time before a step's was known.
    assert spent >= 0.9 * share * total - 2 * cost - 1.0
    distances = {b - a for a, b in itertools.pairwise(looked[2:])}
    assert len(distances) <= 2


@pytest.mark.parametrize("cost", [0.05, 0.5, 5.0, 50.0])
def test_a_known_length_buys_early_looks_within_the_same_share(cost):
    looked, spent, total = simulated(Cadence(0.02, steps=20_000), 20_000, lambda _: 0.1, lambda _: cost)
    unknown, same, _ = simulated(Cadence(0.02), 20_000, lambda _: 0.1, lambda _: cost)
    assert spent <= max(0.02 * total, cost) * 1.000001  # one look is always taken
    assert spent >= same - cost
    if cost == 0.5:
        early = [at for at in looked if at <= 1_000]
        assert len(early) >= 20 > 4 * sum(at <= 1_000 for at in unknown)
        ratios = [b / a for a, b in itertools.pairwise(early[8:])]
        assert max(ratios) < 1.1 * min(ratios)


def test_looks_that_cost_more_come_less_often():
    def cost(at):
        return 0.2 if at < 5_000 else 2.0

    looked, spent, total = simulated(Cadence(0.02), 20_000, lambda _: 0.1, cost)
    assert spent <= 0.02 * total + 2.0
    early, late = (sum(low <= at < low + 5_000 for at in looked) for low in (0, 10_000))
    assert early == pytest.approx(10 * late, rel=0.2)


def test_steps_that_become_faster_are_looked_at_less_often():
    looked, spent, total = simulated(Cadence(0.02), 20_000, lambda at: 0.2 if at < 5_000 else 0.05, lambda _: 0.2)
    assert spent <= 0.02 * total + 0.4
    assert looked[-1] > 19_000


def test_what_is_not_spent_is_not_saved_for_a_burst():
    cadence = Cadence(0.1)
    cadence.look(0, 1.0, 0.1)
    cadence.plan(1_000_000, 0.1)  # as after a pause in which nobody asked
    looked = []
    for at in range(1_000_000, 1_000_010):
        if at >= cadence.next:
            looked.append(at)
            cadence.look(at, 1.0, 0.1)
    assert len(looked) <= 2


def test_every_keeps_to_its_number():
    looked, _, _ = simulated(Cadence(0.001, every=7), 30, lambda _: 0.1, lambda _: 5.0)
    assert looked == [0, 7, 14, 21, 28]


def test_norms_of_any_tensors_are_those_of_the_textbook():
    g = generator(0)
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], torch.randn(3, 4, generator=g), (5, 4), check_invariants=True)
    tensors = [
        torch.randn(7, 3, generator=g),
        torch.randn(4, generator=g, dtype=torch.float64),
        torch.randn(100, generator=g).to(torch.bfloat16),
        sparse,
        torch.zeros(0),
    ]
    found = [float(one) for one in lengths(tensors)]
    wanted = [float((t.to_dense() if t.is_sparse else t).double().norm()) for t in tensors]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_norms_of_large_tensors_are_estimated_closely_and_the_same_each_time():
    g = generator(1)
    a = torch.randn(300, 1000, generator=g)
    b = a + 0.01 * torch.randn(300, 1000, generator=g)
    small = torch.randn(5, 5, generator=g)
    before, after = {"large": a, "small": small}, {"large": b, "small": small + 1}
    chosen = Chosen(before)
    kept = chosen.take(before)
    assert kept["large"].numel() == 16_384
    found = chosen.distances(after, kept)
    assert float(found["large"]) == pytest.approx(float((b - a).norm()), rel=0.02)
    assert float(found["small"]) == pytest.approx(5.0)
    assert torch.equal(Chosen(before).take(before)["large"], kept["large"])


def test_components_add_up_to_the_whole():
    values = {"a": 3.0, "b": 4.0, "c": 12.0}
    found = by_component("norm", values, {"a": "blocks.3.attn", "b": "blocks.3.attn", "c": "embed"})
    assert [(one.value, one.site, one.layer) for one in found] == [
        (13.0, None, None),
        (5.0, "blocks.3.attn", 3),
        (12.0, "embed", None),
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "t5", "subject-moe", "mamba", "vit"])
def test_every_parameter_of_a_family_has_a_component(name):
    module = TINY[name]()
    found = components(ac.wrap(module))
    assert set(found) == {path for path, _ in module.named_parameters()}
    named = {one for one in found.values() if "blocks." in one}
    layers = {one.split("blocks.")[1].split(".")[0] for one in named}
    assert {"0", "1"} <= layers
    kinds = {one.rpartition(".")[2] for one in named}
    assert kinds <= {"attn", "mlp", "moe", "norm", "cross", "mixer", "other"}
    assert "attn" in kinds or "mixer" in kinds


def test_components_of_any_network_are_its_modules():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 1))
    net.register_parameter("scale", nn.Parameter(torch.ones(())))
    assert set(components(ac.wrap(net)).values()) == {"0", "1.0", "2", "scale"}


@pytest.mark.parametrize("site", ["embed", "blocks.0.attn.v", "blocks.1.mlp.act", "blocks.1.resid.post", "final_norm"])
def test_the_first_site_that_is_not_finite_is_the_one_where_it_was_planted(site):
    model = ac.wrap(subject())
    assert first_non_finite(model, PROBE) is None
    (place,) = model.match(site)

    def plant(x):
        return x.index_fill(x.dim() - 1, torch.tensor([0]), torch.nan)

    with model.tap([(place.address, plant, "write")]):
        found = first_non_finite(model, PROBE)
    assert found[0] == site
    with torch.no_grad():
        entries = model.record(PROBE, site)[site].select(-1, 0).numel()
    assert found[1] == entries


def test_masked_scores_are_no_loss_of_numbers():
    assert first_non_finite(ac.wrap(TINY["llama"]()), PROBE % 60) is None


def test_wrappers_are_looked_through_in_any_order():
    net = nn.Sequential(nn.Linear(2, 2))
    assert unwrap(nn.DataParallel(net)) is net
    assert unwrap(torch.compile(nn.DataParallel(torch.compile(net)))) is net


def test_the_probe_is_shared_out_without_a_row_lost():
    batches = [PROBE, {"input_ids": PROBE, "scale": 2.0}]
    parts = [shares(batches, rank, 4) for rank in range(4)]
    rows = torch.cat([part[0] for part in parts])
    assert sorted(rows.tolist()) == sorted(PROBE.tolist())
    assert parts[0][1]["scale"] == 2.0
    assert parts[3][1]["input_ids"].shape == (1, LENGTH)
    with pytest.raises(RunError, match="batches of 6 rows, and 7 processes"):
        check_share(batches, 7)


def test_a_probe_may_be_whatever_the_forward_takes():
    model = ac.wrap(subject())
    for given in (PROBE, [PROBE], PROBE[0], [(PROBE, PROBE)], {"input_ids": PROBE, "labels": PROBE}):
        batches = probe_batches(model, given, None, 2048)
        table = model.measure(batches, {"blocks.*.resid.post": [ac.measures.ActivationScale()]})
        rows = PROBE[:1] if isinstance(given, torch.Tensor) and given.ndim == 1 else PROBE
        wanted = model.measure(rows, {"blocks.*.resid.post": [ac.measures.ActivationScale()]})
        assert torch.equal(table.value("rms"), wanted.value("rms"))
    assert "labels" not in probe_batches(model, {"input_ids": PROBE, "labels": PROBE}, None, 2048)[0]


def test_no_repeated_tokens_for_what_reads_none():
    assert repeated_tokens(ac.wrap(nn.Linear(2, 2))) is None


def test_largest_attention_logits_are_those_of_queries_and_keys():
    model = ac.wrap(subject(layers=2))
    table = model.measure(PROBE, {"blocks.*.attn.scores": AttentionLogitMax()})
    recording = model.record(PROBE, ["blocks.*.attn.q", "blocks.*.attn.k"])
    for layer in range(2):
        q, k = recording[f"blocks.{layer}.attn.q"], recording[f"blocks.{layer}.attn.k"]
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        wanted = scores.masked_fill(~causal, -torch.inf).amax((0, 2, 3))
        assert table.value("attention_logit_max")[layer].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


def test_attention_logits_that_are_not_finite_are_left_out():
    scores = torch.randn(2, 2, 4, 4, generator=generator(3))
    scores[0, 1, 2, 0], scores[1, 0, 1, 1] = torch.nan, torch.inf
    measure = AttentionLogitMax()
    measure.update(scores)
    kept = scores.clone()
    kept[0, :, 2], kept[1, :, 1] = -torch.inf, -torch.inf
    assert measure.compute()["attention_logit_max"].tolist() == pytest.approx(kept.amax((0, 2, 3)).tolist())
    measure = AttentionLogitMax()
    measure.update(torch.full((1, 1, 2, 2), torch.nan))
    assert math.isnan(float(measure.compute()["attention_logit_max"]))


def test_induction_scores_are_those_of_a_loop_over_queries():
    g = generator(5)
    tokens = torch.randint(0, 5, (3, 9), generator=g)
    pattern = torch.rand(3, 2, 9, 9, generator=g).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    score = InductionScore()
    score.update(pattern, mask, tokens)
    previous, found = [], []
    for b in range(3):
        for i in range(int(mask[b].sum())):
            if i:
                previous.append(pattern[b, :, i, i - 1])
            earlier = [j for j in range(i - 1) if tokens[b, j] == tokens[b, i]]
            if earlier:
                found.append(pattern[b, :, i, earlier[-1] + 1])
    values = score.compute()
    assert values["previous_token"].tolist() == pytest.approx(torch.stack(previous).mean(0).tolist(), rel=1e-5)
    assert values["induction"].tolist() == pytest.approx(torch.stack(found).mean(0).tolist(), rel=1e-5)


def test_a_perfect_induction_head_scores_one():
    tokens = torch.arange(8).repeat(2)[None]
    pattern = torch.zeros(1, 2, 16, 16)
    pattern[0, 0, torch.arange(16), (torch.arange(16) - 1).clamp_min(0)] = 1.0  # the token before
    pattern[0, 1, torch.arange(16), (torch.arange(16) - 7).clamp_min(0)] = 1.0  # what followed it last time
    score = InductionScore()
    score.update(pattern, None, tokens)
    values = score.compute()
    assert values["previous_token"].tolist() == pytest.approx([1.0, 1 / 15])  # its second query looks at the first
    assert values["induction"].tolist() == [0.0, 1.0]
    with pytest.raises(MeasureError, match="with its tokens"):
        score.update(pattern)


def test_the_training_panel_of_a_mixture_follows_its_experts(tmp_path):
    module = subject(experts=4)
    with ac.watch(module, text=PROBE, run=tmp_path / "a") as watch:
        pass
    run = opened(watch)
    assert {"pathway_distance", "router_entropy"} <= set(run.measures)
    assert run.frame()["expert"].dropna().nunique() == 4
    assert not any("moe" in one for one in watch.skipped)


def test_a_network_without_sites_is_watched_by_its_modules(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    with ac.watch(net, text=torch.randn(4, 3, 8, 8), run=tmp_path / "a") as watch:
        pass
    assert {"module:0", "module:3"} <= set(opened(watch).frame("rms")["site"])
