"""Trains the demo model and measures it.

    python scripts/train_demo.py               # trains; about 25 minutes on one core; resumes when interrupted
    python scripts/train_demo.py --evaluate    # measures every checkpoint, for the model's card

Weights depend on the seed alone: batches are drawn by (seed, step), and one thread adds in one order. The same
machine with the same library versions gives the same files.
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
import torch
import transformers
from rich.progress import Progress
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actome.tasks.corpus import documents
from actome.tasks.demo import DEMO_MODEL, folder_of_step

BEGIN, PAD = "<|begin|>", "<|pad|>"
VOCABULARY = 2000
CONTEXT = 256
BATCH = 8
ENGLISH_SHARE = 0.10  # of the sequences; by size alone English would be a twentieth of the text
REPEATS_SHARE = 0.08  # of the sequences; see `repeated_spans`
PEAK_RATE, FINAL_RATE, WARMUP = 3e-3, 3e-4, 200
WEIGHT_DECAY = 0.1
SAVE_EVERY = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEMO_MODEL, help="where the checkpoints go")
    parser.add_argument("--state", type=Path, default=Path("build/demo-state.pt"), help="what a resumed run reads")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoints under --out, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if options.evaluate:
        from measure_demo import evaluate

        evaluate(options.out)
    else:
        train(options.steps, options.seed, options.out, options.state)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every sequence starts with the begin token and any text survives a round trip."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, PAD], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    # English counts four times, or nearly all merges would be of source.
    texts = [document.text for document in documents("train", "source") + 4 * documents("train", "english")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    # One token begins and ends a document, so that generation stops where the next document would start.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=BEGIN,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model: 4 layers of 4 heads at width 112, three quarters of a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=112,
        intermediate_size=240,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str, kind: str) -> np.ndarray:
    """All documents of a kind, one after the other as token ids (N,), each with its begin token in front."""
    return np.concatenate([tokenizer(document.text, verbose=False).input_ids for document in documents(split, kind)])


def text_window(stream: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    start = rng.integers(0, len(stream) - length)
    return stream[start : start + length]


def repeated_spans(stream: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Text in which one span of variable length returns at variable distances; in half, the span's order is shuffled.

    A small model that sees only text learns to copy late and weakly, because bigrams explain most repeats. Shuffled
    spans can be predicted in no other way than by looking the earlier occurrence up.
    """
    span = text_window(stream, rng.integers(8, 100), rng)
    if rng.random() < 0.5:
        span = rng.permutation(span)
    pieces = [text_window(stream, rng.integers(0, 60), rng)]
    while sum(map(len, pieces)) < length:
        pieces += [span, text_window(stream, rng.integers(0, 30), rng)]
    return np.concatenate(pieces)[:length]


def batch_of_step(step: int, seed: int, english: np.ndarray, source: np.ndarray) -> torch.Tensor:
    """The token ids (B, T) of one step, a function of (seed, step) alone."""
    rng = np.random.default_rng([seed, step])
    rows = []
    for _ in range(BATCH):
        draw = rng.random()
        if draw < REPEATS_SHARE:
            row = repeated_spans(source, CONTEXT - 1, rng)
        else:
            row = text_window(english if draw < REPEATS_SHARE + ENGLISH_SHARE else source, CONTEXT - 1, rng)
        rows.append(np.concatenate([[0], row]))
    return torch.from_numpy(np.stack(rows))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return FINAL_RATE + 0.5 * (PEAK_RATE - FINAL_RATE) * (1 + math.cos(math.pi * done))


def checkpoint_steps(steps: int) -> set[int]:
    """Step 0 and the last step halved up to eight times: ten checkpoints, evenly spaced in the logarithm."""
    return {0} | {steps >> halvings for halvings in range(9)}


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes an ordinary model folder: weights in bfloat16 for their size, declared float32 for their use."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(steps: int, seed: int, out: Path, state_file: Path) -> None:
    """Trains from the start, or from where an interrupted run left `state_file`; writes the checkpoints to `out`."""
    tokenizer = train_tokenizer()
    english, source = (token_stream(tokenizer, "train", kind) for kind in ("english", "source"))
    model = new_model(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    recipe = {"steps": steps, "seed": seed, "peak_rate": PEAK_RATE}
    run = recipe | {"out": str(out.resolve())}
    first, losses, seconds = 0, [], 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["run"] != run:
            sys.exit(f"{state_file} belongs to another run, {state['run']}; remove it or give another --state")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses, seconds = state["step"], state["losses"], state["seconds"]
        print(f"resuming at step {first} of {steps}")

    started = time.monotonic() - seconds
    with Progress() as progress:
        bar = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            if step in checkpoint_steps(steps):
                save_checkpoint(model, tokenizer, folder_of_step(step, out))
            if step % SAVE_EVERY == 0 and step > first:
                mean, seconds = sum(losses[-SAVE_EVERY:]) / SAVE_EVERY, time.monotonic() - started
                progress.console.print(f"step {step}: loss {mean:.3f} over the last {SAVE_EVERY}, {seconds:.0f} s")
                state = {"run": run, "step": step, "losses": losses, "seconds": seconds}
                save_state(state_file, state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            tokens_BT = batch_of_step(step, seed, english, source)
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.advance(bar)
    save_checkpoint(model, tokenizer, folder_of_step(steps, out))

    summary = recipe | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": {"english": len(english), "source": len(source)},
        "tokens_seen": steps * BATCH * CONTEXT,
        "seconds": round(time.monotonic() - started),
        "versions": versions(),
        "loss": {step: round(float(np.mean(losses[max(0, step - 64) : step])), 4) for step in range(64, steps + 1, 64)},
    }
    (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    state_file.unlink(missing_ok=True)


def save_state(state_file: Path, state: dict) -> None:
    state_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = state_file.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(state_file)  # an interruption leaves the previous state whole


def versions() -> dict[str, str]:
    """What the weights depend on besides the seed."""
    libraries = {library.__name__: library.__version__ for library in (torch, transformers, tokenizers, np)}
    return libraries | {"python": platform.python_version(), "machine": platform.machine()}


if __name__ == "__main__":
    main()
