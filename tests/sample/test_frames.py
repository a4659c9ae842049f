"""A traced run as pictures: steps, pixels and colours."""

import numpy as np
import pytest
import torch

from dcdit.sample.drawing import TracedImage
from dcdit.sample.frames import Frame, frames
from dcdit.sample.model_calls import BoundaryMap


def traced(times, channels=3):
    """An image that brightens by 0.1 with each step, whose router keeps one position more each time."""
    maps = [BoundaryMap(t, torch.full((2, 2), n / 10), torch.arange(4).view(2, 2) < n) for n, t in enumerate(times)]
    return TracedImage(maps, {t: torch.full((channels, 4, 4), n / 10) for n, t in enumerate(times)})


def test_frames_are_the_steps():
    shown = frames([traced([900.0, 500.0, 100.0])] * 2, lambda x: x)
    assert [frame.t for frame in shown] == [900, 500, 100]
    assert [frame.images.shape for frame in shown] == [(2, 4, 4, 3)] * 3
    assert [int(frame.images[0, 0, 0, 0]) for frame in shown] == [128, 140, 153]
    assert [frame.kept for frame in shown] == [0, 0.25, 0.5]


def test_a_long_run_is_thinned_evenly_to_its_ends():
    times = [1000.0 - 10 * n for n in range(100)]
    shown = frames([traced(times)], lambda x: x, most=12)
    assert [frame.t for frame in shown] == times[::9]


def test_two_calls_at_a_time_show_the_later_one():
    """Heun's second call of a step is at the time, and nearly at the state, where the next step begins."""
    image = traced([900.0, 500.0])
    image.maps.insert(1, BoundaryMap(500.0, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)))
    assert [frame.kept for frame in frames([image], lambda x: x)] == [0, 0.25]


@pytest.mark.parametrize("channels", [1, 4])
def test_latents_are_shown_between_their_extremes(channels):
    image = traced([900.0], channels)
    image.expected[900.0] = torch.linspace(-7, 9, 16).view(1, 4, 4).expand(channels, 4, 4)
    (frame,) = frames([image], None)
    assert frame.images[0, 0, 0].tolist() == [0, 0, 0] and frame.images[0, -1, -1].tolist() == [255, 255, 255]


def test_kept_positions_are_tinted_and_others_dark():
    """A position of the grid is a square of the image, also where the sides do not divide."""
    images = np.full((1, 5, 4, 3), 200, dtype=np.uint8)
    mask = np.array([[[True, False], [False, True]]])
    frame = Frame(0.0, images, np.array([[[0.0, 1.0], [0.5, 0.25]]], dtype=np.float32), mask)
    red, blue = frame.kept_tokens()[0, :, :, 0], frame.kept_tokens()[0, :, :, 2]
    assert red.tolist() == [[227, 227, 50, 50]] * 3 + [[50, 50, 227, 227]] * 2
    assert blue.tolist() == [[100, 100, 50, 50]] * 3 + [[50, 50, 100, 100]] * 2
    colors = frame.prob_colors()[0]
    assert colors.shape == (2, 2, 3)
    assert colors[0, 0].tolist() == [68, 1, 84] and colors[0, 1].tolist() == [253, 231, 36]  # the ends of viridis
