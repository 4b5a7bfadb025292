"""The demo model: a small transformer trained on text for this purpose, shipped with ten of its checkpoints.

It is small enough to load in well under a second and to run on any machine, and large enough to hold what people
look for in a language model: heads that attend to the previous token, heads that copy, a sink on the first token,
units of very uneven use. `demo_model/CARD.md` says how it was made and what it measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from actome.core.model import Model

DEMO_MODEL = Path(__file__).parent / "demo_model"


def demo(
    step: int | None = None, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Model:
    """The demo model at one of its checkpoints, wrapped and ready to record, measure and clamp.

    Args:
        step: a training step out of `demo_steps()`; None is the last. Step 0 is the model before training, the
            control for anything that training should have made.
        dtype: of the weights; None is float32.
        device: where to put them; None is the CPU.

    Raises:
        ValueError: when there is no checkpoint at that step; it names the ones that exist, nearest first.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> model.module.config.num_hidden_layers
    4
    """
    from actome.core.load import wrap

    module, tokenizer = demo_module(step, dtype, device)
    return wrap(module, tokenizer, name=f"demo model, step {demo_steps()[-1] if step is None else step}")


def demo_module(
    step: int | None = None, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The demo model as the plain transformers module and tokenizer, in evaluation mode.

    Arguments and errors are those of `demo`.

    >>> from actome.tasks.demo import demo_module
    >>> module, tokenizer = demo_module()
    >>> tokenizer.convert_ids_to_tokens(tokenizer("def f(x):").input_ids)[0]
    '<|begin|>'
    """
    # transformers takes seconds to import; the steps and folders below do without it.
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = demo_dir(step)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    with _without_progress_bar():
        module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return module.to(device or "cpu").eval(), tokenizer


def demo_steps() -> list[int]:
    """The training steps at which there is a checkpoint, in order.

    >>> from actome.tasks.demo import demo_steps
    >>> demo_steps()[0]
    0
    """
    named = (re.fullmatch(r"step-(\d+)", folder.name) for folder in DEMO_MODEL.iterdir())
    return sorted(int(match[1]) for match in named if match)


def demo_dir(step: int | None = None) -> Path:
    """The folder of one checkpoint, an ordinary Hugging Face model folder that other tools load by its path.

    >>> from actome.tasks.demo import demo_dir
    >>> sorted(path.name for path in demo_dir(0).glob("*.safetensors"))
    ['model.safetensors']
    """
    steps = demo_steps()
    step = steps[-1] if step is None else step
    if step not in steps:
        nearest_first = ", ".join(str(known) for known in sorted(steps, key=lambda known: (abs(known - step), known)))
        raise ValueError(f"the demo model has no checkpoint at step {step}; nearest first, it has {nearest_first}")
    return folder_of_step(step)


def folder_of_step(step: int, root: Path = DEMO_MODEL) -> Path:
    """Where the checkpoint of a step lies under `root`, whether or not it exists."""
    return root / f"step-{step:05d}"


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing a bar for a load of milliseconds; leaves its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
