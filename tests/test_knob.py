"""The knob and the layers that carry an intent, on a network whose every weight is set by hand."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

import actome as ac
from actome.clamps import Add, Project, SetCoordinate, load_clamps, save_clamps
from actome.core.errors import ClampError, MeasureError, SiteError
from actome.explain import layer_range_search
from actome.steer import RankOneDAS
from actome.tasks import Subject, SubjectConfig

ITEMS, WIDTH, LAYERS = 4, 20, 4
CONTEXT, PRIOR, OPEN, FIRST_ITEM, LAST, FIRST_ANSWER = 0, 1, 2, 3, 7, 8
SITE = "blocks.1.resid.post"


@cache
def planted(seed=0):
    """A network that answers by item and intent, and the direction that holds the intent.

    Prompts are [intent, item, LAST]. Layer 1 brings the intent to the last position, along the direction, +1 for
    context and -1 for prior; layer 2 brings the item; the MLP of layer 3 has a unit for each item and intent. All of
    it is turned by a random rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    config = SubjectConfig(
        vocab=FIRST_ANSWER + 2 * ITEMS, d_model=WIDTH, layers=LAYERS, heads=1, context=4, d_mlp=2 * ITEMS,
        act="relu", bias=True, norm="none", positions="none",
    )  # fmt: skip
    subject = Subject.fresh(config)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    gate = F.pad(F.normalize(torch.randn(3, generator=generator), dim=0), (9, WIDTH - 12))
    with torch.no_grad():
        for parameter in subject.parameters():
            parameter.zero_()
        embed = torch.zeros(config.vocab, WIDTH)
        embed[CONTEXT, 8], embed[PRIOR, 8] = 1.0, -1.0
        embed[FIRST_ITEM : FIRST_ITEM + ITEMS, :ITEMS] = torch.eye(ITEMS)
        subject.embed.weight.copy_(embed @ turn)
        # Queries and keys are zero, so that the last position takes a third of each of the three.
        carries = torch.zeros(WIDTH, WIDTH)
        carries[0, 8] = 3.0
        writes = torch.zeros(WIDTH, WIDTH)
        writes[:, 0] = gate
        subject.blocks[1].attn.qkv.weight[2 * WIDTH :] = carries @ turn
        subject.blocks[1].attn.out.weight.copy_(turn.T @ writes)
        carries, writes = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
        carries[:ITEMS, :ITEMS] = 3 * torch.eye(ITEMS)
        writes[ITEMS : 2 * ITEMS, :ITEMS] = torch.eye(ITEMS)
        subject.blocks[2].attn.qkv.weight[2 * WIDTH :] = carries @ turn
        subject.blocks[2].attn.out.weight.copy_(turn.T @ writes)
        mlp, up, down = subject.blocks[3].mlp, torch.zeros(2 * ITEMS, WIDTH), torch.zeros(WIDTH, 2 * ITEMS)
        for item in range(ITEMS):
            for unit, sign in ((2 * item, 1.0), (2 * item + 1, -1.0)):
                up[unit] = sign * gate
                up[unit, ITEMS + item] = 1.0
                down[12 + unit, unit] = 1.0
        mlp.up.weight.copy_(up @ turn)
        mlp.up.bias.fill_(-1.0)
        mlp.down.weight.copy_(turn.T @ down)
        unembed = torch.zeros(config.vocab, WIDTH)
        unembed[FIRST_ANSWER:, 12:] = 3 * torch.eye(2 * ITEMS)
        subject.unembed.weight.copy_(unembed @ turn)
    return ac.wrap(subject), gate @ turn


def prompt(intent, item):
    return [intent, FIRST_ITEM + item, LAST]


def answer(intent, item):
    return FIRST_ANSWER + 2 * item + intent


def pairs():
    """Base inputs, sources, labels, the sources' answers and intents: all pairs of two items and opposite intents."""
    some = [
        (prompt(1 - to, item), prompt(to, other), answer(to, item), answer(to, other), ["context", "prior"][to])
        for to in (CONTEXT, PRIOR)
        for item in range(ITEMS)
        for other in range(ITEMS)
        if item != other
    ]
    base, source, labels, answers, intents = zip(*some, strict=True)
    return torch.tensor(base), torch.tensor(source), torch.tensor(labels), torch.tensor(answers), list(intents)


def answered(model, intent):
    return model.logits(torch.tensor([prompt(intent, item) for item in range(ITEMS)]))[:, -1].argmax(-1)


def fitted(model, site=SITE, **options):
    base, source, labels, _, intents = pairs()
    search = RankOneDAS(site, epochs=100, lr=4e-2, batch_size=24, **options)
    return search.fit(model, base, source, labels, intents=intents)


@cache
def found_at(site):
    return fitted(planted()[0], site)


def test_the_network_is_what_it_says():
    model, _ = planted()
    for intent in (CONTEXT, PRIOR):
        assert answered(model, intent).tolist() == [answer(intent, item) for item in range(ITEMS)]


def test_the_planted_direction_is_found_and_turns_the_network_without_an_intent():
    model, direction = planted()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    found = fitted(model)
    assert abs(float(F.cosine_similarity(found.unit, direction, dim=0))) > 0.98
    assert float(found.unit.norm()) == pytest.approx(1.0, abs=1e-6)
    assert abs(found.means["context"]) == pytest.approx(1.0, abs=0.05)
    assert found.means["prior"] == pytest.approx(-found.means["context"], abs=0.05)
    assert found.losses[-1] < found.losses[0] / 2
    for intent, name in enumerate(("context", "prior")):
        wanted = [answer(intent, item) for item in range(ITEMS)]
        for asked in (OPEN, CONTEXT, PRIOR):
            with model.clamp(found.knob(name)):
                assert answered(model, asked).tolist() == wanted
    # The model is as it was, and its parameters ask for gradients again.
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.module.named_parameters())


def test_random_directions_with_constants_found_the_same_way_do_not_turn_it():
    model, direction = planted()
    generator = torch.Generator().manual_seed(5)
    states = model.record(torch.tensor([prompt(PRIOR, item) for item in range(ITEMS)]), SITE, positions=-1)[SITE][:, 0]
    for _ in range(5):
        unit = torch.randn(WIDTH, generator=generator)
        unit = F.normalize(unit - (unit @ direction) * direction, dim=0)
        with model.clamp(SetCoordinate(SITE, unit, float((states @ unit).mean()), positions=-1)):
            assert answered(model, CONTEXT).tolist() == [answer(CONTEXT, item) for item in range(ITEMS)]


def test_before_the_intent_has_come_there_is_nothing_to_find():
    model, _ = planted()
    found = found_at("blocks.0.resid.post")
    with model.clamp(found.knob("prior")):
        assert answered(model, CONTEXT).tolist() == [answer(CONTEXT, item) for item in range(ITEMS)]


def test_separation_is_told_by_the_intents_of_the_fit():
    model, _ = planted()
    found = found_at(SITE)
    inputs = [prompt(CONTEXT, 0), prompt(CONTEXT, 1), prompt(PRIOR, 2), prompt(PRIOR, 3)]
    kinds = ["context", "context", "prior", "prior"]
    assert found.separation(model, inputs, kinds) == 1.0
    assert found.separation(model, inputs, kinds[::-1]) == 0.0
    assert found.separation(model, [prompt(OPEN, 0)] * 4, kinds) == 0.5
    torch.testing.assert_close(
        found.coordinates(model, inputs), torch.tensor([found.means[kind] for kind in kinds]), rtol=0, atol=0.02
    )


def test_rows_of_several_lengths_are_read_at_their_own_last_token():
    model, direction = planted()
    # Items first and the intent later: rows of four tokens carry three quarters of the intent, and are flipped as well.
    base, source, labels, _, intents = pairs()
    rows = [one if i % 2 else one[1:] for i, one in enumerate(base.tolist())]
    sources = [one if i % 3 else [one[0], one[0], *one[1:]] for i, one in enumerate(source.tolist())]
    found = RankOneDAS(SITE, epochs=1).fit(model, rows, sources, labels, intents=intents)
    separate = torch.cat([model.record([one], SITE, positions=-1)[SITE][:, 0] for one in sources]) @ found.unit
    torch.testing.assert_close(found.coordinates(model, sources), separate, rtol=1e-4, atol=1e-5)
    assert direction.shape == found.unit.shape


def test_the_same_seed_gives_the_same_direction_and_a_knob_survives_the_disk(tmp_path):
    model, _ = planted()
    found, again = found_at(SITE), fitted(model)
    assert torch.equal(found.unit, again.unit)
    folder = save_clamps(tmp_path / "knob", [found.knob("context"), found.knob("prior", scale=0.5)], model=model)
    context, prior = load_clamps(folder, model)
    assert (context.positions, prior.scale, prior.value) == (-1, 0.5, found.means["prior"])
    with model.clamp(context):
        assert answered(model, OPEN).tolist() == [answer(CONTEXT, item) for item in range(ITEMS)]


def test_a_site_that_is_written_in_place_can_be_fitted():
    found = found_at("blocks.1.resid.mid")
    assert abs(float(F.cosine_similarity(found.unit, planted()[1], dim=0))) > 0.98


def test_bfloat16_models_are_fitted_too():
    model, direction = planted.__wrapped__()
    low = ac.wrap(model.module.to(torch.bfloat16))
    assert abs(float(F.cosine_similarity(fitted(low).unit, direction, dim=0))) > 0.95


def test_bad_pairs_are_refused():
    model, _ = planted()
    base, source, labels, _, intents = pairs()
    with pytest.raises(MeasureError, match="23 labels"):
        RankOneDAS(SITE).fit(model, base, source, labels[1:], intents=intents)
    with pytest.raises(MeasureError, match="pairs for two intents"):
        RankOneDAS(SITE).fit(model, base, source, labels, intents=["prior"] * len(labels))
    with pytest.raises(MeasureError, match="above zero"):
        RankOneDAS(SITE, epochs=0).fit(model, base, source, labels, intents=intents)
    with pytest.raises(MeasureError, match="one site with a vector a token"):
        RankOneDAS("blocks.*.resid.post").fit(model, base, source, labels, intents=intents)
    with pytest.raises(SiteError, match="nearest"):
        RankOneDAS("blocks.1.resid.pots").fit(model, base, source, labels, intents=intents)
    found = RankOneDAS(SITE, epochs=1).fit(model, base, source, labels, intents=intents)
    with pytest.raises(MeasureError, match="the fit had context, prior"):
        found.knob("neither")
    with pytest.raises(MeasureError, match="one kind for each"):
        found.separation(model, base, ["context"])
    with pytest.raises(MeasureError, match="not of two intents"):
        found.separation(model, base[:1], ["neither"])


# -- the layers -------------------------------------------------------------------------------------------------------


def test_the_layers_are_the_one_that_brings_the_intent():
    model, _ = planted()
    base, source, labels, answers, _ = pairs()
    found = layer_range_search(model, base, source, labels, source_answers=answers)
    assert (found.start, found.end, found.rate) == (1, 1, 1.0)
    ends = found.frame[found.frame["start"] == 0]
    assert ends["flipped"].tolist() == [0.0, 1.0, 0.0, 0.0]  # from layer 2 on the item comes along
    assert ends["imported"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert len(found.frame) == LAYERS + found.end


def test_patching_every_position_is_another_question():
    model, _ = planted()
    base, source, labels, answers, _ = pairs()
    others = layer_range_search(model, base, source, labels, source_answers=answers, pos=0)
    assert others.rate == 0.0


def test_a_range_is_given_where_more_is_imported_than_flipped_and_says_so():
    model, _ = planted()
    base, source, labels, answers, _ = pairs()
    # Layer 2 alone brings the source's item and leaves the intent; what is asked for here never comes.
    found = layer_range_search(model, base, source, labels + 100, source_answers=answers)
    assert found.rate == 0.0
    last = layer_range_search(model, base, source, labels + 100, source_answers=answers, sites="blocks.{2..3}.attn.out")
    assert last.rate == 0.0


def test_layers_are_searched_in_parts_alike():
    model, _ = planted()
    base, source, labels, answers, _ = pairs()
    whole = layer_range_search(model, base, source, labels, source_answers=answers)
    parts = layer_range_search(model, base, source, labels, source_answers=answers, batch_size=5)
    assert whole.frame.equals(parts.frame)


def test_bad_pairs_for_layers_are_refused():
    model, _ = planted()
    base, source, labels, _, _ = pairs()
    with pytest.raises(MeasureError, match="very answer that their base input should change to"):
        layer_range_search(model, base, source, labels, source_answers=labels)
    with pytest.raises(MeasureError, match="as many of each"):
        layer_range_search(model, base, source, labels[1:])
    with pytest.raises(MeasureError, match="one length"):
        layer_range_search(model, base, source[:, 1:], labels)
    with pytest.raises(MeasureError, match="near=0"):
        layer_range_search(model, base, source, labels, near=0)


# -- the clamp --------------------------------------------------------------------------------------------------------


def test_setting_a_coordinate_is_projecting_out_and_adding():
    model, direction = planted()
    inputs = torch.tensor([prompt(CONTEXT, 1), prompt(PRIOR, 2)])
    with model.clamp(SetCoordinate(SITE, 7 * direction, 0.3)):
        one = model.record(inputs, SITE)[SITE]
    with model.clamp(Project(SITE, direction), Add(SITE, 0.3 * direction)):
        two = model.record(inputs, SITE)[SITE]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    with model.clamp(SetCoordinate(SITE, direction, 0.3, scale=0.0)):
        same = model.record(inputs, SITE)[SITE]
    torch.testing.assert_close(same, model.record(inputs, SITE)[SITE])


def test_a_value_for_each_row():
    model, direction = planted()
    inputs = torch.tensor([prompt(CONTEXT, 1), prompt(PRIOR, 2)])
    with model.clamp(SetCoordinate(SITE, direction, torch.tensor([[2.0], [-3.0]]), positions=-1)):
        set_to = model.record(inputs, SITE)[SITE] @ direction
    torch.testing.assert_close(set_to[:, -1], torch.tensor([2.0, -3.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(set_to[:, :-1], (model.record(inputs, SITE)[SITE] @ direction)[:, :-1])


def test_directions_and_values_that_do_not_fit_are_refused():
    model, direction = planted()
    inputs = torch.tensor([prompt(CONTEXT, 1), prompt(PRIOR, 2)])
    for bad in (None, torch.zeros(WIDTH), torch.ones(2, WIDTH), torch.full((WIDTH,), float("nan"))):
        with pytest.raises(ClampError, match="finite and not zero"):
            SetCoordinate(SITE, bad)
    with pytest.raises(ClampError, match="width 3"), model.clamp(SetCoordinate(SITE, torch.ones(3))):
        model.logits(inputs)
    many = SetCoordinate(SITE, direction, torch.ones(5, 1))
    with pytest.raises(ClampError, match="one for each row and position"), model.clamp(many):
        model.logits(inputs)
