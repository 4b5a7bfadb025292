"""Pictures with captions: every picture is read again from its patches."""

import math

import pytest
import torch

from actome.tasks.caption_grid import ASK, BEGIN, CAPTION, END, UNKNOWN, WHERE, CaptionGrid

WORLD = CaptionGrid(objects=4, seed=1)


def near(counted, expected, draws):
    """Within five standard errors."""
    return abs(float(counted) - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-9) / draws)


def seen(world, patches):
    """Place and objects, (kind, colour or -1) in reading order, of a row of patches."""
    places, objects = set(), []
    for patch in patches.tolist():
        one = patch - world.first_patch
        if one < world.places:
            places.add(one)
        else:
            kind, colour = divmod(one - world.places, world.colours + 1)
            objects.append((kind, colour if colour < world.colours else -1))
    return places, objects


def test_patches_hold_all_that_is_said_of_them():
    pictures = WORLD.pictures(300, 2, faded=0.3)
    for i, row in enumerate(pictures.patches):
        places, objects = seen(WORLD, row)
        assert places == {int(pictures.places[i])}
        there = pictures.kinds[i] >= 0
        assert objects == list(zip(pictures.kinds[i, there].tolist(), pictures.colours[i, there].tolist(), strict=True))
        assert bool((pictures.colours[i, ~there] == -1).all())
        assert 1 <= len(objects) <= 4
    assert int(pictures.patches.max()) < WORLD.vocab


def test_things_go_together_as_often_as_the_world_says_and_a_test_breaks_them():
    world = CaptionGrid(seed=3)
    pictures = world.pictures(20_000, 1)
    there = pictures.kinds >= 0
    own = (pictures.kinds % world.places == pictures.places[:, None])[there]
    assert near(own.double().mean(), world.belongs, len(own))
    for kind in (0, 5, 11):
        rows = pictures.kinds == kind
        usual = (pictures.colours[rows] == world.usual_colour[kind]).double()
        assert near(usual.mean(), float(world.usual_share[kind]), len(usual))
    broken = world.pictures(5000, 1, belongs=0.0, usual=0.0, faded=0.25)
    there = broken.kinds >= 0
    assert not bool((broken.kinds % world.places == broken.places[:, None])[there].any())
    assert not bool((broken.colours == world.usual_colour[broken.kinds])[there].any())
    assert near((broken.colours[there] == -1).double().mean(), 0.25, int(there.sum()))


def test_captions_tell_kinds_in_reading_order_and_what_tuning_asks_for():
    pictures = WORLD.pictures(200, 3, faded=0.2)
    plain, colours, places = (WORLD.caption(pictures, about) for about in ("objects", "colours", "places"))
    for i, row in enumerate(pictures.patches):
        (place,), objects = seen(WORLD, row)
        words = [int(WORLD.kind_word(torch.tensor(kind))) for kind, _ in objects]
        colour = int(WORLD.colour_word(torch.tensor(objects[0][1])))
        for told, first in ((plain, []), (colours, [colour]), (places, [int(WORLD.place_word(torch.tensor(place)))])):
            assert told.tokens[i, told.answers[i]].tolist() == [*first, *words, END]
            assert told.prompts[i].tolist() == [BEGIN, *row.tolist(), CAPTION]
            assert told.first[i] == [*first, *words][0]


def test_questions_are_answered_by_the_picture():
    pictures = WORLD.pictures(400, 4, faded=0.2)
    kinds = torch.randint(WORLD.kinds, (400,), generator=torch.Generator().manual_seed(0))
    asked, first, where = WORLD.question(pictures, kinds), WORLD.question(pictures), WORLD.where(pictures)
    unknown = 0
    for i, row in enumerate(pictures.patches):
        (place,), objects = seen(WORLD, row)
        colour = next((colour for kind, colour in objects if kind == int(kinds[i])), -1)
        word = UNKNOWN if colour < 0 else int(WORLD.colour_word(torch.tensor(colour)))
        unknown += word == UNKNOWN
        assert asked.tokens[i, asked.answers[i]].tolist() == [word]
        assert asked.prompts[i, -2:].tolist() == [ASK, int(WORLD.kind_word(kinds[i]))]
        assert first.first[i] == WORLD.colour_word(torch.tensor(objects[0][1]))
        assert where.first[i] == WORLD.place_word(torch.tensor(place))
        assert where.prompts[i, -1] == WHERE
    assert 0 < unknown < 400


def test_a_stream_is_made_of_captions_and_questions():
    tokens, answers = WORLD.stream(4000, 5, "colours", asked=0.4)
    query = tokens[:, 10]
    shares = [(query == one).double().mean() for one in (CAPTION, ASK, WHERE)]
    assert all(near(got, wanted, 4000) for got, wanted in zip(shares, (0.6, 0.2, 0.2), strict=True))
    captions = WORLD.caption(WORLD.pictures(4000, 5), "colours")
    rows = query == CAPTION
    assert torch.equal(tokens[rows], captions.tokens[rows])
    assert torch.equal(answers[rows], captions.answers[rows])
    assert answers[~rows].sum(1).eq(1).all()


def test_the_same_seed_gives_the_same_pictures():
    assert torch.equal(WORLD.pictures(50, 1).patches, WORLD.pictures(50, 1).patches)
    assert not torch.equal(WORLD.pictures(50, 1).patches, WORLD.pictures(50, 2).patches)
    # What is taken off or broken leaves the rest of the picture where it is.
    assert torch.equal(WORLD.pictures(50, 1).kinds, WORLD.pictures(50, 1, faded=0.5, usual=0.0).kinds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptionGrid(places=1), "places=1"),
        (lambda: CaptionGrid(kinds=3), "kinds=3"),
        (lambda: CaptionGrid(side=1, objects=2), "do not fit on 1 cells"),
        (lambda: CaptionGrid(belongs=2.0), "belongs=2.0"),
        (lambda: CaptionGrid(usual=(0.1, 1.5)), "usual=1.5"),
        (lambda: WORLD.pictures(0, 1), "count=0"),
        (lambda: WORLD.pictures(5, 1, faded=-1.0), "faded=-1.0"),
        (lambda: WORLD.caption(WORLD.pictures(5, 1), "sizes"), "choose objects, colours or places"),
        (lambda: WORLD.stream(5, 1, asked=1.5), "asked=1.5"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
