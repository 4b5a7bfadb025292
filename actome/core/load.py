"""Loading: a local directory or a hub id, with safetensors by default and no remote code unless asked for."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import LoadError
from .families import FAMILIES
from .model import Model

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def wrap(module: nn.Module, tokenizer: Any = None, *, name: str | None = None, example: Any = None) -> Model:
    """Wraps any module as it is.

    Args:
        module: any ``nn.Module``. Transformers models have the sites of their family; every module has those of its
            submodules, as ``module:PATH``.
        tokenizer: a transformers tokenizer, for text inputs.
        name: what to call it in reports.
        example: arguments of a forward (tensor, tuple or dict), to find the usual sites of a module whose inputs
            are not known otherwise.

    Example:
        >>> import actome as ac, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> ac.wrap(net).record(torch.randn(5, 3), "module:1")["module:1"].shape
        torch.Size([5, 4])
    """
    return Model(module, tokenizer, name=name, example=example)


def load(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> Model:
    """Loads a transformers model with its tokenizer.

    Args:
        path_or_hub_id: a directory with a ``config.json``, or a hub id such as ``"Qwen/Qwen3-0.6B"``.
        revision: branch, tag or commit on the hub.
        dtype: such as ``"bfloat16"``; by default what the checkpoint was saved in.
        device: such as ``"cuda"``; by default the CPU.
        trust_remote_code: run code that comes with the model. Off: such a model is refused.
        allow_pickle: also read weights that are not safetensors; unpickling can run code.
        options: passed to ``from_pretrained``.

    Returns:
        A `Model` in evaluation mode. Without a tokenizer its `tokenizer` is ``None``, and it takes token ids.

    Raises:
        LoadError: no model there, truncated or corrupt weights, pickled weights, remote code, an unknown dtype.
    """
    import transformers

    place = str(path_or_hub_id)
    directory = Path(place).expanduser()
    local = directory.exists() or place.startswith((".", "/", "~"))
    if local:
        _check_directory(directory, allow_pickle)
        _introduce(directory)
        place = str(directory)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    if local:
        common["local_files_only"] = True
    try:
        config = transformers.AutoConfig.from_pretrained(place, **common)
    except Exception as error:
        raise LoadError(_explain(place, local, error)) from error
    kind = _model_class(transformers, config)
    try:
        # From file to device in one step; transformers reports what it misses by itself.
        module, found = kind.from_pretrained(
            place,
            dtype=_dtype(dtype),
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **common,
            **options,
        )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explain(place, local, error)) from error
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        # Such weights would be random numbers, and everything measured on them too.
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LoadError(f"the weights in {place} lack {', '.join(missing[:3])}{more} of a {type(module).__name__}")
    module.eval()
    if device is not None:
        module.to(device)
    name = directory.resolve().name if local else place
    return Model(module, _tokenizer(transformers, place, common), name=name)


def _check_directory(path: Path, allow_pickle: bool) -> None:
    if not path.is_dir():
        raise LoadError(f"{path} is {'a file' if path.exists() else 'not there'}; give a directory with a config.json")
    if not (path / "config.json").exists():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise LoadError(f"{path} holds no model: there is no config.json in it (found: {there})")
    shards = sorted(path.glob("*.safetensors"))
    if not shards and not allow_pickle:
        pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        if pickles:
            raise LoadError(
                f"{path} has pickled weights only ({pickles[0]}), and unpickling can run code; pass allow_pickle=True "
                "(--allow-pickle) if you trust them, or convert them to safetensors"
            )
        raise LoadError(f"{path} has a config.json but no weights (*.safetensors)")
    for shard in shards:
        check_safetensors(shard)


def _introduce(path: Path) -> None:
    """Makes transformers know the family of a checkpoint, where that family is actome's own."""
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        return  # transformers says what is wrong with it
    for family in FAMILIES:
        if family.home is not None and model_type in family.model_types:
            importlib.import_module(family.home)


def check_safetensors(path: Path) -> None:
    """Proves that a safetensors file is whole: its header is readable and the file as long as the header says.

    Raises:
        LoadError: with the lengths wanted and found.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise LoadError(
                f"{path} is truncated or no safetensors file: {size} bytes, its header alone needs {length + 8}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise LoadError(f"{path} is corrupt: its header is not readable ({error})") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise LoadError(
            f"{path} is {'truncated' if size < wanted else 'corrupt'}: {size} bytes, its header says {wanted}"
        )


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoadError(f"unknown dtype {dtype!r}; one of float32, bfloat16, float16")
    return found


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint was saved from, or, where it does not say, a causal model, else the bare one."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _tokenizer(transformers: Any, place: str, common: dict[str, Any]) -> Any:
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, **common)
        # Where a folder has no tokenizer, transformers makes those of some families (GPT-2's) without a single word.
        return found if len(found) > len(set(found.all_special_ids)) else None
    except Exception:
        return None


def _explain(place: str, local: bool, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{place} comes with code of its own; pass trust_remote_code=True (--trust-remote-code) if you trust it"
    if ("safetensors" in text and "use_safetensors" in text) or "does not appear to have a file named" in text:
        return f"{place} has no safetensors; pass allow_pickle=True (--allow-pickle) to read others if you trust them"
    reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if local:
        return f"cannot load {place}: {reason}"
    return f"cannot load {place!r}: it is no directory here, and as a hub id it gave: {reason}"
