"""`parts.margin` of alignment: the log-probability of the prompt against others, on the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.config import ROOT
from services.reward import Item
from services.rewards.alignment import Alignment
from world import photographs

FOLDER = ROOT / "world" / "alignment"
NAMES = ["a photo of a t-shirt", "a photo of a pair of trousers", "a photo of an ankle boot", "a photo of a bag"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_margin_is_a_log_probability(tmp_path: Path, temperature: float) -> None:
    (tmp_path / "others.txt").write_text("\n".join([*NAMES, "", NAMES[0]]))
    reward = Alignment.load("a", {"folder": FOLDER, "against": tmp_path / "others.txt", "temperature": temperature}, "cpu")
    plain = Alignment.load("a", {"folder": FOLDER}, "cpu")
    images, classes = photographs.load("test")
    trousers = images[int(np.flatnonzero(classes == 1)[0])]
    items = [Item(trousers, name) for name in [*NAMES, "a photo of a dress"]]
    scores, cosines = reward.score(items), plain.score(items)
    assert [s.value for s in scores] == pytest.approx([c.value for c in cosines]) and "margin" not in cosines[0].parts
    logits = reward.towers.scale / temperature * torch.tensor([c.value for c in cosines], dtype=torch.float64)
    assert [s.parts["margin"] for s in scores[:4]] == pytest.approx(logits[:4].log_softmax(0).tolist(), abs=1e-4)
    assert scores[4].parts["margin"] == pytest.approx(float(logits.log_softmax(0)[4]), abs=1e-4), "a prompt that is not in the file"
    assert scores[1].parts["margin"] > max(s.parts["margin"] for s in (scores[0], *scores[2:]))


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="one a line"):
        Alignment.load("a", {"folder": FOLDER, "against": tmp_path / "none.txt"}, "cpu")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="0 prompts"):
        Alignment.load("a", {"folder": FOLDER, "against": tmp_path / "empty.txt"}, "cpu")
