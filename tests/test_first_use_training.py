"""What a first user of watching, alarms, phases and forecasts does wrong: said in words, and never by accident."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from watch_loop import PROBE, opened, subject, trained

import actome as ac
from actome import dynamics as dyn
from actome.core.errors import ActomeError, MeasureError, RunError, TextError
from actome.dynamics.alarms import Alarms

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
    for name, call in (("log", lambda: watch.log({"a": 1.0})), ("event", lambda: watch.event("a"))):
        with pytest.raises(RunError, match=rf"watch\.{name} was called after"):
            call()
    assert opened(watch).status == "finished"


@pytest.mark.parametrize("text", ["", [""]])
def test_an_empty_probe_text_is_told(tmp_path, text):
    with pytest.raises(TextError):
        ac.watch(ac.demo(), text=text, run=tmp_path / "a").begin()


def test_a_replay_that_can_find_nothing_says_so(tmp_path):
    assert Alarms().replay(GROWING)
    with pytest.raises(MeasureError, match=r"no detector looks at any .*train_loss.*they look at .*loss"):
        Alarms().replay(GROWING.assign(measure="train_loss"))
    with pytest.raises(MeasureError, match=r"RunStore\.open"):
        Alarms().replay(tmp_path)
    assert Alarms().replay(GROWING.iloc[:0]) == []


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
