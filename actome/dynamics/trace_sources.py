"""Sources of a trace: everything that holds the checkpoints of one training, as a list that opens them one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import LoadError, nearest_beside
from actome.dynamics.trace_hub import revisions_of
from actome.dynamics.trace_steps import chosen, step_of, step_of_folder
from actome.dynamics.trace_weights import Shared, mark_of_files, mark_of_tensors, read_weights

if TYPE_CHECKING:
    from actome.core.model import Model

DEMO = "demo"
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, not yet in memory.

    Attributes:
        step: of the training.
        name: of the folder, file or revision; for messages.
        open: brings it into memory. Whoever calls it holds the only reference, or, where weights are loaded into one
            module again and again, must be done with the last before opening the next.
        mark: a short text that is another one when the weights are others; None when that cannot be told.
        fresh: whether `open` makes a module that was not in memory before, and that has to be let go of.
    """

    step: int
    name: str
    open: Callable[[], Model] = field(repr=False)
    mark: Callable[[], str | None] = field(repr=False, default=lambda: None)
    fresh: bool = field(repr=False, default=True)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, in order of step.

    Attributes:
        label: where they are.
        items: those that are there.
        missing: steps that were asked for and are not there, with the reason.
        passed_over: what lies among them and was not taken for one, with the reason.
    """

    label: str
    items: tuple[Checkpoint, ...]
    missing: dict[int, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


def checkpoints(
    source: Any,
    *,
    revisions: str | Iterable[str] | None = None,
    steps: Iterable[int] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    api: Any = None,
    **loading: Any,
) -> Checkpoints:
    """Finds the checkpoints of a training without loading any.

    Args:
        source: one of

            - a folder whose subfolders are checkpoints of transformers (``checkpoint-500``, ``step1000``,
              ``global_step20``, ...); the step is that of ``trainer_state.json`` where there is one, else the name's;
            - a folder of files of weights with a step in their names, for which `model` is needed;
            - a hub id whose branches or tags are checkpoints;
            - ``"demo"``, or a `Training` with checkpoints;
            - pairs (step, what), or a mapping by step, where *what* is a folder, a file of weights or a mapping of them
              (with `model`), a `Model`, a module, or a function that gives one of the two.
        revisions: of a hub id: patterns such as ``"step*"``; by default every branch and tag with a step in its name.
        steps: only these.
        model: what weights are loaded into: a `Model`, a module, a function that makes one, or a folder with one.
        tokenizer: for models that come without one.
        api: in place of ``huggingface_hub.HfApi()``.
        loading: options of `actome.load`, such as ``dtype`` and ``device``.

    Raises:
        LoadError: no checkpoints there, or two of one step.

    >>> found = checkpoints("demo", steps=[0, 64])
    >>> [(one.step, one.name) for one in found.items]
    [(0, 'step-00000'), (64, 'step-00064')]
    """
    from actome.tasks.training import Training

    shared = None if model is None else Shared(model, tokenizer, loading)
    if revisions is not None and not _is_hub_id(source):
        raise LoadError(f"revisions are those of a hub id such as EleutherAI/pythia-70m, and the source is {source!r}")
    if isinstance(source, Training):
        label, found, over = _of_training(source, Shared(source.module, tokenizer, loading))
    elif isinstance(source, Mapping):
        label, found, over = _of_pairs(source.items(), tokenizer, shared, loading)
    elif source == DEMO:
        label, found, over = _of_demo(loading)
    elif _is_hub_id(source):
        label = str(source)
        there, over = revisions_of(label, revisions, tokenizer, api, loading)
        found = [Checkpoint(*one, lambda mark=mark: mark) for *one, mark in there]
    elif isinstance(source, str | Path):
        label, found, over = _of_folder(Path(source).expanduser(), tokenizer, shared, loading)
    else:
        label, found, over = _of_pairs(source, tokenizer, shared, loading)
    by_step: dict[int, Checkpoint] = {}
    for one in found:
        if one.step in by_step:
            raise LoadError(
                f"{label} has step {one.step} twice, as {by_step[one.step].name} and {one.name}; give a list of "
                "(step, path) that names one of them"
            )
        by_step[one.step] = one
    if not by_step:
        raise LoadError(f"{label} holds no checkpoints" + (f": {'; '.join(over)}" if over else ""))
    order, missing = chosen(by_step, steps, label)
    return Checkpoints(label, tuple(by_step[step] for step in order), missing, tuple(over))


_Found = tuple[str, list[Checkpoint], list[str]]


def _is_hub_id(source: Any) -> bool:
    here = isinstance(source, str) and (Path(source).expanduser().exists() or source.startswith((".", "/", "~")))
    return isinstance(source, str) and not here and _HUB_ID.fullmatch(source) is not None


def _of_demo(loading: Mapping[str, Any]) -> _Found:
    from actome.tasks.demo import demo, demo_dir, demo_steps

    taken = {key: value for key, value in loading.items() if key in ("dtype", "device")}

    def one(step: int) -> Checkpoint:
        folder = demo_dir(step)
        return Checkpoint(step, folder.name, lambda: demo(step, **taken), lambda: mark_of_files(_weights_in(folder)))

    return DEMO, [one(step) for step in demo_steps()], []


def _of_training(training: Any, shared: Shared) -> _Found:
    def one(step: int, weights: Mapping[str, Any]) -> Checkpoint:
        name = f"step {step}"
        return Checkpoint(step, name, lambda: shared.filled(weights, name), lambda: mark_of_tensors(weights), False)

    kind = type(training.module).__name__
    over = [] if training.checkpoints else ["its training kept none; train(..., checkpoints='log')"]
    return f"training of {kind}", [one(step, weights) for step, weights in training.checkpoints.items()], over


def _of_pairs(pairs: Any, tokenizer: Any, shared: Shared | None, loading: Mapping[str, Any]) -> _Found:
    wanted = "checkpoints are a folder, a hub id, 'demo', a Training, or pairs (step, folder, module or function)"
    try:
        listed = [(step, what) for step, what in pairs]
    except (TypeError, ValueError) as error:
        raise LoadError(f"{wanted}, not {type(pairs).__name__}: {error}") from error
    bad = next((step for step, _ in listed if isinstance(step, bool) or not isinstance(step, int)), None)
    if bad is not None:
        raise LoadError(f"{wanted}; a step is a whole number, not {bad!r}")
    return f"{len(listed)} checkpoints", [_of_any(*one, tokenizer, shared, loading) for one in listed], []


def _of_any(step: int, what: Any, tokenizer: Any, shared: Shared | None, loading: Mapping[str, Any]) -> Checkpoint:
    from torch import nn

    from actome.core.load import wrap
    from actome.core.model import Model

    if isinstance(what, str | Path):
        path = Path(what).expanduser()
        return (_file if path.suffix in WEIGHTS else _folder)(path, step, tokenizer, shared, loading)
    name = f"step {step}"
    if isinstance(what, Model):
        return Checkpoint(step, name, lambda: what, lambda: mark_of_tensors(what.module.state_dict()), False)
    if isinstance(what, nn.Module):
        return Checkpoint(
            step, name, lambda: wrap(what, tokenizer, name=name), lambda: mark_of_tensors(what.state_dict()), False
        )
    if isinstance(what, Mapping):
        return Checkpoint(step, name, lambda: _into(shared, what, name), lambda: mark_of_tensors(what), False)
    if callable(what):
        return Checkpoint(step, name, lambda: _called(what, tokenizer, name))
    raise LoadError(f"step {step} is {type(what).__name__}; give a folder, a Model, a module, weights or a function")


def _called(make: Callable[[], Any], tokenizer: Any, name: str) -> Model:
    from torch import nn

    from actome.core.load import wrap
    from actome.core.model import Model

    try:
        made = make()
    except Exception as error:
        raise LoadError(f"{name}: the function that should give it failed: {type(error).__name__}: {error}") from error
    if isinstance(made, Model):
        return made
    if isinstance(made, nn.Module):
        return wrap(made, tokenizer, name=name)
    raise LoadError(f"{name}: its function gave {type(made).__name__}; a Model or a module is wanted")


# -- folders ----------------------------------------------------------------------------------------------------------


def _of_folder(path: Path, tokenizer: Any, shared: Shared | None, loading: Mapping[str, Any]) -> _Found:
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        hub = "" if path.exists() or len(path.parts) > 2 else "; a hub id has the form owner/name"
        raise LoadError(f"{path} is {what}; give a folder of checkpoints{nearest_beside(path)}{hub}")
    found, over = [], []
    for one in sorted(path.iterdir()):
        if one.name.startswith("."):
            continue
        if one.is_dir():
            step = step_of_folder(one)
            if step is not None:
                found.append(_folder(one, step, tokenizer, shared, loading))
            elif (one / "config.json").exists():
                over.append(f"{one.name} holds a model and says no step")
        elif one.suffix in WEIGHTS and not _SHARD.search(one.stem) and step_of(one.stem) is not None:
            found.append(_file(one, step_of(one.stem) or 0, tokenizer, shared, loading))
    if not found and (path / "config.json").exists():
        over.append("it is one checkpoint; give the folder that holds several, or a list of (step, path)")
    elif not found:
        there = ", ".join(sorted(one.name for one in path.iterdir())[:6]) or "nothing"
        over.append(f"no folder and no file of weights in it has a step in its name, such as step1000 (found: {there})")
    return str(path.resolve()), found, over


def _folder(path: Path, step: int, tokenizer: Any, shared: Shared | None, loading: Mapping[str, Any]) -> Checkpoint:
    def opened() -> Model:
        if shared is not None:
            return shared.filled(read_weights(_weights_in(path), path), path.name)
        return load_folder(path, tokenizer, loading)

    return Checkpoint(step, path.name, opened, lambda: mark_of_files(_weights_in(path)), shared is None)


def _file(path: Path, step: int, tokenizer: Any, shared: Shared | None, loading: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        step, path.name, lambda: _into(shared, lambda: read_weights([path], path), path.name),
        lambda: mark_of_files([path]), False,
    )  # fmt: skip


def _into(shared: Shared | None, weights: Any, name: str) -> Model:
    if shared is None:
        raise LoadError(
            f"{name} is weights alone, which do not say what they are of; give model=, a module, a function that "
            "makes one, or a folder with a config.json"
        )
    return shared.filled(weights() if callable(weights) else weights, name)


def load_folder(path: Path, tokenizer: Any, loading: Mapping[str, Any]) -> Model:
    """A checkpoint's folder as a `Model`, with the tokenizer of the folder above where its own lacks one."""
    from actome.core.load import load

    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise LoadError(
            f"{path} holds a PEFT adapter and no model; give a list of (step, function) whose functions load the base "
            "model with it, as peft.AutoPeftModelForCausalLM.from_pretrained does"
        )
    model = load(path, **loading)
    if model.tokenizer is None:
        model.tokenizer = tokenizer if tokenizer is not None else _tokenizer_above(path)
    return model


def _tokenizer_above(path: Path) -> Any:
    import transformers

    if not any((path.parent / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path.parent), local_files_only=True)
    except Exception as error:
        raise LoadError(f"the tokenizer in {path.parent} cannot be loaded: {error}") from error


def _weights_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    return files or sorted(one for one in folder.glob("*.bin") if one.name != "training_args.bin")
