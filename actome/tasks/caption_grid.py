"""Pictures of a few objects on a grid, with captions and questions, in which some things mostly go together.

A picture is a place with objects in some of its cells. Each cell is one token, as of a picture that was quantised patch
by patch: the background of the place, or an object in a colour. A prompt is the picture and a query:

    BEGIN patch .. patch CAPTION                         the objects, in reading order
    BEGIN patch .. patch ASK kind                        the colour of the first object of this kind
    BEGIN patch .. patch WHERE                           the place

Places have objects of their own, and kinds have a usual colour, some nearly always and some hardly more often than any
other. A test can break both, and take a colour off, so that what a model sees is told from what it expects.

Source: own construction, for concepts that fine-tuning moves (Khayatan et al. 2025, "Analyzing Fine-tuning
Representation Shift for Multimodal LLMs Steering": tuning on captions of colours and places), and for grounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import Rows, counts, seeded, share

BEGIN, END, CAPTION, ASK, WHERE, UNKNOWN = range(6)
_FIRST = 6
About = Literal["objects", "colours", "places"]


class Pictures(NamedTuple):
    """Pictures with all that is on them; N pictures, M places for objects, ordered as one reads.

    Attributes:
        patches: [N, side * side], tokens.
        places: [N].
        kinds: [N, M], -1 where there is no object any more.
        colours: [N, M], -1 where there is no object, or its colour was taken off.
    """

    patches: Tensor
    places: Tensor
    kinds: Tensor
    colours: Tensor


class Told(NamedTuple):
    """Prompts with answers.

    Attributes:
        tokens: [N, T]; what follows the answer is END.
        answers: bool as `tokens`, the mask under which `train` learns answers alone: words, and the END of a caption.
        start: position of the first answered word.
        pictures: what they are about.
    """

    tokens: Tensor
    answers: Tensor
    start: int
    pictures: Pictures

    @property
    def prompts(self) -> Tensor:
        """The prompts alone, [N, start]."""
        return self.tokens[:, : self.start]

    @property
    def first(self) -> Tensor:
        """The first word of each answer, [N]."""
        return self.tokens[:, self.start]


@dataclass(frozen=True)
class CaptionGrid:
    """Places, kinds of objects and colours, and how often they go together.

    Attributes:
        side: cells of a row and of a column.
        places: how many; kind i belongs to place i modulo this.
        kinds: how many kinds of objects.
        colours: how many.
        objects: most objects on a picture; one at least.
        belongs: share of objects that are of a kind of their picture's place.
        usual: share of objects in the usual colour of their kind, from that of kind 0 to that of the last, in equal
            steps.
        seed: of the usual colours.

    >>> world = CaptionGrid()
    >>> told = world.caption(world.pictures(100, seed=1))
    >>> bool((told.first == world.kind_word(told.pictures.kinds[:, 0])).all())
    True
    >>> broken = world.pictures(100, seed=1, belongs=0.0, usual=0.0, faded=0.5)      # what a test may do
    >>> bool((broken.kinds[:, 0] % world.places == broken.places).any())
    False
    """

    side: int = 3
    places: int = 4
    kinds: int = 12
    colours: int = 6
    objects: int = 2
    belongs: float = 0.8
    usual: tuple[float, float] = (0.2, 0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        counts(side=(self.side, 1), places=(self.places, 2), kinds=(self.kinds, self.places), colours=(self.colours, 2))
        counts(objects=(self.objects, 1))
        object.__setattr__(self, "usual", tuple(self.usual))
        share(belongs=self.belongs, usual=self.usual[0])
        share(usual=self.usual[-1])
        if self.objects > self.side**2:
            raise ValueError(f"objects={self.objects} do not fit on {self.side**2} cells; give fewer, or a larger side")

    @property
    def first_patch(self) -> int:
        """First of the patches: backgrounds, then objects by kind and colour, the last of a kind without any."""
        return _FIRST + self.kinds + self.colours + self.places

    @property
    def vocab(self) -> int:
        """Number of tokens, words and patches."""
        return self.first_patch + self.places + self.kinds * (self.colours + 1)

    @cached_property
    def usual_colour(self) -> Tensor:
        """Of every kind, [kinds]."""
        return torch.randint(self.colours, (self.kinds,), generator=seeded(self.seed))

    @cached_property
    def usual_share(self) -> Tensor:
        """How often each kind has its usual colour, [kinds]."""
        return torch.linspace(self.usual[0], self.usual[1], self.kinds)

    def kind_word(self, kinds: Tensor) -> Tensor:
        """Tokens of the words for kinds."""
        return _FIRST + kinds

    def colour_word(self, colours: Tensor) -> Tensor:
        """Tokens of the words for colours; UNKNOWN for -1."""
        return torch.where(colours < 0, UNKNOWN, _FIRST + self.kinds + colours)

    def place_word(self, places: Tensor) -> Tensor:
        """Tokens of the words for places."""
        return _FIRST + self.kinds + self.colours + places

    def pictures(
        self,
        count: int,
        seed: int,
        *,
        belongs: float | None = None,
        usual: float | None = None,
        faded: float = 0.0,
    ) -> Pictures:
        """Pictures of one to `objects` objects in cells of their own.

        Args:
            count: how many.
            seed: of the draw; usual colours have their own.
            belongs: in the place of the world's own share; 0 breaks what goes with places.
            usual: in the place of every kind's own share; 0 breaks what goes with kinds.
            faded: share of objects whose colour is taken off.
        """
        counts(count=(count, 1))
        share(belongs=self.belongs if belongs is None else belongs, usual=0.0 if usual is None else usual, faded=faded)
        generator, N, M = seeded(seed), count, self.objects
        place_N = torch.randint(self.places, (N,), generator=generator)
        own_PK = torch.arange(self.kinds) % self.places == torch.arange(self.places)[:, None]
        p = self.belongs if belongs is None else belongs
        table = p * own_PK / own_PK.sum(1, keepdim=True) + (1 - p) * ~own_PK / (~own_PK).sum(1, keepdim=True)
        kind_NM = Rows(table).draw(place_N[:, None].expand(N, M), generator)
        often = self.usual_share[kind_NM] if usual is None else torch.full((N, M), float(usual))
        as_usual_NM = torch.rand(N, M, generator=generator) < often
        shift_NM = torch.randint(1, self.colours, (N, M), generator=generator) * ~as_usual_NM
        colour_NM = (self.usual_colour[kind_NM] + shift_NM) % self.colours
        colour_NM = torch.where(torch.rand(N, M, generator=generator) < faded, -1, colour_NM)
        many_N1 = torch.randint(1, M + 1, (N, 1), generator=generator)
        there_NM = torch.arange(M) < many_N1
        cell_NM = torch.rand(N, self.side**2, generator=generator).argsort(1)[:, :M]
        # Reading order, with the objects that are not there last.
        order = torch.where(there_NM, cell_NM, self.side**2).argsort(dim=1, stable=True)
        kind_NM, colour_NM, cell_NM = (x.gather(1, order) for x in (kind_NM, colour_NM, cell_NM))
        patch_NM = self.first_patch + self.places + kind_NM * (self.colours + 1) + colour_NM % (self.colours + 1)
        ground_N1 = self.first_patch + place_N[:, None]
        patches = ground_N1.repeat(1, self.side**2).scatter(1, cell_NM, torch.where(there_NM, patch_NM, ground_N1))
        return Pictures(patches, place_N, kind_NM.where(there_NM, -1), colour_NM.where(there_NM, -1))

    def caption(self, pictures: Pictures, about: About = "objects") -> Told:
        """Captions.

        Args:
            pictures: to be told.
            about: ``"objects"``, their kinds in reading order; ``"colours"``, the colour of the first one before that;
                ``"places"``, the place before that. The last two are what a fine-tuning may ask for.
        """
        first = {"objects": None, "colours": self.colour_word(pictures.colours[:, 0])}
        first |= {"places": self.place_word(pictures.places)}
        if about not in first:
            raise ValueError(f"about={about!r} does not exist; choose objects, colours or places")
        kinds_NM = torch.where(pictures.kinds < 0, END, self.kind_word(pictures.kinds))
        words = [kinds_NM] if first[about] is None else [first[about][:, None], kinds_NM]  # type: ignore[index]
        return self._told(pictures, [CAPTION], torch.cat(words, 1), ended=True)

    def question(self, pictures: Pictures, kinds: Tensor | None = None) -> Told:
        """What colour a kind of object has; UNKNOWN where it was taken off, or no such object is there.

        Args:
            pictures: to be asked about.
            kinds: [N], that of the first object by default.
        """
        kinds = pictures.kinds[:, 0] if kinds is None else kinds
        same_NM = pictures.kinds == kinds[:, None]
        colour_N = pictures.colours.gather(1, same_NM.int().argmax(1, keepdim=True))[:, 0]
        colour_N = torch.where(same_NM.any(1), colour_N, -1)
        return self._told(pictures, [ASK, self.kind_word(kinds)], self.colour_word(colour_N)[:, None], ended=False)

    def where(self, pictures: Pictures) -> Told:
        """Which place a picture shows."""
        return self._told(pictures, [WHERE], self.place_word(pictures.places)[:, None], ended=False)

    def stream(self, count: int, seed: int, about: About = "objects", *, asked: float = 0.5) -> tuple[Tensor, Tensor]:
        """Text to train on: captions, and questions for colours and places, as ``(tokens, answers)`` for `train`.

        Args:
            count: how many.
            seed: of the draw.
            about: what captions are about.
            asked: share of questions, of either kind as many.
        """
        share(asked=asked)
        pictures = self.pictures(count, seed)
        kind_N = Rows(torch.tensor([[1 - asked, asked / 2, asked / 2]])).draw(
            torch.zeros(count, dtype=torch.long), seeded(seed + 1)
        )
        told = [self.caption(pictures, about), self.question(pictures), self.where(pictures)]
        width = max(one.tokens.shape[1] for one in told)
        tokens = torch.full((count, width), END)
        answers = torch.zeros(count, width, dtype=torch.bool)
        for which, one in enumerate(told):
            rows = kind_N == which
            tokens[rows, : one.tokens.shape[1]] = one.tokens[rows]
            answers[rows, : one.tokens.shape[1]] = one.answers[rows]
        return tokens, answers

    def _told(self, pictures: Pictures, query: list[int | Tensor], words_NW: Tensor, ended: bool) -> Told:
        N = len(pictures.patches)
        asked = [one[:, None] if isinstance(one, Tensor) else torch.full((N, 1), one) for one in query]
        prompt = torch.cat([torch.full((N, 1), BEGIN), pictures.patches, *asked], 1)
        tokens = torch.cat([prompt, words_NW, torch.full((N, 1), END)], 1)
        start, width = prompt.shape[1], words_NW.shape[1]
        count_N1 = (words_NW != END).sum(1, keepdim=True) + int(ended)
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        answers[:, start:] = torch.arange(width + 1) < count_N1
        return Told(tokens, answers, start, pictures)
