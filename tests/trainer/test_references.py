"""Real pictures: what is read, what is skipped and said, which stand against a step's prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from trainer.config import ConfigError, ReferencesConfig, Stopped
from trainer.references import References, fitted
from trainer.types import Prompt
from world.photographs import load


def picture(n: int, height: int = 28, width: int = 28) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8)


def written(folder: Path, count: int, **shape: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.fromarray(picture(n, **shape)).save(folder / f"{n:03}.png")
    return folder


def jsonl(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def references(path: Path, seed: int = 0, size: int = 28, **changes: Any) -> References:
    return References(ReferencesConfig(path=path, **{"least": 8, **changes}), size, size, seed)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(n, text) for n, text in enumerate(texts)]


def test_the_same_captions_stand_for_their_prompts_and_the_rest_is_drawn_by_seed_and_step(tmp_path: Path) -> None:
    written(tmp_path, 20)
    captions = ["a bag"] * 3 + ["a coat"] * 3 + ["a boot"] * 14
    known = references(jsonl(tmp_path, [{"image": f"{n:03}.png", "prompt": text} for n, text in enumerate(captions)]))
    asked = prompts("a bag", "a bag", "a coat", "a tie", "a tie")
    real, groups = known.drawn(asked, step=3)
    assert real.prompts[:3] == ["a bag", "a bag", "a coat"]
    assert groups == ["3/0", "3/0", "3/1", None, None] and real.groups == ["3/0", "3/0", "3/1", None, None]
    index = [next(n for n in range(20) if np.array_equal(picture(n), image)) for image in real.images]
    assert len(set(index)) == 5 and {*index[:2]} < {0, 1, 2} and index[2] in {3, 4, 5}
    again, _ = references(tmp_path / "pairs.jsonl").drawn(asked, step=3)
    assert all(np.array_equal(a, b) for a, b in zip(real.images, again.images, strict=True))
    other, _ = known.drawn(asked, step=4)
    assert not all(np.array_equal(a, b) for a, b in zip(real.images, other.images, strict=True))


def test_only_matched_references_where_only_those_count(tmp_path: Path) -> None:
    written(tmp_path, 8)
    path = jsonl(tmp_path, [{"image": f"{n:03}.png", "prompt": "a bag"} for n in range(8)])
    known = references(path, match="only")
    real, groups = known.drawn(prompts("a bag", "a tie"), step=0)
    assert real.prompts == ["a bag"] and groups == ["0/0", None]
    known.check(prompts("a bag"))
    with pytest.raises(ConfigError, match="match=prefer"):
        known.check(prompts("a tie"))
    real, groups = references(path, match="none").drawn(prompts("a bag", "a tie"), step=0)
    assert groups == [None, None] and len(real.images) == 2


def test_no_reference_stands_twice_in_a_step(tmp_path: Path) -> None:
    real, _ = references(written(tmp_path / "few", 9)).drawn(prompts(*["a bag"] * 30), step=0)
    assert len(real.images) == 9 == len({image.tobytes() for image in real.images})


def test_the_photographs_of_the_small_world_by_class_and_never_the_held_out_ones(root: Path) -> None:
    known = references(root / "world/photographs", classes=["bag", 3])
    train, classes = load("train")
    assert len(known) == int(np.isin(classes, (8, 3)).sum())
    real, groups = known.drawn([Prompt(0, "a purse", {"class": 8}), Prompt(1, "a coat", {"class": 4})], step=0)
    assert real.prompts[0] == "a purse" and groups == ["0/0", None]
    inside = {image.tobytes() for image in train}
    assert all(image.tobytes() in inside for image in known.some(50).images)
    assert known.note == ""
    with pytest.raises(ConfigError, match="'gloves'"):
        references(root / "world/photographs", classes=["gloves"])


def test_files_that_are_no_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    folder = written(tmp_path / "some", 12)
    (folder / "000.png").write_bytes(b"GIF89a, and nothing more")
    (folder / "001.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    Image.fromarray(picture(0, 4, 4)).save(folder / "small.png")
    known = references(folder)
    assert len(known) == 10
    assert "3 references were skipped: 000.png: not a picture" in known.note and "small.png" in known.note
    with pytest.raises(ConfigError, match=r"10 readable pictures \(3 were skipped.*references\.least"):
        references(folder, least=11)


def test_damage_behind_the_header_is_found_when_it_is_drawn_until_too_few_are_left(tmp_path: Path) -> None:
    folder = written(tmp_path / "some", 10)
    for n in (2, 5):
        data = (folder / f"{n:03}.png").read_bytes()
        (folder / f"{n:03}.png").write_bytes(data[: len(data) // 2])
    known = references(folder)
    told: list[str] = []
    known.warn = told.append
    real, _ = known.drawn(prompts(*["a bag"] * 10), step=0)
    assert len(real.images) == 8 == len(known) and len(told) == 2 and "002.png" in known.note and "005.png" in known.note
    known.drawn(prompts("a bag"), step=1)
    with pytest.raises(Stopped, match="9 are the least"):
        references(folder, least=9).some(10)


def test_captions_beside_the_pictures_of_a_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "some", 8)
    (folder / "003.txt").write_text("a bag\n")
    real, groups = references(folder).drawn(prompts("a bag", "a coat"), step=0)
    assert np.array_equal(real.images[0], picture(3)) and groups == ["0/0", None] and real.prompts == ["a bag", None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"prompt": "a bag"}', "line 1"),
        ('{"image": "000.png", "prompt": 3}', "the prompt is a text"),
        ('{"image": "../secret.png"}', "keep pictures beside the file"),
        ('{"image": "/etc/passwd"}', "keep pictures beside the file"),
        ("[]", "line 1"),
    ],
)
def test_lines_that_cannot_be_meant(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=words):
        references(tmp_path / "pairs.jsonl")


def test_a_missing_file_of_a_line_is_skipped_and_a_missing_path_refused(tmp_path: Path) -> None:
    written(tmp_path, 8)
    lines: list[dict[str, Any]] = [{"image": f"{n:03}.png"} for n in range(9)]
    known = references(jsonl(tmp_path, lines))
    assert len(known) == 8 and "008.png: No such file" in known.note
    with pytest.raises(ConfigError, match="give a JSONL file"):
        references(tmp_path / "nowhere")


def test_other_sizes_are_resized_and_that_is_said(tmp_path: Path) -> None:
    known = references(written(tmp_path / "wide", 8, height=40, width=60))
    assert all(image.shape == (28, 28, 3) for image in known.some(8).images)
    assert "8 of 8 references are not 28x28" in known.note


def test_references_that_went_through_jpeg_are_counted(tmp_path: Path) -> None:
    folder = written(tmp_path / "some", 8)
    Image.fromarray(picture(9)).save(folder / "photo.JPG")
    assert "1 of 9 references are JPEG" in references(folder).note


@given(st.integers(16, 70), st.integers(16, 70), st.integers(16, 70), st.integers(16, 70))
def test_a_picture_of_the_size_passes_unchanged_and_any_other_keeps_its_middle(h: int, w: int, high: int, wide: int) -> None:
    source = picture(h * 71 + w, h, w)
    out = fitted(source, high, wide)
    assert out.shape == (high, wide, 3) and out.dtype == np.uint8
    assert fitted(out, high, wide) is out
    flat = np.full((h, w, 3), 77, np.uint8)
    assert np.array_equal(fitted(flat, high, wide), np.full((high, wide, 3), 77, np.uint8))
    if h >= 3 * w:  # far too high: the ends are cropped
        marked = np.zeros((h, w, 3), np.uint8)
        marked[0] = 255
        assert fitted(marked, 16, 16).max() == 0
