"""Scans of known numbers, for tests of reports: any depth and width, with arrays and a passage."""

import numpy as np
import pandas as pd

from actome.measures.findings import Finding
from actome.measures.histogram import Histogram
from actome.report.scan import Scan

HOSTILE = "</script><img src=x onerror=alert(1)> & \"quoted\" 'name' \u2028"
STREAM = ("rms", "norm", "max_abs", "movement", "cosine", "growth", "used", "massive_ratio", "outlier_energy")
COLUMNS = ["site", "layer", "head", "unit", "expert", "measure", "value"]


def invented(
    layers: int = 12, heads: int = 12, width: int = 768, name: str = "invented", seed: int = 0, more: int = 10
) -> Scan:
    """A scan with everything that a page can show, of numbers drawn at random, and `more` values that none knows."""
    draw = np.random.default_rng(seed)
    rows, arrays = [], []
    axis = Histogram.axis("bin")[1:-1]
    for layer in range(layers):
        for kind in ("resid.post", "mlp.act", "attn.out", "attn.z"):
            place = {"site": f"blocks.{layer}.{kind}", "layer": layer}
            rows += [{**place, "measure": one, "value": float(draw.lognormal())} for one in STREAM]
            rows += [{**place, "measure": f"new_{i}_share", "value": float(draw.random())} for i in range(more)]
            shares = draw.dirichlet(np.exp(-((np.linspace(-4, 4, len(axis))) ** 2)))
            bins = {"at": axis, "values": [float(f"{x:.5g}") for x in shares]}
            arrays.append({**place, "measure": "histogram", "dim": "bin", **bins})
            variances = np.sort(draw.lognormal(sigma=2, size=min(width, 256)))[::-1]
            arrays.append(
                {**place, "measure": "spectrum", "dim": "rank", "values": [float(f"{x:.5g}") for x in variances]}
            )
        pattern = {"site": f"blocks.{layer}.attn.pattern", "layer": layer}
        for one in ("sink_excess", "attention_entropy", "sink_rate"):
            rows += [{**pattern, "head": head, "measure": one, "value": float(draw.random())} for head in range(heads)]
    rows.append({"site": "logits", "measure": "loss", "value": 3.25})
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    frame = frame.astype({**dict.fromkeys(COLUMNS[1:5], "Int64"), "value": "float64"})
    last = layers - 1
    findings = (
        Finding("dead-units", "critical", f"blocks.{last}.mlp.act", {"layers": [last], "units": [1, 2]}, {"dead": 0.95},
                HOSTILE, f"advice {HOSTILE}"),
        Finding("attention-sink", "info", "blocks.{0..1}.attn.pattern", {"layers": [0, 1], "heads": [3]},
                {"sink": 0.5}, "source", "advice"),
    )  # fmt: skip
    text = {"source": HOSTILE, "context": 64, "counts": {"tokens": 640, "sequences": 10}}
    run = {"panel": "health", "seconds": 1.5, "started": "2026-01-01T00:00:00+0000", "versions": {"torch": "2"}}
    facts = {"name": name, "layers": layers, "head": heads, "d_model": width}
    return Scan(facts, text, run, frame, findings, (f"x: {HOSTILE}",), tuple(arrays), passage(layers, draw))


def passage(layers: int, draw: np.random.Generator, length: int = 192) -> dict:
    """A text with ten values of every layer, a sink at the first token and a massive one at the third."""

    def values(*shape: int) -> list:
        return draw.random(shape).round(4).tolist()

    tokens = ["<s>", HOSTILE, *(f" word{i}" if i % 9 else "\n" for i in range(length - 2))]
    kinds = [(name, "resid.post") for name in STREAM] + [("near_zeros", "mlp.act")]
    shown = list(range(0, layers, max(1, layers // 24)))
    return {
        "tokens": tokens,
        "values": [
            {"measure": "token_loss", "kind": "logits", "values": [None, *values(length - 1)]},
            *({"measure": one, "kind": kind, "layers": shown, "values": values(len(shown), length)}
              for one, kind in kinds),
        ],
        "massive": [{"position": 2, "layer": 1, "unit": 447, "ratio": 812.5}],
        "sinks": [{"position": 0, "layer": 1, "head": 3, "weight": 0.71}],
    }  # fmt: skip
