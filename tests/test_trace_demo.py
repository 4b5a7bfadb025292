"""The trace of the demo model against an analysis by brute force: plain transformers, plain hooks, numpy."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import actome as ac
from actome import dynamics as dyn
from actome.cli.main import main
from actome.dynamics.trace_inputs import repeats_for
from actome.tasks.corpus import documents
from actome.tasks.demo import demo_dir, demo_steps

LAYERS, HEADS = 4, 4


@pytest.fixture(scope="module")
def text():
    model = ac.demo(0)
    heldout = [(one.title, one.text) for one in documents("heldout")]
    return torch.cat([batch.ids for batch in ac.Text(heldout, model.tokenizer, context=128, limit=1024)])


@pytest.fixture(scope="module")
def found(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "demo"
    return ac.trace("demo", text=text, out=out), out


@pytest.fixture(scope="module")
def by_hand(text):
    """Loss, effective rank of each layer, and induction and previous-token scores of each head, at every step."""
    (repeats,) = torch.cat(repeats_for(ac.demo(0), 16, 0, 16).batches).split(16)
    out = {}
    for step in demo_steps():
        module = LlamaForCausalLM.from_pretrained(demo_dir(step), dtype=torch.float32, attn_implementation="eager")
        kept = {}
        hooks = [layer.register_forward_hook(keeping(kept, at)) for at, layer in enumerate(module.model.layers)]
        with torch.no_grad():
            logits = module(text).logits
            ranks = [rank_by_svd(kept[at].flatten(0, 1).double().numpy()) for at in range(LAYERS)]
            patterns = module(repeats, output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        scores = [scores_by_loops(pattern.numpy(), repeats.numpy()) for pattern in patterns]
        out[step] = {"loss": float(loss), "ranks": ranks, "scores": scores}
    return out


def keeping(kept: dict, at: int):
    return lambda module, inputs, out: kept.__setitem__(at, out[0] if isinstance(out, tuple) else out)


def rank_by_svd(x: np.ndarray) -> float:
    values = np.linalg.svd(x, compute_uv=False)
    share = values / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def scores_by_loops(pattern_BHQK: np.ndarray, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention to the successor of the last occurrence, and to the token before, of each head."""
    induction, previous = [], []
    for row, tokens in zip(pattern_BHQK, tokens_BT, strict=True):
        for query in range(1, len(tokens)):
            previous.append(row[:, query, query - 1])
            before = [key for key in range(query - 1) if tokens[key] == tokens[query]]
            if before:
                induction.append(row[:, query, before[-1] + 1])
    return np.mean(induction, 0), np.mean(previous, 0)


def halfway(steps: list[int], values: list[float]) -> tuple[int, int]:
    """The checkpoints between which a curve passes half of its way for good, by looking at each in turn."""
    half = (values[0] + values[-1]) / 2
    beyond = [(value - half) * (values[-1] - values[0]) >= 0 for value in values]
    last = max(i for i, far in enumerate(beyond) if not far)
    return steps[last], steps[last + 1]


def test_values_at_every_checkpoint(found, by_hand):
    trace, _ = found
    assert trace.steps == demo_steps()
    assert trace.curve("loss").tolist() == pytest.approx([one["loss"] for one in by_hand.values()], rel=1e-4)
    for layer in range(LAYERS):
        curve = trace.curve("effective_rank", f"blocks.{layer}.resid.post")
        assert curve.tolist() == pytest.approx([one["ranks"][layer] for one in by_hand.values()], rel=1e-2)
        for head in range(HEADS):
            for measure, at in (("induction", 0), ("previous_token", 1)):
                curve = trace.curve(measure, f"blocks.{layer}.attn.pattern", head=head)
                expected = [one["scores"][layer][at][head] for one in by_hand.values()]
                assert curve.tolist() == pytest.approx(expected, abs=1e-5), (measure, layer, head)


def test_dates_agree_with_brute_force(found, by_hand):
    trace, _ = found
    steps = demo_steps()
    dates = trace.dates(["loss", "induction", "previous_token"])
    wanted = {
        ("loss", "logits"): [one["loss"] for one in by_hand.values()],
        ("induction", "blocks.3.attn.pattern head 3"): [one["scores"][3][0][3] for one in by_hand.values()],
        ("previous_token", "blocks.2.attn.pattern head 2"): [one["scores"][2][1][2] for one in by_hand.values()],
    }
    for (measure, place), values in wanted.items():
        row = dates.when(measure, place)
        assert (row["low"], row["high"]) == halfway(steps, values), (measure, place)
        assert row["low"] <= row["at"] <= row["high"]
        assert row["p"] <= 0.05
    # The model card: copying sets in between steps 1024 and 2048, by head 3.3 and the previous-token head 2.2.
    row = dates.when("induction")
    assert (row["place"], row["low"], row["high"]) == ("blocks.3.attn.pattern head 3", 1024, 2048)
    assert dates.when("previous_token")["place"] == "blocks.2.attn.pattern head 2"


def test_phases_of_the_demo_model(found, by_hand):
    trace, _ = found
    phases = dyn.geometry_phases(trace)
    assert phases.names == ["warm-up collapse", "entropy-seeking"]
    least = min(by_hand, key=lambda step: by_hand[step]["ranks"][3])
    assert phases.items[1].low <= least <= phases.items[1].high
    assert phases.p <= 0.05


def test_the_command_shows_goes_on_and_writes(found, tmp_path, capsys, text):
    _, out = found
    page, data = tmp_path / "t.html", tmp_path / "t.json"
    assert main(["trace", str(out), "--html", str(page), "--json", str(data)]) == 0
    said = capsys.readouterr().out
    assert "induction       head 3.3" in said
    assert "between steps 1,024" in said.replace("\n", " ")
    assert "warm-up collapse" in said
    assert page.stat().st_size < 5_000_000
    read = json.loads(data.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in strict JSON"))
    assert read["steps"] == demo_steps()
    assert [one["name"] for one in read["phases"]] == ["warm-up collapse", "entropy-seeking"]
    assert {"step", "site", "layer", "measure", "value"} <= set(read["rows"][0])

    (tmp_path / "notes.txt").write_text("The value of the expression is returned. " * 20)
    words = ["trace", "demo", "--panel", "attention", "--text", str(tmp_path / "notes.txt"), "--steps", "0", "8192"]
    words += ["--tokens", "128", "--repeats", "4", "--out", str(tmp_path / "run"), "--json", "-"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(words) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
    assert main([*words[:3], "health", *words[4:]]) == 1
    assert "another panel" in capsys.readouterr().err
    for bad, said in ((["--panel", "geometri"], "nearest: geometry"), (["--text", "none.txt"], "is not there")):
        assert main(["trace", "demo", *bad]) == 2
        assert said in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "nowhere")]) == 1
    assert "not there" in capsys.readouterr().err
