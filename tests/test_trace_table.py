"""The table that a trace is: curves, dates of planted changes, fits of planted laws, saving, and runs as traces."""

import math

import numpy as np
import pandas as pd
import pytest

import actome as ac
from actome import dynamics as dyn
from actome.dynamics import Trace
from actome.dynamics.law_families import exp_log, exp_log_peak

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])


def rows(measure: str, values, site: str | None = None, head: int | None = None, steps=STEPS) -> pd.DataFrame:
    layer = int(site.split(".")[1]) if site else None
    place = {"site": site, "layer": layer, "head": head}
    return pd.DataFrame({"step": steps, **place, "measure": measure, "value": values})


@pytest.fixture
def trace() -> Trace:
    parts = [rows("loss", np.linspace(4, 1, 12))]
    parts += [rows("rms", (layer + 1) * np.arange(12.0), f"blocks.{layer}.resid.post") for layer in range(3)]
    parts += [rows("sink", np.full(12, 0.1 * head), "blocks.0.attn.pattern", head) for head in range(2)]
    return Trace(pd.concat(parts).sample(frac=1, random_state=0), {"source": "here", "panel": "mine"}, {7: "corrupt"})


def test_curves_by_place(trace):
    assert trace.steps == STEPS.tolist()
    assert set(trace.measures) == {"loss", "rms", "sink"}
    assert trace.curve("loss").iloc[[0, -1]].tolist() == [4, 1]
    assert trace.curve("rms", "blocks.1.resid.post").tolist() == (2 * np.arange(12.0)).tolist()
    assert trace.curve("sink", "blocks.0.attn.pattern", head=1).tolist() == [0.1] * 12
    assert trace.curve("rms", over="mean").tolist() == (2 * np.arange(12.0)).tolist()
    assert sorted(trace.curves("rms", "blocks.{0,2}.resid.post")) == ["blocks.0.resid.post", "blocks.2.resid.post"]
    assert "1 left out" in repr(trace)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"measure": "rmss"}, "no measure 'rmss'; nearest: rms"),
        ({"measure": "rms"}, "'rms' was measured at 3 places"),
        ({"measure": "rms", "site": "blocks.7.resid.post"}, "'rms': "),
        ({"measure": "sink", "head": 5}, "'sink' was not measured at head 5"),
        ({"measure": "rms", "over": "sum"}, "choose 'mean', 'max' or 'min'"),
    ],
)
def test_what_is_not_there(trace, asked, said):
    with pytest.raises(ac.MeasureError, match=said):
        trace.curve(**asked)


def test_saved_and_opened(trace, tmp_path):
    trace.save(tmp_path / "t")
    again = Trace.open(tmp_path / "t")
    order = ["measure", "site", "head", "step"]
    one, other = (each.frame.sort_values(order, ignore_index=True) for each in (again, trace))
    pd.testing.assert_frame_equal(one, other)
    assert (again.left_out, again.about["panel"]) == ({7: "corrupt"}, "mine")
    with pytest.raises(ac.RunError, match="holds a run already"):
        trace.save(tmp_path / "t")
    with pytest.raises(ac.MeasureError, match="lacks measure"):
        Trace(pd.DataFrame({"step": [1], "value": [2.0]}))


def test_a_watched_run_is_a_trace(tmp_path):
    with dyn.RunStore.create(tmp_path / "a") as run:
        for step in range(20):
            run.log(step, {"loss": 1 / (1 + step)})
            run.log(step, {"rms": float(step)}, site="blocks.0.resid.post", layer=0)
            run.log(step, {"act": 1.0}, site="blocks.0.mlp.act", layer=0, unit=3)
        going_on = Trace.from_run(run)
    found = Trace.open(tmp_path / "a")
    pd.testing.assert_frame_equal(found.frame, going_on.frame)
    assert found.measures == ["loss", "rms"]  # single units are left out
    assert found.curve("rms").tolist() == list(range(20))
    assert found.dates("loss").when("loss")["high"] == 1  # a half, of the way from 1 to 0.05
    with dyn.RunStore.create(tmp_path / "b") as run:
        run.log(0, {"loss": 5.0})
    dyn.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    both = dyn.RunStore.open(tmp_path / "both")
    with pytest.raises(ac.RunError, match="name one of them"):
        Trace.from_run(both)
    assert Trace.from_run(both, "b").curve("loss").tolist() == [5.0]


def test_dates_of_planted_changes():
    rng = np.random.default_rng(0)
    late = np.where(STEPS >= 128, 1.0, 0.0) + 0.01 * rng.standard_normal(12)
    back = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1.0])  # goes there, comes back, and then stays
    dip = np.concatenate([np.linspace(10, 2, 5), np.linspace(3, 9, 7)])
    found = Trace(pd.concat([
        rows("late", late), rows("back", back), rows("dip", dip), rows("noise", rng.permutation(np.arange(12.0) % 4)),
    ])).dates()  # fmt: skip
    when = found.when("late")
    assert (when["low"], when["high"]) == (64, 128)
    assert found.when("late")["p"] <= 0.05 < found.when("noise")["p"]
    assert (found.when("back")["low"], found.when("back")["high"]) == (1, 2)  # held for two checkpoints there already
    dip_row = found.when("dip")
    assert (dip_row["turn"], dip_row["turn_value"]) == (8, 2)
    assert math.isnan(found.when("late")["turn"])
    held = Trace(rows("back", back)).dates(hold=3).when("back")
    assert (held["low"], held["high"]) == (128, 256)
    with pytest.raises(ac.MeasureError, match="no curve has three steps"):
        Trace(rows("x", [1.0, 2.0], steps=[0, 1])).dates()
    with pytest.raises(ac.MeasureError, match="share=2"):
        Trace(rows("late", late)).dates(share=2)


def test_order_of_noise_is_called_noise_as_often_as_promised():
    rng = np.random.default_rng(1)
    noise = [rows("noise", rng.standard_normal(12), f"blocks.{i}.resid.post") for i in range(200)]
    p = Trace(pd.concat(noise)).dates().frame["p"]
    assert (p <= 0.05).mean() < 0.1  # 0.05 of 200, with three standard errors


def test_fits_have_goodness_bands_and_a_control():
    steps = np.arange(0, 3000, 100)
    truth = {"A": 6.0, "lam": 0.1, "gam": 3e-3, "t0": 1.0, "K": 4.0}
    rng = np.random.default_rng(0)
    peaked = exp_log(steps, *truth.values()) + 0.02 * rng.standard_normal(30)
    both = [rows("massive_ratio", peaked, "blocks.0.resid.post", steps=steps),
            rows("massive_ratio", np.full(30, 5.0), "blocks.1.resid.post", steps=steps)]  # fmt: skip
    found = dyn.fit_emergence(pd.concat(both), resamples=20, permutations=9, starts=12)
    (row,) = found.frame.to_dict("records")
    assert row["class"] == "early peak"
    assert row["r2"] > 0.99
    assert row["control"] < 0.5
    assert row["t_low"] <= exp_log_peak(0.1, 3e-3, 1.0) <= row["t_high"]
    assert row["rise"] == pytest.approx(peaked[-1] / peaked[0])
    assert "constant" in found.failed["blocks.1.resid.post"]
    low, high = found.band("blocks.0.resid.post", steps)
    clean = exp_log(steps, *truth.values())
    assert ((low <= clean) & (clean <= high)).mean() > 0.8
    with pytest.raises(ac.MeasureError, match=r"nearest: blocks\.0\.resid\.post"):
        found.band("blocks.0.resid.pots", steps)
    with pytest.raises(ac.MeasureError, match="needs 20 points"):
        dyn.fit_emergence(rows("massive_ratio", np.arange(12.0)))
    line = Trace(rows("norm", 2 + 3 * np.sqrt(STEPS + 1.0))).fit("norm", "sqrt", permutations=9)
    assert line.frame["r2"][0] > 0.9


def test_prediction_from_architecture_beats_the_mean_only_where_there_is_something_to_predict():
    rng = np.random.default_rng(0)
    archs = pd.DataFrame({"model": np.repeat([f"m{i}" for i in range(8)], 3), "relative_depth": [1 / 3, 2 / 3, 1] * 8})
    archs["d_model"] = np.repeat([32.0, 64, 128, 256] * 2, 3)
    params = pd.DataFrame({"K": archs["d_model"] * archs["relative_depth"], "noise": rng.standard_normal(24)})
    for kind, shuffles in (("forest", 1), ("trees", 1), ("linear", 9)):
        predictor = dyn.EmergencePredictor(kind, features=["relative_depth", "d_model"])
        scores = predictor.fit(archs, params, shuffles=shuffles).scores_
        assert scores["skill"]["K"] > 0.3 > scores["skill"]["noise"], kind
        assert scores["control"]["K"] < 0.15, kind
        assert predictor.importance_.loc["K"].gt(0).all()
        told = predictor.predict(archs)
        assert ((told["K_low"] <= params["K"]) & (params["K"] <= told["K_high"])).mean() > 0.8
    with pytest.raises(ac.MeasureError, match="needs four or more"):
        dyn.EmergencePredictor(features=["d_model"]).fit(archs[:6], params[:6])
    with pytest.raises(ac.MeasureError, match="lacking: relative_depth, layers"):
        dyn.EmergencePredictor().fit(archs[["model"]], params)
    with pytest.raises(ac.MeasureError, match="call fit first"):
        dyn.EmergencePredictor().predict(archs)
    params.loc[0, "K"] = math.inf
    with pytest.raises(ac.MeasureError, match="not finite: K"):
        dyn.EmergencePredictor(features=["d_model"]).fit(archs, params)


def test_phases_of_planted_turns():
    rng = np.random.default_rng(0)
    steps = np.concatenate([[0], np.geomspace(1, 1e4, 29).round()])
    steps = np.unique(steps)
    along = np.log(steps + 1)
    rank = np.interp(along, [0, 3, 6.5, along[-1]], [30, 10, 28, 18]) + 0.3 * rng.standard_normal(len(steps))
    found = dyn.geometry_phases(steps, rank, np.ones(len(steps)))
    assert found.names == ["warm-up collapse", "entropy-seeking", "compression-seeking"]
    for phase, at in zip(found.items[1:], (np.exp(3) - 1, np.exp(6.5) - 1), strict=True):
        assert phase.low / 1.5 <= at <= phase.high * 1.5
        assert phase.support > 0.8
    assert found.p <= 0.05
    assert found.r2 > 0.95 > found.control
    # A rise before the collapse that is smaller than a turn is no phase.
    nudged = rank + np.where(np.arange(len(steps)) == 2, 0.8, 0)
    assert dyn.geometry_phases(steps, nudged).names[:2] == ["warm-up collapse", "entropy-seeking"]
    # A rank that levels off while alpha goes on rising compresses too; without alpha it cannot be told.
    level = np.interp(along, [0, 3, 6.5, along[-1]], [30, 10, 28, 28])
    alpha = np.interp(along, [0, 6.5, along[-1]], [1, 1, 2])
    assert dyn.geometry_phases(steps, level, alpha).names[-1] == "compression-seeking"
    assert dyn.geometry_phases(steps, level).names[-1] == "entropy-seeking"
    assert dyn.geometry_phases(steps, np.full(len(steps), 5.0)).names == ["no movement"]
    for args, said in (
        ((steps[:4], rank[:4]), "six steps"), ((steps, rank[:-1]), "one of each a step"),
        ((steps[::-1], rank), "steps must be finite and rise"),
    ):  # fmt: skip
        with pytest.raises(ac.MeasureError, match=said):
            dyn.geometry_phases(*args)
