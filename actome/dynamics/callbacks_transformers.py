"""Watching a training by transformers' `Trainer`, and by those that inherit from it, such as TRL's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from .schema import begun
from .watching import Watch


class WatchCallback(TrainerCallback):
    """Watches what a `Trainer` trains: the same as `actome.watch`, as a callback.

    ``Trainer(..., callbacks=[WatchCallback(text=probe, run="runs/a")])`` is all. Steps are those of the trainer
    (gradient accumulation, skipped steps), the loss is that of each step and not the mean that the trainer logs (its
    filter of NaN does not apply), batches are at hand when a loss is not finite, and the forwards of the probe are cast
    as ``bf16`` or ``fp16`` say. An alarm's `Stop` ends the training by ``control.should_training_stop``. A training
    that is resumed from a checkpoint goes on with its run; what that had logged after the checkpoint is passed over.
    What the trainer evaluates and saves becomes rows and events.

    Args:
        panel, options: as those of `actome.Watch`; the tokenizer is the trainer's unless given.

    Attributes:
        watch: the `Watch` of the training that runs, or ran last.

    Example:
        >>> callback = WatchCallback(text="The cat sat on the mat.", run="runs/a")
        >>> callback.watch is None
        True
    """

    def __init__(self, panel: Any = "training", **options: Any):
        self.panel, self.options = panel, options
        self.watch: Watch | None = None
        self._trainer: Any = None
        self._loss: Any = None
        self._batch: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch."""
        if self.watch is not None:
            self.watch.close()
        options = dict(self.options)
        options.setdefault("tokenizer", kwargs.get("processing_class"))
        options.setdefault("optimizer", kwargs.get("optimizer"))
        options.setdefault("config", args.to_sanitized_dict())
        if args.bf16 or args.fp16:
            options.setdefault("autocast", torch.bfloat16 if args.bf16 else torch.float16)
        if state.max_steps > 0:
            options.setdefault("steps", state.max_steps)
        if state.global_step:
            there = isinstance(options["run"], str) or hasattr(options["run"], "__fspath__")
            options.setdefault("resume", state.global_step if there and begun(_path(options["run"])) else False)
            options.setdefault("start", state.global_step)
        self._follow(_trainer_above(self), options)
        self.watch = Watch(kwargs["model"], self.panel, **options).begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Takes in a step."""
        assert self.watch is not None
        self.watch.step(self._loss, at=state.global_step, batch=self._batch)
        self._loss = None
        if self.watch.should_stop:
            control.should_training_stop = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Logs what was evaluated."""
        if self.watch is not None and metrics:
            self.watch.log({name: value for name, value in metrics.items() if isinstance(value, (int, float))})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes a checkpoint."""
        if self.watch is not None:
            self.watch.event("checkpoint", path=f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run."""
        self._end()

    def _end(self, kind: type[BaseException] | None = None, error: BaseException | None = None) -> None:
        if self._trainer is not None:
            self._trainer.__dict__.pop("training_step", None)
            self._trainer = None
        if self.watch is not None:
            self.watch.close(kind, error)

    def _follow(self, trainer: Any, options: dict[str, Any]) -> None:
        """Has the trainer's own step tell its loss, which callbacks are not told."""
        if trainer is None or "training_step" in trainer.__dict__:
            return
        self._trainer = trainer
        options.setdefault("scaler", getattr(trainer.accelerator, "scaler", None))
        step = trainer.training_step

        def told(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                loss = step(model, inputs, *args, **kwargs)
            except BaseException as error:
                self._end(type(error), error)
                raise
            # Scaled such that those of the backward passes of one step add up to the step's.
            self._loss = loss if self._loss is None else self._loss + loss
            self._batch = inputs
            return loss

        trainer.training_step = told


def _trainer_above(callback: WatchCallback) -> Any:
    """The trainer that is calling this callback. It does not introduce itself, so it is looked for up the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        one = frame.f_locals.get("self")
        if hasattr(one, "training_step") and callback in getattr(
            getattr(one, "callback_handler", None), "callbacks", ()
        ):
            return one
        frame = frame.f_back
    return None


def _path(run: Any) -> Any:
    from pathlib import Path

    return Path(run).expanduser()
