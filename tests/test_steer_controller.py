"""Controllers of strength: by hand, on examples not fitted on, end to end, in generation and on disk."""

import pytest
import torch

import actome as ac
from actome.clamps import load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError
from actome.steer import Contrast, Controlled, Examples, Pairs, WeightedController
from actome.steer.likelihood import response_nll
from actome.steer.serving.rows import Rows
from actome.tasks import Subject, SubjectConfig

READ, SITES = "blocks.0.resid.mid", ("blocks.0.resid.post", "blocks.1.resid.post")


def tokens(first, n, seed, length=5):
    out = torch.randint(5, 40, (n, length), generator=torch.Generator().manual_seed(seed))
    out[:, -1] = first
    return out


@pytest.fixture(scope="module")
def world():
    """A model, a direction, prompts that end in 1 (in need) and in 2."""
    model = ac.wrap(Subject.fresh(SubjectConfig(vocab=40, d_model=32, heads=2, layers=2, context=64), seed=1))
    direction = Contrast("blocks.*.resid.post").fit(model, Examples(tokens(3, 30, 0), tokens(4, 30, 1)))
    return model, direction, tokens(1, 40, 2), tokens(2, 40, 3)


@pytest.fixture(scope="module")
def fitted(world):
    model, direction, needed, others = world
    return WeightedController(READ, scale=2.0, epochs=60, lr=3e-3).fit(model, direction, needed, others, sites=SITES)


def strengths(model, clamp, ids):
    return clamp.strength(model.record(ids, READ)[READ][:, -1])


def test_it_steers_where_it_is_needed_on_prompts_not_seen(world, fitted):
    model = world[0]
    for clamp in fitted:
        high, low = (strengths(model, clamp, tokens(k, 50, 10 + k)) for k in (1, 2))
        assert float(high.min()) > 3 * float(low.max())
        assert 0.3 < float(high.mean() / 0.5) < 2  # layer weights stay near a half without a gradient of their own
    ids = torch.cat([tokens(1, 3, 20), tokens(2, 3, 20)])
    bare = model.logits(ids)
    with model.clamp(*fitted):
        moved = (model.logits(ids) - bare).abs().amax(-1)
    assert float(moved[:, :-1].max()) == 0.0  # only the newest token is pushed
    assert float(moved[:3, -1].min()) > 3 * float(moved[3:, -1].max())


def test_the_push_by_hand(world, fitted):
    model = world[0]
    ids = tokens(1, 2, 30)
    clamp = fitted[0]
    with model.clamp(clamp):
        got = model.record(ids, clamp.site)[clamp.site]
    bare = model.record(ids, clamp.site)[clamp.site]
    x = (model.record(ids, READ)[READ][:, -1] - clamp.centre) / clamp.spread
    out = torch.relu(x @ clamp.hidden_weight.T + clamp.hidden_bias) @ clamp.out_weight.T + clamp.out_bias
    push = 2.0 * out[:, :1].sigmoid() * out[:, 1:2].sigmoid() * clamp.direction
    torch.testing.assert_close(got[:, -1], bare[:, -1] + push, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, :-1], bare[:, :-1])
    raw = clamp.at(raw=True)
    torch.testing.assert_close(raw.strength(model.record(ids, READ)[READ][:, -1]), out[:, 0] * out[:, 1].sigmoid())


def test_padding_and_the_cache_change_nothing(world, fitted):
    model = world[0]
    rows = [tokens(1, 1, 40)[0].tolist(), tokens(1, 1, 41, length=3)[0].tolist()]
    with model.clamp(*fitted):
        together = model.generate(rows, max_new_tokens=5, eos_token_id=None).new
        alone = [model.generate(torch.tensor(row), max_new_tokens=5, eos_token_id=None).new[0] for row in rows]
        padded = model.logits(rows)
        single = model.logits(torch.tensor(rows[1]))
    assert together.tolist() == [one.tolist() for one in alone]
    torch.testing.assert_close(padded[1, :3], single[0], rtol=1e-4, atol=1e-5)


def test_end_to_end_raises_what_is_wanted_and_keeps_the_rest(world):
    model, direction, needed, others = world
    pairs = Pairs(needed, torch.full((40, 1), 7), torch.full((40, 1), 9))
    keep = (others, torch.full((40, 1), 9))
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    estimator = WeightedController(READ, scale=4.0, lr=1e-2, epochs=10)
    plain = estimator.fit(model, direction, needed, others, sites=SITES)
    tuned = estimator.fit(model, direction, needed, others, sites=SITES, pairs=pairs, keep=keep, steps=40)

    def loss(clamps, prompts, token):
        answers = torch.full((len(prompts), 1), token)
        return float(response_nll(model, prompts, answers, clamps=clamps).nll.mean())

    fresh, other = tokens(1, 40, 50), tokens(2, 40, 51)
    # A network that has learnt nothing can be pushed by little; trained through it the push goes the right way.
    gain, cost = loss(plain, fresh, 7) - loss(tuned, fresh, 7), loss(tuned, other, 9) - loss((), other, 9)
    assert gain > 0.01
    assert abs(cost) < gain
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.module.named_parameters())
    assert not any(t.requires_grad for t in (tuned[0].out_weight, tuned[0].hidden_bias))


def test_scoring_a_response_is_generating_it(world, fitted):
    """Read in one forward, a response is as likely as it is token by token with the cache."""
    model = world[0]
    prompts, responses = tokens(1, 3, 70), torch.randint(5, 40, (3, 4), generator=torch.Generator().manual_seed(0))
    newest = ac.Add(
        "blocks.0.resid.post", 3 * torch.randn(32, generator=torch.Generator().manual_seed(1)), positions=-1
    )
    gates = [{"phase": "prompt"}, {"phase": "generated"}, {"steps": 0}, {"steps": [0, 2]}, {"steps": slice(1, 3)},
             {"positions": -1, "steps": 0}, {"positions": -1, "phase": "generated"},
             {"positions": [1, 5], "steps": [0, 1]}, {"positions": slice(2, 7), "phase": "generated"}]  # fmt: skip
    kinds = [[newest.at(**{"positions": None, **gate})] for gate in gates]
    for clamps in (fitted, [newest], [*fitted, newest], [fitted[0].at(phase="generated")], *kinds):
        got = response_nll(model, prompts, responses, clamps=clamps, batch_size=2).nll
        bare = response_nll(model, prompts, responses).nll
        for i in range(3):
            rows, nll = Rows(model, alone=True), 0.0
            logits = rows.join(prompts[i].tolist(), clamps)
            for token in responses[i].tolist():
                nll -= float(logits.double().log_softmax(-1)[token])
                logits = rows.step([token])[0]
            assert float(got[i]) == pytest.approx(nll, rel=1e-4)
            assert abs(float(got[i] - bare[i])) > 1e-3
    with pytest.raises(MeasureError, match="beside a phase or steps"):
        response_nll(model, prompts, responses, clamps=[newest.at(positions=-2, phase="prompt")])


def test_it_is_saved(world, fitted, tmp_path):
    model = world[0]
    loaded = load_clamps(save_clamps(tmp_path / "c", fitted, model=model), model)
    ids = tokens(1, 2, 60)
    with model.clamp(*fitted):
        wanted = model.logits(ids)
    with model.clamp(*loaded):
        assert torch.equal(model.logits(ids), wanted)


def test_bad_input(world):
    model, direction, needed, others = world
    estimator = WeightedController(READ)
    with pytest.raises(MeasureError, match="3 other prompts are too few"):
        estimator.fit(model, direction, needed, others[:3])
    with pytest.raises(ac.SiteError, match="is reached after"):
        WeightedController("blocks.1.resid.post").fit(model, direction, needed, others, sites=SITES[:1])
    with pytest.raises(MeasureError, match="takes both"):
        estimator.fit(model, direction, needed, others, keep=(needed, needed))
    with pytest.raises(ClampError, match="made by WeightedController"):
        Controlled("blocks.0.resid.post")
