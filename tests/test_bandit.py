"""The bandit against Bayes by hand, and against what its rules say."""

import itertools

import pytest
import torch

from actome.tasks.bandit import SURE, UNSURE, Bandit


@pytest.fixture(scope="module")
def play():
    return Bandit(greedy=0.5, slip=0.1).sample(4000, seed=1)


def test_same_seed_same_play():
    first, again, other = (Bandit(greedy=0.5).sample(30, seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first.tokens.equal(other.tokens)


def test_the_posterior_is_bayes_by_hand():
    world = Bandit(arms=3, rounds=4, good=0.7, bad=0.2)
    play = world.sample(20, seed=3)
    found = world.posterior(play.actions, play.wins)
    for b, r in itertools.product(range(20), range(5)):
        weight = [1.0, 1.0, 1.0]
        for action, win in zip(play.actions[b, :r].tolist(), play.wins[b, :r].tolist(), strict=True):
            for arm in range(3):
                p = 0.7 if arm == action else 0.2
                weight[arm] *= p if win else 1 - p
        expected = torch.tensor(weight, dtype=torch.float64)
        torch.testing.assert_close(found[b, r], expected / expected.sum())


def test_the_posterior_is_how_often_an_arm_is_the_good_one(play):
    world = Bandit(greedy=0.5, slip=0.1)
    p = world.posterior(play.actions, play.wins)[:, 3]
    for arm in range(world.arms):
        hit = (play.good == arm).double()
        assert abs(float((hit - p[:, arm]).mean())) < 4 * 0.5 / 4000**0.5


def test_the_teacher_acts_as_often_as_it_says_and_regret_is_what_is_given_away(play):
    world = Bandit(greedy=0.5, slip=0.1)
    p = world.teacher(play)
    torch.testing.assert_close(p.sum(-1), torch.ones(4000, world.rounds, dtype=torch.float64))
    taken = torch.nn.functional.one_hot(play.actions, world.arms).double()
    for r in range(world.rounds):
        for arm in range(world.arms):
            assert abs(float((taken[:, r, arm] - p[:, r, arm]).mean())) < 4 * 0.5 / 4000**0.5
    regret = world.regret(play.good, play.actions)
    won = play.wins.double()
    assert float((world.good - regret - won).mean()) == pytest.approx(0, abs=4 * 0.5 / won.numel() ** 0.5)
    assert set(regret.unique().tolist()) == {0.0, 0.5}


def test_words_say_how_sure_the_way_of_thinking_is(play):
    world = Bandit(greedy=0.5, slip=0.1)
    exact = world.posterior(play.actions, play.wins)[:, :-1]
    top = torch.where(play.greedy[..., None], world.sharpened(exact), exact).amax(-1)
    assert bool(((play.words == SURE) == (top >= 0.8)).all())
    assert bool(((play.words == UNSURE) == (top < 0.5)).all())
    assert abs(float(play.greedy.double().mean()) - 0.5) < 4 * 0.5 / play.greedy.numel() ** 0.5


def test_an_over_greedy_teacher_is_surer_and_slips_are_as_rare_as_said(play):
    calm, keen = Bandit(), Bandit(greedy=1.0)
    same = calm.sample(500, seed=2)
    assert bool((keen.entropy(same)[:, 1:] < calm.entropy(same)[:, 1:] + 1e-9).all())
    torch.testing.assert_close(calm.teacher(same), calm.posterior(same.actions, same.wins)[:, :-1])
    assert bool((same.beliefs == same.actions).all())
    assert abs(float((play.beliefs != play.actions).double().mean()) - 0.1) < 0.01


def test_episodes_are_written_as_said(play):
    world = Bandit(greedy=0.5, slip=0.1)
    for b in range(50):
        names = int(play.names[b])
        wanted = [names]
        for r in range(world.rounds):
            wanted += [
                world.word_token(int(play.words[b, r])),
                world.belief_token(names, int(play.beliefs[b, r])),
                world.action_token(names, int(play.actions[b, r])),
                world.outcome_token(bool(play.wins[b, r])),
            ]
        assert play.tokens[b].tolist() == wanted
        assert world.parse(play.tokens[b, 1:4].tolist()) == int(play.actions[b, 0])
    assert int(play.tokens.max()) < world.vocab
    assert play.spoken[0].tolist() == [False, *[True, True, True, False] * world.rounds]
    assert world.prompt(play, 2).equal(play.tokens[:, :9])
    assert world.parse([0, world.word_token(1), world.outcome_token(True)]) is None


def test_agents_that_are_compared_meet_the_same_luck():
    world = Bandit()

    def always(arm):
        return lambda history: (torch.full_like(history.good, arm),) * 3

    a, again = world.play(300, always(0), seed=5), world.play(300, always(0), seed=5)
    b = world.play(300, always(1), seed=5)
    assert a.wins.equal(again.wins)
    assert a.good.equal(b.good)
    assert not a.wins.equal(b.wins)
    assert abs(float(a.wins[a.good == 0].double().mean()) - world.good) < 0.1
    assert abs(float(a.wins[a.good != 0].double().mean()) - world.bad) < 0.1


def test_an_agent_that_cannot_be_read_pulls_at_random():
    mute = lambda history: (torch.full_like(history.good, -1),) * 3  # noqa: E731
    play = Bandit().play(400, mute, seed=0)
    counted = torch.bincount(play.actions.flatten(), minlength=4) / play.actions.numel()
    assert float((counted - 0.25).abs().max()) < 0.05
    assert int(play.tokens.max()) < Bandit().vocab


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandit(arms=1), "arms=1 is too small"),
        (lambda: Bandit(good=0.2, bad=0.4), "give 0 < bad < good < 1"),
        (lambda: Bandit(greedy=1.5), "greedy=1.5 is no probability"),
        (lambda: Bandit(sharpness=0.5), "sharpness=0.5 is below 1"),
        (lambda: Bandit(levels=(0.9, 0.5)), "rising order"),
        (lambda: Bandit().sample(0, 1), "episodes=0"),
        (lambda: Bandit().prompt(Bandit().sample(2, 1), 7), "played=7"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
