"""What a first user of watching, alarms, phases and forecasts does wrong: said in words, and never by accident."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from watch_loop import PROBE, opened, subject, trained

import actome as ac
from actome import dynamics as dyn
from actome.core.errors import ActomeError, MeasureError, RunError, TextError
from actome.dynamics.alarms import Alarms
from actome.tasks.nets import MLP

STEPS = np.arange(0, 300, 10)
GROWING = pd.DataFrame(
    {"step": STEPS, "measure": "attention_logit_max", "site": "blocks.0.attn.scores", "value": 5 * np.exp(STEPS / 40)}
)
D = 200.0 * 2 ** np.arange(10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": "3%"}, "budget='3%': the share"),
        ({"every": "10"}, "every='10': 'auto', or a number"),
        ({"steps": "100"}, "steps='100': how many steps the run will have"),
        ({"steps": -3}, "steps=-3"),
        ({"start": -4}, "start=-4: how many steps"),
        ({"start": "4"}, "start='4'"),
        ({"resume": "3"}, "resume='3': True, False, or the step"),
        ({"resume": -3}, "resume=-3"),
        ({"panel": None, "text": None, "losses": {"seen": PROBE}}, "panel=None takes none: give a panel"),
        ({"losses": [PROBE]}, "losses= are texts by name"),
        ({"actions": {"critical": "stop"}}, "an action is Stop.*not 'stop'"),
        ({"alarms": ["loss_spike"]}, "a detector is an object .*not 'loss_spike'"),
        ({"alarms": False, "actions": {"critical": print}}, "alarms=False has none raised"),
        ({"alarms": Alarms(), "actions": {"critical": print}}, r"give them to it, Alarms\(actions"),
    ],
)
def test_an_option_that_makes_no_sense_is_told_and_leaves_no_run(tmp_path, options, match):
    with pytest.raises(MeasureError, match=match):
        ac.watch(subject(), **{"text": PROBE, "run": tmp_path / "a"} | options)
    assert not (tmp_path / "a").exists()


def test_a_watch_outside_its_block_says_so(tmp_path):
    module = subject()
    watch = ac.watch(module, text=PROBE, run=tmp_path / "a", every=2)
    assert watch.error is None
    for name, call in (("log", lambda: watch.log({"a": 1.0})), ("event", lambda: watch.event("a"))):
        with pytest.raises(RunError, match=rf"watch\.{name} was called before"):
            call()
    with watch:
        trained(module, 2, watch)
        with pytest.raises(RunError, match=r"at=7\.5: the number of a step is a whole one"):
            watch.step(1.0, at=7.5)
    for name, call in (("log", lambda: watch.log({"a": 1.0})), ("event", lambda: watch.event("a"))):
        with pytest.raises(RunError, match=rf"watch\.{name} was called after"):
            call()
    assert opened(watch).status == "finished"
    with pytest.raises(RunError, match=r"holds a run already: resume=True.*store=\{'overwrite': True\}"):
        ac.watch(module, text=PROBE, run=tmp_path / "a").begin()


@pytest.mark.parametrize("text", ["", [""]])
def test_an_empty_probe_text_is_told(tmp_path, text):
    with pytest.raises(TextError):
        ac.watch(ac.demo(), text=text, run=tmp_path / "a").begin()


def test_a_probe_that_the_network_cannot_read(tmp_path):
    with pytest.raises(TextError, match=r"token id \d+ is not among the 24"):
        ac.watch(subject(), text=PROBE + 24, run=tmp_path / "a").begin()
    too_long = torch.zeros(2, 40, dtype=torch.long)
    with pytest.raises(MeasureError, match=r"cannot read the probe .*token ids below its vocabulary"):
        ac.watch(subject(), text=too_long, run=tmp_path / "b").begin()


def test_a_replay_that_can_find_nothing_says_so(tmp_path):
    assert Alarms().replay(GROWING)
    with pytest.raises(MeasureError, match=r"no detector looks at any .*my_score.*they look at .*loss"):
        Alarms().replay(GROWING.assign(measure="my_score"))
    with pytest.raises(MeasureError, match=r"RunStore\.open"):
        Alarms().replay(tmp_path)
    assert Alarms().replay(GROWING.iloc[:0]) == []
    for column, value in (("step", np.nan), ("step", "x"), ("value", "x")):
        with pytest.raises(MeasureError, match=f"the column '{column}' holds something that is no number"):
            Alarms().replay(GROWING.assign(**{column: value}))


def test_a_trace_is_replayed_like_its_frame():
    told = [[alarm.message for alarm in Alarms().replay(one)] for one in (GROWING, dyn.Trace(GROWING))]
    assert told[0] == told[1] != []


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (([0, 1, 2, 4, 8, 16],), "without ranks"),
        (("demo",), "phases are of a Trace"),
        ((GROWING, [1.0] * 30), "DataFrame is neither"),
        ((np.arange(12), np.ones((12, 2))), r"ranks \(12, 2\)"),
        (([np.nan, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]), "must be finite and rise"),
        (([0, 1, 2, 3, 4, np.inf], [1, 2, 3, 4, 5, 6]), "must be finite and rise"),
    ],
)
def test_phases_of_something_else(args, match):
    with pytest.raises(MeasureError, match=match):
        dyn.geometry_phases(*args)


@pytest.mark.parametrize("given", [None, "demo", np.ones(30)])
def test_emergence_of_something_else(given):
    with pytest.raises(MeasureError, match="a Trace, or a frame with the columns step and value"):
        dyn.fit_emergence(given)


@pytest.mark.parametrize(
    ("curves", "options", "match"),
    [
        ({"a": 5}, {}, r"'a' is not \(sizes, losses\)"),
        ({"a": (D, 9 / D, 9 / D)}, {}, r"'a' is not \(sizes, losses\)"),
        ({"a": (D, ["x"] * 10)}, {}, r"'a' is not \(sizes, losses\)"),
        ([(D, 9 / D)], {}, r"give curves=\{name: \(sizes, losses\)\}"),
        ({"a": (D, 9 / D)}, {"target": "1e7"}, "target='1e7': give the size"),
        ({"a": (D, 9 / D)}, {"k": 3.5}, "k=3.5.*whole number"),
    ],
)
def test_models_that_cannot_be_ranked(curves, options, match):
    with pytest.raises(MeasureError, match=match):
        dyn.accept_then_stop(curves, **{"target": 1e7} | options)


def test_labels_and_votes_that_are_no_classes():
    with pytest.raises(MeasureError, match=r"whole numbers of classes; 0\.5 is none"):
        dyn.RunVariance.from_calibration(np.full((4, 2), 0.5), [0.5, 1, 1, 0])
    for votes in ([[0.5, 1]], [[]], [[3]]):
        with pytest.raises(MeasureError, match="classes from 0 to 2"):
            dyn.vote_shares(votes, 3)
    half = torch.full((4, 2), 0.5)
    labels = [0, 1, 1, 0]
    assert dyn.RunVariance.from_calibration(half.bfloat16(), labels) == dyn.RunVariance.from_calibration(half, labels)


def test_facts_that_are_no_token_ids():
    fact = dyn.Fact(torch.tensor([0, 1]), torch.tensor([9]), "a", other=torch.tensor([8]))
    prefixes = {"a": torch.tensor([[0, 1, 3]]), "b": torch.tensor([[0, 5, 6]])}
    for samples, given, match in [
        (fact, prefixes, "one Fact by itself was given; want a list"),
        ([dataclasses.replace(fact, context=[0, 1])], prefixes, "context is a tensor of token ids .*not list"),
        ([dataclasses.replace(fact, other=torch.tensor([0.5]))], prefixes, "other is a tensor of token ids"),
        ([fact], {"a": torch.tensor([0, 1, 3]), "b": torch.tensor([0, 5, 6])}, "theme 'a': each is a tensor"),
        ([fact], {"a": ["x"], "b": ["y"]}, "theme 'a': each is a tensor of token ids .*not str"),
    ]:
        with pytest.raises(ActomeError, match=match):
            dyn.priming(subject(), samples, given, steps=1)
    with pytest.raises(MeasureError, match=r"step 1 has nothing to train on: batches\(1\) gave no row"):
        dyn.priming(subject(), [fact], prefixes, steps=2, every=2, batches=lambda step: [])


def test_curves_and_bounds_that_are_no_numbers():
    curve = 0.9 - 0.7 * np.arange(1.0, 16) ** -0.8
    with pytest.raises(MeasureError, match=r"a curve is \(points\) numbers, not list"):
        dyn.extrapolate_curve(["a", "b"], 5)
    for bounds in (1.0, (0, 1, 2)):
        with pytest.raises(MeasureError, match=r"want two numbers, \(lowest, highest\)"):
            dyn.extrapolate_curve(curve, 5, bounds=bounds)
    assert set(dyn.score_extrapolations([curve], 5, methods="last")["method"]) == {"last"}


def test_a_network_that_was_lost_has_no_regime():
    before, after = MLP([4, 8, 2]), MLP([4, 8, 2])
    with torch.no_grad():
        next(after.parameters()).fill_(torch.nan)
    with pytest.raises(MeasureError, match="weights of one of the two networks are not finite"):
        dyn.regime(before, after, torch.randn(8, 4), "module:act.0", kernel=False)


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(RunError, match=r"is a file; a run is a folder with run\.sqlite in it"):
        dyn.RunStore.open(tmp_path / "a.txt")


def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_folder_above(tmp_path):
    words = ac.demo().tokenizer
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=8, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    for step in (10, 20):
        torch.manual_seed(step)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / f"checkpoint-{step}")
    assert ac.load(tmp_path / "checkpoint-10").tokenizer is None
    text = ["the value of x is returned. " * 40]
    with pytest.raises(TextError, match="text needs a tokenizer"):
        ac.trace(tmp_path, text=text, repeats=0)
    words.save_pretrained(tmp_path)
    assert ac.trace(tmp_path, text=text, repeats=0).steps == [10, 20]
