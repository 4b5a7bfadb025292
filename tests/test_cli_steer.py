"""`actome steer` and `actome serve` on the command line."""

import json

import pytest
import transformers

import actome as ac
from actome.cli.main import main

CODE = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
PROSE = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "code.txt").write_text("\n".join(CODE))
    (tmp_path / "prose.txt").write_text("\n".join(PROSE))
    rows = [{"prompt": p, "wanted": " self", "unwanted": " the"} for p in PROSE]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def fit(files, *more):
    return main(["steer", "fit", "demo", "--positive", str(files / "code.txt"), "--negative", str(files / "prose.txt"),
                 "--sites", "blocks.{1..2}.resid.post", "--out", str(files / "clamp"), *more])  # fmt: skip


def test_from_examples_to_a_checkpoint(files, capsys):
    assert fit(files) == 0
    assert "chosen: blocks." in capsys.readouterr().out
    judged = ["steer", "eval", "demo", "--clamp", str(files / "clamp"), "--pairs", str(files / "pairs.jsonl")]
    assert main([*judged, "--strengths", "1,2", "--random", "1", "--json", str(files / "e.json")]) == 0
    assert "recommended:" in capsys.readouterr().out
    data = json.loads((files / "e.json").read_text())
    assert {row["arm"] for row in data["rows"]} == {"fitted", "random"}
    assert (
        main(["steer", "apply", "demo", "--clamp", str(files / "clamp"), "--prompt", "The", "--new-tokens", "4"]) == 0
    )
    assert "without:" in capsys.readouterr().out
    out = ["--gguf", str(files / "v.gguf"), "--checkpoint", str(files / "model")]
    assert main(["steer", "export", "demo", "--clamp", str(files / "clamp"), *out]) == 0
    loaded = ac.wrap(transformers.AutoModelForCausalLM.from_pretrained(files / "model").eval())
    demo = ac.demo()
    from actome.clamps import load_clamps

    ids = demo.tokenizer("def main(", return_tensors="pt")["input_ids"]
    with demo.clamp(*load_clamps(files / "clamp")):
        wanted = demo.logits(ids)
    assert float((loaded.logits(ids) - wanted).abs().max()) < 1e-3
    # The control vector is taken where a folder is.
    assert (
        main(["steer", "apply", "demo", "--clamp", str(files / "v.gguf"), "--prompt", "The", "--new-tokens", "2"]) == 0
    )


def test_a_judgement_with_everything(files, capsys):
    assert fit(files, "--quiet") == 0
    question = {"prompt": "def f(x):", "answers": [" return", " cat"], "right": 0}
    (files / "task.jsonl").write_text("\n".join([json.dumps(question)] * 3))
    judged = ["steer", "eval", "demo", "--clamp", str(files / "clamp"), "--pairs", str(files / "pairs.jsonl"),
              "--task", str(files / "task.jsonl"), "--text", str(files / "prose.txt"), "--sites",
              "blocks.{1..2}.resid.post", "--positions", "all,last", "--strengths", "1,30",
              "--random", "1"]  # fmt: skip
    shuffled = ["--positive", str(files / "code.txt"), "--negative", str(files / "prose.txt")]
    assert main([*judged, *shuffled, "--html", str(files / "page.html"), "--json", str(files / "e.json")]) == 0
    said = capsys.readouterr().out
    assert "comes apart: strength 30 at blocks.1.resid.post (all)" in said
    assert "actome steer" in (files / "page.html").read_text()
    data = json.loads((files / "e.json").read_text())
    places = {(row["site"], row["positions"], row["arm"]) for row in data["rows"]}
    assert len(places) == 2 * 2 * 3
    assert {row["measure"] for row in data["rows"]} >= {"preference", "utility", "nll", "accuracy", "repetition"}
    assert main([*judged, "--positive", str(files / "code.txt")]) == 2
    assert "both --positive and --negative" in capsys.readouterr().err
    assert main([*judged[:-6], "--positions", "everywhere"]) == 1
    assert "no placing 'everywhere'; choose all, prompt, last, response" in capsys.readouterr().err
    assert main([*judged[:7], "--sites", "embed"]) == 1
    assert "was not fitted at" in capsys.readouterr().err
    (files / "task.jsonl").write_text('{"prompt": "a", "answers": ["b"], "right": "b"}')
    assert main(judged) == 1
    assert "line 1: give answers, a list of texts" in capsys.readouterr().err


def test_a_condition_from_fit_to_apply(files, capsys):
    """Steered hard, and only where the prompt is code."""
    only = ["--only", str(files / "code.txt"), "--except", str(files / "prose.txt")]
    assert fit(files, *only, "--sites", "blocks.*.resid.post") == 0
    assert "only if: similarity" in capsys.readouterr().out
    (clamp,) = ac.clamps.load_clamps(files / "clamp")
    assert clamp.when.site < clamp.site
    demo = ac.demo()
    for texts, steered in ((CODE, True), (PROSE, False)):
        bare = [demo.logits(text) for text in texts]
        with demo.clamp(clamp.at(scale=5.0), strict=False):
            moved = [float((demo.logits(text) - x).abs().max()) for text, x in zip(texts, bare, strict=True)]
        assert sum((one > 0.1) == steered for one in moved) >= 7
    assert fit(files, "--only", str(files / "code.txt"), "--overwrite") == 2
    assert "both --only and --except" in capsys.readouterr().err
    assert fit(files, *only, "--sites", "blocks.0.resid.post", "--overwrite") == 1
    assert "no site of blocks.0.resid.post is reached before blocks.0.resid.post" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["split", "split-lora"])
def test_split_from_pairs_to_a_checkpoint(files, capsys, method):
    fitted = ["steer", "fit", "demo", "--method", method, "--pairs", str(files / "pairs.jsonl"), "--sites",
              "blocks.1.mlp.out", "--out", str(files / "clamp")]  # fmt: skip
    assert main(fitted) == 0
    assert "at blocks.1.mlp.out" in capsys.readouterr().out
    judged = ["steer", "eval", "demo", "--clamp", str(files / "clamp"), "--pairs", str(files / "pairs.jsonl")]
    assert main([*judged, "--strengths", "1", "--random", "0", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    bare, steered = (one["value"] for one in rows if one["measure"] == "preference")
    assert steered > bare + 1
    exported = ["steer", "export", "demo", "--clamp", str(files / "clamp"), "--checkpoint", str(files / "m")]
    assert main(exported) == 0
    assert main([*judged, "--positive", str(files / "code.txt"), "--negative", str(files / "prose.txt")]) == 1
    assert "no labels to shuffle" in capsys.readouterr().err
    assert main(fitted[:5]) == 2
    assert main(["steer", "fit", "demo", "--method", method, "--out", str(files / "x")]) == 2
    assert "is trained on --pairs" in capsys.readouterr().err
    assert main(["steer", "fit", "demo", "--out", str(files / "x")]) == 2
    assert "takes two sets of examples" in capsys.readouterr().err


def test_transport_from_fit_to_apply(files, capsys):
    assert fit(files, "--method", "transport-mean") == 0
    assert "fitted: Transport at blocks.1.resid.post, Transport at blocks.2.resid.post" in capsys.readouterr().out
    judged = ["steer", "eval", "demo", "--clamp", str(files / "clamp"), "--pairs", str(files / "pairs.jsonl"),
              "--strengths", "1", "--positive", str(files / "code.txt"), "--negative", str(files / "prose.txt"),
              "--json", "-"]  # fmt: skip
    assert main(judged) == 0
    data = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in data["rows"]} == {"fitted", "shuffled"}
    applied = ["steer", "apply", "demo", "--clamp", str(files / "clamp"), "--prompt", "The", "--new-tokens", "2"]
    assert main(applied) == 0
    assert main(["steer", "export", "demo", "--clamp", str(files / "clamp"), "--gguf", str(files / "v.gguf")]) == 1
    header = json.loads((files / "clamp" / "clamps.json").read_text())
    header["about"] = {}
    (files / "clamp" / "clamps.json").write_text(json.dumps(header))
    assert main(judged) == 1
    assert "does not say how it was fitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda f: (f / "code.txt").write_text("a\nb"), 1, "2 positive examples are too few"),
        (lambda f: (f / "code.txt").unlink(), 2, "there is no file"),
        (lambda f: (f / "code.txt").write_text(""), 1, "is empty"),
        (lambda f: (f / "clamp").write_text(""), 1, "is a file"),
    ],
)
def test_bad_examples(files, capsys, change, code, words):
    change(files)
    assert fit(files) == code
    assert words in capsys.readouterr().err


def test_bad_pairs_and_clamps(files, capsys):
    fit(files, "--quiet")
    judged = ["steer", "eval", "demo", "--clamp", str(files / "clamp"), "--pairs", str(files / "pairs.jsonl")]
    (files / "pairs.jsonl").write_text('{"prompt": "a", "wanted": "b"}\n')
    assert main(judged) == 1
    assert "line 1: give an object with the texts prompt, wanted, unwanted" in capsys.readouterr().err
    assert main([*judged, "--strengths", "x"]) == 2
    assert main(["steer", "export", "demo", "--clamp", str(files / "clamp")]) == 2
    assert "--gguf FILE" in capsys.readouterr().err
    assert main(["steer", "apply", "demo", "--clamp", str(files / "clam"), "--prompt", "a"]) == 1
    assert "nearest: clamp" in capsys.readouterr().err
    assert fit(files) == 1
    assert "overwrite=True replaces" in capsys.readouterr().err


def test_serving_says_what_is_wrong_before_it_begins(files, capsys):
    fit(files, "--quiet")
    folder = str(files / "clamp")
    assert main(["serve", "demo", "--clamp", folder, "--clamp", folder]) == 2
    assert "same name" in capsys.readouterr().err
    assert main(["serve", "demo", "--clamp", f"x={folder}x"]) == 1
    assert "no clamps in" in capsys.readouterr().err
