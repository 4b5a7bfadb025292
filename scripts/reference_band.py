"""Makes the reference band of the report: the demo model's trained checkpoints over parts of held-out text.

    python scripts/reference_band.py [--panel all] [--out actome/report/assets/reference_band.json]

For each value, kind of site and relative depth: the 10th and the 90th percentile over checkpoints and parts of the
text. The same command gives the same file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

import actome as ac
from actome.measures.panels import PANELS
from actome.report.arrays import rounded
from actome.report.figures import by_depth
from actome.report.scan import default_text, scan
from actome.report.words import word
from actome.tasks.demo import demo_steps

# From here on the loss falls slowly: the phase in which a model that people scan usually is.
TRAINED = 1024
PARTS, TOKENS = 8, 32_768
LOW, HIGH = 10, 90
OUT = Path(__file__).parents[1] / "actome" / "report" / "assets" / "reference_band.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--panel", default="all", choices=list(PANELS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    steps = [step for step in demo_steps() if step >= TRAINED]
    rows = pd.concat([measured(step, part, args.panel) for step in steps for part in range(PARTS)])
    values: dict[str, dict[str, dict[str, list]]] = {}
    for (measure, kind), some in rows.groupby(["measure", "kind"], sort=False):
        at = some.groupby("depth")["value"]
        low, high = (at.apply(np.percentile, q) for q in (LOW, HIGH))
        found = {"depth": low.index, "low": low, "high": high}
        values.setdefault(measure, {})[kind] = {name: [rounded(x, 4) for x in some] for name, some in found.items()}
    about = (
        f"the demo family's: {LOW} to {HIGH} % of {len(steps)} trained checkpoints (steps {steps[0]} to {steps[-1]}) "
        f"over {PARTS} parts of held-out text of {TOKENS // PARTS} tokens each, at the same relative depth"
    )
    data = {"about": about, "panel": args.panel, "values": values}
    args.out.write_text(written(data), encoding="utf-8")
    print(f"written: {args.out}")


def written(data: dict) -> str:
    """JSON with a line for each value and kind of site."""
    lines = [
        f"  {json.dumps(measure)}: {{\n"
        + ",\n".join(f"   {json.dumps(kind)}: {json.dumps(found, allow_nan=False)}" for kind, found in kinds.items())
        + "\n  }"
        for measure, kinds in data["values"].items()
    ]
    head = "".join(f" {json.dumps(key)}: {json.dumps(data[key])},\n" for key in ("about", "panel"))
    return "{\n" + head + ' "values": {\n' + ",\n".join(lines) + "\n }\n}\n"


def measured(step: int, part: int, panel: str) -> pd.DataFrame:
    """The values of layers of one checkpoint on one part of the text: measure, kind, depth, value."""
    model = ac.demo(step)
    text = default_text(model, limit=TOKENS).shard(part, PARTS)
    frame = by_depth(scan(model, text, panel=panel, passage=False).frame)
    plain = frame[frame[["head", "unit", "expert"]].isna().all(axis=1) & frame["layer"].notna()]
    plain = plain[np.isfinite(plain["value"]) & plain["measure"].map(lambda name: word(name).look != "index")]
    depth = (plain["layer"].astype(float) + 1) / model.layers
    return pd.DataFrame({"measure": plain["measure"], "kind": plain["kind"], "depth": depth, "value": plain["value"]})


if __name__ == "__main__":
    main()
