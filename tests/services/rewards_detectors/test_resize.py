"""Resizing by banded products is torch's antialiased interpolation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.rewards._resize import Mode, resized

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(16, 300),
    width=st.integers(16, 300),
    sides=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    mode=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 9),
)
def test_equals_interpolate(height: int, width: int, sides: tuple[int, int], mode: Mode, seed: int) -> None:
    images = list(np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(pixels, sides, mode=mode, antialias=True)
    torch.testing.assert_close(resized(images, sides, mode, CPU), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("side", [1, 7, 84, 224])
def test_a_grey_picture_stays_grey(side: int) -> None:
    grey = resized([np.full((512, 640, 3), 91, np.uint8)], (side, side), "bicubic", CPU)
    assert grey.shape == (1, 3, side, side)
    torch.testing.assert_close(grey, torch.full_like(grey, 91), rtol=0, atol=1e-3)
