"""A bandit played in context by an agent that says what it thinks before it acts.

One of several arms is good. In every round the agent says how sure it is, names the arm that it believes to be the good
one, and pulls an arm; a win or a loss follows. The teacher that the agent imitates samples its belief from the exact
posterior (posterior sampling), or, over-greedy, from a sharpened one, which is surer than the evidence allows. The
posterior, the distribution of beliefs and of actions, and the regret are known exactly.

Source: own construction, for Rahn et al. 2024, Controlling Large Language Model Agents with Entropic Activation
Steering (in-context bandit agents that reason before they act, and are overconfident); posterior sampling is Thompson
1933.

Letters: B episodes, R rounds, A arms, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, entropy, seeded, share

UNSURE, LEANING, SURE = 0, 1, 2  # how sure a thought says that it is
WORDS = 3
_ROUND = 4  # tokens of a round: how sure, believed arm, pulled arm, win or loss


class Episodes(NamedTuple):
    """Episodes as they are read. Tokens [B, 1 + 4 R]: the names in use, then the four tokens of each round.

    Attributes:
        tokens: int64.
        spoken: bool [B, T], the tokens that the agent says: all but the names in use and wins and losses.
        names: [B], which set of names the arms have.
        good: [B], the good arm.
        words: [B, R], how sure it says to be: 0 unsure, 1 leaning, 2 sure.
        beliefs: [B, R], the arm that it says to believe in.
        actions: [B, R], the arm that it pulls.
        wins: bool [B, R].
        greedy: bool [B, R], whether the round was thought over with the sharpened posterior.
    """

    tokens: Tensor
    spoken: Tensor
    names: Tensor
    good: Tensor
    words: Tensor
    beliefs: Tensor
    actions: Tensor
    wins: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class Bandit:
    """The arms and the teacher.

    Attributes:
        arms: how many; one is good, all equally often.
        rounds: of an episode.
        good, bad: chance that the good arm, and any other, wins.
        names: sets of names that the arms may have; an episode keeps to one.
        greedy: share of rounds in which the teacher is over-greedy: 0 is posterior sampling throughout, near 1 an
            agent that is overconfident.
        sharpness: power to which an over-greedy teacher takes the posterior.
        slip: chance that another arm is pulled than the one that was named.
        levels: probability of the likeliest arm from which on the teacher is leaning, and sure.

    >>> world = Bandit()
    >>> play = world.sample(500, seed=1)
    >>> play.tokens.shape, world.prompt(play, 3).shape  # a prompt ends before the thought of its round
    (torch.Size([500, 25]), torch.Size([500, 13]))
    >>> early, late = world.entropy(play)[:, [1, -1]].mean(0)
    >>> bool(early > late > 0)
    True
    """

    arms: int = 4
    rounds: int = 6
    good: float = 0.75
    bad: float = 0.25
    names: int = 2
    greedy: float = 0.0
    sharpness: float = 4.0
    slip: float = 0.0
    levels: tuple[float, float] = (0.5, 0.8)

    def __post_init__(self) -> None:
        counts(arms=(self.arms, 2), rounds=(self.rounds, 1), names=(self.names, 1))
        share(good=self.good, bad=self.bad, greedy=self.greedy, slip=self.slip)
        if not 0 < self.bad < self.good < 1:
            raise ValueError(f"bad={self.bad} and good={self.good}: give 0 < bad < good < 1")
        if self.sharpness < 1:
            raise ValueError(f"sharpness={self.sharpness} is below 1, which would be less sure than the posterior")
        if not 0 <= self.levels[0] <= self.levels[1] <= 1:
            raise ValueError(f"levels={self.levels} are not two probabilities in rising order")

    @property
    def vocab(self) -> int:
        """Number of tokens: sets of names, words, wins and losses, believed arms, pulled arms."""
        return self.names + WORDS + 2 + 2 * self.names * self.arms

    @property
    def length(self) -> int:
        """Tokens of an episode."""
        return 1 + _ROUND * self.rounds

    def word_token(self, word: int) -> int:
        """Of how sure a thought says to be."""
        return self.names + word

    def outcome_token(self, win: bool) -> int:
        """Of a loss or a win."""
        return self.names + WORDS + int(win)

    def belief_token(self, names: int, arm: int) -> int:
        """Of naming an arm in a thought."""
        return self.names + WORDS + 2 + names * self.arms + arm

    def action_token(self, names: int, arm: int) -> int:
        """Of pulling an arm."""
        return self.belief_token(self.names, 0) + names * self.arms + arm

    def parse(self, completion: Sequence[int]) -> int | None:
        """The arm that a completion pulls, whatever its names; None where it pulls none.

        >>> world = Bandit()
        >>> world.parse([world.word_token(2), world.belief_token(1, 3), world.action_token(1, 3)])
        3
        """
        first, count = self.action_token(0, 0), self.names * self.arms
        return next((int(one - first) % self.arms for one in completion if 0 <= one - first < count), None)

    def posterior(self, actions: Tensor, wins: Tensor) -> Tensor:
        """P(arm is the good one | the first r rounds), [B, R + 1, A], float64; r = 0 to R.

        Args:
            actions: [B, R], arms pulled.
            wins: bool [B, R].
        """
        pulled_BRA = torch.nn.functional.one_hot(actions, self.arms).bool()
        p_BRA = torch.where(pulled_BRA, self.good, self.bad).double()
        log_BRA = torch.where(wins[..., None], p_BRA, 1 - p_BRA).log().cumsum(1)
        return torch.nn.functional.pad(log_BRA, (0, 0, 1, 0)).softmax(-1)

    def sharpened(self, posterior: Tensor) -> Tensor:
        """What an over-greedy teacher makes of it."""
        return (posterior.clamp_min(1e-300).log() * self.sharpness).softmax(-1)

    def teacher(self, play: Episodes) -> Tensor:
        """P(action | rounds before), [B, R, A]: of the mixed teacher, who tells no one which way it is thinking."""
        exact = self.posterior(play.actions, play.wins)[:, :-1]
        belief = (1 - self.greedy) * exact + self.greedy * self.sharpened(exact)
        return (1 - self.slip) * belief + self.slip * (1 - belief) / (self.arms - 1)

    def entropy(self, play: Episodes) -> Tensor:
        """Entropy of the teacher's action in nats, [B, R]."""
        return entropy(self.teacher(play))

    def regret(self, good: Tensor, actions: Tensor) -> Tensor:
        """Expected wins that each pull gives away, [B, R]."""
        return (actions != good[:, None]).double() * (self.good - self.bad)

    def sample(self, episodes: int, seed: int) -> Episodes:
        """Plays episodes with the teacher as the agent.

        Args:
            episodes: how many.
            seed: of everything.
        """
        generator = seeded(seed)
        ways: list[Tensor] = []

        def agent(history: Episodes) -> tuple[Tensor, Tensor, Tensor]:
            exact = self.posterior(history.actions, history.wins)[:, -1]
            ways.append(torch.rand(len(exact), generator=generator) < self.greedy)
            belief_BA = torch.where(ways[-1][:, None], self.sharpened(exact), exact)
            top = belief_BA.amax(-1)
            words = (top >= self.levels[0]).long() + (top >= self.levels[1]).long()
            believed = torch.multinomial(belief_BA, 1, generator=generator)[:, 0]
            slips = torch.rand(len(exact), generator=generator) < self.slip
            other = (believed + torch.randint(1, self.arms, believed.shape, generator=generator)) % self.arms
            return words, believed, torch.where(slips, other, believed)

        play = self.play(episodes, agent, seed)
        return play._replace(greedy=torch.stack(ways, 1))

    def play(self, episodes: int, agent: Callable[[Episodes], tuple[Tensor, Tensor, Tensor]], seed: int) -> Episodes:
        """Plays episodes with any agent.

        Args:
            episodes: how many.
            agent: from the rounds so far to how sure it says to be, the arm that it names and the arm that it pulls,
                [B] each; an action of -1, where none could be read, is taken as an arm at random.
            seed: of the arms, the names and the wins; agents that are compared with one seed meet the same luck.
        """
        counts(episodes=(episodes, 1))
        generator = seeded(seed + 2**31)
        names = torch.randint(self.names, (episodes,), generator=generator)
        good = torch.randint(self.arms, (episodes,), generator=generator)
        luck_BRA = torch.rand(episodes, self.rounds, self.arms, generator=generator)
        chance_BA = torch.where(torch.arange(self.arms) == good[:, None], self.good, self.bad)
        stray_BR = torch.randint(self.arms, (episodes, self.rounds), generator=generator)
        parts = torch.zeros(4, episodes, 0, dtype=torch.long)
        for r in range(self.rounds):
            words, beliefs, actions = agent(self._written(names, good, *parts))
            actions = torch.where(actions < 0, stray_BR[:, r], actions)
            won = luck_BRA[:, r].gather(1, actions[:, None])[:, 0] < chance_BA.gather(1, actions[:, None])[:, 0]
            parts = torch.cat([parts, torch.stack([words, beliefs, actions, won.long()])[..., None]], -1)
        return self._written(names, good, *parts)

    def prompt(self, play: Episodes, played: int) -> Tensor:
        """The first rounds of each episode as a prompt that ends before a thought, [B, 1 + 4 played]."""
        if not 0 <= played <= play.actions.shape[1]:
            raise ValueError(f"played={played} is not among 0 to {play.actions.shape[1]} rounds")
        return play.tokens[:, : 1 + _ROUND * played]

    def _written(
        self, names: Tensor, good: Tensor, words: Tensor, beliefs: Tensor, actions: Tensor, wins: Tensor
    ) -> Episodes:
        """As tokens; a belief or word of -1, where none could be read, is written as the arm pulled, and as unsure."""
        believed = torch.where(beliefs < 0, actions, beliefs)
        at = names[:, None] * self.arms
        parts = (
            self.names + words.clamp_min(0),
            self.belief_token(0, 0) + at + believed,
            self.action_token(0, 0) + at + actions,
            self.names + WORDS + wins,
        )
        tokens = torch.cat([names[:, None], torch.stack(parts, -1).flatten(1)], 1)
        place = torch.arange(tokens.shape[1])
        spoken = ((place > 0) & (place % _ROUND != 0)).expand(len(tokens), -1)
        none = torch.zeros_like(wins, dtype=torch.bool)
        return Episodes(tokens, spoken, names, good, words, beliefs, actions, wins.bool(), none)
