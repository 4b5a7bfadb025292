"""Watch: one line in a training loop that says what happens inside."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actome.core.errors import ActomeError, MeasureError, RunError
from actome.core.load import wrap
from actome.core.model import Model

from ..alarms.base import Alarm, Reading
from ..store import RunStore
from ..writer import RunWriter
from .cadence import Cadence, StepClock
from .logbook import Logbook
from .looks import Looker, origin
from .norms import EXACT
from .optimizers import OptimizerWatch, unwrapped
from .probe import TOKENS, check_share, probe_batches
from .ranks import Ranks
from .scalars import Scalar, Step, fetched, mean, named, scalar
from .unwrap import unwrap
from .untouched import untouched

# Scalars wait no longer than this before they are fetched, written and shown to the detectors.
_STEPS, _SECONDS = 50, 1.0
# Of the budget the scalars of every step, the norms and the writing may take a third, and the panel the rest.
_SHARE = 1 / 3
# So many looks in a row may fail before no more are taken.
_FAILURES = 3
_INITIAL = "initial_weights"


def watch(model: Model | nn.Module, panel: Any = "training", **options: Any) -> Watch:
    """Watches the training of a network from one line in its loop; see `Watch` for every option.

    Example:
        >>> import tempfile, torch, actome as ac
        >>> from actome.tasks import Subject, SubjectConfig
        >>> module = Subject.fresh(SubjectConfig(vocab=16, d_model=16, heads=2, layers=1, context=32))
        >>> optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        >>> tokens = torch.arange(16).repeat(2)[:32].repeat(4, 1)
        >>> with ac.watch(module, text=tokens, run=f"{tempfile.mkdtemp()}/a", every=10) as watch:
        ...     for _ in range(20):
        ...         logits = module(tokens).logits[:, :-1]
        ...         loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...         watch.step(loss)
        >>> from actome.dynamics import RunStore
        >>> run = RunStore.open(watch.path)
        >>> len(run.scalars("loss")), run.scalars("effective_rank").index.tolist()
        (20, [0, 10, 20])
    """
    return Watch(model, panel, **options)


class Watch:
    """A training that is watched; a context manager around its loop, made by `actome.watch`.

    `step` is called once for each step of the optimizer, after it, or after every backward pass where several make one
    step. Nothing of the training changes by it: weights, gradients, buffers, modes and random numbers are bit for bit
    those of the same loop without it.

    Args:
        model: the module that is trained, or a `Model` of it; whatever `torch.compile`, `DistributedDataParallel` and
            PEFT wrap around it is looked through.
        panel: what is measured at the probe: a panel's name, a `Panel`, or a mapping as `Model.measure` takes it; None
            for scalars and norms only.
        text: the probe. Strings (read by `tokenizer`, packed into rows of `context` tokens, up to `tokens` of them), a
            `Text`, token ids, or batches as the forward takes them; always the same, and not part of the training data.
        run: the folder of the run, or a `RunWriter`, which is then left open.
        optimizer: the one or those that train it; found at its first step when not given.
        every: ``"auto"`` keeps within `budget`; a number looks at each so-manieth step whatever it costs.
        budget: the share of the training's time that watching may add. A third of it is for scalars, norms and writing.
        steps: how long the run will be, if known: half of the budget then goes to looks at the steps 1, 2, 4, 8, ...
        alarms: True for the detectors of `actome.dynamics.alarms`, False for none; detectors, or an `Alarms`.
        actions: what to do about alarms, by name, level or ``"*"``; see `actome.dynamics.alarms`.
        config: of the run, kept with it.
        tokenizer, context, tokens: for a probe of strings.
        autocast: the dtype that the forwards of the training are cast to, so that the probe's are too.
        scaler: the `GradScaler`, if there is one, so that its scale is logged and steps that it skips are told apart.
        guard: whether a few gradients are looked at before each update, so that values that are not finite are traced to
            their site while the weights are still whole. By default on the CPU, where it takes microseconds; on an
            accelerator it waits for the device at each step.
        resume: True goes on with the run that `run` holds; a number does so from the checkpoint of this step.
        store: options of `RunWriter`, such as ``{"sinks": [...], "overwrite": True}``.

    Attributes:
        at: the step that was last made; 0 before the first.
        module, optimizers: what is watched, without what is wrapped around it.
        run: the `RunWriter`; None in processes that do not write.
        path: the run's folder.
        should_stop, reason: whether an alarm's action asked the training to end, and why. The loop may ask it.
        alarms: what was raised so far.
        skipped: what the panel has and this network has no place for.

    Raises:
        RunError: another writer, or a run that is there already; an optimizer of another network; sharded weights.
        TextError: an empty probe, text without a tokenizer or too short for a row.
        MeasureError, SiteError: a panel that does not exist or has no site in this network.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        panel: Any = "training",
        *,
        text: Any = None,
        run: Any,
        optimizer: Any = None,
        every: int | Literal["auto"] = "auto",
        budget: float = 0.03,
        steps: int | None = None,
        alarms: Any = True,
        actions: Mapping[str, Any] | None = None,
        config: Any = None,
        tokenizer: Any = None,
        context: int | None = None,
        tokens: int = TOKENS,
        autocast: torch.dtype | None = None,
        scaler: Any = None,
        guard: bool | None = None,
        resume: bool | int = False,
        store: Mapping[str, Any] | None = None,
    ):
        if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise MeasureError(f"every={every!r}: 'auto', or a number of steps, 1 or more")
        if not 0 < budget < 1:
            raise MeasureError(f"budget={budget}: the share of the training's time that watching may add, such as 0.03")
        if panel is not None and text is None:
            raise MeasureError("a panel is measured at a probe: give text=, or panel=None for scalars and norms only")
        if isinstance(model, Model):
            self.model = model if unwrap(model.module) is model.module else wrap(unwrap(model.module), model.tokenizer)
        else:
            self.model = wrap(unwrap(model))
        if tokenizer is not None and self.model.tokenizer is not tokenizer:
            self.model = wrap(self.model.module, tokenizer, name=self.model.name, example=self.model.example)
        self._panel, self._text, self._context, self._tokens = panel, text, context, tokens
        self._to, self._config, self._resume, self._store = run, config, resume, dict(store or {})
        self._given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
        self._autocast, self._scaler = autocast, scaler
        self._detect, self._actions = alarms, actions
        self._guard = self.model.device.type == "cpu" if guard is None else guard
        self.module = self.model.module
        self.run: RunWriter | None = None
        self.at = 0
        self.should_stop, self.reason = False, ""
        self.alarms: list[Alarm] = []
        self.skipped: list[str] = []
        self.budget = budget
        number = None if every == "auto" else every
        self._looks = Cadence(budget * (1 - _SHARE), number, steps)
        self._norms = Cadence(budget * _SHARE, number)
        self._clock = StepClock()
        self._state: Literal["new", "open", "closed"] = "new"

    # -- beginning and ending -------------------------------------------------------------------------------------

    def begin(self) -> Watch:
        """Opens the run, looks at the network as it is, and waits for the first step; what ``with`` does."""
        if self._state != "new":
            raise RunError("this watch has been begun already; make another for another training")
        begin = time.perf_counter()
        self._ranks = Ranks()
        self._looker: Looker | None = None
        self._pending: list[Step] = []
        self._micro: list[dict[str, Scalar]] = []
        self._batch: Any = None
        self._stash: dict[str, Tensor] | None = None
        self._broken = False
        self._failed = 0
        self._spent = 0.0
        self._scale: float | None = None
        with untouched(self.module):
            if self._panel is not None:
                batches = probe_batches(self.model, self._text, self._context, self._tokens)
                check_share(batches, self._ranks.count)
                self._looker = Looker(self.model, self._panel, batches, self._ranks, self._autocast)
                self.skipped = list(self._looker.skipped)
            detectors = self._detectors()
            self._log = Logbook(self._ranks.first_does(self._open))
            self.run = self._log.run
            self.at = self._ranks.tell(self.at)
            try:
                self._optimizers = OptimizerWatch(
                    self.model, self._given, self._norms_next, self._on_broken if self._guard else None, self._reference()
                )
            except BaseException:
                self._log.close()
                raise
        self._alarms = detectors
        self._state = "open"
        self._keep_reference()
        self._log.event("begin", self.at, **self._facts())
        self._flush_at, self._flushed = self.at + _STEPS, begin
        for cadence in (self._looks, self._norms):
            cadence.rewind(self.at)
        setup = time.perf_counter() - begin
        (self._looks if self._looker else self._norms).spend(setup)
        self._spent += setup
        self._pending.append(Step(self.at, {}, {}))
        self._take(look=self._looker is not None, norms=True, first=True)
        self._flush()
        self._clock.start(time.perf_counter())
        return self

    def __enter__(self) -> Watch:
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.close(kind, error)

    def close(self, kind: type[BaseException] | None = None, error: BaseException | None = None) -> None:
        """Writes what is left and takes out every hook; never raises for a disk that is full (`Logbook`)."""
        if self._state != "open":
            return
        self._state = "closed"
        try:
            # After an exception the other processes may be anywhere, and would be waited for in vain.
            self._flush(alone=kind is not None)
        finally:
            self._optimizers.close()
            self._log.event("end", self.at, seconds=self._clock.total, **self._costs())
            if isinstance(self._to, RunWriter):
                if self.run is not None:
                    self.run.commit()
            else:
                self._log.close(kind, error)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that are known to train the network."""
        return self._optimizers.optimizers if self._state != "new" else [unwrapped(one) for one in self._given]

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The first of `optimizers`, if there is any."""
        return next(iter(self.optimizers), None)

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self._to.path if isinstance(self._to, RunWriter) else Path(self._to).expanduser()

    @property
    def overhead(self) -> float:
        """Seconds spent on watching, as a share of those spent on training so far."""
        return self._spent / self._clock.total if self._clock.total else 0.0

    @property
    def error(self) -> RunError | None:
        """Why the run cannot be written at the moment; None when everything is."""
        return self._log.error

    def stop(self, reason: str = "") -> None:
        """Asks the training to end: sets `should_stop`, which the loop (or a trainer's callback) looks at."""
        self.should_stop, self.reason = True, reason

    def event(self, name: str, **data: Any) -> None:
        """Notes something that happened at this step, such as a checkpoint."""
        self._log.event(name, self.at, **data)

    # -- each step ------------------------------------------------------------------------------------------------

    def step(
        self,
        loss: Any = None,
        *,
        components: Mapping[str, Any] | None = None,
        batch: Any = None,
        grad_norm: Any = None,
        at: int | None = None,
    ) -> None:
        """Takes in one step of the training; called after the optimizer's.

        Args:
            loss: of this step, one number; a tensor stays on its device until many are fetched together.
            components: parts of it by name, logged as ``loss/NAME``.
            batch: what the forward was given, so that a loss that is not finite can be traced in it.
            grad_norm: the total norm where the loop has it, as `clip_grad_norm_` returns it; logged at every step in
                place of the one that looks take, which is that of the gradients that the optimizer was given.
            at: the number of this step, for loops that count by themselves.

        Raises:
            MeasureError: a loss that is not one number.
            RunError: outside the ``with`` block.
        """
        begin = time.perf_counter()
        if self._state != "open":
            where = "after its `with` block has ended" if self._state == "closed" else "before `with ... as watch:`"
            raise RunError(f"watch.step was called {where}")
        shared = named(None if loss is None else scalar("loss", loss), components)
        hooks = self._optimizers
        skipped = False
        if hooks.optimizers and not hooks.stepped:
            skipped = at is not None or self._was_skipped()
            if not skipped:  # one of several backward passes of a step
                self._micro.append(shared)
                hooks.spent += time.perf_counter() - begin
                return
        if self._micro:
            parts, self._micro = [*self._micro, shared], []
            shared = {name: mean([part[name] for part in parts if name in part]) for name in shared}
        if grad_norm is not None:
            shared["grad_norm"] = scalar("grad_norm", grad_norm)
        if at is not None and at <= self.at:
            raise RunError(f"step {at} comes after step {self.at}; to go back to a checkpoint, resume the run")
        self.at = self.at + 1 if at is None else at
        seconds = self._clock.tick(begin, hooks.spent)
        own = {} if seconds is None else {"step_time": seconds}
        if hooks.lr is not None:
            own["lr"] = float(hooks.lr)
        self._pending.append(Step(self.at, shared, own))
        self._batch = batch
        if skipped or hooks.skips:
            self._note_skip(skipped)
        if self._broken and self._stash is not None:
            self._replay()
        self._follow(hooks.spent)
        hooks.begin_step()
        end = time.perf_counter()
        self._spent += end - begin + hooks.spent
        self._clock.start(end)

    def _follow(self, hooked: float) -> None:
        """What is due at this step: norms that were taken around it, a look, the fetching of scalars."""
        usual = self._clock.usual
        norms = bool(self._optimizers.measured)
        look = self._looker is not None and self._looks.next is not None and self.at >= self._looks.next
        if norms or look:
            self._take(look, norms)
        elif self._looks.next is None or self._norms.next is None:
            self._plan(usual)
        late = self._ranks.alone and time.perf_counter() - self._flushed > _SECONDS
        if look or norms and self._ranks.alone or late or self.at >= self._flush_at or self._unsound():
            self._flush()
