"""Sinks: what a run logs, sent on to other tools through their own clients.

The run store stays the truth. A sink gets what has been committed, once for each step and in the background, so a slow
service does not hold up the training; one that fails is left out with a warning, and `RunStore.forward` gives it
everything later. Rows of single units are not sent, since of those there may be a million.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actome.core.errors import RunError

from .schema import as_json


def tag(
    measure: str,
    site: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    unit: int | None = None,
    expert: int | None = None,
) -> str:
    """The name under which a number is sent: the measure first, so that tools that group by it show it over all sites.

    >>> tag("sink", "blocks.0.attn.pattern", head=3)
    'sink/blocks.0.attn.pattern/head.3'
    """
    # A site names its layer already.
    places = {"layer": layer if site is None else None, "head": head, "unit": unit, "expert": expert}
    return "/".join([measure, *([site] if site else []), *(f"{k}.{v}" for k, v in places.items() if v is not None)])


class Sink:
    """What a run may be sent to; a subclass overrides what it has a use for."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Called once, with the run's name and configuration."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by `tag`; a step may come several times, and an earlier one after a resume."""

    def alarm(self, step: int, name: str, message: str, level: str) -> None:
        """An alarm: info, warning or critical."""

    def close(self) -> None:
        """Called once, at the end."""


class TensorBoardSink(Sink):
    """To TensorBoard, by torch's `SummaryWriter`; needs the extra ``actome[tensorboard]``.

    Args:
        folder: where its event files go; a folder below is made for each run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        _client("tensorboard", "tensorboard")
        self._writer: Any = None

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / name))
        self._writer.add_text("config", f"```json\n{json.dumps(json.loads(as_json(dict(config))), indent=1)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def alarm(self, step: int, name: str, message: str, level: str) -> None:
        self._writer.add_text(f"alarms/{name}", f"{level}: {message}", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink(Sink):
    """To Weights & Biases; needs the extra ``actome[wandb]``.

    Args:
        project: of the run.
        options: whatever else `wandb.init` takes, such as ``mode="offline"`` or ``entity=``.
    """

    def __init__(self, project: str, **options: Any):
        self.project, self.options = project, options
        self._wandb = _client("wandb", "wandb")
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(**{"project": self.project, "name": name, "config": dict(config), **self.options})
        # Their own step only grows; with a metric as the step, a resumed run may go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def alarm(self, step: int, name: str, message: str, level: str) -> None:
        levels = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
        self._run.alert(title=f"{name} at step {step}", text=message, level=levels[level])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class TrackioSink(Sink):
    """To trackio; needs the extra ``actome[trackio]``.

    Args:
        project: of the run.
        options: whatever else `trackio.init` takes, such as ``space_id=``.
    """

    def __init__(self, project: str, **options: Any):
        self.project, self.options = project, options
        self._trackio = _client("trackio", "trackio")
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        plain = json.loads(as_json(dict(config)))
        self._run = self._trackio.init(**{"project": self.project, "name": name, "config": plain, **self.options})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def alarm(self, step: int, name: str, message: str, level: str) -> None:
        levels = {"info": "info", "warning": "warn", "critical": "error"}
        self._run.alert(name, message, level=self._trackio.AlertLevel(levels[level]), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _client(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            f"{module} is not installed ({error}); it comes with the extra: pip install 'actome[{extra}]'"
        ) from error
