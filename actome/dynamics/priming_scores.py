"""How far a new fact leaks: what a few steps on one text do to its keyword in other contexts.

A model is shown one text a few times among ordinary ones. It then knows the keyword in that text's context, which is
wanted, and expects it more in other contexts as well, which is not. How much more follows from how unlikely the keyword
was before.

Source: Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it" (the scores, their prediction, and
stepping stones; `actome.tune.IgnoreTopK` is the other remedy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError, nearest
from actome.dynamics.changepoints import ChangePoint, change_point
from actome.tasks.losses import TrainingError, logits_of, next_token_loss

if TYPE_CHECKING:
    import pandas as pd

Prefixes = Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Fact:
    """One new fact.

    Attributes:
        context: (pos) token ids, what stands before the keyword.
        key: (tokens) ids of the keyword.
        theme: which of the thematic prefixes it is tried on.
        far: prefixes of which other themes are the control; all others when left out.
        other: (tokens) a keyword that is not taught, for the null; that of another sample when left out.
        text: (pos) what is trained on; context and keyword when left out.
    """

    context: Tensor
    key: Tensor
    theme: str
    far: tuple[str, ...] | None = None
    other: Tensor | None = None
    text: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        return torch.cat([self.context, self.key]) if self.text is None else self.text


def priming(
    model: Any, samples: Sequence[Fact], theme_prefixes: Mapping[str, Prefixes], steps: int = 20, *,
    batches: Callable[[int], Tensor] | None = None, every: int = 1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    r"""Teaches a model each sample by itself and says how far it leaks; the model comes back as it was.

    .. math::
        S_\mathrm{mem} = \frac{P_\mathrm{after}(key | X_c)}{P_\mathrm{before}(key | X_c)}, \qquad
        S_\mathrm{prime} = \mathrm{mean}_j \frac{P_\mathrm{after}(key | X_{T,j})}{P_\mathrm{before}(key | X_{T,j})}

    with the sample's context :math:`X_c` and the prefixes :math:`X_{T,j}` of its theme. A keyword that is unlikely on
    the prefixes has little in the denominator of S_prime, so some of its fall with P_before comes by construction: look
    at ``log_p_theme_after`` too, and at the null.

    Args:
        model: a causal language model, bare or wrapped.
        samples: the facts; each is taught to the model as it is given.
        theme_prefixes: for each theme token ids (n, pos), or a list of (pos) of any lengths.
        steps: of the optimizer, for each sample.
        batches: ordinary token ids (rows, pos) for each step, of one padding-free length; by default the sample is
            alone.
        every: the sample is among the batch at every so many steps, from the first on.
        optimizer: makes one of the parameters, anew for each sample; Adam at 3e-4 by default.
        seed: of dropout, and of which keyword is whose null.

    Returns:
        One row for each sample: ``sample``, ``theme``, ``log_p_before``, ``log_p_after`` (of the keyword in its
        context, in nats), ``s_mem``, ``s_prime``, ``s_prime_far`` (prefixes of other themes), ``s_prime_null`` (the
        same prefixes, a keyword that was not taught), ``log_p_theme_before`` and ``log_p_theme_after`` (means of logs
        over the theme's prefixes).

    Raises:
        MeasureError: no sample, a theme without prefixes, or a step without anything to train on.
        TrainingError: the loss is not finite.

    >>> from actome.tasks import Subject, SubjectConfig
    >>> subject = Subject.fresh(SubjectConfig(vocab=16, d_model=16, layers=1, heads=2, context=8))
    >>> fact = Fact(torch.tensor([0, 1, 2]), torch.tensor([9]), theme="a", other=torch.tensor([8]))
    >>> prefixes = {"a": torch.tensor([[0, 1, 3]]), "b": torch.tensor([[0, 5, 6]])}
    >>> frame = priming(subject, [fact], prefixes, steps=5)
    >>> bool(frame.s_mem[0] > frame.s_prime[0] > frame.s_prime_null[0])
    True
    """
    import pandas as pd

    module = getattr(model, "module", model)
    samples = _checked(samples, theme_prefixes, steps, every, batches)
    others = [_other(samples, i, seed) for i in range(len(samples))]
    rows = []
    for i, (sample, other) in enumerate(zip(samples, others, strict=True)):
        far = [name for name in theme_prefixes if name != sample.theme] if sample.far is None else sample.far
        asked = {
            "context": ([sample.context], sample.key),
            "theme": (theme_prefixes[sample.theme], sample.key),
            "far": ([row for name in far for row in theme_prefixes[name]], sample.key),
            "null": (theme_prefixes[sample.theme], other),
        }
        with _restored(module):
            before = {name: keyword_log_probs(module, *one) for name, one in asked.items()}
            _teach(module, sample.trained, steps, batches, every, optimizer, seed)
            after = {name: keyword_log_probs(module, *one) for name, one in asked.items()}
        ratio = {name: float((after[name] - before[name]).exp().mean()) for name in asked}
        rows.append(
            {
                "sample": i, "theme": sample.theme, "log_p_before": float(before["context"]),
                "log_p_after": float(after["context"]), "s_mem": ratio["context"], "s_prime": ratio["theme"],
                "s_prime_far": ratio["far"], "s_prime_null": ratio["null"],
                "log_p_theme_before": float(before["theme"].mean()), "log_p_theme_after": float(after["theme"].mean()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def keyword_log_probs(module: nn.Module, prefixes: Prefixes, key: Tensor) -> Tensor:
    """log P(keyword | prefix) in nats, (prefixes), float64; the sum over the keyword's tokens.

    Args:
        prefixes: (n, pos) or a list of (pos), of any lengths.
        key: (tokens).
    """
    device = next(module.parameters()).device
    rows = [torch.cat([row.to(device), key.to(device)]) for row in prefixes]
    found = torch.empty(len(rows), dtype=torch.float64)
    for length in {len(row) for row in rows}:
        here = [i for i, row in enumerate(rows) if len(row) == length]
        logits = logits_of(module(torch.stack([rows[i] for i in here])))[:, -len(key) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        found[here] = log_p.gather(-1, key.to(device)[None, :, None].expand(len(here), -1, 1)).sum((1, 2)).cpu()
    return found


def stepping_stone(model: Any, sample: Fact, stones: Iterable[Tensor]) -> Fact:
    """The same fact told by way of likelier words, so that its keyword comes as less of a surprise.

    Of the given ways the one is taken that makes the telling as likely as can be: the largest
    P(stone | context) P(keyword | context, stone).

    Args:
        model: as in `priming`, as it is before the fact.
        sample: the fact.
        stones: token ids (tokens) that may stand between context and keyword, connecting words among them.

    Returns:
        The sample with the stone at the end of its context; ``text`` is made anew.

    Raises:
        MeasureError: no stone.
    """
    module = getattr(model, "module", model)
    ways = list(stones)
    if not ways:
        raise MeasureError("no stone was given: token ids that may stand between the context and the keyword")
    scores = [float(keyword_log_probs(module, [sample.context], torch.cat([way, sample.key]))) for way in ways]
    best = ways[int(np.argmax(scores))]
    return dataclasses.replace(sample, context=torch.cat([sample.context, best]), text=None)


def priming_threshold(frame: pd.DataFrame, **options: Any) -> ChangePoint:
    """Where log10 S_prime bends over log10 P_before: two joined lines, with a permutation test and an interval.

    The paper finds keywords below a probability of about 1e-3 to prime; ``10 ** found.at`` is that probability.

    Args:
        frame: of `priming`; samples of one and the same probability are averaged.
        options: of `change_point`.
    """
    points = frame.assign(x=frame["log_p_before"] / np.log(10), y=np.log10(frame["s_prime"])).groupby("x")["y"].mean()
    return change_point(points.index.to_numpy(), points.to_numpy(), joined=True, **options)


def _checked(
    samples: Sequence[Fact], prefixes: Mapping[str, Prefixes], steps: int, every: int, batches: Any
) -> list[Fact]:
    if isinstance(samples, Fact) or not samples:
        given = "one Fact by itself" if samples else "no sample"
        raise MeasureError(f"{given} was given; want a list of Fact(context, key, theme)")
    if steps < 1 or every < 1 or (batches is None and every > 1):
        raise MeasureError(f"steps={steps}, every={every}: give 1 or more, and batches= for the steps between")
    for i, sample in enumerate(samples):
        for theme in (sample.theme, *(sample.far or ())):
            if theme not in prefixes or not len(prefixes[theme]):
                raise MeasureError(f"sample {i}: no prefixes of the theme {theme!r}{nearest(theme, prefixes)}")
        if sample.far == () or (sample.far is None and len(prefixes) < 2):
            raise MeasureError(f"sample {i} has no other theme for the control; give prefixes of two themes")
        for name in ("context", "key", "other", "text"):
            ids = getattr(sample, name)
            if ids is not None or name in ("context", "key"):
                _check_ids(f"sample {i}: {name}", ids)
    for theme, rows in prefixes.items():
        for row in rows:
            _check_ids(f"prefixes of the theme {theme!r}: each", row)
    return list(samples)


def _check_ids(what: str, ids: Any) -> None:
    if isinstance(ids, Tensor) and ids.ndim == 1 and len(ids) and not (ids.is_floating_point() or ids.is_complex()):
        return
    got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
    raise MeasureError(f"{what} is a tensor of token ids (pos), one at least, not {got}")


def _other(samples: Sequence[Fact], i: int, seed: int) -> Tensor:
    if samples[i].other is not None:
        return samples[i].other
    different = [one.key for one in samples if not torch.equal(one.key, samples[i].key)]
    if not different:
        raise MeasureError("all samples have one keyword, so there is no null; give Fact(..., other=...)")
    return different[int(np.random.default_rng([seed, i]).integers(len(different)))]


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and afterwards as it was."""
    kept, training = {name: value.detach().clone() for name, value in module.state_dict().items()}, module.training
    module.eval()
    try:
        yield
    finally:
        module.load_state_dict(kept)
        module.zero_grad(set_to_none=True)
        module.train(training)


def _teach(module: nn.Module, text: Tensor, steps: int, batches: Any, every: int, optimizer: Any, seed: int) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    make = optimizer or (lambda params: torch.optim.Adam(params, lr=3e-4))
    chosen, device = make(parameters), parameters[0].device
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module.train()
        for step in range(steps):
            rows = [] if batches is None else list(batches(step))
            rows += [text] if step % every == 0 else []
            if not rows:
                raise MeasureError(f"step {step} has nothing to train on: batches({step}) gave no row")
            # On the right, where a causal model does not see it, and no target.
            tokens = nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            loss = next_token_loss(module, tokens, real)
            if not bool(loss.isfinite()):
                raise TrainingError(f"the loss of step {step} is {loss.item()}; take a smaller learning rate")
            chosen.zero_grad()
            loss.backward()
            chosen.step()
        module.eval()
