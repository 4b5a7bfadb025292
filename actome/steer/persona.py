"""Persona vectors: a trait named in words, contrasted by instructions, as a direction to watch, add and prevent.

Letters: N responses, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from actome.core.errors import MeasureError

from .contrast import Contrast, Examples, Steering
from .states import count, states

if TYPE_CHECKING:
    import pandas as pd

    from actome.core.model import Model


@dataclass(frozen=True)
class Trait:
    """What a trait is contrasted by.

    Attributes:
        name: in words, such as "flattery".
        positive, negative: instructions that ask for it and that ask for its opposite; as many of each.
        questions: to which responses are made.
    """

    name: str
    positive: Sequence[str]
    negative: Sequence[str]
    questions: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.positive) == len(self.negative) >= 1 or not self.questions:
            raise MeasureError(
                f"a trait takes as many positive as negative instructions, and questions; {self.name!r} has "
                f"{len(self.positive)}, {len(self.negative)} and {len(self.questions)}"
            )


class Describer(Protocol):
    """Makes a `Trait` of a sentence that describes one; usually by asking a language model."""

    def __call__(self, description: str) -> Trait: ...


class Judge(Protocol):
    """Scores how far a response to a question shows a trait, 0 to 100; usually by asking a language model."""

    def __call__(self, trait: str, question: str, response: str) -> float: ...


Ask = Callable[[str, str], Any]


@dataclass(frozen=True)
class PersonaVector:
    """Fits the direction of a trait from a model's own responses under opposing instructions.

    Under each pair of instructions the model answers every question, several times; responses under positive
    instructions that score above `threshold`, and those under negative ones that score below it, are kept. The
    direction at a site is the difference between the two sets of the mean, over responses, of the mean state over a
    response's tokens.

    Args:
        sites: a name or pattern; the clamp is put where held-out responses are best separated, and `evaluate`
            chooses by what steering does.
        judge: scores responses.
        describe: makes a `Trait` of a sentence, for ``fit(model, "is cruel")``.
        prompt: puts an instruction and a question together; by default the chat template with a system message where
            the tokenizer has one, and two lines otherwise.
        rollouts: responses to each question under each instruction.
        new_tokens: of a response.
        temperature: of sampling.
        threshold: see above.
        over: ``"response"``, the mean state over a response's tokens, or ``"prompt"``, the state at the prompt's last
            token, from which the response comes: for responses of one token, whose own state tells what was said and
            need not tell what will be.
        batch_size: rows a forward.
        seed: of sampling.

    Source: Chen et al. 2025, Persona Vectors: Monitoring and Controlling Character Traits in Language Models,
    section 2.
    """

    judge: Judge
    sites: str = "blocks.*.resid.post"
    describe: Describer | None = None
    prompt: Ask | None = None
    rollouts: int = 4
    new_tokens: int = 64
    temperature: float = 1.0
    threshold: float = 50.0
    over: Literal["response", "prompt"] = "response"
    batch_size: int = 8
    seed: int = 0

    def fit(self, model: Model, trait: Trait | str) -> Steering:
        """The clamp: strength 1 adds the difference of means.

        Raises:
            MeasureError: a trait in words and nobody to describe it; a judge that gives no score; too few responses
                that show the trait, or that do not: the message says how many of how many.
        """
        if self.over not in ("response", "prompt"):
            raise MeasureError(f"over={self.over!r} does not exist here; choose 'response' or 'prompt'")
        if isinstance(trait, str):
            if self.describe is None:
                raise MeasureError("a trait in words needs describe=, which makes instructions and questions of it")
            trait = self.describe(trait)
        kept, of = self._kept(model, trait)
        few = {name: count(some) for name, some in kept.items() if count(some) < 8}
        if few:
            name, left = next(iter(few.items()))
            side = "above" if name == "positive" else "below"
            raise MeasureError(
                f"{left} of {of} responses under {name} instructions score {side} {self.threshold:g} for "
                f"{trait.name!r}, and 8 are needed: other instructions, more rollouts, or a model that follows them"
            )
        fitted = Contrast(self.sites, over=self.over, batch_size=self.batch_size, seed=self.seed).fit(
            model, Examples(kept["positive"], kept["negative"])
        )
        about = {**(fitted.about or {}), "trait": trait.name, "responses": of}
        return replace(fitted, about=about)

    def _kept(self, model: Model, trait: Trait) -> tuple[dict[str, tuple[list[str], list[str]]], int]:
        """Prompts and responses that show what they were asked for, and how many there were of each kind."""
        kept: dict[str, tuple[list[str], list[str]]] = {}
        asked = self.rollouts * len(trait.questions) * len(trait.positive)
        for kind, instructions in (("positive", trait.positive), ("negative", trait.negative)):
            prompts, responses = [], []
            for i, instruction in enumerate(instructions):
                texts = [self._prompt(model, instruction, question) for question in trait.questions]
                for rollout in range(self.rollouts):
                    said = self._answers(model, texts, self._seed(kind, i, rollout))
                    for text, question, response in zip(texts, trait.questions, said, strict=True):
                        if response and (self._score(trait, question, response) > self.threshold) == (
                            kind == "positive"
                        ):
                            prompts.append(text)
                            responses.append(response)
            kept[kind] = (prompts, responses)
        return kept, asked

    def _seed(self, kind: str, instruction: int, rollout: int) -> int:
        return ((self.seed * 1009 + instruction) * 1009 + rollout) * 2 + (kind == "positive")

    def _score(self, trait: Trait, question: str, response: str) -> float:
        score = self.judge(trait.name, question, response)
        if not isinstance(score, (int, float)) or not 0 <= score <= 100:
            raise MeasureError(f"the judge gave {score!r} for {response[:60]!r}; a score is a number from 0 to 100")
        return float(score)

    def _answers(self, model: Model, texts: list[str], seed: int) -> list[str]:
        said: list[str] = []
        for at in range(0, len(texts), self.batch_size):
            made = model.generate(
                texts[at : at + self.batch_size],
                max_new_tokens=self.new_tokens,
                seed=seed + at,
                do_sample=self.temperature > 0,
                **({"temperature": self.temperature} if self.temperature > 0 else {}),
            )
            if made.text is None:
                raise MeasureError(f"{model.name} has no tokenizer; persona vectors are fitted on text")
            said += made.text
        return said

    def _prompt(self, model: Model, instruction: str, question: str) -> str:
        if self.prompt is not None:
            return self.prompt(instruction, question)
        if getattr(model.tokenizer, "chat_template", None):
            messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
            return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return f"{instruction}\n{question}\n"


def prevent(vector: Steering, strength: float = 1.0) -> Steering:
    """The clamp to train under, so that training need not move the model along the direction itself.

    With the trait pushed from outside while a model is tuned on data that shows it, there is less for the weights to
    learn of it; without the push, afterwards, less of it is there. Use it around the training loop, and not at
    inference.

    Source: Chen et al. 2025, Persona Vectors, section 5.2 (preventative steering).
    """
    return vector.at(scale=abs(vector.scale) * strength)  # type: ignore[return-value]


def shift(base: Model, tuned: Model, vector: Steering, prompts: Any, *, batch_size: int = 8) -> Tensor:
    """How far tuning moved the last token of each prompt along a direction, (N), in units of its gap.

    Source: Chen et al. 2025, Persona Vectors, section 4.2 (finetuning shift).
    """
    sets = [
        states(model, prompts, vector.site, over="last", batch_size=batch_size)[vector.site] for model in (base, tuned)
    ]
    return (sets[1] - sets[0]) @ vector.unit / (vector.gaps or {})[vector.site]


def screen(
    model: Model, vector: Steering, prompts: Any, responses: Any, own: Any, *, batch_size: int = 8
) -> pd.DataFrame:
    """Which samples of a data set would push a model along a direction, before it is trained on them.

    Args:
        model: the one to be tuned.
        prompts, responses: the data set.
        own: the model's own responses to the same prompts.

    Returns:
        One row a sample, in the order of the data: projection (of the response), usual (of the model's own), and
        difference, in units of the direction's gap. Their mean over a data set predicts how far tuning on it shifts
        the trait; large ones are the samples to look at.

    Source: Chen et al. 2025, Persona Vectors, section 6 (projection difference).
    """
    import pandas as pd

    unit, gap = vector.unit, (vector.gaps or {})[vector.site]
    found = [
        states(model, (prompts, some), vector.site, over="response", batch_size=batch_size)[vector.site] @ unit / gap
        for some in (responses, own)
    ]
    frame = pd.DataFrame({"projection": found[0].tolist(), "usual": found[1].tolist()})
    return frame.assign(difference=frame["projection"] - frame["usual"])
