"""Learning-curve extrapolation in one forward pass, by a network that was trained on curves from a prior.

Dims: N curves, C points seen, Q points asked for, T steps of the whole curve, K bars.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actome.core.errors import ActomeError, MeasureError
from actome.dynamics.bars import BarDistribution, bar_log_density, tail_width
from actome.dynamics.lcpfn.network import PFN, PFNConfig
from actome.dynamics.learning_curves import ahead, curve_prior, laid_out

Prior = Callable[[int, int, np.random.Generator], np.ndarray]
SHIPPED = Path(__file__).parent / "shipped.safetensors"


class LCPFNError(ActomeError, RuntimeError):
    """A file that holds no network of this kind."""


@dataclass(frozen=True)
class LCPFN:
    """A trained extrapolator of learning curves that rise and lie in [0, 1].

    Attributes:
        net: the network, in evaluation mode.
        borders: of its bars, (K + 1).
        seq_len: T, the steps that a whole curve had in training.
        recipe: how it was trained, one entry a call of `pretrain`.

    Source: Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted Networks.

    >>> from actome.dynamics import LCPFN
    >>> pfn = LCPFN.shipped()
    >>> forecast = pfn.predict([0.10, 0.31, 0.42, 0.49, 0.54, 0.57, 0.60, 0.61], horizons=[1, 10, 40])
    >>> forecast.shape, bool((forecast.mean() > 0.6).all()), bool(forecast.quantile(0.95)[-1] < 1)
    (torch.Size([3]), True, True)
    """

    net: PFN = field(repr=False)
    borders: Tensor = field(repr=False)
    seq_len: int
    recipe: tuple[dict[str, Any], ...] = ()

    @classmethod
    def pretrain(
        cls, prior: str | Prior = "domhan", seq_len: int = 50, steps: int = 1000, *, config: PFNConfig | None = None,
        start: LCPFN | None = None, batch_size: int = 48, lr: float = 2e-3, seed: int = 0,
        device: str | torch.device = "cpu", on_step: Callable[[int, float], None] | None = None, progress: bool = False,
    ) -> LCPFN:  # fmt: skip
        """Trains a network on curves from a prior, each seen once. Takes about 80 seconds on one core as it stands.

        Args:
            prior: ``"domhan"`` for `curve_prior`, or ``prior(curves, seq_len, generator) -> (curves, seq_len)``.
            seq_len: T, steps of a whole curve.
            steps, batch_size: how much; every batch is cut at one step drawn uniformly from 1 to T - 1.
            config: shape of the network; its bars' borders are quantiles of 10 000 curves of the prior.
            start: a network to go on from, with its shape and its borders; it is left as it is.
            lr: the highest rate of Adam, after a warm-up over a tenth of the steps; then down to zero by a half cosine.
            seed: of the curves, the cuts and the initial weights.
            on_step: called with the steps done and the loss (mean negative log density, nats).
            progress: show a bar.

        Raises:
            MeasureError: a prior that does not exist or gives something else, or fewer than two steps a curve.
        """
        from actome.tasks.draw import weights_from
        from actome.tasks.training import train

        if prior != "domhan" and not callable(prior):
            raise MeasureError(f"there is no prior {prior!r}; choose 'domhan' or give a function that draws curves")
        if seq_len < 2 or steps < 1 or batch_size < 1:
            raise MeasureError(f"seq_len={seq_len}, steps={steps}, batch_size={batch_size}: want 2, 1 and 1 or more")
        if start is not None and (config not in (None, start.net.config) or seq_len != start.seq_len):
            raise MeasureError(
                f"start has {start.net.config} and seq_len={start.seq_len}; what goes on from it has the same"
            )
        config, rng = config or PFNConfig(), np.random.default_rng(seed)

        def draw(count: int) -> Tensor:
            curves = curve_prior(count, seq_len, rng).noisy if prior == "domhan" else prior(count, seq_len, rng)
            curves = torch.as_tensor(np.asarray(curves), dtype=torch.float32)
            if curves.shape != (count, seq_len) or not bool(curves.isfinite().all()):
                raise MeasureError(
                    f"the prior gave {tuple(curves.shape)}, finite or not; want ({count}, {seq_len}) of finite numbers"
                )
            return curves.to(device)

        if start is None:
            borders = _borders(draw(10_000), config.bars)
            with weights_from(seed):
                net = PFN(config).to(device)
        else:
            net, borders = copy.deepcopy(start.net).to(device).requires_grad_(True), start.borders.to(device)
        x_1T = torch.arange(1, seq_len + 1, device=device)[None] / seq_len
        pool: list[Tensor] = []

        def batch(step: int) -> tuple[Tensor, Tensor]:
            if not pool:  # drawing many at once costs a hundredth of drawing them batch by batch
                pool.extend(draw(batch_size * min(100, steps - step)).split(batch_size))
            return pool.pop(), torch.tensor(int(rng.integers(1, seq_len)))

        def loss(module: PFN, curves_BT: Tensor, cut: Tensor) -> Tensor:
            c = int(cut)
            logits = module(x_1T.expand(len(curves_BT), -1), curves_BT[:, :c])
            return -bar_log_density(logits, borders, curves_BT[:, c:]).mean()

        def rule(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.Adam([one for group in groups for one in group["params"]], lr)

        trained = train(
            net, batch, steps, loss=loss, optimizer=rule, schedule="cosine", warmup=max(steps // 10, 1), seed=seed,
            on_step=None if on_step is None else lambda done, value, _: on_step(done, value), progress=progress,
        )  # fmt: skip
        named = "domhan" if prior == "domhan" else getattr(prior, "__name__", "a function")
        recipe = {"prior": named, "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
        stages = [*(start.recipe if start is not None else ()), recipe]
        return cls(trained.module.requires_grad_(False), borders, seq_len, tuple(stages))

    @classmethod
    def shipped(cls) -> LCPFN:
        """The network that comes with actome; `lcpfn/CARD.md` beside it says how it was made and what it measures."""
        return _shipped()

    @classmethod
    def load(cls, path: str | Path) -> LCPFN:
        """A network that was saved.

        Raises:
            LCPFNError: no such file, or one that holds something else.
        """
        from safetensors import SafetensorError, safe_open

        from actome.core.load import check_safetensors

        try:
            check_safetensors(Path(path))
            with safe_open(path, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["lcpfn"])
                state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - no mapping
            net = PFN(PFNConfig(**about["config"]))
            borders = state.pop("borders")
            net.load_state_dict(state)
        except (OSError, SafetensorError, ActomeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise LCPFNError(f"{path} holds no network of LCPFN.save: {error}") from error
        return cls(net.eval().requires_grad_(False), borders, about["seq_len"], tuple(about["recipe"]))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes one safetensors file; `dtype` of the weights (the borders stay float32)."""
        from safetensors.torch import save_file

        state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in self.net.state_dict().items()}
        state["borders"] = self.borders.detach().cpu().float()
        about = {"config": asdict(self.net.config), "seq_len": self.seq_len, "recipe": self.recipe}
        save_file(state, str(path), metadata={"lcpfn": json.dumps(about)})

    @torch.no_grad()
    def predict(
        self, y_prefix: Any, horizons: int | Sequence[int] | None = None, *, length: int | None = None
    ) -> BarDistribution:
        """The distribution of later values of a curve, given its first ones.

        Args:
            y_prefix: (C) or (N, C), the values of steps 1 to C, equally spaced; measures that rise, in [0, 1]. For
                losses and other scales see `extrapolate_curve`.
            horizons: which steps after the last one, 1 for the next; a number for that one alone, None for all up to
                the curve's end.
            length: steps of the whole curve; `seq_len` by default. The steps of another length are laid evenly over
                those of `seq_len`, the first on the first and the last on the last.

        Returns:
            Bars of shape (Q) or (N, Q), Q the number of horizons, of values with their noise.

        Raises:
            MeasureError: an empty prefix, values that are not finite or lie out of [0, 1] by more than noise, or
                horizons beyond the curve's end.
        """
        y = torch.as_tensor(np.asarray(y_prefix, dtype=np.float64))
        length = self.seq_len if length is None else length
        single = y.ndim == 1
        y_NC = y[None] if single else y
        if y_NC.ndim != 2 or not y_NC.shape[1] or not len(y_NC):
            raise MeasureError(f"y_prefix has shape {tuple(y.shape)}; want (points) or (curves, points), one at least")
        count = y_NC.shape[1]
        later = ahead(horizons, count, length)
        middle_N = y_NC.median(1).values
        if not bool(y_NC.isfinite().all()) or float(middle_N.min()) < -0.25 or float(middle_N.max()) > 1.25:
            raise MeasureError(
                f"the prefix goes from {float(y_NC.min()):g} to {float(y_NC.max()):g}; the network knows measures that "
                "rise within [0, 1], and their noise; extrapolate_curve brings losses and other scales there"
            )
        device, dtype = self.net.read.weight.device, self.net.read.weight.dtype
        steps = np.array([*range(1, count + 1), *(count + h for h in later)])
        x = torch.from_numpy(laid_out(steps, length, self.seq_len)) / self.seq_len
        logits = self.net(x.to(device, dtype).expand(len(y_NC), -1), y_NC.to(device, dtype))
        return BarDistribution((logits[0] if single else logits).cpu(), self.borders.cpu())


@lru_cache(maxsize=1)
def _shipped() -> LCPFN:
    return LCPFN.load(SHIPPED)


def _borders(curves: Tensor, bars: int) -> Tensor:
    """Quantiles of the prior's values as inner borders; outer ones such that the tails fit the values beyond them."""
    values = curves.flatten().double().cpu()
    inner = torch.from_numpy(np.quantile(values.numpy(), np.arange(1, bars) / bars))
    ends = inner[[0, -1]] + torch.stack([-tail_width(inner[0] - values), tail_width(values - inner[-1])])
    borders = torch.cat([ends[:1], inner, ends[1:]])
    if not bool((borders.diff() > 0).all()):
        raise MeasureError(f"the values of the prior are too much alike for {bars} bars; take fewer")
    return borders.float().to(curves.device)
