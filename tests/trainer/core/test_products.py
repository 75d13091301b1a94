"""Products with frozen weights: what torch's own linear layers give, forward and backward."""

import pytest
import torch
from torch import nn

from trainer.policies import products
from trainer.policies.products import FrozenLinear, by_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is too small for oneDNN."""
    monkeypatch.setattr(products, "LARGE", 0)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("shape", [(5,), (2, 7, 5), (0, 5), (1, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 3, bias=bias).requires_grad_(False)
    frozen = nn.Linear(5, 3, bias=bias).requires_grad_(False)
    frozen.load_state_dict(plain.state_dict())
    assert by_onednn(frozen) == 1
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(given) for layer, given in zip((plain, frozen), inputs, strict=True)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.usefixtures("any_size")
def test_a_gradient_that_is_not_contiguous() -> None:
    layer = nn.Linear(4, 6).requires_grad_(False)
    by_onednn(layer)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).t().contiguous().t().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 4))


def test_only_frozen_float32_layers_are_changed() -> None:
    model = nn.ModuleList(
        [nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).bfloat16().requires_grad_(False)]
    )
    assert by_onednn(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, FrozenLinear, nn.Linear]


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(products, "_by_onednn", lambda x, weight, bias: asked.append(x) or nn.functional.linear(x, weight, bias))
    layer = nn.Linear(256, 256).requires_grad_(False)
    by_onednn(layer)
    layer(torch.randn(8, 256))
    assert not asked
    layer(torch.randn(products.LARGE // 256**2, 256))
    assert len(asked) == 1
