"""The demo model is what its card says: it loads at every step, models held-out text, and copies what repeats."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actome.tasks.corpus import documents
from actome.tasks.demo import DEMO_MODEL, demo, demo_dir, demo_module, demo_steps

LAST = demo_steps()[-1]
SPANS = ((0, 40), (20, 70), (0, 30))  # bounds of the lead, length and gap of a random repeat


@pytest.fixture(scope="module")
def last():
    return demo_module()


def losses(module, tokens_BT):
    """Cross-entropy in nats (B, T-1)."""
    with torch.no_grad():
        logits_BTV = module(input_ids=tokens_BT).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")


def heldout_tokens(tokenizer, kind, rows=12, width=128):
    """The start of held-out documents, (B, T)."""
    rows_of_ids = (tokenizer(document.text, verbose=False).input_ids for document in documents("heldout", kind))
    long_enough = [ids[:width] for ids in rows_of_ids if len(ids) >= width]
    return torch.tensor(long_enough[:rows])


def unigram_loss(tokenizer, kind, tokens_BT):
    """Loss of the add-one unigram of the training text of the same kind, counted here and not by the script."""
    counts = torch.ones(len(tokenizer))
    for document in documents("train", kind):
        ids = torch.tensor(tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids)
        counts += torch.bincount(ids, minlength=len(counts))
    return -(counts / counts.sum()).log()[tokens_BT[:, 1:]].mean().item()


def second_and_first_copy_loss(module, rows=12):
    """Loss on the two copies of a random span, the first token left out; each row has its own lead, length and gap."""
    generator = torch.Generator().manual_seed(7)
    first, second = [], []
    for _ in range(rows):
        lead, length, gap = (int(torch.randint(low, high, (), generator=generator)) for low, high in SPANS)
        tokens_T = torch.randint(2, 2000, (1 + lead + length + gap + length,), generator=generator)
        tokens_T[0] = 0
        tokens_T[-length:] = tokens_T[1 + lead : 1 + lead + length]
        losses_T = losses(module, tokens_T[None])[0]
        first.append(losses_T[1 + lead : lead + length])
        second.append(losses_T[-length + 1 :])
    return torch.cat(second).mean().item(), torch.cat(first).mean().item()


@pytest.mark.parametrize("step", demo_steps())
def test_every_checkpoint_loads_and_is_finite(step):
    module, tokenizer = demo_module(step)
    assert not module.training
    assert module.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert losses(module, torch.tensor([tokenizer("def f(x):\n    return x").input_ids])).isfinite().all()


def test_checkpoints_start_at_zero_and_fit_in_the_package():
    steps = demo_steps()
    assert steps[0] == 0
    assert 8 <= len(steps) <= 12
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 16e6
    assert sum(path.stat().st_size for path in files) < 18e6


def test_loading_leaves_the_random_state_and_progress_bars_alone(capsys):
    before = torch.get_rng_state()
    demo_module(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert "Loading" not in capsys.readouterr().err


def test_dtype_may_be_named():
    assert demo_module(dtype="bfloat16")[0].dtype == torch.bfloat16


def test_folder_is_an_ordinary_model_folder(last):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(demo_dir())
    assert module.dtype == torch.float32
    for ours, theirs in zip(last[0].parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(demo_dir())("a b").input_ids == last[1]("a b").input_ids


def test_unknown_step_names_the_nearest_first():
    with pytest.raises(ValueError, match=rf"step {LAST - 1}; nearest first, it has {LAST}, "):
        demo_module(LAST - 1)
    with pytest.raises(ValueError, match=r"no checkpoint at step -1; nearest first, it has 0, "):
        demo(step=-1)


@pytest.mark.parametrize("kind", ["english", "source"])
def test_last_checkpoint_models_heldout_text(last, kind):
    module, tokenizer = last
    tokens_BT = heldout_tokens(tokenizer, kind)
    # The card has it more than 3 nats below; here the texts depend on the Python that runs, and are few.
    assert losses(module, tokens_BT).mean().item() < unigram_loss(tokenizer, kind, tokens_BT) - 2


def test_untrained_checkpoint_knows_nothing():
    module, tokenizer = demo_module(0)
    loss = losses(module, heldout_tokens(tokenizer, "source", rows=4)).mean().item()
    assert loss == pytest.approx(math.log(len(tokenizer)), abs=0.1)


def test_training_makes_the_model_copy_random_repeats(last):
    second, first = second_and_first_copy_loss(last[0])
    assert second < first - 3
    second, first = second_and_first_copy_loss(demo_module(0)[0])
    assert second == pytest.approx(first, abs=0.05)


def test_card_and_measurements_are_of_these_checkpoints():
    measured = json.loads((DEMO_MODEL / "measurements.json").read_text(encoding="utf-8"))["checkpoints"]
    assert [int(step) for step in measured] == demo_steps()
    card = (DEMO_MODEL / "CARD.md").read_text(encoding="utf-8")
    for step, figures in measured.items():
        assert f"| {step} | {figures['english']:.2f} | {figures['source']:.2f} |" in card


def test_wrapped_model_keeps_module_and_tokenizer(last):
    pytest.importorskip("actome.core.model")
    model = demo()
    tokens_BT = torch.tensor([last[1]("import os").input_ids])
    assert torch.equal(losses(model.module, tokens_BT), losses(last[0], tokens_BT))
    assert model.tokenizer("import os").input_ids == tokens_BT[0].tolist()


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(last, text):
    tokenizer = last[1]
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_corpus_split_is_disjoint_whole_and_repeatable():
    train, heldout, everything = (documents(split) for split in ("train", "heldout", "all"))
    titles = [document.title for document in everything]
    assert len(set(titles)) == len(titles)
    assert {document.title for document in train}.isdisjoint(document.title for document in heldout)
    assert sorted(document.title for document in train + heldout) == sorted(titles)
    assert documents("all") == everything
    assert documents("train") == train
    assert {document.title for document in documents("heldout", "source")} >= {"source:textwrap", "source:functools"}


@pytest.mark.parametrize("kind", ["english", "source"])
def test_corpus_holds_out_about_a_tenth(kind):
    sizes = {split: sum(len(document.text) for document in documents(split, kind)) for split in ("heldout", "all")}
    assert sizes["all"] > 300_000
    assert 0.03 < sizes["heldout"] / sizes["all"] < 0.2


def test_heldout_english_is_not_quoted_in_training_english():
    def paragraphs(split):
        return {
            " ".join(paragraph.split())
            for document in documents(split, "english")
            for paragraph in document.text.split("\n\n")
            if len(paragraph) > 80
        }

    heldout = paragraphs("heldout")
    shared = heldout & paragraphs("train")
    # A few paragraphs of one section may be quoted in another; whole sections must not be.
    assert sum(map(len, shared)) < 0.05 * sum(map(len, heldout))


def test_unknown_split_and_kind_say_what_there_is():
    with pytest.raises(ValueError, match="'train', 'heldout' or 'all'"):
        documents("test")
    with pytest.raises(ValueError, match="'english', 'source' or 'all'"):
        documents(kind="german")
