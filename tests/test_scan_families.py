"""`actome scan` on models of several families, saved to disk with a tokenizer, as a user would have them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from actome.cli.main import main
from actome.tasks.demo import demo_module

WORDS = {"vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = WORDS | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS = {
    "GPT2LMHeadModel": transformers.GPT2Config(**WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "GPTNeoXForCausalLM": transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=128),
    "Qwen3ForCausalLM": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "Gemma2ForCausalLM": transformers.Gemma2Config(**GROUPED, head_dim=8),
    "MixtralForCausalLM": transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "MambaForCausalLM": transformers.MambaConfig(**WORDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "BertForMaskedLM": transformers.BertConfig(**SIZES, max_position_embeddings=128),
    "FalconForCausalLM": transformers.FalconConfig(
        **WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_scan_of_a_saved_model(kind, tmp_path, capsys):
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    getattr(transformers, kind)(CONFIGS[kind]).eval().save_pretrained(tmp_path / "model")
    demo_module()[1].save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The value of the expression is bound to the name. " * 40, encoding="utf-8")
    report, page = tmp_path / "scan.json", tmp_path / "scan.html"
    code = main(
        ["scan", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--tokens", "500"]
        + ["--json", str(report), "--html", str(page), "--quiet"]
    )
    assert code == 0
    found = json.loads(report.read_text())
    assert found["model"]["layers"] == 2
    measures = {row["measure"] for row in found["rows"]}
    assert {"rms", "movement", "effective_rank"} <= measures
    assert ("loss" in measures) == (kind != "BertForMaskedLM")
    assert ("sink" in measures) == (kind != "MambaForCausalLM")
    assert not [f for f in found["findings"] if f["severity"] == "critical"]
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_a_model_that_gives_nan_is_a_finding_and_not_a_crash(tmp_path):
    module = transformers.GPT2LMHeadModel(CONFIGS["GPT2LMHeadModel"]).eval()
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.bias[3] = float("nan")
    module.save_pretrained(tmp_path / "model")
    demo_module()[1].save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The value of the expression. " * 20, encoding="utf-8")
    command = ["scan", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--quiet"]
    assert main([*command, "--json", str(tmp_path / "scan.json")]) == 0
    findings = json.loads((tmp_path / "scan.json").read_text())["findings"]
    found = [f for f in findings if f["id"] == "non-finite"]
    assert found
    assert all(f["severity"] == "critical" for f in found)
    assert main([*command, "--fail-on", "non-finite"]) == 3
