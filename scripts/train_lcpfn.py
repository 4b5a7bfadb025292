"""Trains the extrapolator of learning curves that actome ships, and says how well it does on curves it has not seen.

    python scripts/train_lcpfn.py stage1.safetensors --steps 4500 --rate 2e-3 --seed 1
    python scripts/train_lcpfn.py actome/dynamics/lcpfn/shipped.safetensors --start stage1.safetensors \
        --steps 4500 --rate 1e-3 --seed 2 --half

These two calls made the file in the package; each takes about five minutes on one core. What they print is in
`actome/dynamics/lcpfn/CARD.md`. Evaluation curves have a seed of their own, which no training draws from.
"""

from __future__ import annotations

import argparse
import time

import torch

from actome.dynamics.lcpfn import LCPFN
from actome.dynamics.learning_curves import curve_prior

EVALUATION = 20_231_210


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--start", help="a file to go on from")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--half", action="store_true", help="keep the weights as float16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = LCPFN.load(asked.start) if asked.start else None
    begun = time.perf_counter()
    pfn = LCPFN.pretrain(
        steps=asked.steps, batch_size=asked.batch, lr=asked.rate, seed=asked.seed, start=start, progress=True
    )
    print(f"trained for {time.perf_counter() - begun:.0f} s")
    pfn.save(asked.out, torch.float16 if asked.half else torch.float32)
    report(LCPFN.load(asked.out))


def report(pfn: LCPFN) -> None:
    curves = curve_prior(2000, pfn.seq_len, EVALUATION).noisy
    for cut in (5, 10, 20, 40):
        forecast, truth = pfn.predict(curves[:, :cut]), torch.from_numpy(curves[:, cut:])
        low, high = forecast.interval(0.9)
        inside = ((low <= truth) & (truth <= high)).double().mean()
        score, error = forecast.log_prob(truth).mean(), (forecast.mean() - truth).abs().mean()
        print(f"cut {cut}: log score {score:.3f}, mean error {error:.4f}, 90 % interval holds {inside:.3f}")


if __name__ == "__main__":
    main()
