"""Worlds of text with known ground truth: every rule by brute force, every exact number by enumeration.

Frequencies are held against the tables within five standard errors, so a right generator passes for all but one seed
in a million or so; seeds are fixed, so a test passes always or never.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from actome.tasks import draw
from actome.tasks.clue_chain import ClueChain
from actome.tasks.copy_spans import BEGIN, CLOSE, COPY, OPEN, CopySpans
from actome.tasks.graph_walk import GraphWalk, graph
from actome.tasks.hmm import HiddenMarkov
from actome.tasks.induction import MatchCopy, RepeatedSegments
from actome.tasks.modular import ModularAddition
from actome.tasks.moving_sum import MovingSum
from actome.tasks.running_sums import RunningSums
from actome.tasks.topic_bigram import TopicBigram
from actome.tasks.two_hop import TwoHop

WORLDS = {
    "topic_bigram": lambda seed: TopicBigram(switch=0.1).sample(50, 20, seed),
    "hmm": lambda seed: HiddenMarkov().sample(50, 20, seed),
    "segments": lambda seed: RepeatedSegments(shortest=3, longest=6).sample(50, 20, seed),
    "match": lambda seed: MatchCopy().sample(50, 20, seed),
    "clues": lambda seed: ClueChain().sample(50, seed),
    "walk": lambda seed: GraphWalk().sample(50, 20, seed),
    "pairs": lambda seed: GraphWalk(mode="pairs").sample(50, 20, seed),
    "spans": lambda seed: CopySpans().sample(50, 65, seed),
    "two_hop": lambda seed: TwoHop().sample(50, seed),
    "modular": lambda seed: (ModularAddition().sample(50, seed),),
    "moving_sum": lambda seed: (MovingSum().sample(50, seed),),
    "running_sums": lambda seed: RunningSums().sample(50, seed),
}


@pytest.mark.parametrize("name", WORLDS)
def test_same_seed_same_data_other_seed_other_data(name):
    first, again, other = (WORLDS[name](seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


def test_a_world_of_another_seed_has_other_tables():
    for make in (lambda s: TopicBigram(seed=s).tables(), lambda s: HiddenMarkov(seed=s).emission()):
        assert make(3).equal(make(3))
        assert not make(3).equal(make(4))
    assert not ClueChain(seed=0).codes().equal(ClueChain(seed=1).codes())
    assert not TwoHop(seed=0).table().equal(TwoHop(seed=1).table())


def near(counted, expected, draws):
    """Whether shares `counted` out of `draws` agree with probabilities within five standard errors."""
    error = (expected * (1 - expected) / draws).clamp_min(1e-12).sqrt()
    return bool(((counted - expected).abs() <= 5 * error + 1e-9).all())


def agrees(surprise, floor):
    """Whether the mean of `surprise` agrees with `floor` within five standard errors over sequences (its rows)."""
    rows = surprise.double().mean(1)
    return abs(float(rows.mean()) - floor) <= 5 * float(rows.std()) / len(rows) ** 0.5


# Drawing


def test_rows_draw_as_often_as_the_table_says():
    generator = draw.seeded(0)
    table = draw.dirichlet((7, 5), 0.3, generator)
    table[2] = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    rows = torch.arange(7).repeat(20000)
    drawn = draw.Rows(table * 3).draw(rows, generator).view(20000, 7)
    counted = torch.nn.functional.one_hot(drawn, 5).double().mean(0)
    assert near(counted, table / table.sum(1, keepdim=True), 20000)
    assert counted[2][[0, 2, 4]].tolist() == [0, 0, 0]


def test_rows_at_the_ends_of_the_unit_interval_stay_on_possible_columns():
    table = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 0.0, 1.0]]).repeat(5000, 1)
    rows = torch.arange(10000)
    for u in (0.0, 1 - 2**-53):
        drawn = draw.Rows(table).place(rows, torch.full((10000,), u, dtype=torch.float64))
        assert bool((table[rows, drawn] > 0).all())


def test_rows_refuse_a_row_of_nothing():
    with pytest.raises(ValueError, match="no weight"):
        draw.Rows(torch.zeros(2, 3))


# Topics


def test_topic_text_follows_the_table_of_its_topic():
    world = TopicBigram(vocab=5, topics=3, concentration=1.0)
    text = world.sample(20000, 12, seed=1)
    assert bool((text.topics == text.topics[:, :1]).all())
    assert near(text.topics[:, 0].bincount().double() / 20000, torch.full((3,), 1 / 3, dtype=torch.float64), 20000)
    for topic in range(3):
        tokens = text.tokens[text.topics[:, 0] == topic]
        for token in range(5):
            after = tokens[:, 1:][tokens[:, :-1] == token]
            counted = after.bincount(minlength=5).double() / len(after)
            assert near(counted, world.tables()[topic, token], len(after))


def test_switching_topics_change_as_often_as_said():
    text = TopicBigram(topics=4, switch=0.2).sample(5000, 40, seed=1)
    changed = (text.topics[:, 2:] != text.topics[:, 1:-1]).double()
    expected = torch.tensor(0.2 * 3 / 4)
    assert near(changed.mean(), expected, changed.numel())
    assert text.topics[:, 0].equal(text.topics[:, 1])


def _topic_chain(world, tokens, topics):
    """P(topics and tokens), the begin token aside, step by step."""
    p = 1 / world.topics
    for t in range(1, len(tokens)):
        if t > 1:
            p *= world.switch / world.topics + (1 - world.switch) * (topics[t - 1] == topics[t - 2])
        p *= world.tables()[topics[t - 1], tokens[t - 1], tokens[t]].item()
    return p


@pytest.mark.parametrize("switch", [0.0, 0.3])
def test_topic_posterior_and_prediction_are_those_of_enumeration(switch):
    world = TopicBigram(vocab=4, topics=2, switch=switch)
    for row in world.sample(3, 5, seed=2).tokens.tolist():
        posterior, predicted = world.posterior(torch.tensor([row]))[0], world.predict(torch.tensor([row]))[0]
        for t in range(1, 5):
            paths = list(itertools.product(range(2), repeat=t))
            joint = torch.tensor([_topic_chain(world, row[: t + 1], path) for path in paths])
            last = torch.tensor([path[-1] for path in paths])
            brute = torch.stack([joint[last == z].sum() for z in range(2)]) / joint.sum()
            torch.testing.assert_close(posterior[t].float(), brute, atol=1e-5, rtol=0)
        for t in range(4):
            each = [
                sum(_topic_chain(world, [*row[: t + 1], v], path) for path in itertools.product(range(2), repeat=t + 1))
                for v in range(4)
            ]
            brute = torch.tensor(each) / sum(each)
            torch.testing.assert_close(predicted[t].float(), brute, atol=1e-5, rtol=0)


@pytest.mark.parametrize("switch", [0.0, 0.1])
def test_topic_floors_are_the_surprise_of_those_who_know(switch):
    world = TopicBigram(switch=switch)
    text = world.sample(4000, 24, seed=3)
    told = world.tables()[text.topics[:, 1:], text.tokens[:, :-1], text.tokens[:, 1:]]
    assert agrees(-told.log(), world.floor(text))
    bayes = world.predict(text.tokens[:, :-1]).gather(-1, text.tokens[:, 1:, None])[..., 0]
    assert agrees(-bayes.log(), world.bayes_floor(text.tokens))
    assert world.bayes_floor(text.tokens) > world.floor(text) + 0.05


# Hidden Markov text


def test_hidden_text_follows_both_tables():
    world = HiddenMarkov(vocab=6, states=3, stay=0.7, concentration=1.0)
    text = world.sample(10000, 10, seed=1)
    assert bool((world.transition().diagonal() >= 0.7).all())
    for state in range(3):
        after = text.states[:, 1:][text.states[:, :-1] == state]
        assert near(after.bincount(minlength=3).double() / len(after), world.transition()[state], len(after))
        out = text.tokens[text.states == state]
        assert near(out.bincount(minlength=6).double() / len(out), world.emission()[state], len(out))


def test_forward_algorithm_is_enumeration_of_all_paths():
    world = HiddenMarkov(vocab=4, states=3)
    transition, emission = world.transition(), world.emission()
    tokens = world.sample(4, 5, seed=1).tokens
    paths = torch.tensor(list(itertools.product(range(3), repeat=5)))

    def joint(row, upto):
        p = torch.full((len(paths),), 1 / 3, dtype=torch.float64)
        for t in range(5):
            p = p * (transition[paths[:, t - 1], paths[:, t]] if t else 1)
            p = p * (emission[paths[:, t], row[t]] if t < upto else 1)
        return p

    for row, predicted, filtered, smoothed, total in zip(
        tokens,
        world.predict(tokens),
        world.posterior(tokens),
        world.posterior(tokens, smoothed=True),
        world.log_likelihood(tokens),
        strict=True,
    ):
        assert math.isclose(total.item(), joint(row, 5).sum().log().item(), rel_tol=1e-9)
        for t in range(5):
            before, upto, whole = joint(row, t), joint(row, t + 1), joint(row, 5)
            brute = torch.stack([(before * emission[paths[:, t], v]).sum() for v in range(4)]) / before.sum()
            torch.testing.assert_close(predicted[t], brute)
            for posterior, p in ((filtered, upto), (smoothed, whole)):
                brute = torch.stack([p[paths[:, t] == s].sum() for s in range(3)]) / p.sum()
                torch.testing.assert_close(posterior[t], brute)


def test_hidden_floor_is_the_surprise_of_the_forward_algorithm():
    world = HiddenMarkov()
    tokens = world.sample(3000, 24, seed=2).tokens
    assert agrees(-world.predict(tokens).gather(-1, tokens[..., None])[..., 0].log(), world.floor(tokens))


# Induction


@pytest.mark.parametrize(("distinct", "zipf"), [(True, 0.0), (True, 0.5), (False, 0.5)])
def test_segments_repeat_with_a_period_that_varies(distinct, zipf):
    world = RepeatedSegments(vocab=20, shortest=3, longest=7, distinct=distinct, zipf=zipf)
    text = world.sample(500, 24, seed=1)
    seen = set()
    for row, source, predictable in zip(text.tokens.tolist(), text.source.tolist(), text.predictable, strict=True):
        assert row[0] == 0
        assert 0 not in row[1:]
        first = next(t for t in range(24) if source[t] >= 0)
        period = first - 1
        seen.add(period)
        assert source == [t - period if t > period else -1 for t in range(24)]
        assert all(row[t] == row[source[t]] for t in range(first, 24))
        assert predictable.nonzero()[:, 0].tolist() == list(range(period + 2, 24))
        if distinct:
            assert len(set(row[1 : period + 1])) == period
    assert seen == {3, 4, 5, 6, 7}


def test_zipf_segments_have_zipf_frequencies():
    world = RepeatedSegments(vocab=6, shortest=4, longest=4, distinct=False, zipf=1.0)
    drawn = world.sample(20000, 6, seed=1).tokens[:, 1:5].flatten()
    assert near(drawn.bincount(minlength=6).double() / len(drawn), world.weights(), len(drawn))
    assert math.isclose(world.weights()[1] / world.weights()[4], 4.0)


@pytest.mark.parametrize("distinct", [True, False])
def test_segment_prediction_is_enumeration_of_all_texts(distinct):
    world = RepeatedSegments(vocab=4, shortest=1, longest=2, distinct=distinct, zipf=0.7)
    weights = world.weights()
    joint = {}
    for period in (1, 2):
        for segment in itertools.product((1, 2, 3), repeat=period):
            if distinct and len(set(segment)) < period:
                continue
            p, left = 0.5, 1.0
            for token in segment:
                p *= weights[token].item() / left
                left -= weights[token].item() if distinct else 0
            row = (0, *((segment * 5)[:5]))
            joint[row] = joint.get(row, 0) + p
    for row in joint:
        predicted = world.predict(torch.tensor([row]))[0]
        for t in range(5):
            same = {other: p for other, p in joint.items() if other[: t + 1] == row[: t + 1]}
            for v in range(4):
                brute = sum(p for other, p in same.items() if other[t + 1] == v) / sum(same.values())
                assert math.isclose(predicted[t, v].item(), brute, abs_tol=1e-9)


@pytest.mark.parametrize("distinct", [True, False])
def test_segment_floor_is_the_surprise_of_one_who_finds_out_the_period(distinct):
    world = RepeatedSegments(vocab=30, shortest=4, longest=9, distinct=distinct)
    tokens = world.sample(3000, 24, seed=2).tokens
    surprise = -world.predict(tokens[:, :-1]).gather(-1, tokens[:, 1:, None])[..., 0].log()
    assert agrees(surprise, world.floor(tokens))


def test_match_copy_marks_and_copies_the_last_match():
    world = MatchCopy(vocab=8, copy=0.7)
    text = world.sample(1000, 30, seed=1)
    hits = matches = fresh = 0
    for row, source in zip(text.tokens.tolist(), text.source.tolist(), strict=True):
        for t in range(1, 30):
            earlier = [i for i in range(t - 1) if row[i] == row[t - 1]]
            assert source[t] == (earlier[-1] + 1 if earlier else -1)
            matches += bool(earlier)
            hits += bool(earlier) and row[t] == row[source[t]]
            fresh += not earlier
    assert text.predictable.equal(text.source >= 0)
    assert near(torch.tensor(hits / matches), torch.tensor(0.7 + 0.3 / 8), matches)
    surprise = -world.predict(text).gather(-1, text.tokens[:, 1:, None])[..., 0].log()
    assert agrees(surprise, world.floor(text))
    assert fresh > 0
    torch.testing.assert_close(world.predict(text).sum(-1), torch.ones(1000, 29, dtype=torch.float64))


# Clue chains


def test_chains_are_written_as_said():
    world = ClueChain(classes=5, clues=4)
    chains = world.sample(400, seed=1)
    codes = world.codes()
    assert len(set(map(tuple, codes.tolist()))) == 5
    for b in range(400):
        shown = int(chains.shown[b])
        clues = [world.classes + int(c) for c in chains.clues[b, :shown]]
        level = world.level_token + int(chains.levels[b])
        pads = [world.pad_token] * (4 - shown)
        assert chains.tokens[b].tolist() == [level, *clues, world.cue_token, int(chains.classes[b]), *pads]
        assert chains.mask[b].sum() == shown + 3
        assert chains.tokens[b, chains.cue[b]] == world.cue_token
        assert chains.steps()[b].tolist() == [*range(shown + 1), *[-1] * (4 - shown)]
    assert chains.tokens.max() < world.vocab
    assert set(chains.shown.tolist()) == {0, 1, 2, 3, 4}
    assert chains.correct.equal(chains.answers == chains.classes)


def test_clues_are_wrong_as_often_as_their_level_says():
    world = ClueChain()
    chains = world.sample(20000, seed=1)
    right = chains.clues == world.codes()[chains.classes]
    for level, error in enumerate(world.errors):
        at = right[chains.levels == level]
        assert near(1 - at.double().mean(), torch.tensor(error), at.numel())
    by = (chains.clues - world.codes()[chains.classes])[~right] % 3
    assert near((by == 1).double().mean(), torch.tensor(0.5), len(by))


def test_clue_posterior_is_bayes_by_hand():
    world = ClueChain(classes=4, clues=3)
    chains = world.sample(20, seed=1)
    codes = world.codes()
    posterior, ahead = world.posterior(chains.clues, chains.levels), world.next_clue(chains.clues, chains.levels)
    for b in range(20):
        error = world.errors[int(chains.levels[b])]
        weight = torch.ones(4, dtype=torch.float64)
        for s in range(4):
            torch.testing.assert_close(posterior[b, s], weight / weight.sum())
            if s == 3:
                break
            likelihood = lambda v, s=s, e=error: torch.where(codes[:, s] == v, 1 - e, e / 2).double()  # noqa: E731
            brute = torch.stack([(weight / weight.sum() * likelihood(v)).sum() for v in range(3)])
            torch.testing.assert_close(ahead[b, s], brute)
            weight = weight * likelihood(chains.clues[b, s])


def test_clue_floor_value_and_answers_are_what_happens():
    world = ClueChain()
    chains = world.sample(20000, seed=2)
    at = torch.arange(20000), chains.shown
    posterior = world.posterior(chains.clues, chains.levels)[at]
    assert agrees(-posterior.gather(1, chains.classes[:, None]).log(), world.floor(chains))
    for greedy, answers in ((False, chains.answers), (True, posterior.argmax(1))):
        value = world.value(chains.clues, chains.levels, greedy)[at]
        assert agrees((answers == chains.classes).double()[:, None] - value[:, None], 0.0)
    assert (world.entropy(chains.clues, chains.levels)[:, 0] - math.log(12)).abs().max() < 1e-9


def test_chains_keep_to_what_is_asked_for():
    chains = ClueChain().sample(50, seed=1, shown=3, level=2)
    assert set(chains.shown.tolist()) == {3}
    assert set(chains.levels.tolist()) == {2}


# Walks


@pytest.mark.parametrize(
    ("shape", "nodes", "degrees"),
    [
        ("ring", 6, {2}),
        ("lattice", 8, {4}),
        ("cliques", 8, {3}),
        ("grid", 12, {2, 3, 4}),
        ("hexagon", 16, {1, 2, 3}),
    ],
)
def test_graphs_and_walks_over_them(shape, nodes, degrees):
    adjacency = graph(shape, nodes)
    assert adjacency.equal(adjacency.T)
    assert not bool(adjacency.diagonal().any())
    assert set(adjacency.sum(1).tolist()) == degrees
    for mode in ("walk", "pairs"):
        world = GraphWalk(adjacency, mode=mode)
        walks = world.sample(100, 20, seed=1)
        for tokens, at, names in zip(walks.tokens.tolist(), walks.nodes.tolist(), walks.names.tolist(), strict=True):
            assert len(set(names)) == nodes
            assert max(names) < world.vocab
            assert tokens == [names[node] for node in at]
            pairs = itertools.pairwise(at) if mode == "walk" else zip(at[::2], at[1::2], strict=True)
            assert all(adjacency[i, j] for i, j in pairs)
        assert len({tuple(names) for names in walks.names.tolist()}) == 100
        allowed = world.neighbours(walks)
        assert allowed.sum(-1).equal(adjacency.sum(1)[walks.nodes])
        step = slice(None) if mode == "walk" else slice(None, None, 2)
        assert bool(allowed[:, :-1][:, step].gather(-1, walks.tokens[:, 1:][:, step, None]).all())


def test_walk_frequencies_and_floors():
    adjacency = graph("grid", 6)
    degree = adjacency.sum(1).double()
    for mode in ("walk", "pairs"):
        world = GraphWalk(adjacency, mode=mode)
        walks = world.sample(20000, 6, seed=1)
        for t in (0, 3, 5):  # degree is the stationary distribution
            counted = walks.nodes[:, t].bincount(minlength=6).double() / 20000
            assert near(counted, degree / degree.sum(), 20000)
        after = walks.nodes[walks.nodes[:, 0] == 1, 1]
        assert near(after.bincount(minlength=6).double() / len(after), adjacency[1] / degree[1], len(after))
        stationary = (degree / degree.sum()).log()
        known = -degree[walks.nodes[:, :-1]].log()
        if mode == "pairs":
            known[:, 1::2] = stationary[walks.nodes[:, 2::2]]
        assert agrees(-known, world.floor(walks))


# Copied spans


def test_spans_come_again_word_for_word():
    world = CopySpans(vocab=12, shortest=2, longest=5, stretch=20)
    text = world.sample(200, 41, seed=1)
    sizes, places = set(), set()
    for row, source, noise in zip(text.tokens.tolist(), text.source.tolist(), text.noise.tolist(), strict=True):
        assert row[0] == BEGIN
        for start in (1, 21):
            part = row[start : start + 20]
            begin, end, again = part.index(OPEN), part.index(CLOSE), part.index(COPY)
            span = part[begin + 1 : end + 1]
            assert begin < end < again
            assert part[again + 1 : again + 1 + len(span)] == span
            copies = range(start + again + 1, start + again + 1 + len(span))
            assert [source[t] for t in copies] == list(range(start + begin + 1, start + end + 1))
            marks = {start + begin, start + end, start + again}
            assert all(noise[t] == (t not in marks and t not in copies) for t in range(start, start + 20))
            sizes.add(len(span) - 1)
            places.add(begin)
    assert sizes == {2, 3, 4, 5}
    assert len(places) > 5


def test_spans_stand_anywhere_in_their_stretch():
    # Two tokens of noise to spare, cut at two places among 0, 1, 2: the earlier one is 0, 1, 2 in 5, 3, 1 of 9 cases.
    text = CopySpans(shortest=3, longest=3, stretch=12).sample(20000, 13, seed=1)
    first = (text.tokens == OPEN).int().argmax(1) - 1
    expected = torch.tensor([5, 3, 1], dtype=torch.float64) / 9
    assert near(first.bincount(minlength=3).double() / 20000, expected, 20000)


def test_span_noise_follows_the_table_and_the_floor():
    world = CopySpans(vocab=9, shortest=2, longest=4, stretch=16)
    text = world.sample(5000, 33, seed=1)
    table = world.table()
    drawn = text.noise[:, 1:]
    context = torch.where(text.noise[:, :-1], text.tokens[:, :-1], BEGIN)
    for token in (BEGIN, 4, 8):
        after = text.tokens[:, 1:][drawn & (context == token)]
        assert near(after.bincount(minlength=9).double() / len(after), table[token], len(after))
    surprise = torch.where(drawn, -table[context, text.tokens[:, 1:]].clamp_min(1e-300).log(), 0.0)
    assert agrees(surprise, world.floor(text))


# Facts and sums


def test_two_hop_facts_hold_and_the_split_is_one():
    world = TwoHop(entities=10, relations=3, heldout=0.25)
    table = world.table().tolist()
    train, heldout = (set(map(tuple, world.compositions(split).tolist())) for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train | heldout) == 10 * 9
    assert len(heldout) == 22
    assert all(sorted(column) == list(range(10)) for column in zip(*table, strict=True))
    for split, allowed in (("train", train), ("heldout", heldout)):
        facts = world.sample(2000, seed=1, split=split)
        for (begin, e, r1, r2, answer), bridge, hops in zip(*(x.tolist() for x in facts), strict=True):
            assert begin == world.begin_token
            assert bridge == table[e][r1 - 10]
            if r2 == world.none_token:
                assert hops == 1
                assert answer == bridge
            else:
                assert hops == 2
                assert (e, r1 - 10, r2 - 10) in allowed
                assert answer == table[bridge][r2 - 10]
        assert near((facts.hops == 1).double().mean(), torch.tensor(0.5), 2000)
    assert len(world.facts().tokens) == 30
    assert set(world.facts().hops.tolist()) == {1}
    assert len(world.facts("heldout").tokens) == 22


@pytest.mark.parametrize("shuffled", [False, True])
def test_modular_sums_and_mirrored_pairs(shuffled):
    world = ModularAddition(p=11, shuffled=shuffled)
    train, heldout = ({(a, b): c for a, b, _, c in world.pairs(split).tolist()} for split in ("train", "heldout"))
    assert not train.keys() & heldout.keys()
    assert len(train) + len(heldout) == 121
    for side in (train, heldout):
        assert all(side[b, a] == c for (a, b), c in side.items())
    right = [(a + b) % 11 == c for (a, b), c in {**train, **heldout}.items()]
    assert all(right) != shuffled
    if shuffled:
        # A permutation of the 66 answers leaves about one in eleven where it was.
        assert sum(right) < 30
        unordered = lambda w: sorted(c for a, b, _, c in w.pairs("all").tolist() if a <= b)  # noqa: E731
        assert unordered(world) == unordered(ModularAddition(p=11))
    rows = {tuple(row) for row in world.sample(500, seed=1).tolist()}
    assert rows <= {(a, b, 11, c) for (a, b), c in train.items()}


@pytest.mark.parametrize("rule", ["window", "prefix", "copy", "reverse"])
def test_moving_sums_and_the_attention_that_they_need(rule):
    world = MovingSum(terms=6, rule=rule)
    rows = world.sample(200, seed=1)
    assert rows.shape == (200, world.length)
    assert set(rows[:, 6].tolist()) == {world.separator}
    needed = world.needed()
    for *x, _, y1, y2, y3, y4, y5, y6 in rows.tolist():
        y = [y1, y2, y3, y4, y5, y6]
        assert min(x) >= 1
        assert max(x) <= 16
        rules = {
            "window": [x[0], *((a + b) % 17 for a, b in itertools.pairwise(x))],
            "prefix": [sum(x[: i + 1]) % 17 for i in range(6)],
            "copy": x,
            "reverse": x[::-1],
        }
        assert y == rules[rule]
    # What is needed decides the output: among all rows, the tokens at needed keys determine the next token.
    for query in world.outputs().tolist():
        keys = needed[query].nonzero()[:, 0].tolist()
        assert keys
        assert max(keys) <= query
        known: dict[tuple, int] = {}
        for row in rows.tolist():
            assert known.setdefault(tuple(row[k] for k in keys), row[query + 1]) == row[query + 1]
    assert needed.sum() == needed[world.outputs()].sum()


def test_running_sums_in_both_modes():
    world = RunningSums(terms=4, modulus=11)
    sums = world.sample(300, seed=1)
    wrong = world.irrelevant(sums, seed=2)
    assert wrong.tokens[:, :6].equal(sums.tokens[:, :6])
    assert not wrong.tokens.equal(sums.tokens)
    for row, numbers, written, response in zip(
        sums.tokens.tolist(), sums.numbers.tolist(), sums.written.tolist(), sums.response, strict=True
    ):
        steps = [sum(numbers[: i + 1]) % 11 for i in range(4)]
        said = [*steps, 14] if written else [steps[-1], 14]
        assert row == [11 if written else 12, *numbers, 13, *said, *[15] * (5 - len(said))]
        assert response.nonzero()[:, 0].tolist() == list(range(6, 6 + len(said)))
    assert sums.mask.equal(sums.tokens != 15)
    assert world.vocab == 16


# What cannot be


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopicBigram(topics=0),
        lambda: TopicBigram(switch=1.5),
        lambda: TopicBigram(concentration=0.0),
        lambda: TopicBigram().sample(0, 8, 0),
        lambda: TopicBigram().sample(1, 1, 0),
        lambda: HiddenMarkov(states=0),
        lambda: RepeatedSegments(shortest=5, longest=4),
        lambda: RepeatedSegments(vocab=8, longest=20),
        lambda: RepeatedSegments(zipf=-1.0),
        lambda: RepeatedSegments().sample(1, 10, 0),
        lambda: MatchCopy(copy=-0.1),
        lambda: ClueChain(classes=10, clues=2),
        lambda: ClueChain(errors=()),
        lambda: ClueChain().sample(1, 0, shown=9),
        lambda: ClueChain().sample(1, 0, level=3),
        lambda: graph("star", 6),
        lambda: graph("grid", 7),
        lambda: graph("cliques", 7),
        lambda: GraphWalk(torch.eye(4)),
        lambda: GraphWalk(torch.zeros(3, 3)),
        lambda: GraphWalk(vocab=4),
        lambda: GraphWalk(mode="jump"),
        lambda: GraphWalk(mode="pairs").sample(1, 5, 0),
        lambda: CopySpans(stretch=10),
        lambda: CopySpans().sample(1, 60, 0),
        lambda: TwoHop(heldout=2.0),
        lambda: TwoHop(heldout=0.0).compositions("heldout"),
        lambda: TwoHop().compositions("test"),
        lambda: ModularAddition(train=1.0),
        lambda: ModularAddition().pairs("test"),
        lambda: MovingSum(rule="product"),
        lambda: RunningSums(terms=1),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_given(make):
    with pytest.raises(ValueError, match=r"\d|=|'"):
        make()
