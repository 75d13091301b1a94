"""The small real world: what is shipped is what the cards say."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.honesty import Monitors, SmallCNN, frechet, kernel_distance, unbiased_frechet
from world import captions, photographs

WORLD = Path(photographs.__file__).parent


def test_every_weight_file_has_its_checksum_and_a_card() -> None:
    sums = json.loads((WORLD / "checksums.json").read_text())
    files = {p.relative_to(WORLD).as_posix(): p for p in WORLD.rglob("*.safetensors") if ".cache" not in p.parts}
    assert set(sums) == set(files)
    for name, path in files.items():
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        assert sha == sums[name], f"{name} is not the file that the recipes wrote"
        assert sha in (WORLD / name.split("/")[0] / "README.md").read_text()


def test_photographs_are_split_and_their_notice_is_shipped() -> None:
    train, test = photographs.load("train"), photographs.load("test")
    assert train[0].shape == (8000, 28, 28, 3) and test[0].shape == (2000, 28, 28, 3)
    assert set(train[1]) == set(test[1]) == set(range(10))
    assert "MIT License" in (photographs.FOLDER / "LICENSE").read_text()


def test_damaged_photographs_are_named(tmp_path: Path) -> None:
    import gzip

    bad = tmp_path / "x.gz"
    bad.write_bytes(gzip.compress(b"\0" * 64))
    with pytest.raises(ValueError, match="not an IDX file"):
        photographs._read_idx(bad, 2051)


def test_held_out_wordings_are_never_trained_on() -> None:
    trained = {text for text, _ in captions.all_captions(captions.WORDINGS, captions.TEMPLATES)}
    prompts = {
        name: {json.loads(line)["prompt"] for line in (WORLD / "prompts" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "eval", "heldout")
    }
    assert prompts["train"] == trained
    assert prompts["eval"] <= trained
    assert not prompts["heldout"] & trained


def test_the_base_policy_is_good_and_bad_enough() -> None:
    """The figures that `python -m world.make cards` measured, as the issue asks for them."""
    scores = json.loads((WORLD / "scores.json").read_text())
    assert scores["detector_auc"] >= 0.85
    assert scores["policy_class_hit"] >= 0.6
    assert scores["policy_distance"] > 3 * scores["photographs_distance"]
    assert scores["alignment_auc"] >= 0.9 and scores["alignment_heldout_auc"] >= 0.8


def test_monitors_tell_photographs_from_noise() -> None:
    monitors = Monitors.load(WORLD / "monitors")
    real, classes = photographs.load("test")
    chosen = slice(0, 300)
    seen = monitors.measure(real[chosen], classes[chosen].tolist())
    noise = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 3), dtype=np.uint8)
    bad = monitors.measure(noise, [None] * 300)
    assert seen["class_hit"] > 0.85 and np.isnan(bad["class_hit"])
    assert seen["distance"] < 10 < bad["distance"]
    assert abs(seen["kernel_distance"]) < 1 < bad["kernel_distance"]
    assert seen["heldout_cnn"] > 0 and seen["heldout_spectrum"] > 0


def test_monitors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="eval.monitors"):
        Monitors.load(tmp_path)
    with pytest.raises(ValueError, match="two or more"):
        Monitors.load(WORLD / "monitors").measure(np.zeros((1, 28, 28, 3), np.uint8), [1])


def test_distances_are_zero_for_equal_sets_and_grow_with_a_shift() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 8))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + 2) == pytest.approx(32, rel=1e-6)  # 8 axes, 2 squared each
    assert kernel_distance(a[:250], a[250:]) == pytest.approx(0, abs=0.1)
    assert kernel_distance(a, a + 2) > 1


def test_the_distance_does_not_depend_on_how_many_there_are() -> None:
    rng = np.random.default_rng(1)
    basis = rng.normal(size=(16, 16))
    b = rng.normal(size=(20_000, 16)) @ basis
    few, many = (rng.normal(size=(n, 16)) @ basis + 0.5 for n in (200, 20_000))
    true = 16 * 0.25
    assert frechet(few, b) > 1.3 * true, "biased"
    assert unbiased_frechet(few, b) == pytest.approx(true, rel=0.15)
    assert unbiased_frechet(many, b) == pytest.approx(true, rel=0.05)
    assert unbiased_frechet(few[:40], b) == frechet(few[:40], b)
    assert unbiased_frechet(b[:2000], b) < 0.2


def test_small_cnn_takes_grey_pictures() -> None:
    assert SmallCNN(3)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_the_autoencoder_hands_pixels_through() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WORLD / "policy" / "vae")
    real, _ = photographs.load("test")
    pixels = torch.from_numpy(real[:4].astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        out = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert float((out - pixels).abs().max()) * 127.5 < 0.1


def test_detector_and_alignment_know_real_from_sampled_and_right_from_wrong() -> None:
    from services.reward import Item
    from services.rewards.alignment import Alignment
    from services.rewards.detector import Detector

    real, classes = photographs.load("test")
    detector = Detector.load("detector", {"folder": WORLD / "detector"}, "cpu")
    good = detector.score([Item(image) for image in real[:64]])
    assert np.mean([s.value for s in good]) > 0.9
    assert np.mean([bool(s.in_domain) for s in good]) > 0.95
    rng = np.random.default_rng(0)
    outside = detector.score([Item(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))])[0]
    assert outside.in_domain is False
    blocks = real[:64, ::4, ::4].repeat(4, 1).repeat(4, 2)
    assert np.mean([s.value for s in detector.score([Item(image) for image in blocks])]) < 0.5
    alignment = Alignment.load("alignment", {"folder": WORLD / "alignment"}, "cpu")
    right = alignment.score(
        [Item(i, f"a photo of {captions.WORDINGS[c][0]}") for i, c in zip(real[:64], classes[:64], strict=True)]
    )
    wrong = alignment.score(
        [Item(i, f"a photo of {captions.WORDINGS[(c + 5) % 10][0]}") for i, c in zip(real[:64], classes[:64], strict=True)]
    )
    assert np.mean([s.value for s in right]) > np.mean([s.value for s in wrong]) + 0.3
    assert alignment.score([Item(real[0])])[0].status == "error"


def test_pictures_from_outside_are_told_so() -> None:
    import matplotlib
    from PIL import Image

    from services.reward import Item
    from services.rewards.detector import Detector

    detector = Detector.load("detector", {"folder": WORLD / "detector"}, "cpu")
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as file:
        portrait = np.asarray(file.convert("RGB"))
    outside = [portrait, portrait[100:300, 100:300]]
    assert [s.in_domain for s in detector.score([Item(image) for image in outside])] == [False] * 2
