"""How much of a site changes from one position to the next: temporal sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, ratio, real_tokens

# Activations whose rounded values stay in a core's cache; a GPU takes more at once.
_CHUNK = 1 << 18
_CHUNK_ACCELERATOR = 1 << 23


class DeltaSparsity(Measure):
    r"""Share of units whose quantised activation is the same as at the position before, against those that are zero.

    With a quantisation step s, :math:`q_t = s \, \mathrm{round}(a_t / s)` and :math:`d_t = q_t - q_{t-1}`,
    :math:`q_{-1} = 0`. A linear layer fed with the differences only has work to do where :math:`d_{tu} \neq 0`.

    - ``temporal_zeros``: share of differences that are 0, :math:`d_0 = q_0` among them
    - ``spatial_zeros``: share of quantised activations that are 0, what skipping zeros would save anyway
    - ``delta_work``: work of a layer fed with differences against a dense one: the first position of a row in full,
      then the share of differences that are not 0

    Temporal sparsity pays where ``temporal_zeros`` is well above ``spatial_zeros``: slowly changing streams (video,
    audio, agents), rarely text. It depends on the step above all; compare sites and models at one step.

    Over real positions; one with a non-finite unit is left out, and the next one is compared with the last before it.

    Args:
        step: s in the activation's own units. By default it is `relative` times the rms of the row's activations.
        relative: see `step`; 0.1 gives about 40 levels to a Gaussian unit.

    Shapes: x (\*stack, batch, pos, unit); every value (\*stack).

    Raises:
        MeasureError: a step that is not above 0.

    Source: Yousefzadeh and Sifalakis 2021, Training for temporal sparsity in deep neural networks, application in
    video processing, section on the delta activation layer; the relative step is ours.

    Example:
        >>> delta = DeltaSparsity(step=1.0)
        >>> delta.update(torch.tensor([[[3.0, 0.0], [3.2, 0.1], [3.0, 5.0]]]))
        >>> {name: round(float(value), 2) for name, value in delta.compute().items()}
        {'temporal_zeros': 0.67, 'spatial_zeros': 0.33, 'delta_work': 0.5}
    """

    reductions: ClassVar[dict[str, Reduction]] = {"entries": "sum", "still": "sum", "zeros": "sum", "work": "sum"}
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {"temporal_zeros": (), "spatial_zeros": (), "delta_work": ()}

    def __init__(self, step: float | None = None, relative: float = 0.1, **options: object):
        super().__init__(**options)
        for name, value in (("step", step), ("relative", relative)):
            if value is not None and not value > 0:
                raise MeasureError(f"{name} is {value}; give a quantisation step above 0")
        self.step = step
        self.relative = relative

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Counts of entries, of differences and of activations that are zero, and of multiplications; all ()."""
        kept = real_tokens(x, mask)
        rows = kept.x if kept.keep is None else [row[keep] for row, keep in zip(kept.x, kept.keep, strict=True)]
        length = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_ACCELERATOR) // x.shape[-1])
        buffer = kept.x.new_empty(length, x.shape[-1])
        moved, nonzero, first = (torch.zeros((), dtype=torch.long, device=x.device) for _ in range(3))
        for row_TU in rows:
            if not len(row_TU):
                continue
            per_step = self._per_step(row_TU)
            for at in range(0, len(row_TU), length):
                # One position of the piece before goes along, so that every difference is taken once.
                back = min(at, 1)
                q = (row_TU[at - back : at + length] * per_step).round_()
                # Counted in float32, exact for so few and several times faster than count_nonzero.
                moved += torch.ne(q[1:], q[:-1], out=buffer[: len(q) - 1]).sum().long()
                q.ne_(0)
                nonzero += q[back:].sum().long()
                if not at:
                    moved += (start := q[0].sum().long())
                    first += x.shape[-1] - start
        entries = kept.count * x.shape[-1]
        return {"entries": entries, "still": entries - moved, "zeros": entries - nonzero, "work": moved + first}

    def _per_step(self, row_TU: Tensor) -> Tensor | float:
        if self.step is not None:
            return 1 / self.step
        rms = torch.linalg.vector_norm(row_TU) / row_TU.numel() ** 0.5
        # A row of zeros does not change, whatever the step.
        return torch.where(rms > 0, 1 / (self.relative * rms), 0.0)

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        entries = stats["entries"]
        return {
            "temporal_zeros": ratio(stats["still"], entries),
            "spatial_zeros": ratio(stats["zeros"], entries),
            "delta_work": ratio(stats["work"], entries),
        }
