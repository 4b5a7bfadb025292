"""Spots on two rings and their diffusion model: noise by closed form, an exact denoiser, and a trained one."""

import pytest
import torch

from actome.tasks import train
from actome.tasks.diffusion2d import INNER, OUTER, Denoiser, Rings2D, draw, signal


def test_points_lie_where_their_content_and_style_say():
    world = Rings2D(contents=5)
    drawn = world.sample(4000, seed=1)
    contents, styles = world.read(drawn.points)
    assert torch.equal(contents, drawn.contents)
    assert torch.equal(styles, drawn.styles)
    for style in (INNER, OUTER):
        spot = drawn.points[(drawn.contents == 0) & (drawn.styles == style)]
        torch.testing.assert_close(spot.mean(0), torch.tensor([world.radii[style], 0.0]), rtol=0, atol=0.03)
        torch.testing.assert_close(spot.std(0), torch.full((2,), world.spread), rtol=0.2, atol=0)
    again, other = world.sample(9, seed=1), world.sample(9, seed=2)
    assert torch.equal(again.points, world.sample(9, seed=1).points)
    assert not torch.equal(again.points, other.points)


def test_inputs_hold_the_point_and_the_noise_in_the_shares_of_the_level():
    world = Rings2D()
    inputs, noise = world.noised(500, seed=3)
    kept = signal(inputs[:, 2:3])
    torch.testing.assert_close((inputs[:, :2] - (1 - kept).sqrt() * noise) / kept.sqrt(), world.sample(500, 3).points,
                               rtol=0, atol=1e-4)  # fmt: skip
    assert torch.equal(inputs[:, 3:].sum(1), torch.full((500,), 2.0))


def test_an_exact_denoiser_draws_the_distribution():
    """Of one Gaussian the noise is known in closed form."""
    centre, spread = torch.tensor([0.8, -0.4]), 0.3

    def denoise(x):
        kept = signal(x[:, 2:3])
        return (1 - kept).sqrt() * (x[:, :2] - kept.sqrt() * centre) / (kept * spread**2 + 1 - kept)

    points = draw(denoise, torch.zeros(8000, 1), seed=1, steps=200)
    torch.testing.assert_close(points.mean(0), centre, rtol=0, atol=0.02)
    torch.testing.assert_close(points.std(0), torch.full((2,), spread), rtol=0.05, atol=0)


def test_a_trained_denoiser_draws_what_it_is_asked_for():
    world = Rings2D()
    contents = torch.arange(world.contents).repeat(20)
    styles = (torch.arange(len(contents)) // world.contents) % 2
    net = Denoiser(world, seed=1)
    untrained = world.read(draw(net, world.condition(contents, styles), seed=4))
    train(net, world.noised(600 * 128, 2), batch_size=128, lr=3e-3, seed=2)
    found = world.read(draw(net, world.condition(contents, styles), seed=4))
    assert float((found[0] == contents).float().mean()) > 0.95
    assert float((found[1] == styles).float().mean()) > 0.95
    assert float((untrained[0] == contents).float().mean()) < 0.5


def test_bad_rings():
    with pytest.raises(ValueError, match=r"between=-1\.0 must be above zero"):
        Rings2D(radii=(2.0, 1.0))
    with pytest.raises(ValueError, match="contents=1 is too small"):
        Rings2D(contents=1)
    with pytest.raises(ValueError, match="steps=1 is too small"):
        draw(Denoiser(Rings2D()), torch.zeros(2, 8), seed=0, steps=1)
