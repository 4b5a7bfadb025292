"""What somebody new to steering gets wrong, and what they are told."""

import json

import numpy as np
import pytest
import torch
import transformers

import actome as ac
from actome.cli.main import main
from actome.core.errors import MeasureError, TextError
from actome.shift import ConceptShift, coarse
from actome.steer import (
    SPLIT,
    Asked,
    Contrast,
    Examples,
    Pairs,
    RankOneDAS,
    attempts,
    cosines,
    evaluate,
    interference,
    preference_utility,
    resistance,
    select_layer,
    steerability,
)

CODE = ["import os", "def f(x):", "return x", "for i in y:", "class A:", "x = [1]", "if x:", "print(x)"]
PROSE = ["The cat", "It is a", "When the", "This value", "An object", "You can", "See the", "There is"]
SITE = "blocks.1.resid.post"
NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return ac.demo()


@pytest.fixture(scope="module")
def clamp(model):
    return Contrast("blocks.{1..2}.resid.post").fit(model, Examples(CODE, PROSE))


@pytest.fixture(scope="module")
def pairs():
    return Pairs(PROSE, [" self"] * 8, [" the"] * 8)


@pytest.fixture(scope="module")
def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    return ac.wrap(transformers.GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strengths": 1}, "give a list of finite numbers"),
        ({"strengths": "1,2"}, "give a list of finite numbers"),
        ({"random": 1.5}, "whole numbers of draws"),
        ({"task": "accuracy"}, "task= takes Choices, or a function"),
    ],
)
def test_evaluate_says_what_an_option_takes(model, clamp, pairs, options, told):
    with pytest.raises(MeasureError, match=told):
        evaluate(model, clamp, pairs, **options)


def test_evaluate_takes_one_placing_and_a_pattern_of_sites(model, clamp, pairs):
    found = evaluate(
        model, clamp, pairs, strengths=(1,), random=0, new_tokens=0, positions="last", sites="blocks.{1..2}.resid.post"
    )
    assert set(found.frame["positions"]) == {"last"}
    assert set(found.frame["site"]) == {"blocks.1.resid.post", "blocks.2.resid.post"}


def test_a_clamp_that_is_not_finite_is_named_as_the_cause(model, pairs):
    found = evaluate(model, ac.Add(SITE, torch.full((112,), NAN)), pairs, strengths=(1,), random=0, new_tokens=0)
    assert found.strength is None
    assert "value and scale are finite" in found.why


@pytest.mark.parametrize("bad", [None, 3, [None]])
def test_what_is_no_clamp_is_named(model, clamp, pairs, bad):
    with pytest.raises(MeasureError, match="give a clamp such as Add"):
        evaluate(model, bad, pairs)
    with pytest.raises(MeasureError, match="give a clamp such as Add"):
        interference(model, {"a": bad, "b": clamp}, {"a": pairs})


def test_what_is_no_pairs_is_named(model, clamp):
    two = {"a": clamp, "b": clamp.to(SITE)}
    for call in (
        lambda: evaluate(model, clamp, [("a", "b", "c")] * 8),
        lambda: interference(model, two, {"a": "x"}),
        lambda: select_layer(model, clamp, "x"),
        lambda: SPLIT("blocks.1.mlp.out").fit(model, "x"),
        lambda: preference_utility(model, clamp, None),
    ):
        with pytest.raises(MeasureError, match="give Pairs"):
            call()


def test_clamps_without_names(model, clamp, pairs):
    with pytest.raises(MeasureError, match="by name"):
        interference(model, [clamp, clamp], [pairs, pairs])
    with pytest.raises(MeasureError, match="by name"):
        cosines([clamp, clamp])


def test_strengths_are_finite_numbers_everywhere(model, clamp, pairs):
    for bad in ([NAN], "x", 1.0, [], [None]):
        with pytest.raises(MeasureError, match="finite numbers"):
            preference_utility(model, clamp, pairs, bad)
        with pytest.raises(MeasureError, match="finite numbers"):
            select_layer(model, clamp, pairs, strengths=bad)
    assert len(preference_utility(model, clamp, pairs, np.array([0, 1], dtype=np.float32))) == 2
    assert len(preference_utility(model, clamp, pairs, torch.tensor([0.0, 1.0]))) == 2


def test_examples_are_lists():
    for bad in (None, "code"):
        with pytest.raises(MeasureError, match="give the positive examples as a list"):
            Examples(bad, PROSE)


def test_a_direction_of_another_model(gpt2, clamp):
    with pytest.raises(MeasureError, match=r"112 wide, and blocks\.1\.resid\.post of .* 16"):
        clamp.to(SITE).monitor(gpt2, torch.ones(2, 3, dtype=torch.long))


def test_labels_that_are_no_token(model):
    ids = torch.randint(3, 2000, (2, 8, 4), generator=torch.Generator().manual_seed(0))
    for wrong in (2000, -1):
        labels = torch.full((8,), wrong)
        with pytest.raises(TextError, match=f"label {wrong} is not among the 2,000"):
            RankOneDAS(SITE).fit(model, *ids, labels, intents=["a", "b"] * 4)


def test_answers_and_lengths_of_steerability(model, clamp):
    paths = torch.tensor([[5, 6, 7]])
    for norm in (NAN, 0.0, -1.0, float("inf")):
        with pytest.raises(MeasureError, match="a length above zero"):
            steerability(model, paths, SITE, clamp.value, Asked([5], [5, 6]), norm=norm)
    for answers in ([], [5]):
        with pytest.raises(MeasureError, match="two outcomes at least"):
            Asked([5], answers)
    with pytest.raises(MeasureError, match="ids from 0 to 1999"):
        steerability(model, paths, SITE, clamp.value, Asked([5], [5, 2000]), norm=1.0)


def test_marks_are_a_list(model):
    for bad in ("no", [""]):
        with pytest.raises(MeasureError, match="give a list of texts"):
            attempts("now and then", marks=bad)
    push = ac.Add(SITE, torch.ones(112))
    with pytest.raises(MeasureError, match="give a list of texts"):
        resistance(model, push, lambda prompt, attempt: 1.0, prompts=PROSE, marks="no")
    with pytest.raises(MeasureError, match="give a list of prompts"):
        resistance(model, push, lambda prompt, attempt: 1.0, prompts="eight letters", marks=["no"])


def test_states_of_a_shift():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    plain, arrays = ConceptShift(k=2, top=5).fit(x, x + 1), ConceptShift(k=2, top=5).fit(x.numpy(), x.numpy() + 1)
    assert torch.equal(plain.shifts_, arrays.shifts_)
    with pytest.raises(MeasureError, match="as tensors"):
        ConceptShift(k=2).fit("x", "y")
    with pytest.raises(MeasureError, match=r"k=2\.5"):
        ConceptShift(k=2.5).fit(x, x)
    with pytest.raises(MeasureError, match="not finite"):
        coarse(SITE, x * NAN, torch.arange(60) % 2 == 0)


def test_more_tokens_than_learned_positions(gpt2, model):
    ids = torch.ones(1, 13, dtype=torch.long)
    for call in (lambda: gpt2.logits(ids), lambda: gpt2.logits([[1] * 13]), lambda: gpt2.generate(ids[:, :4], 10)):
        with pytest.raises(TextError, match="13 tokens are more than the 12 that"):
            call()
    assert gpt2.generate(ids[:, :4], 9, eos_token_id=None).ids.shape == (1, 13)
    # Rotary positions have no table that ends.
    assert model.logits(torch.ones(1, model.context + 1, dtype=torch.long)).shape[1] == model.context + 1


@pytest.fixture
def files(tmp_path):
    (tmp_path / "code.txt").write_text("\n".join(CODE))
    (tmp_path / "prose.txt").write_text("\n".join(PROSE))
    return tmp_path


def test_a_checkpoint_does_not_replace_the_model(files, capsys):
    ac.demo().module.save_pretrained(files / "model")
    before = (files / "model" / "model.safetensors").read_bytes()
    words = ["steer", "export", str(files / "model"), "--clamp", str(files / "clamp"), "--checkpoint"]
    assert main([*words, f"{files}/other/../model"]) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert (files / "model" / "model.safetensors").read_bytes() == before


def test_bad_words_on_the_command_line(files, capsys):
    fit = ["steer", "fit", "demo", "--positive", str(files / "code.txt"), "--negative", str(files / "prosa.txt")]
    assert main([*fit, "--out", str(files / "clamp")]) == 2
    assert "nearest: prose.txt" in capsys.readouterr().err
    assert main(["steer", "apply", "demo", "--clamp", "x", "--prompt", "a", "--scale", "nan"]) == 2
    assert "'nan' is not a finite number" in capsys.readouterr().err
    assert main(["serve", "demo", "--port", "99999"]) == 2
    assert "ports are 1 to 65535" in capsys.readouterr().err
    assert main(["serve", "demo", "--clamp", "=x"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_refused_by_the_server(model):
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from actome.steer.serving import Limits, make_app

    with TestClient(make_app(model, {}, limits=Limits(prompt=10**6))) as client:
        body = json.dumps({"model": model.name, "prompt": "\ud800"})
        answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert "surrogate" in answer.json()["error"]["message"]
        # A limit beyond the model's context is the context's.
        long = {"model": model.name, "prompt": [5] * 400}
        answer = client.post("/v1/completions", json=long)
        assert answer.status_code == 400
        assert f"at most {model.context - 1}" in answer.json()["error"]["message"]
