"""How states travel over the tokens of a sequence: how far, by which detours, and whether towards where they end.

Letters: B batch, T position, D width, S segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.errors import MeasureError
from ..core.measure import Measure, Reduction, double, ratio, real_tokens

if TYPE_CHECKING:
    from ..core.recording import Recording


class TrajectorySignals(NamedTuple):
    """Three numbers of each trajectory; every field has the dims of the states without positions and width.

    Attributes:
        net: length of the way from the first to the last segment, in lengths of the first.
        cumulative: lengths of all steps between neighbouring segments, each in lengths of the segment it starts from,
            added up.
        aligned: mean cosine of the steps with the way from the first to the last.
    """

    net: Tensor
    cumulative: Tensor
    aligned: Tensor


class LatentTrajectory(Measure):
    r"""Net, cumulative and aligned change of the states along sequences, cut into segments of equal length.

    Real tokens of each row are cut into segments of `segment` tokens (the last may be shorter), and :math:`h_s` is
    the mean state of segment s of S. Means over rows with at least two segments of

    - ``net_change``: :math:`\lVert h_S - h_1 \rVert / \lVert h_1 \rVert`
    - ``cumulative_change``: :math:`\sum_s \lVert h_s - h_{s-1} \rVert / \lVert h_{s-1} \rVert`, which grows with S
    - ``aligned_change``: mean over s of :math:`\cos(h_s - h_{s-1}, h_S - h_1)`

    The others, and rows in which a divisor is zero, are left out, and so are tokens that are not finite. A row is a
    sequence: measure text with one document a row.
    `trajectory_signals` gives the three for each sequence, for other segments, and for a recording.

    Args:
        segment: tokens a segment.

    Shapes: x (\*stack, batch, pos, unit); every value (\*stack).

    Source: Vilas et al. 2025, Tracing the Traces: Latent Temporal Signals for Efficient and Accurate Reasoning; the
    paper reads the tokens that a model generates and takes the mean over layers.

    Example:
        >>> trajectory = LatentTrajectory(segment=1)
        >>> trajectory.update(torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]]))
        >>> {name: round(float(value), 3) for name, value in trajectory.compute().items()}
        {'net_change': 2.0, 'cumulative_change': 1.707, 'aligned_change': 1.0}
    """

    reductions: ClassVar[dict[str, Reduction]] = {
        "sequences": "sum",
        "net": "sum",
        "cumulative": "sum",
        "aligned": "sum",
    }
    value_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "net_change": (),
        "cumulative_change": (),
        "aligned_change": (),
    }

    def __init__(self, segment: int = 16, **options: object):
        super().__init__(**options)
        if segment < 1:
            raise MeasureError(f"segment={segment}; a segment has at least one token")
        self.segment = segment

    def site_statistics(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """sequences: count; net, cumulative, aligned: sums over them; all ()."""
        found = real_tokens(x, mask)
        if found.keep is None and x.shape[1] % self.segment == 0:
            h_BSD = found.x.unflatten(1, (-1, self.segment)).mean(2)
            got = _signals(h_BSD, torch.full((len(x),), h_BSD.shape[1], device=x.device))
        else:
            place_BT = _blocks(len(x), x.shape[1], self.segment, found.keep, x.device)
            got = _signals(*_segments(found.x, place_BT, found.keep))
        there = got.net.isfinite() & got.cumulative.isfinite() & got.aligned.isfinite()
        sums = {name: double(of.where(there, 0.0)).sum() for name, of in got._asdict().items()}
        return {"sequences": there.sum(), **sums}

    def values(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        n = stats["sequences"]
        return {f"{name}_change": ratio(stats[name], n) for name in ("net", "cumulative", "aligned")}


def trajectory_signals(
    states: Tensor | Recording,
    *,
    segment: int | None = None,
    boundaries: Tensor | None = None,
    mask: Tensor | None = None,
    sites: str | Sequence[str] = "blocks.*.resid.post",
) -> TrajectorySignals:
    """The three signals of each sequence, at each layer.

    Args:
        states: (*stack, batch, pos, unit), or a `Recording`, of which the sites that `sites` names are stacked.
        segment: tokens a segment, counted over the real tokens of a row; every token is one by default.
        boundaries: instead, the segment of each token, (batch, pos) integers, 0, 1, 2, ... in a row without gaps;
            negative for tokens of no segment, such as those of the prompt.
        mask: (batch, pos) bool, which tokens are real; a recording brings its own.
        sites: for a recording, a pattern or several.

    Returns:
        `TrajectorySignals`, each field (*stack, batch); NaN for a row with fewer than two segments, and where a
        divisor is zero.

    Raises:
        MeasureError: both `segment` and `boundaries`, or boundaries that do not fit the states.

    >>> h = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [3.0, 1.0]]])
    >>> trajectory_signals(h, boundaries=torch.tensor([[-1, 0, 1, 1]])).net
    tensor([1.4142])
    """
    if segment is not None and boundaries is not None:
        raise MeasureError("segments are given by their length or by boundaries, not both")
    if not isinstance(states, Tensor):
        states, mask = _stacked(states, sites, mask)
    if states.ndim < 3:
        raise MeasureError(f"trajectories are of states (batch, pos, unit), and these are {tuple(states.shape)}")
    stack = states.shape[:-3]
    batch, length = states.shape[-3:-1]
    if boundaries is None:
        if segment is not None and segment < 1:
            raise MeasureError(f"segment={segment}; a segment has at least one token")
        place_BT = _blocks(batch, length, segment or 1, mask, states.device)
    else:
        if boundaries.shape != (batch, length) or boundaries.is_floating_point():
            raise MeasureError(
                f"boundaries give the segment of each of the tokens {(batch, length)}, as integers, and these are "
                f"{boundaries.dtype} {tuple(boundaries.shape)}"
            )
        place_BT = boundaries.to(states.device).long()
        if mask is not None:
            place_BT = place_BT.masked_fill(~mask.to(states.device), -1)
    parts = []
    for x_BTD in states.reshape(-1, *states.shape[-3:]) if stack else states[None]:
        found = real_tokens(x_BTD.detach(), mask if mask is None else mask.to(states.device))
        parts.append(_signals(*_segments(found.x, place_BT, found.keep)))
    return TrajectorySignals(*(torch.stack(field).view(*stack, batch) for field in zip(*parts, strict=True)))


def _stacked(recording: Recording, sites: str | Sequence[str], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    patterns = (sites,) if isinstance(sites, str) else tuple(sites)
    names = list(dict.fromkeys(name for pattern in patterns for name in recording.sites(pattern)))
    states = torch.stack([recording[name] for name in names])
    return states, recording.mask if mask is None else mask


def _blocks(batch: int, length: int, segment: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """The segment of each token, (batch, pos), counted over real tokens; -1 for padding."""
    if mask is None:
        return (torch.arange(length, device=device) // segment).expand(batch, length)
    return ((mask.long().cumsum(1) - 1) // segment).masked_fill(~mask, -1)


def _segments(x_BTD: Tensor, place_BT: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean states (batch, segment, unit) and how many segments each row has, (batch); left-out tokens are zero."""
    inside_BT = place_BT >= 0 if keep_BT is None else (place_BT >= 0) & keep_BT
    count = int(place_BT.max()) + 1 if place_BT.numel() else 0
    B, _, D = x_BTD.shape
    where = (place_BT + torch.arange(B, device=x_BTD.device)[:, None] * count)[inside_BT]
    sums = torch.zeros(B * count, D, dtype=x_BTD.dtype, device=x_BTD.device).index_add_(0, where, x_BTD[inside_BT])
    sizes = torch.bincount(where, minlength=B * count)
    # A segment of which nothing was finite is NaN, and makes its row NaN: a gap in the way cannot be mended.
    return (sums / sizes[:, None]).view(B, count, D), place_BT.amax(1) + 1


def _signals(h_BSD: Tensor, count_B: Tensor) -> TrajectorySignals:
    """The signals of mean states, of which row b has the first `count_B[b]`."""
    B, S, _ = h_BSD.shape
    if S < 2:
        nothing = torch.full((B,), torch.nan, dtype=h_BSD.dtype, device=h_BSD.device)
        return TrajectorySignals(nothing, nothing, nothing)
    step_BSD = h_BSD.diff(dim=1)
    is_step = torch.arange(1, S, device=h_BSD.device) < count_B[:, None]
    last_BD = h_BSD.gather(1, (count_B - 1).clamp_min(0)[:, None, None].expand(-1, 1, h_BSD.shape[-1]))[:, 0]
    way_BD = last_BD - h_BSD[:, 0]
    norm_BS = torch.linalg.vector_norm(h_BSD, dim=-1)
    step_BS = torch.linalg.vector_norm(step_BSD, dim=-1)
    way_B = torch.linalg.vector_norm(way_BD, dim=-1)
    cosine_BS = torch.einsum("bsd,bd->bs", step_BSD, way_BD) / (step_BS * way_B[:, None])
    steps = is_step.sum(1)
    short = steps < 1
    net = (way_B / norm_BS[:, 0]).masked_fill(short, torch.nan)
    cumulative = (step_BS / norm_BS[:, :-1]).where(is_step, 0.0).sum(1).masked_fill(short, torch.nan)
    aligned = cosine_BS.where(is_step, 0.0).sum(1) / steps
    return TrajectorySignals(net, cumulative, aligned)
