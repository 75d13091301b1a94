"""Weight files from strangers, pictures against the processors of PIL, the cache of texts."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from services.reward import Item
from services.rewards import clip_kit
from services.rewards._resize import upload
from services.rewards.clip_kit import (
    ModelOptions,
    Pixels,
    Prompted,
    Texts,
    Tokens,
    _pass,
    check_state,
    digest,
    fetched,
    read_state,
    resized,
    same_size,
)
from shared.schema import RewardInfo, Score

CPU = torch.device("cpu")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(32, 32), (100, 64), (64, 101), (33, 47), (16, 16), (40, 300), (512, 511), (100, 64)]


def pictures(sizes: list[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    """Gradients and noise, so that resizing has edges and flat parts to get wrong."""
    rng, out = np.random.default_rng(0), []
    for index, (height, width) in enumerate(sizes):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        slope = (np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))).astype(np.uint8)
        out.append(noise if index % 2 else slope)
    return out


def grey_levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute differences of normalised pixels in grey levels of the picture."""
    return (a - b).abs() * 255 * torch.tensor(STD).view(1, 3, 1, 1)


class Trap:
    """What a hostile file runs when it is unpickled."""

    def __init__(self, touched: str) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.touched),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickle_in_a_torch_file_is_refused_and_never_run(tmp_path: Path, suffix: str) -> None:
    bad, touched = tmp_path / f"bad{suffix}", tmp_path / "touched"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Trap(str(touched))}, bad)
    with pytest.raises(ValueError, match=r"more than tensors.*safetensors"):
        read_state(bad)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b"\xff" * 64),
        ("a.safetensors", b""),
        ("a.pth", b"not a torch file"),
        ("a.pth", b""),
        ("a.pt", b"PK\x03\x04"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_state(tmp_path / name)


def test_files_without_named_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "number.pt")
    for name in ("tensor.pt", "number.pt"):
        with pytest.raises(ValueError, match="no named tensors"):
            read_state(tmp_path / name)


def test_wrappings_of_a_state_are_taken_off(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(3.0)}
    save_file(tensors, tmp_path / "plain.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "wrapped.pt")
    for name in ("plain.safetensors", "wrapped.pt"):
        assert {k: v.tolist() for k, v in read_state(tmp_path / name).items()} == {"a.weight": [0.0, 1.0, 2.0]}


def test_differences_of_a_checkpoint_are_named() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    check_state(wanted, {"a": torch.ones(2), "b": torch.ones(2, 3)}, "x")
    with pytest.raises(ValueError, match=r"x does not fit.*1 missing, e.g. b; 1 too many, e.g. c; a is \(4,\), not \(2,\)"):
        check_state(wanted, {"a": torch.zeros(4), "c": torch.zeros(1)}, "x")


def test_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"a"), two.write_bytes(b"b")
    assert digest([one]) == hashlib.sha256(b"a").hexdigest()
    assert len({digest([one]), digest([one, two]), digest([two, one])}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either `folder`"),
        ({"folder": "a", "model": "b/c"}, "either `folder`"),
        ({"model": "b/c"}, "needs its `revision`"),
        ({"model": "b/c", "revision": "main"}, "40 hex digits"),
        ({"folder": "a", "dtype": "int8"}, "dtype"),
        ({"folder": "a", "foldr": "a"}, "foldr"),
    ],
)
def test_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelOptions.model_validate(options)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        ModelOptions(folder=tmp_path / "none").place()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        ModelOptions(folder=tmp_path).files(tmp_path)
    with pytest.raises(FileNotFoundError, match="commit of 40 hex digits"):
        fetched("org/model@main:x.pt")
    with pytest.raises(ValueError, match="names no file"):
        fetched(f"org/model@{'a' * 40}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="download it, and give the local path"):
        fetched(f"org/model@{'a' * 40}:x.pt")
    with pytest.raises(ValueError, match="download it, and give the local path"):
        ModelOptions(model="org/model", revision="a" * 40).place()


@pytest.mark.parametrize("resample", [2, 3])
def test_crop_is_transformers_own_to_a_grey_level(resample: int) -> None:
    """Against the processor that works on PIL, picture by picture: no pixel off by more than one grey level, few at all."""
    images = pictures()
    settings = {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": resample}
    ours = Pixels.of(CLIPImageProcessor(**settings), CPU)(images)
    pil = CLIPImageProcessorPil(**settings)
    reference = torch.cat([pil(Image.fromarray(i), return_tensors="pt").pixel_values for i in images])
    off = grey_levels(ours, reference)
    assert off.max() < 1.01 and off.mean() < 0.2
    fast = torch.cat([CLIPImageProcessor(**settings)(Image.fromarray(i), return_tensors="pt").pixel_values for i in images])
    assert grey_levels(ours, fast).max() < 1e-3


def test_squash_is_transformers_own_to_a_grey_level() -> None:
    images, settings = pictures(), {"size": {"height": 32, "width": 24}, "image_mean": MEAN, "image_std": STD}
    ours = Pixels.of(SiglipImageProcessor(**settings), CPU)(images)
    pil = SiglipImageProcessorPil(**settings)
    off = grey_levels(ours, torch.cat([pil(Image.fromarray(i), return_tensors="pt").pixel_values for i in images]))
    assert off.max() < 1.01 and off.mean() < 0.2


def test_rounded_centre_is_torchvisions() -> None:
    """OpenAI's CLIP, the aesthetic predictor and ImageReward cut with torchvision, whose centre of an odd margin differs."""
    images = pictures([(35, 32), (32, 35), (37, 32), (32, 39), (70, 64)])
    chain = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(MEAN, STD)])
    reference = torch.stack([chain(Image.fromarray(i)) for i in images])
    assert grey_levels(Pixels("crop", (32, 32), MEAN, STD, CPU, rounded_centre=True)(images), reference).max() < 1.01
    assert grey_levels(Pixels("crop", (32, 32), MEAN, STD, CPU)(images), reference).max() > 10


def test_pad_keeps_the_whole_picture_with_black_around() -> None:
    images = pictures()
    rows = []
    for image in images:
        scale = 32 / max(image.shape[:2])
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        canvas = np.zeros((32, 32, 3), np.uint8)
        top, left = (32 - height) // 2, (32 - width) // 2
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        canvas[top : top + height, left : left + width] = np.asarray(small)
        rows.append(Normalize(MEAN, STD)(ToTensor()(canvas)))
    off = grey_levels(Pixels("pad", (32, 32), MEAN, STD, CPU)(images), torch.stack(rows))
    assert off.max() < 1.01 and off.mean() < 0.2


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@given(sizes=st.lists(st.tuples(st.integers(16, 90), st.integers(16, 90)), min_size=1, max_size=6))
@settings(max_examples=8, deadline=None)
def test_a_batch_is_its_pictures_one_by_one(fit: Any, sizes: list[tuple[int, int]]) -> None:
    images, pixels = pictures(sizes), Pixels(fit, (24, 24), MEAN, STD, CPU)
    assert torch.equal(pixels(images), torch.cat([pixels([image]) for image in images]))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(240, 32), (32, 48), (350, 12), (300, 40)])
def test_resizing_is_pils_two_passes(mode: str, sides: tuple[int, int]) -> None:
    """The path of the CPU, and the one of a GPU run here: rows first, each pass rounded."""
    noise = np.random.default_rng(1).integers(0, 256, (300, 40, 3), dtype=np.uint8)
    how = Image.Resampling[mode.upper()]
    pil = Image.fromarray(noise).resize((sides[1], 300), how).resize((sides[1], sides[0]), how)
    pixels = upload([noise], CPU)
    paths = [resized(pixels, sides, mode), _pass(_pass(pixels, (300, sides[1]), mode), sides, mode)]
    for path in paths:
        off = np.abs(path[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(pil).astype(int))
        assert off.max() <= 2 and off.mean() < 0.1


def test_one_call_for_pictures_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures([(40, 30), (50, 50), (40, 30), (40, 30)])
    assert sorted(same_size(images)) == [[0, 2, 3], [1]]
    monkeypatch.setattr(clip_kit, "_AT_ONCE", 2 * 40 * 30)
    assert sorted(same_size(images)) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("settings", [{"resample": 1}, {"size": {"shortest_edge": 40}, "crop_size": 32}, {"do_center_crop": False}])
def test_settings_that_are_not_known_are_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        Pixels.of(CLIPImageProcessor(**settings), CPU)


def test_texts_are_encoded_once_and_bounded() -> None:
    calls: list[list[str]] = []

    def encode(texts: list[str]) -> torch.Tensor:
        calls.append(texts)
        return torch.tensor([[float(len(t)), 1.0] for t in texts])

    texts = Texts(encode, limit=3)
    assert texts(["a", "bb", "a"]).tolist() == [[1, 1], [2, 1], [1, 1]]
    assert texts(["bb", "a"]).tolist() == [[2, 1], [1, 1]]
    assert calls == [["a", "bb"]]
    assert texts(["ccc", "dddd"])[:, 0].tolist() == [3, 4] and len(texts) == 3
    texts(["a"]), texts(["bb"])
    assert calls == [["a", "bb"], ["ccc", "dddd"], ["bb"]], "the one that was used longest ago went"
    many = [str(i) * 2 for i in range(10)]
    assert texts(many).shape == (10, 2) and len(texts) == 3


class Initials(Prompted):
    """The first letter of the prompt as a number; its tokens are its letters."""

    def __init__(self) -> None:
        info = RewardInfo(name="x", needs=["prompt"])
        super().__init__(info, Tokens(lambda text, **_: SimpleNamespace(input_ids=list(text))), 5, "refuse")

    def _inputs(self, items: list[Item]) -> Any:
        return [float(ord((item.prompt or "")[0])) for item in items]

    def _scores(self, items: list[Item], inputs: Any) -> list[Score]:
        return [Score.ok(value) for value in inputs]


def test_items_keep_their_places() -> None:
    good, slim = np.zeros((20, 20, 3), np.uint8), np.zeros((16, 1000, 3), np.uint8)
    batch = [Item(good, "a"), Item(good), Item(slim, "b"), Item(good, "c" * 9), Item(good, "d")]
    scores = Initials().score(batch)
    assert [s.value for s in scores] == [97.0, None, None, None, 100.0]
    kinds = [s.error.type.rpartition(":")[2] for s in scores if s.error]
    assert kinds == ["prompt-missing", "image-too-slim", "prompt-too-long"]
    assert scores[3].status == "refused"
    assert [s.value for s in Initials().score(batch[1:4])] == [None] * 3
