"""Watch: one line in a training loop that says what happens inside."""

from __future__ import annotations

import time
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actome.core.errors import MeasureError, RunError
from actome.core.load import wrap
from actome.core.model import Model

from ..alarms.base import Alarm, Reading
from ..rows import number
from ..writer import RunWriter
from .agenda import Agenda
from .alerts import Alerts
from .logbook import Logbook
from .looks import Looker
from .opening import Opening, first_weights, keep_weights
from .optimizers import OptimizerWatch, unwrapped
from .probe import TOKENS, check_share, probe_batches
from .ranks import Ranks
from .scalars import Scalar, Step, fetched, mean, named, scalar
from .trouble import Trouble
from .untouched import untouched
from .unwrap import unwrap


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
        losses: further texts by name, of which only the next-token loss is taken and logged as ``loss_NAME``: one
            ``seen``, of the training data, and one ``heldout``, of the same source, tell memorising from learning.
        optimizer: the one or those that train it; found at its first step when not given. Give it where `step` is
            called after every backward pass of several.
        every: ``"auto"`` keeps within `budget`; a number looks at each so-manieth step whatever it costs.
        budget: the share of the training's time that watching may add. A third of it is for scalars, norms and writing.
        steps: how long the run will be, if known: half of the budget then goes to early looks, at equal ratios of steps
        alarms: True for the detectors of `actome.dynamics.alarms`, False for none; detectors, or an `Alarms`.
        actions: what to do about alarms, by name, level or ``"*"``; see `actome.dynamics.alarms`.
        config: of the run, kept with it.
        tokenizer, context, tokens: for a probe of strings.
        autocast: the dtype that the forwards of the training are cast to, so that the probe's are too.
        scaler: the `GradScaler`, if there is one, so that its scale is logged and steps that it skips are told apart.
        guard: whether a few gradients are looked at before each update, so that values that are not finite are traced
            to their site while the weights are still whole. By default on the CPU, where it takes microseconds; on
            an accelerator it waits for the device at each step.
        resume: True goes on with the run that `run` holds; a number does so from the checkpoint of this step.
        start: how many steps a training that has a new run has made already.
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
        losses: Mapping[str, Any] | None = None,
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
        start: int = 0,
        store: Mapping[str, Any] | None = None,
    ):
        if every != "auto" and (not _whole(every) or every < 1):
            raise MeasureError(f"every={every!r}: 'auto', or a number of steps, 1 or more")
        if not isinstance(budget, int | float) or not 0 < budget < 1:
            raise MeasureError(f"budget={budget!r}: the share of the training's time that watching may add, as 0.03")
        if steps is not None and (not _whole(steps) or steps < 1):
            raise MeasureError(f"steps={steps!r}: how many steps the run will have, 1 or more; None if not known")
        if not _whole(start) or start < 0:
            raise MeasureError(f"start={start!r}: how many steps the training has made already, 0 or more")
        if not isinstance(resume, bool) and (not _whole(resume) or resume < 0):
            raise MeasureError(f"resume={resume!r}: True, False, or the step of the checkpoint, 0 or more")
        if panel is not None and text is None:
            raise MeasureError("a panel is measured at a probe: give text=, or panel=None for scalars and norms only")
        if not isinstance(losses or {}, Mapping):
            raise MeasureError(f"losses= are texts by name, {{'heldout': ...}}, not {type(losses).__name__}")
        if panel is None and losses:
            raise MeasureError("losses= are taken at looks, and panel=None takes none: give a panel and text=")
        if isinstance(model, Model):
            self.model = model if unwrap(model.module) is model.module else wrap(unwrap(model.module), model.tokenizer)
        else:
            self.model = wrap(unwrap(model))
        if tokenizer is not None and self.model.tokenizer is not tokenizer:
            self.model = wrap(self.model.module, tokenizer, name=self.model.name, example=self.model.example)
        self._panel, self._text, self._losses = panel, text, dict(losses or {})
        self._reading = {"context": context, "tokens": tokens}
        self._opening = Opening(run, config, resume, start, dict(store or {}))
        self._given = _listed(optimizer)
        self._autocast, self._scaler = autocast, scaler
        self._alerts = Alerts(alarms, actions)
        self._guarded = self.model.device.type == "cpu" if guard is None else guard
        self._agenda = Agenda(None if every == "auto" else every, budget, steps)
        self.module = self.model.module
        self.run: RunWriter | None = None
        self.at = 0
        self.should_stop, self.reason = False, ""
        self.alarms: list[Alarm] = []
        self.skipped: list[str] = []
        self._state: Literal["new", "open", "closed"] = "new"

    # -- beginning and ending -------------------------------------------------------------------------------------

    def begin(self) -> Watch:
        """Opens the run, looks at the network as it is, and waits for the first step; what ``with`` does."""
        if self._state != "new":
            raise RunError("this watch has been begun already; make another for another training")
        begin = time.perf_counter()
        self._ranks = Ranks()
        self._pending: list[Step] = []
        self._micro: list[dict[str, Scalar]] = []
        self._batch: Any = None
        self._scale = 0.0 if self._scaler is None else self._scaler.get_scale()
        with untouched(self.module):
            self._looker = self._look_at()
            self._log = Logbook(self._ranks.first_does(self._opening.open))
            self.run = self._log.run
            try:
                self.at = self._ranks.tell(0 if self.run is None else self._opening.step(self.run))
                if self.run is not None and self._opening.resume is not False:
                    self._alerts.resume(self.run)
                self._trouble = Trouble(self.model, self._looker.batches if self._looker else [], self._autocast)
                guard = self._before_broken_update if self._guarded else None
                weights = None if self.run is None else first_weights(self.run)
                self._hooks = OptimizerWatch(self.model, self._given, self._measure_next, guard, weights)
                if self.run is not None and weights is None:
                    keep_weights(self.run, self.at, self._hooks.flat_reference())
            except BaseException as error:
                self._log.close(type(error), error)
                raise
        self._state = "open"
        self._log.event("begin", self.at, **self._facts())
        self._agenda.begin(self.at, self._ranks, self._looker is not None, time.perf_counter() - begin)
        looked = time.perf_counter()
        self._pending.append(Step(self.at))
        try:
            self._take(look=self._looker is not None)
            self._flush()
        except BaseException as error:
            self._pending.clear()
            self.close(type(error), error)
            raise
        self._log.commit()  # so that whoever follows the run sees it begin
        self._agenda.spend(looked, 0.0)
        return self

    def __enter__(self) -> Watch:
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.close(kind, error)

    def close(self, kind: type[BaseException] | None = None, error: BaseException | None = None) -> None:
        """Writes what is left and takes out every hook; a disk that is full is told by a warning, as during the run."""
        if self._state != "open":
            return
        self._state = "closed"
        try:
            # After an exception the other processes may be anywhere, and would be waited for in vain.
            self._flush(alone=kind is not None)
        finally:
            self._hooks.close()
            self._log.event("end", self.at, **self._agenda.costs())
            if self._opening.to is self.run:
                self._log.commit()
            else:
                self._log.close(kind, error)

    def _look_at(self) -> Looker | None:
        if self._panel is None:
            return None
        batches = probe_batches(self.model, self._text, **self._reading)
        check_share(batches, self._ranks.count)
        others = {name: probe_batches(self.model, text, **self._reading) for name, text in self._losses.items()}
        looker = Looker(self.model, self._panel, batches, self._ranks, self._autocast, others)
        self.skipped = list(looker.skipped)
        return looker

    def _facts(self) -> dict[str, Any]:
        probe = self._looker.describe() if self._looker else None
        return {
            "network": self.model.name,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "trained": sum(p.numel() for p in self._hooks.trained().values()),
            "panel": getattr(self._panel, "name", self._panel if isinstance(self._panel, str) else None),
            "probe": probe,
            "skipped": self.skipped,
            "guard": self._guarded,
            "processes": self._ranks.count,
            **self._agenda.describe(),
        }

    # -- what may be asked ----------------------------------------------------------------------------------------

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that are known to train the network."""
        return [unwrapped(one) for one in self._given] if self._state == "new" else self._hooks.optimizers

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The first of `optimizers`, if there is any."""
        return next(iter(self.optimizers), None)

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self._opening.path

    @property
    def overhead(self) -> float:
        """Seconds spent on watching, as a share of those spent on training so far."""
        return self._agenda.overhead

    @property
    def error(self) -> RunError | None:
        """Why the run cannot be written at the moment; None when everything is."""
        return None if self._state == "new" else self._log.error

    def stop(self, reason: str = "") -> None:
        """Asks the training to end: sets `should_stop`, which the loop (or a trainer's callback) looks at."""
        self.should_stop, self.reason = True, reason

    def log(self, values: Mapping[str, float]) -> None:
        """Notes further numbers of this step, such as those of an evaluation."""
        self._check_open("log")
        self._log.scalars(self.at, {name: number(name, value) for name, value in values.items()})

    def event(self, name: str, **data: Any) -> None:
        """Notes something that happened at this step, such as a checkpoint."""
        self._check_open("event")
        self._log.event(name, self.at, **data)

    @property
    def told_before_update(self) -> bool:
        """Whether the loop calls `before_update`; set by loops that make the gradients within the optimizer's step."""
        return self._hooks.before_is_called

    @told_before_update.setter
    def told_before_update(self, told: bool) -> None:
        self._hooks.before_is_called = told

    def before_update(self, optimizer: Any) -> None:
        """Sees the gradients and weights before an update; needed only with `told_before_update`."""
        self._hooks.before(unwrapped(optimizer))

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
            RunError: outside the ``with`` block; a step that is not after the last one.
        """
        begin = time.perf_counter()
        self._check_open("step")
        shared = named(None if loss is None else scalar("loss", loss), components)
        hooks = self._hooks
        skipped = bool(hooks.optimizers) and not hooks.stepped
        if skipped and at is None and not self._was_skipped():
            self._micro.append(shared)  # of one of several backward passes, whose step is still to come
            hooks.spent += time.perf_counter() - begin
            return
        if self._micro:
            parts, self._micro = [*self._micro, shared], []
            shared = {name: mean([part[name] for part in parts if name in part]) for name in shared}
        if grad_norm is not None:
            shared["grad_norm"] = scalar("grad_norm", grad_norm)
        if at is not None and not _whole(at):
            raise RunError(f"at={at!r}: the number of a step is a whole one")
        if at is not None and at <= self.at:
            raise RunError(f"step {at} comes after step {self.at}; to go back to a checkpoint, resume the run")
        self.at = self.at + 1 if at is None else at
        own = self._agenda.tick(begin, hooks.spent)
        if hooks.lr is not None:
            # A tensor may lie on the device, and is fetched with the rest.
            (shared if isinstance(hooks.lr, Tensor) else own)["lr"] = scalar("lr", hooks.lr)
        self._pending.append(Step(self.at, shared, own, [1.0] if skipped else hooks.skips))
        self._batch = batch
        look = self._agenda.looks_at(self.at)
        taken = look or hooks.measured
        if taken:
            self._take(look)
        if self._trouble.now:
            self._pending[-1].readings[:0] = self._trouble.after_step(batch)
        if look or self._agenda.flushes_at(self.at) or (self._ranks.alone and (taken or self._unsound())):
            self._flush()
        self._agenda.spend(begin, hooks.spent)
        hooks.begin_step()

    def _check_open(self, what: str) -> None:
        if self._state != "open":
            where = "after its `with` block had ended" if self._state == "closed" else "before `with ... as watch:`"
            raise RunError(f"watch.{what} was called {where}")

    def _was_skipped(self) -> bool:
        """Whether a gradient scaler passed over the step that did not come, and not that more backward passes come."""
        if not self._hooks.has_gradients():
            return True
        before, self._scale = self._scale, 0.0 if self._scaler is None else self._scaler.get_scale()
        return self._scale < before

    def _measure_next(self) -> bool:
        """Asked by the hooks around an optimizer's step: whether norms are to be taken around it."""
        return self._ranks.first and self._agenda.measures_at(self.at + 1)

    def _before_broken_update(self, hooks: OptimizerWatch) -> None:
        """Asked by the same hooks when gradients are not finite."""
        self._trouble.before_update(hooks, self.at + 1)

    def _unsound(self) -> bool:
        """Whether something is to be told now: a loss that is known not to be finite, or what was found before it."""
        last = self._pending[-1]
        loss = last.shared.get("loss")
        known = isinstance(loss, float) or (loss is not None and loss.device.type == "cpu")
        return any(one.measure == "non_finite" for one in last.readings) or (known and not abs(float(loss)) < torch.inf)

    def _take(self, look: bool) -> None:
        """Norms of this step, and a look if one is due."""
        last = self._pending[-1]
        if self._ranks.first:
            with self._agenda.norms(self.at, self._hooks):
                self._hooks.weights()
                last.readings += self._hooks.readings()
        if look and self._looker is not None:
            with self._agenda.look(self.at, self.model.device):
                last.readings[:0] = self._looker.look_safely(self._log, self.at)
        if "grad_norm" in last.shared:
            last.readings[:] = [one for one in last.readings if (one.measure, one.site) != ("grad_norm", None)]

    def _flush(self, alone: bool = False) -> None:
        """Fetches the scalars of all steps since the last time, writes them, and tells what the detectors find."""
        begin = time.perf_counter()
        steps, self._pending = self._pending, []
        ranks = Ranks.only() if alone else self._ranks
        told: list[tuple[int, list[Reading]]] = []
        for step, (shared, skips) in zip(steps, fetched(steps, ranks, self.model.device), strict=True):
            if skips:
                self._log.event("skipped_step", step.at)
            step.readings[:0] = self._trouble.of_loss(step.at, shared.get("loss", 0.0), self._batch)
            values = {**shared, **step.own}
            if step is steps[-1]:
                values |= self._agenda.last_values(self._scaler)
                self._scale = values.get("loss_scale", 0.0)
            self._log.scalars(step.at, values)
            self._log.readings(step.at, step.readings)
            told.append((step.at, [*(Reading(name, value) for name, value in values.items()), *step.readings]))
        found = self._alerts.found(told) if self._ranks.first else []
        self._agenda.plan(self.at, time.perf_counter() - begin, self._log)
        if not ranks.alone:
            found, self.should_stop, self.reason = ranks.tell((found, self.should_stop, self.reason))
            self._agenda.agree(ranks)
        self.alarms += found
        self._alerts.tell(found, self._log, self)


def _listed(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
