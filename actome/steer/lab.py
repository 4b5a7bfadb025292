"""Lab: everything that is measured of a model under a clamp at one strength, and of the bare model, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actome.core.clamp import Clamp
from actome.core.errors import MeasureError
from actome.measures import ngram_repetition
from actome.tasks.trials import interval

from .choices import Choices, accuracy
from .likelihood import text_nll
from .manifold import Manifold
from .placing import Placing, active, while_generating
from .preference import Pairs, odds, scaled
from .states import count, states, subset

if TYPE_CHECKING:
    from actome.core.model import Model

Interval = tuple[float, float, float]
Task = Choices | Callable[["Model"], Tensor]

# Whether more of it is damage (+1) or less (-1); of `off_manifold` none is forbidden.
HARM = {"nll": 1, "repetition": 1, "accuracy": -1}
_LAST = "blocks.*.resid.post"
_GRAM = 4


@dataclass
class Lab:
    """What to look at.

    Attributes:
        model, pairs, text, prompts, task, per_token, new_tokens, batch_size, seed: as `evaluate` takes them.
    """

    model: Model
    pairs: Pairs
    text: Any
    prompts: Any
    task: Task | None
    per_token: bool
    new_tokens: int
    batch_size: int
    seed: int
    _bare: dict[str, Interval] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.prompts is None:
            self.prompts = self.pairs.prompts
        self.end = self.model.match(_LAST)[-1].name
        clean = self._end_states()
        self.manifold = Manifold.fit(clean) if len(clean) >= 16 else None

    def at(self, clamps: Sequence[Clamp], strength: float, placing: Placing = "all") -> dict[str, Interval]:
        """Measures with their 95 % intervals over pairs, questions or rows."""
        if strength == 0.0:
            if self._bare is None:
                self._bare = self.measured((), "all")
            return self._bare
        return self.measured([scaled(one, strength) for one in clamps], placing)

    def preference(
        self, clamps: Sequence[Clamp], strength: float, placing: Placing, pairs: Pairs | None = None
    ) -> np.ndarray:
        """Log-odds of each pair."""
        some = [] if strength == 0.0 else [scaled(one, strength) for one in clamps]
        return self._odds(some, placing, pairs or self.pairs).preference.numpy()

    def _odds(self, clamps: Sequence[Clamp], placing: Placing, pairs: Pairs) -> Any:
        return odds(
            self.model,
            pairs,
            clamps=clamps,
            placing=placing,
            per_token=self.per_token,
            batch_size=self.batch_size,
        )

    def measured(self, clamps: Sequence[Clamp], placing: Placing = "all") -> dict[str, Interval]:
        """The same of clamps as they are, with a scale or without one."""
        found = self._odds(clamps, placing, self.pairs)
        out = {name: interval(getattr(found, name).numpy(), self.seed) for name in ("preference", "utility")}
        if isinstance(self.task, Choices):
            options = {"clamps": clamps, "placing": placing, "per_token": self.per_token}
            right = accuracy(self.model, self.task, batch_size=self.batch_size, **options)
            out["accuracy"] = interval(right.numpy(), self.seed)
        # Text has no prompt: there the clamp acts everywhere, which is the most that it can do.
        if self.text is not None:
            with active(self.model, clamps):
                got = text_nll(self.model, self.text, batch_size=self.batch_size)
            out["nll"] = interval(got.nll.numpy(), self.seed, got.tokens.numpy())
        placed = while_generating(clamps, placing)
        if self.task is not None and not isinstance(self.task, Choices):
            with active(self.model, placed):
                out["accuracy"] = interval(_scores(self.task(self.model)), self.seed)
        if self.new_tokens:
            with active(self.model, placed):
                out["repetition"] = interval(self._repetition(), self.seed)
        if self.manifold is not None:
            with active(self.model, placed):
                off = self.manifold.distance(self._end_states())
            out["off_manifold"] = interval(off.numpy(), self.seed)
        return out

    def _end_states(self) -> Tensor:
        found = states(self.model, self.prompts, self.end, over="last", batch_size=self.batch_size)
        return found[self.end]

    def sample(self, clamps: Sequence[Clamp], strength: float, placing: Placing, rows: int = 4) -> dict[str, Any]:
        """What some prompts are continued with: strength, prompts, continuations; texts, or ids without a tokenizer."""
        prompts = subset(self.prompts, list(range(min(count(self.prompts), rows))))
        some = [] if strength == 0.0 else [scaled(one, strength) for one in clamps]
        with active(self.model, while_generating(some, placing)):
            made = self.model.generate(prompts, max_new_tokens=self.new_tokens)
        return {
            "strength": strength,
            "prompts": [_shown(self.model, one) for one in prompts],
            "continuations": made.new.tolist() if made.text is None else list(made.text),
        }

    def _repetition(self) -> np.ndarray:
        """Of what each of the first prompts is continued with."""
        prompts = subset(self.prompts, list(range(min(count(self.prompts), self.batch_size))))
        made = self.model.generate(prompts, max_new_tokens=self.new_tokens).new
        return ngram_repetition(made, _GRAM).numpy()


def _scores(values: Any) -> np.ndarray:
    found = torch.as_tensor(values).detach().double().cpu().flatten()
    if not len(found) or not bool(found.isfinite().all()):
        raise MeasureError("task= must give a finite score for each question, such as 0 and 1")
    return found.numpy()


def _shown(model: Model, prompt: Any) -> Any:
    """A prompt as text where it can be, else as ids."""
    if isinstance(prompt, str):
        return prompt
    ids = torch.as_tensor(prompt).tolist()
    return ids if model.tokenizer is None else model.tokenizer.decode(ids)
