"""Short films of a task in three steps: reach for the handle, turn it, slide the door open.

Steps have random lengths, and some films stall for good before the end; how far each frame has come is known. Pictures
of random objects, which have nothing to do with the task, train an encoder that has never seen progress.

Source: own construction, for Sermanet, Xu and Levine 2017, "Unsupervised Perceptual Rewards for Imitation Learning".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actome.tasks.draw import counts, seeded, share

STEPS = 3


class Films(NamedTuple):
    """Films of T frames.

    Attributes:
        frames: [B, T, size, size] from 0 to 1.
        progress: [B, T] from 0 to 1, a third for each step.
        step: [B, T], 0 reach, 1 turn, 2 slide; the last frames of a film that succeeds hold the open door in step 2.
        lengths: [B, 3], frames of each step; what a stalled film would have needed.
        success: [B], whether the door is open at the end.
    """

    frames: Tensor
    progress: Tensor
    step: Tensor
    lengths: Tensor
    success: Tensor


class Objects(NamedTuple):
    """Images [N, 1, size, size]; kind [N] (disc, square, cross, bar) and number of objects [N], from 1."""

    images: Tensor
    kind: Tensor
    number: Tensor


@dataclass(frozen=True)
class ReachTurnSlide:
    """The world and its camera.

    Attributes:
        size: of a frame in pixels.
        frames: of a film.
        shortest: least number of frames in a step.
        longest: greatest; at most a third of `frames`.
        noise: standard deviation of the camera's noise.

    >>> world = ReachTurnSlide()
    >>> films = world.sample(20, seed=1, failures=0.5)
    >>> films.frames.shape, bool((films.progress[:, -1] == 1).eq(films.success).all())
    (torch.Size([20, 36, 16, 16]), True)
    """

    size: int = 16
    frames: int = 36
    shortest: int = 6
    longest: int = 12
    noise: float = 0.02

    def __post_init__(self) -> None:
        counts(size=(self.size, 8), shortest=(self.shortest, 2), longest=(self.longest, self.shortest))
        counts(frames=(self.frames, STEPS * self.longest))

    def sample(self, films: int, seed: int, *, failures: float = 0.0) -> Films:
        """Draws films.

        Args:
            films: how many.
            seed: of everything.
            failures: share of films that stall, at a random point of the first 85 % of the way.
        """
        counts(films=(films, 1))
        share(failures=failures)
        generator = seeded(seed)
        lengths_B3 = torch.randint(self.shortest, self.longest + 1, (films, STEPS), generator=generator)
        failed_B = torch.rand(films, generator=generator) < failures
        stall_B = torch.where(failed_B, 0.85 * torch.rand(films, generator=generator), torch.inf)
        ends_B3 = lengths_B3.cumsum(1)
        at_T = torch.arange(self.frames)
        # Step s has length n: its frames stand at 1/n, 2/n, ..., 1 of it, so the film ends on an open door.
        step_BT = (at_T[None, :, None] >= ends_B3[:, None]).sum(-1).clamp_max(STEPS - 1)
        begun_BT = (ends_B3 - lengths_B3).gather(1, step_BT)
        within_BT = ((at_T - begun_BT + 1) / lengths_B3.gather(1, step_BT)).clamp_max(1)
        progress_BT = torch.minimum((step_BT + within_BT) / STEPS, stall_B[:, None])
        # Where a film stalls it stays in its step.
        step_BT = torch.minimum(step_BT, (progress_BT * STEPS).ceil().long().sub(1).clamp_min(0))
        start_B2 = torch.rand(films, 2, generator=generator) * torch.tensor([0.5, 1.4]) + torch.tensor([-0.95, -0.7])
        images = self.render(progress_BT, start_B2)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        return Films(images.clamp(0, 1), progress_BT, step_BT, lengths_B3, ~failed_B)

    def render(self, progress: Tensor, start: Tensor) -> Tensor:
        """Frames [B, T, size, size] at progress [B, T]; the hand starts at (x, y) [B, 2], from -1 to 1."""
        along = (progress[..., None] * STEPS - torch.arange(STEPS)).clamp(0, 1)
        reach, turn, slide = (part[..., None, None] for part in along.unbind(-1))
        at = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = at[:, None], at[None, :]

        def box(dx: Tensor, dy: Tensor, width: float, height: float) -> Tensor:
            inside = torch.minimum(width - dx.abs(), height - dy.abs())
            return torch.sigmoid(inside * 2 * self.size)

        door_x = 0.15 + 0.6 * slide
        door = 0.4 * box(x - door_x, y, 0.3, 0.8)
        handle_x, angle = door_x - 0.1, turn * math.pi / 2
        dx, dy = x - handle_x, y + 0 * turn
        lever = box(dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin(), 0.42, 0.09)
        hand_x = start[:, None, :1, None] * (1 - reach) + handle_x * reach
        hand_y = start[:, None, 1:, None] * (1 - reach)
        hand = box(x - hand_x, y - hand_y, 0.12, 0.12)
        return torch.maximum(torch.maximum(door, 0.75 * lever), hand)

    def random_objects(self, examples: int, seed: int, *, most: int = 4) -> Objects:
        """Pictures of 1 to `most` objects of one kind, at random places, for an encoder that knows nothing of doors."""
        counts(examples=(examples, 1), most=(most, 1))
        generator = seeded(seed)
        kind_N = torch.randint(4, (examples,), generator=generator)
        number_N = torch.randint(1, most + 1, (examples,), generator=generator)
        centre = (torch.rand(examples, most, 2, generator=generator) * 1.6 - 0.8)[..., None, None]
        radius = (0.16 + 0.12 * torch.rand(examples, most, generator=generator))[..., None, None]
        grey = (0.5 + 0.5 * torch.rand(examples, most, generator=generator))[..., None, None]
        at = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        dx, dy = (at[None, :] - centre[:, :, 0]).abs(), (at[:, None] - centre[:, :, 1]).abs()
        thin = 0.35 * radius
        upright, level = torch.minimum(thin - dx, radius - dy), torch.minimum(radius - dx, thin - dy)
        inside = torch.stack(
            (radius - (dx**2 + dy**2).sqrt(), radius - torch.maximum(dx, dy), torch.maximum(upright, level), level)
        )[kind_N, torch.arange(examples)]
        ink = grey * torch.sigmoid(inside * 2 * self.size)
        shown = torch.arange(most) < number_N[:, None]
        images = (ink * shown[..., None, None]).amax(1)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        return Objects(images.clamp(0, 1)[:, None], kind_N, number_N)
