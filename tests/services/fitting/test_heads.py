"""Features kept by picture, options of a loss, thresholds."""

import numpy as np
import pytest
import torch

from services.fitting.heads import HeadOptions, Kept, LossOptions, balanced, checked, head_logits, hidden_layer
from services.fitting.losses import hinge, soft_cross_entropy
from services.reward import Item


def item(level: int, height: int = 16) -> Item:
    return Item(np.full((height, 16, 3), level, np.uint8))


class Counting:
    """Mean and height of a picture, and how often it was asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(len(items))
        means = torch.tensor([[float(i.image.mean())] for i in items], requires_grad=True)
        return means * 2, torch.tensor([i.image.shape[0] for i in items])


def test_features_are_computed_once_in_the_order_asked_for() -> None:
    count = Counting()
    kept = Kept(count)
    means, heights = kept([item(3), item(7), item(3), item(3, 20)])
    assert means[:, 0].tolist() == [6, 14, 6, 6] and heights.tolist() == [16, 16, 16, 20] and not means.requires_grad
    assert count.batches == [3] and len(kept) == 3
    again, _ = kept([item(7), item(9)])
    assert again[:, 0].tolist() == [14, 18] and count.batches == [3, 1]
    kept.clear()
    assert len(kept) == 0 and kept([item(7)])[0].tolist() == [[14]] and count.batches == [3, 1, 1]


def test_many_are_computed_in_pieces_and_the_oldest_leave() -> None:
    count = Counting()
    kept = Kept(count, limit=12 * 100)  # 12 bytes a picture
    found, _ = kept([item(i) for i in range(130)])
    assert found[:, 0].tolist() == [2.0 * i for i in range(130)] and count.batches == [64, 64, 2] and len(kept) == 100
    kept([item(129)])
    assert len(count.batches) == 3
    kept([item(0)])
    assert len(count.batches) == 4 and len(kept) == 100


def test_losses_by_name() -> None:
    real, made = torch.tensor([1.0, -0.5]), torch.tensor([0.2])
    assert torch.equal(LossOptions(loss="hinge")(real, made), hinge(real, made))
    assert torch.equal(LossOptions(real=0.9, generated=0.2)(real, made), soft_cross_entropy(real, made, 0.9, 0.2))


def test_accuracy_is_balanced() -> None:
    assert balanced(torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.2, 0.3, 0.8]), 0.5) == pytest.approx((0.5 + 0.75) / 2)


def test_a_new_hidden_layer_says_nothing_yet() -> None:
    x, g = torch.randn(5, 12), torch.Generator().manual_seed(0)
    linear = {"head.weight": torch.randn(12), "head.bias": torch.tensor(0.3)}
    whole = linear | hidden_layer(12, 7, g) | {"domain.mean": torch.zeros(12), "domain.std": torch.ones(12)}
    assert torch.equal(head_logits(x, linear), head_logits(x, whole))
    assert HeadOptions(kind="mlp").hidden is None


def test_weights_are_copied_when_they_are_checked() -> None:
    weights = {"a": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    found = checked(weights, {"a": torch.zeros(2)}, "detector")
    assert found["a"].dtype == torch.float32 and not found["a"].requires_grad
    found["a"].zero_()
    assert weights["a"].sum() == 2
