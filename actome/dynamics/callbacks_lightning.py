"""Watching a training by Lightning's `Trainer`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .schema import begun
from .watching import Watch

# Lightning goes by two names, whose classes do not know one another: that of the trainer in use is taken.
try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        try:
            from lightning.pytorch import Callback
        except ImportError:
            from pytorch_lightning import Callback
except ImportError as error:
    raise ImportError("LightningWatch needs Lightning: pip install 'actome[lightning]'") from error

_CASTS = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class LightningWatch(Callback):  # type: ignore[misc, valid-type]
    """Watches what Lightning's `Trainer` trains: the same as `actome.watch`, as a callback.

    ``Trainer(callbacks=[LightningWatch(text=probe, run="runs/a")])`` is all. A step is one of the optimizer's
    (``trainer.global_step``), however many batches it takes. Gradients are seen where Lightning shows them, before it
    clips them. An alarm's `Stop` ends the training by ``trainer.should_stop``. A training that is resumed from a
    checkpoint goes on with its run.

    Args:
        panel, options: as those of `actome.Watch`.
        module: the attribute of the `LightningModule` that holds the network; by default ``model`` where there is one,
            else the whole.

    Attributes:
        watch: the `Watch` of the training that runs, or ran last.
    """

    def __init__(self, panel: Any = "training", *, module: str | None = None, **options: Any):
        super().__init__()
        self.panel, self.module, self.options = panel, module, options
        self.watch: Watch | None = None
        self._loss: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to watch."""
        if self.watch is not None:
            self.watch.close()
        options = dict(self.options)
        options.setdefault("optimizer", list(trainer.optimizers))
        options.setdefault("autocast", _CASTS.get(str(trainer.precision)))
        options.setdefault("scaler", getattr(trainer.precision_plugin, "scaler", None))
        steps = trainer.estimated_stepping_batches
        if steps not in (-1, float("inf")):
            options.setdefault("steps", int(steps))
        if trainer.global_step:
            run = options["run"]
            there = isinstance(run, (str, Path)) and begun(Path(run).expanduser())
            options.setdefault("resume", trainer.global_step if there else False)
            options.setdefault("start", trainer.global_step)
        self.watch = Watch(self._network(pl_module), self.panel, **options).begin()
        # Lightning makes the gradients within the optimizer's step, and says when they are there.
        self.watch.told_before_update = True

    def _network(self, pl_module: Any) -> nn.Module:
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        held = getattr(pl_module, "model", None)
        return held if isinstance(held, nn.Module) else pl_module

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Sees the gradients, and the weights before their update."""
        if self.watch is not None:
            self.watch.before_update(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes in a step, once the optimizer has made one."""
        assert self.watch is not None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            # Scaled such that those of the batches of one step add up to the step's.
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step <= self.watch.at:
            return
        self.watch.step(self._loss, at=trainer.global_step, batch=batch)
        self._loss = None
        if self.watch.should_stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs what was validated."""
        if self.watch is not None and not trainer.sanity_checking:
            self.watch.log({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Notes a checkpoint."""
        if self.watch is not None:
            self.watch.event("checkpoint", epoch=trainer.current_epoch)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the run as failed."""
        if self.watch is not None:
            self.watch.close(type(exception), exception)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the run."""
        if self.watch is not None:
            self.watch.close()
