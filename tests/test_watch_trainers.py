"""Watching by the callbacks of transformers' and Lightning's trainers."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from watch_loop import PROBE, VOCAB, events, ids, opened, same, weights

from actome.dynamics import RunStore, WatchCallback
from actome.dynamics.alarms import Alarm, Detector, Stop

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset):
    def __init__(self, count: int = 32):
        self.rows = ids(3, count)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trainer(module, path, callbacks=(), **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=4, max_steps=4, report_to=[], use_cpu=True, seed=0,
        disable_tqdm=True, logging_strategy="no", save_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=module, args=arguments, train_dataset=Rows(), eval_dataset=Rows(4), callbacks=list(callbacks)
    )


def test_trainer_is_watched_step_by_step_and_trains_the_same(tmp_path):
    plain, watched = llama(), llama()
    trainer(plain, tmp_path / "p", gradient_accumulation_steps=2).train()
    callback = WatchCallback(text=PROBE, run=tmp_path / "a", every=2)
    made = trainer(watched, tmp_path / "w", [callback], gradient_accumulation_steps=2)
    losses = []
    compute = made.compute_loss

    def told(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    made.compute_loss = told
    made.train()
    assert "training_step" not in vars(made)
    assert same(weights(plain), weights(watched))
    run = opened(tmp_path / "a")
    assert run.status == "finished"
    # Each of the two passes of a step tells the loss as a share of the step's tokens.
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert run.scalars("loss").to_dict() == pytest.approx(dict(enumerate(sums, 1)), rel=1e-5)
    assert run.scalars("effective_rank", site="blocks.1.resid.post").index.tolist() == [0, 2, 4]
    assert run.config["gradient_accumulation_steps"] == 2
    assert len(run.scalars("grad_norm")) == 2


class At(Detector):
    name = "at"
    needs = ("loss",)

    def update(self, step, readings):
        return [Alarm(step, "at", "now")] * (step == 2)

    def rewind(self, step):
        pass


def test_trainer_stops_when_an_alarm_says_so(tmp_path):
    callback = WatchCallback(text=PROBE, run=tmp_path / "a", every=1, alarms=[At()], actions={"at": Stop()})
    made = trainer(llama(), tmp_path / "w", [callback])
    made.train()
    assert made.state.global_step == 2
    assert callback.watch.should_stop


def test_trainer_resumes_the_run_from_its_checkpoint(tmp_path):
    def made(module):
        one = trainer(module, tmp_path / "w", [WatchCallback(text=PROBE, run=tmp_path / "a", every=1)])
        one.args.save_strategy, one.args.save_steps = "steps", 2
        return one

    made(llama()).train()
    assert events(tmp_path / "a", "checkpoint")[0]["path"].endswith("checkpoint-2")
    before = opened(tmp_path / "a").scalars("loss")
    again = made(llama(seed=9))
    again.train(resume_from_checkpoint=str(tmp_path / "w" / "checkpoint-2"))
    run = RunStore.open(tmp_path / "a")
    assert run.scalars("loss").to_dict() == pytest.approx(before.to_dict(), rel=1e-5)
    frame = run.frame("loss", superseded=True)
    assert sorted(frame[frame["site"].isna()]["step"]) == [1, 2, 3, 3, 4, 4]


def test_trainer_that_fails_leaves_a_failed_run(tmp_path):
    made = trainer(llama(), tmp_path / "w", [WatchCallback(panel=None, run=tmp_path / "a")])

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    made.compute_loss = broken
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert opened(tmp_path / "a").status == "failed"


def test_a_loss_of_nan_is_seen_though_the_trainer_filters_it(tmp_path):
    module = llama()
    made = trainer(module, tmp_path / "w", [WatchCallback(text=PROBE, run=tmp_path / "a", every=100)])
    compute, calls = made.compute_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                module.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        return compute(*args, **kwargs)

    made.compute_loss = poisoned
    made.train()
    run = opened(tmp_path / "a")
    assert math.isnan(run.scalars("loss")[3])
    alarm = run.alarms.iloc[0]
    assert (alarm["step"], alarm["name"], alarm["site"]) == (3, "non_finite", "blocks.1.mlp.out")


def test_trl_is_watched_by_inheritance(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table

    rows = Table.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids(3, 16)])
    tokenizer = _tokenizer()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "w"), per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, bf16=False,
    )  # fmt: skip
    callback = WatchCallback(text=PROBE, run=tmp_path / "a", every=1)
    made = trl.SFTTrainer(
        model=llama(), args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    made.train()
    run = opened(tmp_path / "a")
    assert run.scalars("loss").index.tolist() == [1, 2, 3]
    assert run.scalars("effective_rank", site="blocks.0.resid.post").index.tolist() == [0, 1, 2, 3]


def _tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_is_watched_step_by_step_and_trains_the_same(tmp_path, accumulate):
    lightning = pytest.importorskip("lightning.pytorch")
    from actome.dynamics import LightningWatch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama()
            self.losses = []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(callbacks):
        module = Module()
        made = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        torch.manual_seed(0)
        made.fit(module, DataLoader(Rows(16), batch_size=4), DataLoader(Rows(4), batch_size=4))
        return module

    plain = run([])
    callback = LightningWatch(text=PROBE, run=tmp_path / "a", every=1)
    watched = run([callback])
    assert same(weights(plain), weights(watched))
    store = opened(tmp_path / "a")
    steps = 4 // accumulate
    means = torch.tensor(watched.losses).view(steps, accumulate).mean(1).tolist()
    assert store.scalars("loss").to_dict() == pytest.approx(dict(enumerate(means, 1)), rel=1e-5)
    assert store.scalars("effective_rank", site="blocks.1.resid.post").index.tolist() == list(range(steps + 1))
    assert store.scalars("val_loss").index.tolist() == [steps]
    # Plain gradient descent: an update is the gradient times the rate.
    ratio = store.scalars("update_norm") / store.scalars("grad_norm")
    assert ratio.tolist() == pytest.approx([0.1] * steps, rel=1e-4)
    assert store.status == "finished"


def test_lightning_missing_is_said_with_its_extra(monkeypatch):
    import actome.dynamics

    for name in list(sys.modules):
        if name.split(".")[0] in ("lightning", "pytorch_lightning") or name.endswith("callbacks_lightning"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(vars(actome.dynamics), "LightningWatch", raising=False)  # as if it had not been asked for
    with pytest.raises(ImportError, match=r"actome\[lightning\]"):
        _ = actome.dynamics.LightningWatch


def test_heavy_libraries_are_imported_only_when_a_callback_is_asked_for():
    import subprocess

    code = "import sys, actome.dynamics; print([m for m in ('lightning', 'accelerate', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
