"""Augmentation: by one generator's state one outcome, each change what it says, sizes and types kept, both sides alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from services.fitting.augment import AugmentOptions, augment, blurred, jittered, resized_and_back, through_jpeg
from services.reward import Item

NOTHING = {"flip": 0, "blur": 0, "jitter": 0}
EVERYTHING = {"flip": 1, "blur": 1, "jitter": 1, "jpeg": 1, "resize": 1}


def picture(height: int = 40, width: int = 30, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 40, width: int = 30) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture(6, 5)).resize((width, height), Image.Resampling.BICUBIC))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(**more: object) -> AugmentOptions:
    return AugmentOptions.model_validate({**NOTHING, **more})


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 60), st.integers(16, 60), st.integers(0, 2**40))
def test_any_size_stays_and_a_seed_repeats(height: int, width: int, seed: int) -> None:
    items = [Item(picture(height, width, i), f"prompt {i}", meta={"group": "g"}) for i in range(3)]
    before = [item.image.copy() for item in items]
    options = AugmentOptions.model_validate(EVERYTHING)
    first, same = (augment(items, options, seeded(seed)) for _ in range(2))
    for item, one, two, kept in zip(items, first, same, before, strict=True):
        assert one.image.dtype == np.uint8 and one.image.shape == (height, width, 3) and one.image.flags.c_contiguous
        assert np.array_equal(one.image, two.image) and np.array_equal(item.image, kept)
        assert (one.prompt, one.meta) == (item.prompt, item.meta)
    assert not all(np.array_equal(a.image, b) for a, b in zip(first, before, strict=True))


def test_nothing_asked_for_is_nothing_done() -> None:
    items = [Item(picture())]
    assert np.array_equal(augment(items, only(), seeded())[0].image, items[0].image)


def test_defaults_are_realgens_and_each_happens_as_often_as_asked() -> None:
    default = AugmentOptions()
    assert (default.flip, default.blur, default.jitter, default.jpeg, default.resize) == (0.5, 0.5, 0.5, 0, 0)
    assert default.blur_kernels == (3, 5) and default.blur_sigma == (0.1, 2.0)
    image = smooth()
    for change in ("flip", "blur", "jitter", "jpeg", "resize"):
        options = AugmentOptions.model_validate({**NOTHING, change: 0.3, "blur_sigma": (1.0, 2.0)})
        changed = [not np.array_equal(one.image, image) for one in augment([Item(image)] * 400, options, seeded(1))]
        assert 80 < sum(changed) < 160, change


def test_flipping_mirrors() -> None:
    image = picture()
    assert np.array_equal(augment([Item(image)], only(flip=1), seeded())[0].image, image[:, ::-1])


def test_blurring_is_a_gaussian_mirrored_at_the_edges() -> None:
    image = picture(17, 16)
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 0.9) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = np.zeros_like(image, dtype=float)
    for y in range(5):
        for x in range(5):
            expected += kernel[y, x] * padded[y : y + 17, x : x + 16]
    assert np.abs(blurred(image, 5, 0.9).astype(float) - expected).max() <= 0.5 + 1e-9
    assert np.array_equal(blurred(image, 3, 1e-3), image)
    wide = np.asarray(Image.fromarray(smooth()).filter(ImageFilter.GaussianBlur(1.0)), float)
    assert np.abs(blurred(smooth(), 31, 1.0).astype(float) - wide)[4:-4, 4:-4].mean() < 1.5, "near Pillow's approximation"


def test_jitter_scales_brightness_contrast_and_saturation() -> None:
    image = smooth()
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    assert np.array_equal(jittered(image, 1, 1, 1), image)
    assert np.abs(jittered(image, 0.5, 1, 1) - image * 0.5).max() <= 0.5 + 1e-9
    assert np.abs(jittered(image, 1, 0.5, 1) - (grey.mean() + (image - grey.mean()) * 0.5)).max() <= 0.5 + 1e-9
    assert np.abs(jittered(image, 1, 1, 0.0) - grey).max() <= 0.5 + 1e-9
    assert jittered(np.full((16, 16, 3), 250, np.uint8), 2, 1, 1).max() == 255


def test_hue_turns_colours_and_leaves_grey() -> None:
    red = np.zeros((16, 16, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    turned = jittered(red, 1, 1, 1, 1 / 3)
    assert turned[0, 0, 1] > 190 and turned[0, 0, 0] < 10
    grey = np.full((16, 16, 3), 77, np.uint8)
    assert np.array_equal(jittered(grey, 1, 1, 1, 0.05), grey)


def test_jpeg_of_low_quality_harms_more() -> None:
    image = smooth()
    errors = [np.abs(through_jpeg(image, q).astype(int) - image).mean() for q in (95, 60, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_resizing_goes_there_and_back() -> None:
    image = picture(64, 48)
    expected = Image.fromarray(image).resize((24, 32), Image.Resampling.BICUBIC).resize((48, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(resized_and_back(image, 0.5), np.asarray(expected))
    assert np.array_equal(resized_and_back(picture(16, 16), 0.5), picture(16, 16)), "no side under 16"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"blur_kernels": [4]}, "odd number"),
        ({"jpeg_quality": [90, 10]}, "smaller number first"),
        ({"rotate": 0.5}, "rotate"),
        ({"blur_kernels": []}, "blur_kernels"),
    ],
)
def test_wrong_options_are_named(more: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AugmentOptions.model_validate(more)
