"""The safety gate: equal to nsfwjs under TensorFlow.js, shipped as data, and honest about small pictures."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from services.reward import Item
from services.rewards._nsfwjs import CLASSES, read
from services.rewards.safety import WEIGHTS, Safety
from services.weights.nsfwjs import recipe
from tests.services.rewards_detectors import nsfwjs_vectors


@pytest.fixture(scope="module")
def safety() -> Safety:
    return Safety.load("safety", {}, "cpu")


def test_probabilities_equal_those_of_tensorflow_js(safety: Safety) -> None:
    expected = [[row[c] for c in CLASSES] for row in json.loads(nsfwjs_vectors.ANSWERS.read_text())]
    found = safety.probabilities(nsfwjs_vectors.pictures()).numpy()
    assert len({row.index(max(row)) for row in expected}) >= 3, "the pictures should not all look the same to the model"
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_value_parts_and_gate(safety: Safety) -> None:
    pictures = nsfwjs_vectors.pictures()
    scores = safety.score([Item(p) for p in pictures])
    for score in scores:
        assert score.value is not None and set(score.parts) == {*CLASSES, "gate"}
        assert sum(score.parts[c] for c in CLASSES) == pytest.approx(1)
        assert score.value == pytest.approx(score.parts["drawing"] + score.parts["neutral"])
        assert score.parts["gate"] == (1.0 if score.value >= 0.5 else 0.0)
    assert {s.parts["gate"] for s in scores} == {0.0, 1.0}
    assert [s.in_domain for s in scores] == [min(p.shape[:2]) >= 112 for p in pictures]


def test_the_classes_that_count_are_options(safety: Safety) -> None:
    pictures = [Item(p) for p in nsfwjs_vectors.pictures()]
    strict = Safety.load("strict", {"unsafe": ["hentai", "porn", "sexy", "drawing"], "threshold": 0.9}, "cpu").score(pictures)
    for score in strict:
        assert score.value == pytest.approx(score.parts["neutral"]) and score.parts["gate"] == float(score.parts["neutral"] >= 0.9)
    with pytest.raises(ValueError, match="unsafe"):
        Safety.load("x", {"unsafe": ["violence"]}, "cpu")


def test_the_card_names_the_file(safety: Safety) -> None:
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    card = (WEIGHTS.parent / "README.md").read_text()
    assert digest in card and f"{WEIGHTS.stat().st_size:,}" in card and safety.info.weights_sha256 == digest
    assert "MIT" in (WEIGHTS.parent / "LICENSE").read_text()


def package(folder: Path, shard: bytes) -> Path:
    """An archive laid out as nsfwjs', with two small tensors."""
    manifest = (
        '!function(e){x=[{name:"Conv1/kernel",shape:[20,40],dtype:"float32",quantization:{min:-.5,scale:.25,dtype:"uint8"}},'
        '{name:"Conv1/bias",shape:[3],dtype:"float32",quantization:{min:1e-3,scale:2,dtype:"uint8"}}]}'
    )
    file = folder / "package.tgz"
    with tarfile.open(file, "w:gz") as tar:
        for name, text in (
            ("model.min.js", manifest),
            ("group1-shard1of1.min.js", f'e="{base64.b64encode(shard).decode()}"'),
        ):
            info = tarfile.TarInfo(f"package/dist/models/mobilenet_v2/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return file


def test_the_recipe_reads_bytes_and_ranges(tmp_path: Path) -> None:
    shard = bytes(i % 251 for i in range(803))
    found, ranges = recipe.tensors(package(tmp_path, shard))
    assert found["Conv1/kernel"].shape == (20, 40) and found["Conv1/kernel"].tobytes() + found["Conv1/bias"].tobytes() == shard
    assert ranges == {"Conv1/kernel": (-0.5, 0.25), "Conv1/bias": (0.001, 2.0)}
    with pytest.raises(RuntimeError, match="803 bytes of weights, the shard holds 804"):
        recipe.tensors(package(tmp_path, shard + b"\0"))


def test_shipped_ranges_cover_every_tensor() -> None:
    tensors = read(WEIGHTS)
    assert len(tensors) == 266
    variances = [t for k, t in tensors.items() if k.endswith("moving_variance")]
    assert len(variances) == 52 and all((v >= 0).all() for v in variances)
