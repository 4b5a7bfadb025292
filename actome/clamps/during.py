"""Clamps that come on and go off with the steps of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core.clamp import Clamp
from ..core.clamping import ClampContext
from ..core.errors import ClampError

if TYPE_CHECKING:
    from ..core.model import Model

Steps = range | slice | Callable[[int], bool] | None


class ClampSchedule:
    """What `clamp_during` gives: clamps that follow the steps of a training.

    Attributes:
        step: steps done; the next forward is that of this step.
        fired: how often any of the clamps changed a tensor so far.
    """

    def __init__(self, model: Model, clamps: tuple[Clamp, ...], on: Steps):
        if not clamps:
            raise ClampError("clamp_during() was given no clamp")
        if not (on is None or isinstance(on, range | slice) or callable(on)):
            raise ClampError(
                f"on={on!r}: give the steps as a range, a slice such as slice(100, None), a function of the step, or "
                "None for all of them"
            )
        self.model, self.clamps, self.on = model, clamps, on
        self.step = self._fired = 0
        self._told = False
        self._open: ClampContext | None = None

    @property
    def fired(self) -> int:
        return self._fired + (self._open.fired if self._open is not None else 0)

    def is_on(self, step: int) -> bool:
        """Whether the clamps hold in the forwards of a step."""
        if self.on is None:
            return True
        if isinstance(self.on, slice):
            start, stop, stride = self.on.start or 0, self.on.stop, self.on.step or 1
            return step >= start and (stop is None or step < stop) and (step - start) % stride == 0
        return step in self.on if isinstance(self.on, range) else bool(self.on(step))

    def __call__(self, step: int, loss: float | None = None, module: Any = None) -> None:
        """Goes on to the step after `step` steps were done; to be given as ``train(..., on_step=schedule)``."""
        self.step, self._told = step, True
        self._follow()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the clamps off for a while, such as to evaluate the model as it is between two steps."""
        was_open = self._open is not None
        self._close()
        try:
            yield
        finally:
            if was_open:
                self._follow()

    def __enter__(self) -> ClampSchedule:
        self.step = self._fired = 0
        self._told = False
        self._follow()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._close(kind)
        if kind is not None:
            return
        if self.on is not None and not self._told:
            raise ClampError(
                f"clamp_during(on={self.on!r}) was never told of a step; give it as train(..., on_step=schedule), or "
                "call schedule(step) after each step of your own loop"
            )
        if not self._fired:
            raise ClampError(
                f"clamp_during(on={self.on!r}) never came on: the training ended after {self.step} steps"
                if not self.is_on(0)
                else "clamp_during() never fired: no forward reached the sites inside the with block"
            )

    def _follow(self) -> None:
        if not self.is_on(self.step):
            self._close()
        elif self._open is None:
            self._open = self.model.clamp(*self.clamps)
            self._open.__enter__()

    def _close(self, kind: type[BaseException] | None = None) -> None:
        context, self._open = self._open, None
        if context is None:
            return
        self._fired += context.fired
        # It may have been opened for a step that did not come any more, which is no fault; an idle clamp is.
        ran = any(one.reached for one in context.active)
        context.__exit__(kind if ran else ClampError, None, None)


def clamp_during(model: Model, *clamps: Clamp, on: Steps = None) -> ClampSchedule:
    """Holds clamps during a training, in the steps that `on` names.

    For all steps ``with model.clamp(...): train(...)`` is enough; this adds the schedule and `ClampSchedule.paused`.

    Args:
        model: around the module that is trained.
        clamps: as for `Model.clamp`.
        on: steps, counted from 0, in whose forward and backward passes the clamps hold: a range, a slice
            (``slice(100, None)`` is from step 100 on), a function of the step; ``None`` for all.

    Returns:
        A context manager, which is also the ``on_step`` of `actome.tasks.train`; in a loop of your own call it with the
        number of steps done after each of them.

    Raises:
        ClampError: no clamp, an `on` of another kind; on leaving, clamps that never came on or never fired, and a
            schedule that was never told of a step.

    Example:
        >>> import actome as ac, torch
        >>> from actome.tasks import Subject, SubjectConfig, train
        >>> subject = Subject.fresh(SubjectConfig(vocab=8, d_model=16, heads=2, context=16))
        >>> clamp = ac.Ablate("blocks.0.attn.z", heads=[0])
        >>> with clamp_during(ac.wrap(subject), clamp, on=range(2, 5)) as schedule:
        ...     _ = train(subject, lambda step: torch.zeros(4, 8, dtype=torch.long), steps=10, on_step=schedule)
        >>> schedule.fired
        3

    Source: Singh et al. 2024, What needs to go right for an induction head?; from a step on, Gopalani and Hu 2025,
    What Happens During the Loss Plateau?
    """
    return ClampSchedule(model, clamps, on)
