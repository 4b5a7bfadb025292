"""What a first user does wrong, or does at the edge: said in words, or counted as nothing, and never by accident."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
import transformers
from measured import SUBJECTS, assert_same, generator, ids
from torch import nn

import actome as ac
from actome.cli.common import UsageError, make_room
from actome.core.errors import MeasureError, TextError
from actome.measures import (
    CETT,
    PANELS,
    ActivationCode,
    ActivationScale,
    CentreAgreement,
    DeadUnits,
    EigenScore,
    FeatureInformation,
    FeatureVariance,
    HypersphericalEnergy,
    LinearCKA,
    MassiveActivations,
    MutualInformation,
    NeuralCollapse,
    OutlierChannels,
    PosteriorCollapse,
    RepetitionFrequency,
    ResidualPeak,
    SetVariability,
    SinkScore,
    Sparsity,
    Spectrum,
    Spikes,
    UnitFrequency,
    ValueDrain,
    Voids,
    compare,
    layer_criticality,
    ppl_sparsity,
    screen,
    similarity,
)
from actome.report.plain import write
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.backcopy import Backcopy
from actome.tasks.training import TrainingError

B, T = 3, 8
STREAM = "blocks.1.resid.post"


# -- measures in a loop of one's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_a_batch_of_nothing_changes_nothing(name: str) -> None:
    subject = SUBJECTS[name]
    x, tokens = subject.inputs(generator(1), B, T), ids(generator(2), B, T)
    alone, between = subject.make(), subject.make()
    alone.update(x, None, tokens)
    between.update(x.narrow(subject.batch_dim, 0, 0), None, tokens[:0])
    between.update(x, None, tokens)
    between.update(x.narrow(subject.batch_dim, 0, 0), torch.ones(0, T, dtype=torch.bool), tokens[:0])
    assert_same(between.compute(), alone.compute())


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_what_is_no_tensor_or_elsewhere_is_named(name: str) -> None:
    subject = SUBJECTS[name]
    x, tokens = subject.inputs(generator(1), B, T), ids(generator(2), B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    with pytest.raises(MeasureError, match="tensor"):
        subject.make().update(x.numpy(), None, tokens)
    for wrong in (mask.tolist(), mask.numpy(), mask.float(), mask[:, :-1], mask[..., None]):
        with pytest.raises(MeasureError, match="mask"):
            subject.make().update(x, wrong, tokens)
    with pytest.raises(MeasureError, match="on cpu and their mask on meta"):
        subject.make().update(x, mask.to("meta"), tokens)


def test_rows_of_another_width_are_refused() -> None:
    measure = HypersphericalEnergy(size=16)
    measure.update(torch.randn(2, 4, 6, generator=generator()))
    with pytest.raises(MeasureError, match="one measure for each shape"):
        measure.update(torch.randn(2, 4, 5, generator=generator()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SinkScore(baseline="mean"),  # type: ignore[arg-type]
        lambda: SinkScore(eps=-1),
        lambda: Sparsity(-1),
        lambda: DeadUnits(-1),
        lambda: UnitFrequency(0.0, 3),
        lambda: MassiveActivations(0),
        lambda: OutlierChannels(0),
        lambda: OutlierChannels(share=2),
        lambda: ResidualPeak(0),
        lambda: ValueDrain(0),
        lambda: Spikes(-1),
        lambda: Voids(-1),
        lambda: RepetitionFrequency(-1),
        lambda: Spectrum(max_width=0),
    ],
)
def test_options_without_a_meaning_are_refused(make) -> None:
    with pytest.raises(MeasureError, match="="):
        make()


# -- merging ---------------------------------------------------------------------------------------------------------

X = torch.randn(2, 8, 24, generator=generator(3))
F = torch.randn(30, 6, generator=generator(4))
Y = torch.randint(0, 3, (30,), generator=generator(5))
DOWN = torch.randn(6, 24, generator=generator(6))


@pytest.mark.parametrize(
    ("one", "other", "given", "option"),
    [
        (Sparsity(0.1), Sparsity(0.2), (X,), "near=0.1"),
        (CETT(DOWN, [1.0]), CETT(DOWN, [2.0]), (X,), "thresholds"),
        (Spectrum(max_width=20, seed=1), Spectrum(max_width=20, seed=2), (X,), "seed"),
        (EigenScore(1e-3), EigenScore(0.1), (F,), "alpha"),
        (ActivationCode(64), ActivationCode(128), (F,), "cap"),
        (SetVariability(0.1), SetVariability(0.2), (F,), "alike"),
        (SetVariability(), SetVariability().calibrate([F]), (F,), "knots"),
        (PosteriorCollapse((0.1, 0.2)), PosteriorCollapse(0.1), (F, F), "eps"),
        (NeuralCollapse(3), NeuralCollapse(4), (F, Y), "num_classes"),
        (CentreAgreement(F[:3]), CentreAgreement(F[3:6]), (F, Y, F[:, :3]), "means"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_other_options_do_not_merge(one, other, given, option: str) -> None:
    one, other = one.clone(), other.clone()
    one.update(*given)
    one.merge_state(other)  # it has seen nothing yet, so there is nothing to mix up
    other.update(*given)
    with pytest.raises(MeasureError, match=option):
        one.merge_state(other)


def test_other_kinds_do_not_merge() -> None:
    one, other = Sparsity(), ActivationScale()
    one.update(X), other.update(X)
    with pytest.raises(MeasureError, match="not with ActivationScale"):
        one.merge_state(other)


def test_limits_that_the_first_batch_fixed_are_taken_over() -> None:
    one, fresh = FeatureInformation(), FeatureInformation()
    one.update(F, F[:, 0])
    one.merge_state(FeatureInformation())
    fresh.merge_state(one)
    assert_same(fresh.compute(), one.compute())


# -- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "update",
    [
        lambda: NeuralCollapse(3).update(F, Y.tolist()),
        lambda: NeuralCollapse(3).update(F.numpy(), Y),
        lambda: FeatureVariance(3).update(F, Y.tolist()),
        lambda: FeatureInformation(num_classes=3).update(F, Y.tolist()),
        lambda: LinearCKA().update(F.numpy(), F),
        lambda: screen(F.numpy(), Y.numpy()),
        lambda: similarity(ac.demo(), "text"),  # type: ignore[arg-type]
    ],
)
def test_folds_say_that_they_take_tensors(update) -> None:
    with pytest.raises(MeasureError, match=r"tensor|features"):
        update()


def test_labels_and_outputs_in_the_wrong_order_are_told() -> None:
    with pytest.raises(MeasureError, match="outputs"):
        CentreAgreement(F[:3]).update(F, F[:, :3], Y)


def test_collapse_of_nothing_is_not_known() -> None:
    collapse = NeuralCollapse(3, weights=F[:3])
    collapse.update(F[:0], Y[:0])
    assert collapse.compute()["nc3"].isnan()


def test_mutual_information_says_where_its_edges_come_from() -> None:
    with pytest.raises(MeasureError, match="AdaptiveEdges first"):
        MutualInformation(num_classes=3)
    with pytest.raises(MeasureError, match="leave edges= out"):
        MutualInformation("fixed", num_classes=3, edges=torch.arange(4.0))


@pytest.mark.parametrize(
    ("batches", "folds", "said"),
    [
        ([torch.ones(4, 10, dtype=torch.long)], {STREAM: NeuralCollapse(3)}, r"a batch is \(inputs, labels"),
        ([(torch.ones(4, 10, dtype=torch.long), Y[:4])], {STREAM: NeuralCollapse}, "no fold"),
        ([(torch.ones(4, 10, dtype=torch.long), Y[:4])], {STREAM: Sparsity()}, "model.measure"),
        ([(torch.ones(4, 10, dtype=torch.long), Y[:4])], {}, "nothing to fold"),
    ],
)
def test_fold_says_what_it_takes(batches, folds, said: str) -> None:
    with pytest.raises(MeasureError, match=said):
        ac.demo().fold(batches, folds, pool="mean")


# -- a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        ("health", r"PANELS\['health'\]"),
        ([Sparsity()], "pattern"),
        ({STREAM: NeuralCollapse(3)}, "model.fold"),
        ({STREAM: "sparsity"}, "no measure"),
    ],
)
def test_measure_says_what_it_takes(measures, said: str) -> None:
    with pytest.raises(MeasureError, match=said):
        ac.demo().measure("The value", measures)


def test_an_iterator_that_was_read_is_told() -> None:
    with pytest.raises(MeasureError, match="no batch"):
        ac.demo().measure(iter([]), {STREAM: Sparsity()})


def test_ids_of_no_tokens_are_told() -> None:
    with pytest.raises(TextError, match="one token at least"):
        ac.demo().measure(torch.zeros(0, 4, dtype=torch.long), {STREAM: Sparsity()})


class _Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.left_out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_modules_that_no_forward_calls_are_skipped_by_a_panel_and_an_error_by_name() -> None:
    model, x = ac.wrap(_Skips()), torch.randn(5, 4, generator=generator())
    table = model.measure(x, PANELS["sparsity"])
    assert set(table.frame.site) == {"module:used"}
    assert any("did not reach module:left_out" in said for said in table.skipped)
    with pytest.raises(MeasureError, match="did not reach module:left_out"):
        model.measure(x, {"module:left_out": Sparsity()})


def test_panels_on_a_sparse_model_without_dense_mlps() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    table = ac.wrap(transformers.MixtralForCausalLM(config)).measure(torch.arange(20)[None], PANELS["sparsity"])
    assert len(table.frame)
    assert any("did not reach" in said for said in table.skipped)


def _subject(**options) -> Subject:
    return Subject.fresh(
        SubjectConfig(**{"vocab": 16, "d_model": 16, "layers": 1, "heads": 2, "context": 16} | options), 0
    )


def test_panels_on_one_layer_of_experts() -> None:
    table = ac.wrap(_subject(experts=4)).measure(torch.arange(8)[None], PANELS["experts"])
    assert any("only blocks.0.moe.weights" in said for said in table.skipped)
    assert {"blocks.0.moe.weights", "blocks.0.moe.router"} <= set(table.frame.site)


def test_panels_on_continuous_inputs_leave_out_what_needs_ids() -> None:
    model, x = ac.wrap(_subject(d_in=5)), torch.randn(2, 7, 5, generator=generator())
    table = model.measure(x, PANELS["health"])
    assert any("needs token ids" in said for said in table.skipped)
    assert "loss" not in set(table.frame.measure)


def test_models_of_other_vocabularies_are_told_apart() -> None:
    with pytest.raises(MeasureError, match="ids that both can read"):
        compare(ac.demo(), ac.wrap(_subject()), "The value of the expression", STREAM, "blocks.0.resid.post")


def test_too_little_text_for_a_loss() -> None:
    one = torch.tensor([[5]])
    with pytest.raises(MeasureError, match="a token with one before it"):
        ppl_sparsity(ac.demo(), one, one.clone())


def test_no_modules_have_no_criticality() -> None:
    with pytest.raises(MeasureError, match="modules is empty"):
        layer_criticality(nn.Linear(6, 3), F, [])


# -- subjects and their training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 4},
        {"rope_theta": 1.0, "head": 4},
        {"init": -1.0},
        {"init": float("nan")},
        {"d_model": 16.0},
        {"experts": -1},
    ],
)
def test_configurations_that_make_no_sense(options) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]}="):
        _subject(**options)


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        (torch.zeros(8, 4, dtype=torch.long), {"batch_size": 0}, "batch_size=0"),
        (torch.zeros(8, 4, dtype=torch.long), {"batch_size": 4, "steps": -1}, "steps=-1"),
        (None, {}, "not NoneType"),
        (torch.zeros(8, 4, dtype=torch.long), {"batch_size": 4, "loss": lambda m, x: 3.0}, "not float"),
        (torch.zeros(8, 4, dtype=torch.long), {"batch_size": 4, "loss": lambda m, x: m(x).logits}, "one number"),
    ],
)
def test_training_says_what_it_takes(batches, options, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        train(_subject(), batches, **{"steps": 2} | options)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: Backcopy(trigger_share=-1.0),
        lambda: Backcopy(concentration=0.0),
        lambda: Backcopy().sample(-1, 10, 0),
        lambda: Backcopy().sample(10, 1, 0),
    ],
)
def test_worlds_without_a_meaning(draw) -> None:
    with pytest.raises(ValueError, match=r"no probability|above zero|too small"):
        draw()


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of Unix")
def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As root, a file put in the place of /dev/null would break the machine."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "content")
    reader.join(10)
    assert read == ["content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_page_does_not_go_to_a_file_named_like_an_option() -> None:
    with pytest.raises(UsageError, match="only --json"):
        make_room("-")


def test_too_little_text_for_a_rise_of_perplexity_is_refused_with_how_much_is_needed():
    with pytest.raises(MeasureError, match="at least 64"):
        ppl_sparsity(ac.demo(), "The value of the expression is", "It is what it is")


def test_models_of_other_vocabularies_are_not_compared_on_text():
    class Other:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def get_vocab(self):
            return {"another": 0}

    a, b = ac.demo(), ac.demo(0)
    assert len(compare(a, b, "The value of the expression is an integer.", "blocks.0.resid.post")) == 1
    b.tokenizer = Other(b.tokenizer)
    with pytest.raises(MeasureError, match="other vocabularies"):
        compare(a, b, "The value of the expression is an integer.", "blocks.0.resid.post")
    ids = torch.randint(0, 2000, (2, 20))
    assert len(compare(a, b, ids, "blocks.0.resid.post")) == 1
