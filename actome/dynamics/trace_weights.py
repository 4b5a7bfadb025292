"""Weights without their model: read from files, put into one module again and again, and told from others."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.core.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from actome.core.model import Model

_SAMPLE = 1 << 16  # bytes that are looked at, at either end of a file
_TENSORS = 16  # that are looked at, of weights in memory
_WRAPPERS = ("module.", "_orig_mod.")  # which data-parallel training and torch.compile put before names
_NESTED = ("state_dict", "model_state_dict", "model")


def read_weights(files: Sequence[Path], where: Path) -> dict[str, Tensor]:
    """The tensors of safetensors or torch files; the latter are read as plain tensors, without running any code.

    Raises:
        LoadError: no file, a truncated or corrupt one, or one that holds something else than weights.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from actome.core.load import check_safetensors

    if not files:
        raise LoadError(f"{where} holds no weights")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                check_safetensors(file)
                weights |= load_file(file)
                continue
            held = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise LoadError(f"{file} is not there") from error
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise LoadError(f"{file} is corrupt: {str(error).splitlines()[0] if str(error) else error!r}") from error
        except Exception as error:  # pickle's own, which weights_only raises for anything but tensors
            raise LoadError(f"{file} holds more than plain weights, which could run code: {error}") from error
        for name in _NESTED:
            if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
                held = held[name]
        if not isinstance(held, Mapping) or not all(isinstance(one, torch.Tensor) for one in held.values()):
            raise LoadError(f"{file} holds {type(held).__name__}; weights by name are wanted")
        weights |= held
    return weights


class Shared:
    """One module that the weights of all checkpoints are put into, one after the other, so that memory holds one.

    Args:
        model: a `Model`, a module (copied, so that the user's keeps its weights), a function that makes either, or a
            folder with a config.json.
        tokenizer: for a module that has none.
        loading: options of `actome.load`, of which ``dtype`` and ``device`` are heeded.
    """

    def __init__(self, model: Any, tokenizer: Any, loading: Mapping[str, Any]):
        self.source, self.tokenizer, self.loading = model, tokenizer, dict(loading)
        self.model: Model | None = None

    def filled(self, weights: Mapping[str, Tensor], name: str) -> Model:
        """The model with these weights.

        Raises:
            LoadError: they are of another architecture; says which names and shapes.
        """
        if self.model is None:
            self.model = self._made()
        module = self.model.module
        own = module.state_dict()
        given = _with_tied({_plain(key, own): value for key, value in weights.items()}, own)
        differences = differing(_shapes(own), _shapes(given))
        if differences:
            raise LoadError(f"{name} does not fit {type(module).__name__}: {differences}")
        module.load_state_dict(given)
        module.eval()
        self.model.name = name
        return self.model

    def _made(self) -> Model:
        from torch import nn

        from actome.core.load import _dtype, wrap
        from actome.core.model import Model

        made = self.source
        if isinstance(made, str | Path):
            made = _untrained(Path(made).expanduser())
        elif not isinstance(made, Model | nn.Module) and callable(made):
            made = made()
        elif isinstance(made, Model):
            made = Model(copy.deepcopy(made.module), made.tokenizer, made.name, made.example)
        elif isinstance(made, nn.Module):
            made = copy.deepcopy(made)
        if isinstance(made, nn.Module):
            made = wrap(made)
        if not isinstance(made, Model):
            raise LoadError(f"model= is {type(made).__name__}; give a Model, a module, a function or a folder")
        if made.tokenizer is None:
            made.tokenizer = self.tokenizer
        dtype = _dtype(self.loading.get("dtype"))
        made.module.to(device=self.loading.get("device"), dtype=None if dtype == "auto" else dtype)
        made.module.eval()
        return made


def _untrained(folder: Path) -> nn.Module:
    """A model of the shape that a folder's config.json says."""
    import transformers

    from actome.core.load import _model_class

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        return _model_class(transformers, config)._from_config(config)
    except Exception as error:
        raise LoadError(f"no model can be made of {folder}: {error}") from error


def _plain(key: str, own: Mapping[str, Any]) -> str:
    """A parameter's name without what wrappers put before it, where that is what the module calls it."""
    plain = key
    while plain not in own and plain.startswith(_WRAPPERS):
        plain = plain.partition(".")[2]
    return plain if plain in own else key


def _with_tied(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names that files leave out because their tensor is that of another name."""
    at = {one.data_ptr(): name for name, one in own.items() if name in given}
    return given | {
        name: given[at[one.data_ptr()]] for name, one in own.items() if name not in given and one.data_ptr() in at
    }


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in weights.items()}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The architecture of a module as its parameters' names and shapes."""
    return _shapes(dict(module.named_parameters()))


def differing(one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> str:
    """What differs between two architectures in words; empty when nothing does.

    >>> differing({"a": (2, 3), "b": (2,)}, {"a": (2, 4), "c": (2,)})
    'a is (2, 3) there and (2, 4) here; lacks b; has c besides'
    """
    shapes = [
        f"{name} is {tuple(one[name])} there and {tuple(other[name])} here"
        for name in one
        if name in other and tuple(one[name]) != tuple(other[name])
    ]
    lacking = [name for name in one if name not in other]
    besides = [name for name in other if name not in one]
    parts = [*shapes[:2], *([f"and {len(shapes) - 2} more shapes"] if len(shapes) > 2 else [])]
    for word, names, end in (("lacks", lacking, ""), ("has", besides, " besides")):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            parts.append(f"{word} {', '.join(names[:2])}{more}{end}")
    return "; ".join(parts)


def mark_of_files(files: Iterable[Path]) -> str | None:
    """A fingerprint of files by their sizes and the bytes at either end: other weights, another fingerprint.

    Cheap, so that a trace that goes on can tell whether a checkpoint was written anew; no proof against malice.
    """
    digest, seen = hashlib.sha256(), False
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as data:
                digest.update(f"{file.name}:{size}:".encode() + data.read(_SAMPLE))
                data.seek(max(0, size - _SAMPLE))
                digest.update(data.read(_SAMPLE))
        except OSError:
            return None
        seen = True
    return digest.hexdigest()[:16] if seen else None


def mark_of_tensors(weights: Mapping[str, Tensor]) -> str | None:
    """The same of weights in memory, from some of their tensors."""
    import torch

    names = sorted(name for name, one in weights.items() if isinstance(one, torch.Tensor) and one.numel())
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _TENSORS)]:
        some = weights[name].detach().flatten()
        some = some[:: max(1, len(some) // 1024)].double().cpu()
        digest.update(f"{name}:{tuple(weights[name].shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16] if names else None
