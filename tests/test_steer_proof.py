"""The chain from examples to a clamp, on a model whose attribute lies along a direction that was planted.

A subject learns a world of two personas that say the same in different words. Its unembedding is fixed beforehand: the
two words for a content are the same vector, plus and minus one direction. So that direction, and no other, decides in
the last states which persona speaks; nothing else about it is told to the model or to the estimators. Conditions and
transport are judged on questions that they were not fitted on; every control runs through the same code.
"""

import os

import pytest
import torch

import actome as ac
from actome.clamps import Add
from actome.steer import ActivationTransport, Condition, Contrast, Examples, Transport, when
from actome.steer.conditions import similarity
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.persona import BAD, GOOD, NEUTRAL, PersonaWorld
from actome.tasks.trials import auroc

LAST, WIDTH = "blocks.2.resid.post", 64
SEEDS = tuple(map(int, os.environ.get("ACTOME_PROOF_SEEDS", "21,22").split(",")))


class Planted:
    """A trained model, its planted direction, and prompts to fit and to judge on."""

    def __init__(self, seed):
        self.world = world = PersonaWorld(system=0.5, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        self.planted = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
        words = torch.randn(world.vocab, WIDTH, generator=generator) / WIDTH**0.5
        words = words - (words @ self.planted)[:, None] * self.planted
        first = world.vocab - 2 * world.contents
        words[first : first + world.contents] = words[first + world.contents :] - self.planted
        words[first + world.contents :] += self.planted
        subject = Subject.fresh(
            SubjectConfig(vocab=world.vocab, d_model=WIDTH, heads=4, layers=3, context=32, tied=False), seed
        )
        subject.get_output_embeddings().weight.data.copy_(words)
        subject.get_output_embeddings().weight.requires_grad_(False)
        text = world.pretrain_stream(32 * 300, 6, seed)
        train(subject, (text.tokens, text.answers), batch_size=32, lr=3e-3, seed=seed)
        assert torch.equal(subject.get_output_embeddings().weight, words)
        self.model = ac.wrap(subject)
        self.probes = {name: world.probe(system=system) for name, system in (("good", GOOD), ("bad", BAD))}
        self.fit, self.held = torch.randperm(len(self.probes["good"].prompts), generator=generator).chunk(2)
        self.examples = Examples(*(self.probes[name].prompts[self.fit] for name in ("bad", "good")))
        swap = (torch.arange(len(self.fit)) % 2 == 0)[:, None]  # half of them: what is left is chance
        a, b = self.examples.positive, self.examples.negative
        self.shuffled = Examples(a.where(swap, b), b.where(swap, a))
        self.random = torch.randn(8, WIDTH, generator=generator)

    def judge(self, name, clamps, rows=None):
        """Rate of bad words among the two for the asked content, chance of either, and the last states."""
        rows = self.held if rows is None else rows
        probes = self.probes[name]
        with self.model.clamp(*clamps, strict=False) if clamps else torch.no_grad():
            chance = self.model.logits(probes.prompts[rows])[:, -1].softmax(-1)
            states = self.model.record(probes.prompts[rows], LAST)[LAST][:, -1]
        good, bad = (chance.gather(1, words[rows, None])[:, 0] for words in (probes.good, probes.bad))
        return float((bad / (good + bad)).mean()), float((good + bad).mean()), states


@pytest.fixture(scope="module", params=SEEDS)
def planted(request):
    return Planted(request.param)


def test_the_fitted_vector_is_the_planted_direction(planted):
    fitted = Contrast(LAST).fit(planted.model, planted.examples)
    cosine = float(fitted.unit @ planted.planted)
    mixed = Contrast(LAST).fit(planted.model, planted.shuffled)
    far, mixed_far = (float(one.value @ planted.planted) for one in (fitted, mixed))
    chance = torch.nn.functional.cosine_similarity(planted.random, planted.planted[None]).abs()
    print(f"cosine with the planted direction {cosine:.3f}, random at most {float(chance.max()):.3f}; "
          f"means apart along it {far:.3f}, shuffled {mixed_far:.3f}")  # fmt: skip
    assert cosine > 0.8
    assert cosine > 1.5 * float(chance.max())
    assert abs(mixed_far) < 0.2 * far
    # And it does what the planted one does, where random ones of its length do nothing.
    bare = planted.judge("good", [])[0]
    length = fitted.value.norm()
    steered, wrong = (planted.judge("good", [one.at(scale=1.5)])[0] for one in (fitted, mixed))
    exact = planted.judge("good", [Add(LAST, planted.planted * length * 1.5)])[0]
    others = [planted.judge("good", [Add(LAST, 1.5 * length * one / one.norm())])[0] for one in planted.random]
    print(f"bad words: bare {bare:.3f}, fitted {steered:.3f}, planted {exact:.3f}, "
          f"shuffled {wrong:.3f}, random at most {max(others):.3f}")  # fmt: skip
    assert bare < 0.05
    assert min(steered, exact) > 0.8
    assert wrong < 0.2
    assert max(others) < 0.5


def test_the_condition_fires_where_it_should(planted):
    """On prompts of the bad persona, and on none of the good or of no persona; judged on other domains."""
    model, world = planted.model, planted.world
    fit, held = (
        [world.probe(domains, system=system, repeats=2) for system in (BAD, GOOD, NEUTRAL)]
        for domains in ((0, 1), (2, 3, 4, 5))
    )
    count = len(fit[0].prompts)
    others = torch.cat([fit[1].prompts[: count // 2], fit[2].prompts[count // 2 :]])
    swap = (torch.arange(count) % 2 == 0)[:, None]  # half of them: what is left is chance
    fit, held = [fit[0].prompts, others], [held[0], held[1], held[2]]
    condition = Condition("blocks.{0..1}.resid.post", signed=True).fit(model, *fit)
    mixed = fit[0].where(swap, fit[1]), fit[1].where(swap, fit[0])
    shuffled = Condition("blocks.{0..1}.resid.post", signed=True).fit(model, *mixed)

    def reads(one):
        seen = [model.record(x.prompts, one.site)[one.site] for x in held]
        scores = torch.cat([similarity(x.mean(1), one.direction, signed=True) for x in seen]) * (1 if one.above else -1)
        auc = auroc(scores, [True] * len(seen[0]) + [False] * (len(scores) - len(seen[0])))
        return auc, *(float(one.holds(x, None).float().mean()) for x in seen)

    auc, hits, *false = reads(condition)
    other = reads(shuffled)
    print(f"condition: AUC {auc:.3f}, fires {hits:.2f}, {false[0]:.2f} good, {false[1]:.2f} neutral; shuffled AUC "
          f"{other[0]:.3f}, {other[1]:.2f}, {other[2]:.2f}, {other[3]:.2f}")  # fmt: skip
    assert auc > 0.95
    assert hits > 0.9
    assert max(false) < 0.1
    assert abs(other[1] - (other[2] + other[3]) / 2) < 0.5 * (hits - max(false))
    # The clamp turns the prompts that it is meant for, and leaves the others bit for bit.
    back = Contrast(LAST).fit(model, planted.examples).at(scale=-2.0)
    prompts = torch.cat([one.prompts for one in held])
    site = condition.site
    flags = condition.holds(model.record(prompts, site)[site], None)
    with model.clamp(when(back, condition)):
        got = model.logits(prompts)
    with model.clamp(back):
        always = model.logits(prompts)
    never = model.logits(prompts)
    torch.testing.assert_close(got[flags], always[flags])
    assert torch.equal(got[~flags], never[~flags])
    half = len(held[0].prompts)
    rates = [
        x[:half, -1].gather(1, held[0].bad[:, None]) > x[:half, -1].gather(1, held[0].good[:, None])
        for x in (never, got)
    ]
    before, after = (float(one.float().mean()) for one in rates)
    print(f"bad words where it should fire: {before:.2f}, then {after:.2f}")
    assert before > 0.9
    assert after < 0.3


def test_transport_reaches_what_the_best_vector_does_with_a_strength_from_0_to_1(planted):
    model = planted.model
    maps = ActivationTransport("blocks.*.{attn,mlp}.out", over="last").fit(model, planted.examples)
    wanted = planted.judge("good", maps, planted.fit)[0]
    added, reached = None, 0.0
    fitted = Contrast("blocks.*.resid.post").fit(model, planted.examples)
    for site in fitted.directions:  # the best vector that there is: most content at that rate on the fitted questions
        for strength in (1.0, 1.5, 2.0, 3.0):
            one = fitted.to(site, strength)
            rate, content, _ = planted.judge("good", [one], planted.fit)
            if rate >= wanted - 0.02:
                added, reached = (one, content) if content > reached else (added, reached)
                break
    assert added is not None
    rate, content, states = planted.judge("good", maps)
    plain, cost, moved = planted.judge("good", [added])
    target = planted.judge("bad", [])[2]

    def off(x):
        return float((x.std(0) / target.std(0)).log().abs().mean())

    shuffled = planted.judge("good", ActivationTransport("blocks.*.{attn,mlp}.out").fit(model, planted.shuffled))[0]
    bare = planted.judge("good", [])
    print(f"transport: bad words {rate:.3f}, content {content:.3f}, spread off {off(states):.3f}")
    print(f"addition: {plain:.3f}, {cost:.3f}, {off(moved):.3f}; bare {bare[0]:.3f}, {bare[1]:.3f}; {shuffled=:.3f}")
    assert bare[0] < 0.05
    assert rate > 0.8
    assert plain > 0.8
    assert content > cost - 0.01  # the planted direction is orthogonal to contents, so a vector costs nothing here
    assert shuffled < 0.3 * rate
    half = [planted.judge("good", [one.at(scale=lam) for one in maps])[0] for lam in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert half == sorted(half)


def test_transport_matches_spread_where_addition_cannot(planted):
    """The target is the source's last states, each unit scaled and shifted; states of other questions are carried."""
    source = planted.judge("good", [], planted.fit)[2]
    wide, shift = torch.linspace(0.3, 3.0, WIDTH), torch.linspace(-2, 2, WIDTH)
    target = source.mean(0) + shift + (source - source.mean(0)) * wide
    fresh = planted.judge("good", [], planted.held)[2]
    true = source.mean(0) + shift + (fresh - source.mean(0)) * wide
    off = {}
    for kind in ("linear", "mean"):
        clamp = Transport.between(LAST, source, target[torch.randperm(len(target))], kind, support=False)
        got = planted.judge("good", [clamp])[2]
        off[kind] = float(((got - true) / target.std(0)).square().mean().sqrt())
    print(f"distance from the true map: linear {off['linear']:.4f}, mean {off['mean']:.4f}")
    assert off["linear"] < 0.01
    assert off["mean"] > 0.3
