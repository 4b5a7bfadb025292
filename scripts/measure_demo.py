"""Measures every checkpoint of the demo model on held-out text and on random tokens that repeat.

`python scripts/train_demo.py --evaluate` runs it: it writes `measurements.json` beside the checkpoints and prints the
tables of their card. It uses transformers alone, so that it can be compared with what actome itself measures.

Dims: B rows, T positions, H heads, Q/K query and key positions, F units, D model width, N tokens, V vocabulary.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from actome.tasks.corpus import documents
from actome.tasks.demo import folder_of_step

CONTEXT = 256
TEXT_ROWS = 160  # held-out windows of each kind for the loss; English has fewer
PATTERN_ROWS = 48  # held-out windows of source and English for heads and units
REPEATS = 96


@dataclass(frozen=True)
class Repeats:
    """Random tokens (B, T) in which a span of `length` (B,) starts at `first` and, for a repeat, again at `second`."""

    tokens_BT: Tensor
    first: list[int]
    second: list[int]
    length: list[int]


def random_repeats(count: int, repeated: bool, seed: int = 0) -> Repeats:
    """Begin token, lead, span, gap, span, filler: all of random tokens, and each of a random length.

    With `repeated=False` the second span is drawn anew: the control, in which there is nothing to copy.
    """
    rng = np.random.default_rng(seed)
    rows, spans = [], []
    for _ in range(count):
        lead, length, gap = (int(rng.integers(low, high)) for low, high in ((0, 49), (16, 81), (0, 41)))
        row = rng.integers(2, 2000, size=CONTEXT)
        row[0] = 0
        first, second = 1 + lead, 1 + lead + length + gap
        if repeated:
            row[second : second + length] = row[first : first + length]
        rows.append(row)
        spans.append((first, second, length))
    return Repeats(torch.from_numpy(np.stack(rows)), *map(list, zip(*spans, strict=True)))


def text_rows(tokenizer: PreTrainedTokenizerFast, kind: str, limit: int, split: str = "heldout") -> Tensor:
    """Windows (B, T) of text, evenly spaced over the documents, each with the begin token in front."""
    streams = [tokenizer(document.text, verbose=False).input_ids for document in documents(split, kind)]
    stream = torch.tensor([token for ids in streams for token in ids])
    windows = stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    chosen = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    return torch.cat([torch.zeros(len(chosen), 1, dtype=torch.long), chosen], dim=1)


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy in nats (B, T-1); column t is the loss on the token at position t + 1."""
    rows = []
    for chunk_BT in tokens_BT.split(16):
        logits_BTV = model(input_ids=chunk_BT).logits[:, :-1].float()
        rows.append(nn.functional.cross_entropy(logits_BTV.transpose(1, 2), chunk_BT[:, 1:], reduction="none"))
    return torch.cat(rows)


def span_loss(losses_BT: Tensor, starts: list[int], lengths: list[int]) -> float:
    """Mean loss over the spans, without their first token, which nothing foretells."""
    spans = [row[start : start + length - 1] for row, start, length in zip(losses_BT, starts, lengths, strict=True)]
    return torch.cat(spans).mean().item()


def baselines(tokenizer: PreTrainedTokenizerFast, kind: str, heldout_BT: Tensor) -> dict[str, float]:
    """Loss of a unigram (add-one) and a bigram model counted on the training text of the same kind.

    The bigram backs off to the unigram with the prior weight that does best on the held-out text itself, in its favour.
    """
    vocabulary = len(tokenizer)
    unigram_V = np.ones(vocabulary)
    bigram_VV = np.zeros((vocabulary, vocabulary))
    for document in documents("train", kind):
        ids = np.array(tokenizer(document.text, verbose=False).input_ids)
        np.add.at(unigram_V, ids[1:], 1)
        np.add.at(bigram_VV, (ids[:-1], ids[1:]), 1)
    unigram_V /= unigram_V.sum()
    before, after = heldout_BT[:, :-1].flatten().numpy(), heldout_BT[:, 1:].flatten().numpy()
    seen, pairs = bigram_VV.sum(1)[before], bigram_VV[before, after]
    bigram = min(
        -np.log((pairs + weight * unigram_V[after]) / (seen + weight)).mean() for weight in (1, 3, 10, 30, 100, 300)
    )
    return {"unigram": float(-np.log(unigram_V[after]).mean()), "bigram": float(bigram)}


@torch.no_grad()
def head_scores(model: LlamaForCausalLM, text_BT: Tensor, repeats: Repeats, control: Repeats) -> dict[str, list]:
    """Mean attention weights by [layer][head].

    previous: to the token before, on text, for queries whose previous token is not the first one.
    first: to the first token (the sink), on text, for queries from 1 on.
    induction: from the second span to the token after the same token's first occurrence; `control` where the second
        span repeats nothing.
    """
    model.set_attn_implementation("eager")
    text_LHQK = [pattern.mean(0) for pattern in model(text_BT, output_attentions=True).attentions]
    scores = {
        "previous": [pattern.diagonal(-1, 1, 2)[:, 1:].mean(1).tolist() for pattern in text_LHQK],
        "first": [pattern[:, 1:, 0].mean(1).tolist() for pattern in text_LHQK],
    }
    for name, sequences in {"induction": repeats, "induction_control": control}.items():
        patterns = model(sequences.tokens_BT, output_attentions=True).attentions
        rows, queries, keys = copy_positions(sequences)
        scores[name] = [pattern[rows, :, queries, keys].mean(0).tolist() for pattern in patterns]
    model.set_attn_implementation("sdpa")
    return scores


def copy_positions(sequences: Repeats) -> tuple[Tensor, Tensor, Tensor]:
    """Row, query and key of every place where an induction head should look; the span's last token has no successor."""
    spans = enumerate(zip(sequences.first, sequences.second, sequences.length, strict=True))
    places = [
        (row, second + offset, first + offset + 1)
        for row, (first, second, length) in spans
        for offset in range(length - 1)
    ]
    rows, queries, keys = torch.tensor(places).T
    return rows, queries, keys


@contextmanager
def caught_inputs(modules: list[nn.Module]):
    """Catches what enters each module, as one list of tensors per module."""
    caught = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, into=into: into.append(inputs[0].detach()))
        for module, into in zip(modules, caught, strict=True)
    ]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values: 0 when all are equal, near 1 when one has everything."""
    return ((values[:, None] - values).abs().mean() / (2 * values.mean())).item()


@torch.no_grad()
def layer_health(model: LlamaForCausalLM, text_BT: Tensor) -> list[dict[str, float]]:
    """By layer, on text: how unevenly units are used, and the size and rank of the residual stream after the layer.

    A unit is open on a token where its gate is positive. Massive ratio: largest |x| on begin tokens, and on all others,
    over the median |x|. Rank: participation ratio of the covariance over the other tokens, at most the model width.
    """
    begins_BT = text_BT == 0  # at the first position, and inside where a document starts
    layers = model.model.layers
    after = [*layers[1:], model.model.norm]
    seams = [layer.mlp.down_proj for layer in layers] + [layer.mlp.gate_proj for layer in layers] + after
    with caught_inputs(seams) as caught:
        model(text_BT)
    acts, gate_inputs, resids = (caught[start : start + len(layers)] for start in range(0, len(seams), len(layers)))
    health = []
    for layer, (act_BTF,), (into_BTD,), (resid_BTD,) in zip(layers, acts, gate_inputs, resids, strict=True):
        size_F = act_BTF.flatten(0, 1).abs().mean(0)
        open_F = (layer.mlp.gate_proj(into_BTD) > 0).float().flatten(0, 1).mean(0)
        spread_D = torch.linalg.eigvalsh(resid_BTD[~begins_BT].T.cov())
        health.append(
            {
                "gini_of_mean_abs_act": gini(size_F),
                "mean_abs_act_quantiles": size_F.quantile(torch.tensor([0, 0.1, 0.5, 0.9, 1.0])).tolist(),
                "open_share_quantiles": open_F.quantile(torch.tensor([0, 0.1, 0.5, 0.9, 1.0])).tolist(),
                "units_below_a_hundredth_of_the_median": int((size_F < size_F.median() / 100).sum()),
                "massive_ratio_on_begin": (resid_BTD[begins_BT].abs().max() / resid_BTD.abs().median()).item(),
                "massive_ratio_elsewhere": (resid_BTD[~begins_BT].abs().max() / resid_BTD.abs().median()).item(),
                "rank": (spread_D.sum() ** 2 / (spread_D**2).sum()).item(),
            }
        )
    return health


@contextmanager
def silenced(module: nn.Module, columns: slice = slice(None)):
    """Zeroes columns of what enters a linear module: a head before the output projection, or a whole MLP."""

    def zero(_, inputs):
        changed = inputs[0].clone()
        changed[..., columns] = 0
        return (changed,)

    hook = module.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def ablations(model: LlamaForCausalLM, text_BT: Tensor, repeats: Repeats) -> dict[str, list]:
    """Loss on text without each MLP and each attention [layer]; on the second copy without each head [layer][head]."""
    width, heads = model.config.head_dim, range(model.config.num_attention_heads)
    without = {"mlp": [], "attention": [], "head": []}
    for layer in model.model.layers:
        for name, module in (("mlp", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj)):
            with silenced(module):
                without[name].append(token_losses(model, text_BT).mean().item())
        without["head"].append([])
        for head in heads:
            with silenced(layer.self_attn.o_proj, slice(head * width, (head + 1) * width)):
                losses_BT = token_losses(model, repeats.tokens_BT)
            without["head"][-1].append(span_loss(losses_BT, repeats.second, repeats.length))
    return without


def evaluate(root: Path) -> None:
    """Measures every checkpoint under `root`, writes `measurements.json` there and prints the card's tables."""
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder_of_step(steps[-1], root))
    text = {kind: text_rows(tokenizer, kind, TEXT_ROWS) for kind in ("english", "source")}
    mixed_BT = torch.cat([rows_BT[: PATTERN_ROWS // 2] for rows_BT in text.values()])
    repeats, control = random_repeats(REPEATS, repeated=True), random_repeats(REPEATS, repeated=False)
    result = {
        "heldout_tokens": {kind: rows_BT[:, 1:].numel() for kind, rows_BT in text.items()},
        "baselines": {kind: baselines(tokenizer, kind, rows_BT) for kind, rows_BT in text.items()},
        "checkpoints": {},
    }
    for step in track(steps, description="measuring"):
        model = LlamaForCausalLM.from_pretrained(folder_of_step(step, root), dtype=torch.float32).eval()
        repeated_BT, fresh_BT = (token_losses(model, sequences.tokens_BT) for sequences in (repeats, control))
        figures = {kind: token_losses(model, rows_BT).mean().item() for kind, rows_BT in text.items()}
        figures |= {
            "first_copy": span_loss(repeated_BT, repeats.first, repeats.length),
            "second_copy": span_loss(repeated_BT, repeats.second, repeats.length),
            "second_span_control": span_loss(fresh_BT, control.second, control.length),
            "heads": head_scores(model, mixed_BT, repeats, control),
            "layers": layer_health(model, mixed_BT),
        }
        result["checkpoints"][step] = figures
    result["mixed_text_loss"] = token_losses(model, mixed_BT).mean().item()
    result["loss_on_training_text"] = {
        kind: token_losses(model, text_rows(tokenizer, kind, TEXT_ROWS, "train")).mean().item() for kind in text
    }
    result["loss_without"] = ablations(model, mixed_BT, repeats)
    result["continuations"] = continuations(model, tokenizer)
    four_digits = json.loads(json.dumps(result), parse_float=lambda digits: round(float(digits), 4))
    (root / "measurements.json").write_text(json.dumps(four_digits, indent=1) + "\n")
    print(tables(four_digits))


def continuations(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Greedy continuations of a few prompts."""
    prompts = ["The value of the", "    def __init__(self", "import os\nimport", "abc xyz 123\nabc xyz 123\nabc"]
    texts = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts[prompt] = tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def tables(result: dict) -> str:
    """The measurements as Markdown: losses by checkpoint, then heads and layers of the last checkpoint."""
    base, without = result["baselines"], result["loss_without"]
    rows = [[name, *(f"{base[kind][name]:.2f}" for kind in base), "", "", "", ""] for name in ("unigram", "bigram")]
    for step, figures in result["checkpoints"].items():
        columns = ("english", "source", "first_copy", "second_copy", "second_span_control")
        best = max(score for layer in figures["heads"]["induction"] for score in layer)
        rows.append([step, *(f"{figures[column]:.2f}" for column in columns), f"{best:.2f}"])
    losses = table("step, English, source, first copy, second copy, second span of the control, best induction", rows)

    names, rows = ("previous", "first", "induction", "induction_control"), []
    for layer, of_layer in enumerate(without["head"]):
        for head, loss in enumerate(of_layer):
            scores = (f"{figures['heads'][name][layer][head]:.2f}" for name in names)
            rows.append([f"{layer}.{head}", *scores, f"{loss:.2f}"])
    heads = table("head, previous, first, induction, its control, second-copy loss without it", rows)

    rows, single = [], ("gini_of_mean_abs_act", "massive_ratio_on_begin", "massive_ratio_elsewhere", "rank")
    for layer, health in enumerate(figures["layers"]):
        quantiles = (health["mean_abs_act_quantiles"], health["open_share_quantiles"])
        rows.append([str(layer), *(" ".join(f"{value:.2f}" for value in values) for values in quantiles)])
        rows[-1] += [f"{health[name]:.2f}" for name in single]
        rows[-1] += [f"{without[name][layer]:.2f}" for name in ("mlp", "attention")]
    columns = "layer, mean abs act, open share, Gini, massive on begin, elsewhere, rank, loss without MLP, attention"
    return "\n".join([losses, heads, table(columns, rows)])


def table(columns: str, rows: list[list]) -> str:
    lines = [columns.split(", "), ["---"] * (columns.count(",") + 1), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)
