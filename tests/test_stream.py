"""Measuring in one pass: equals measuring the recorded whole; shards, processes and clusters merge to the same."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import TINY, inputs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import actome as ac
from actome.core.cluster import measure_on_ray, merge_tables
from actome.core.measure import Measure, real_tokens

RESID = "blocks.*.resid.post"


class Square(Measure):
    """Mean square of each unit: small enough to be computed again from a recording."""

    reductions = {"square": "sum", "count": "sum"}  # noqa: RUF012
    value_dims = {"mean_square": ("unit",)}  # noqa: RUF012

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        kept = real_tokens(x, mask)
        return {"square": kept.x.square().sum(dim=(0, 1)), "count": kept.count}

    def values(self, stats):
        return {"mean_square": stats["square"] / stats["count"][..., None]}


class FirstKey(Measure):
    """Attention to the first token, by head."""

    layout = "pattern"
    reductions = {"weight": "sum", "count": "sum"}  # noqa: RUF012
    value_dims = {"first": ("head",)}  # noqa: RUF012

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        keep = torch.ones(x.shape[0], x.shape[2]) if mask is None else mask.float()
        return {"weight": (x[..., 0] * keep[:, None]).sum(dim=(0, 2)), "count": keep.sum()}

    def values(self, stats):
        return {"first": stats["weight"] / stats["count"][..., None]}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(batch_size: int = 4) -> ac.Text:
    letters = "abcdefghijklmnopqrstuvwxyz"
    documents = [(f"d{i}", " ".join(letters[(i * j) % 26] for j in range(1, 3 + i % 9))) for i in range(30)]
    return ac.Text(documents, tokenizer(), context=12, batch_size=batch_size, pack=False)


def model() -> ac.Model:
    return ac.wrap(TINY["llama"](), tokenizer())


def measured(m: ac.Model, what: ac.Text) -> ac.core.table.MeasureTable:
    return m.measure(what, {RESID: Square(), "blocks.*.attn.z": Square(), "blocks.*.attn.pattern": FirstKey()})


def test_one_pass_equals_the_recorded_whole():
    m = model()
    table = measured(m, text())
    rec = m.record(text(), [RESID, "blocks.*.attn.z"])
    for i in range(m.layers):
        site = f"blocks.{i}.resid.post"
        wanted = rec.flat(site).square().mean(0)
        torch.testing.assert_close(table.value("mean_square", site).float(), wanted, rtol=1e-4, atol=1e-6)
        site = f"blocks.{i}.attn.z"
        wanted = rec.flat(site).flatten(1).square().mean(0)
        torch.testing.assert_close(table.value("mean_square", site).float(), wanted, rtol=1e-4, atol=1e-6)
    assert table.value("first").shape == (m.layers, 4)


def test_rows_name_layer_head_and_unit():
    frame = measured(model(), text()).frame
    assert set(frame.columns) == {"site", "layer", "head", "unit", "measure", "value"}
    one = frame[(frame.measure == "first") & (frame.layer == 1)]
    assert one["head"].tolist() == [0, 1, 2, 3]


def test_small_and_large_batches_take_different_paths_to_the_same_values():
    m = model()
    ids = torch.randint(3, 29, (40, 60), generator=torch.Generator().manual_seed(0))
    parts = [m.measure(ids, {RESID: Square()}, batch_size=n).value("mean_square") for n in (1, 7, 40)]
    for part in parts[1:]:
        # The forward is in float32, and its products may be summed in another order where the batch is larger.
        torch.testing.assert_close(part, parts[0], rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing():
    m = model()
    one, many = (measured(m, text(batch_size=n)) for n in (1, 15))
    for name in ("first",):
        torch.testing.assert_close(one.value(name), many.value(name), rtol=1e-4, atol=1e-6)
    frame_one, frame_many = one.frame, many.frame
    torch.testing.assert_close(
        torch.tensor(frame_one.value.to_numpy()), torch.tensor(frame_many.value.to_numpy()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_merge_to_the_whole(count):
    m = model()
    whole = measured(m, text())
    merged = merge_tables([measured(m, text().shard(i, count)) for i in range(count)])
    assert whole.frame[["site", "measure"]].equals(merged.frame[["site", "measure"]])
    torch.testing.assert_close(
        torch.tensor(whole.frame.value.to_numpy()), torch.tensor(merged.frame.value.to_numpy()), rtol=1e-5, atol=1e-7
    )


def _rank(rank: int, ranks: int, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=ranks)
    table = measured(model(), text().shard(rank, ranks))
    table.frame.to_json(f"{where}/{rank}.json")
    dist.destroy_process_group()


def test_two_processes_of_torch_distributed_get_the_values_of_both(tmp_path):
    import pandas as pd

    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    whole = torch.tensor(measured(model(), text()).frame.value.to_numpy())
    for rank in range(2):
        got = torch.tensor(pd.read_json(tmp_path / f"{rank}.json").value.to_numpy())
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)


def test_a_local_ray_cluster_gives_the_values_of_the_whole():
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    import sys
    from pathlib import Path

    here = str(Path(__file__).parent)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ":".join([here, *sys.path]), "OMP_NUM_THREADS": "1"}},
    )
    try:
        plan = {RESID: Square(), "blocks.*.attn.pattern": FirstKey()}
        table = measure_on_ray(model, text(), plan, workers=2)
    finally:
        ray.shutdown()
    whole = model().measure(text(), plan)
    torch.testing.assert_close(table.value("mean_square"), whole.value("mean_square"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(table.value("first"), whole.value("first"), rtol=1e-5, atol=1e-7)


def test_clamps_show_in_measures():
    m = model()
    with m.clamp(ac.Set("blocks.1.resid.post", 2.0)):
        table = m.measure(text(), {RESID: Square()})
    assert bool((table.value("mean_square", "blocks.1.resid.post") == 4.0).all())


def test_an_image_model_is_measured_channel_by_channel():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    x = torch.randn(6, 3, 8, 8)
    table = ac.wrap(net).measure(x, {"module:1": Square()}, batch_size=2)
    torch.testing.assert_close(table.value("mean_square")[0].float(), net(x).square().mean(dim=(0, 2, 3)))


def test_an_encoder_decoder_is_measured_in_both_stacks():
    m = ac.wrap(TINY["t5"]())
    table = m.measure([inputs("t5")], {RESID: Square()})
    assert {site.name.split(".")[0] for site in table.sites("mean_square")} == {"encoder", "decoder"}


def test_a_decoder_beside_an_encoder_reads_the_text_one_step_later():
    m = ac.wrap(TINY["t5"](), tokenizer())
    table = m.measure(text(), {"logits": ac.measures.NextTokenLoss(), RESID: Square()})
    loss, count = 0.0, 0
    for batch in text(batch_size=1):
        inside = torch.cat([torch.zeros(1, 1, dtype=torch.long), batch.ids[:, :-1]], dim=1)
        with torch.no_grad():
            logits = m.module(input_ids=batch.ids, decoder_input_ids=inside).logits
        loss += float(torch.nn.functional.cross_entropy(logits[0, :-1], inside[0, 1:], reduction="sum"))
        count += inside.shape[1] - 1
    torch.testing.assert_close(float(table.value("loss")), loss / count, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said():
    m = model()
    with pytest.raises(ac.SiteError, match="nearest"):
        m.measure(text(), {"blocks.*.resid.pots": Square()})
    with pytest.raises(ac.MeasureError, match="attention patterns"):
        m.measure(text(), {RESID: FirstKey()})
    with pytest.raises(ac.MeasureError, match="pair of positions"):
        m.measure(text(), {"blocks.0.attn.pattern": Square()})
    with pytest.raises(ac.MeasureError, match="nothing to measure"):
        m.measure(text(), {})
    with pytest.raises(ac.MeasureError, match="different measures"):
        merge_tables([m.measure(text(), {RESID: Square()}), m.measure(text(), {"embed": Square()})])


def test_measures_of_one_tensor_share_its_tokens_and_none_sees_what_another_did():
    from actome.core.real import real_tokens, shared_tokens

    x, mask = torch.randn(2, 5, 3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with shared_tokens():
        first = real_tokens(x, mask)
        assert real_tokens(x.detach(), mask) is first
        assert real_tokens(x[:, 1:], mask[:, 1:]) is not first
        again = real_tokens(x, mask)
        x[0, 0, 0] = torch.nan  # written to in place: the same tensor is another
        assert int(real_tokens(x, mask).count) == int(again.count) - 1
        with torch.inference_mode():
            made = torch.ones(1, 2, 3)
            assert real_tokens(made) is not real_tokens(made)
    assert real_tokens(x, mask) is not real_tokens(x, mask)


def test_a_panel_passes_over_modules_that_no_forward_calls():
    class Spare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    from actome.measures import PANELS

    table = ac.wrap(Spare()).measure(torch.randn(4, 5, 3), PANELS["sparsity"])
    assert {site.name for site in table.sites("zeros")} == {"module:used"}
    assert any("did not reach module:spare" in reason for reason in table.skipped)
