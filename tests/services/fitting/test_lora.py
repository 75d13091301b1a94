"""Adapters: nothing changes at the start, what is frozen stays shared, and the merged network is the adapted one."""

import pytest
import timm
import torch
from torch import Tensor, nn

from services.fitting.lora import LoraOptions, adaptable, adapted, adapters, merged, shared_copy

ARCHITECTURES = {
    "cnn": ("tf_efficientnet_lite0", {}, 48),
    "vit": ("vit_small_patch14_dinov2", {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 56}, 56),
    "convnext": ("convnext_atto", {}, 64),
}


def network(kind: str) -> tuple[nn.Module, Tensor]:
    name, arguments, side = ARCHITECTURES[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model, torch.randn(3, 3, side, side)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_at_the_start_nothing_changes_to_the_bit(kind: str) -> None:
    model, x = network(kind)
    options, before = LoraOptions(rank=2), model(x)
    copy = adapted(model, options, seeded())
    assert torch.equal(copy(x), before)
    assert torch.equal(merged(model, options, adapters(copy))(x), before)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merged_is_adapted_and_the_frozen_is_neither_copied_nor_changed(kind: str) -> None:
    model, x = network(kind)
    options, before, state = LoraOptions(rank=2, alpha=3), model(x), {k: v.clone() for k, v in model.state_dict().items()}
    copy = adapted(model, options, seeded())
    values = adapters(copy)
    assert len(values) == 2 * len(adaptable(model)) > 4 and all(
        v.requires_grad and v.dtype == torch.float32 for v in values.values()
    )
    (copy(x).square().mean()).backward()
    assert all(v.grad is not None for v in values.values()) and not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for v in values.values():
            v.add_(0.02 * torch.randn_like(v))
    whole = merged(model, options, values)
    with torch.no_grad():
        assert not torch.allclose(copy(x), before, atol=1e-3)
        torch.testing.assert_close(whole(x), copy(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), before) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    held, changed = {id(p) for p in model.parameters()}, {id(p) for p in whole.parameters()}
    assert len(changed - held) == len(values) // 2, "only adapted weights are new tensors"
    assert {id(p) for p in copy.parameters()} - held == {id(v) for v in values.values()}
    assert type(whole.get_submodule(adaptable(model)[0])) is type(model.get_submodule(adaptable(model)[0]))


def test_the_change_is_alpha_over_rank_times_b_a() -> None:
    model, options = (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5)).requires_grad_(False),
        LoraOptions(rank=2, alpha=6),
    )
    g = seeded()
    values = {"0.a": torch.randn(2, 36, generator=g), "0.b": torch.randn(6, 2, generator=g)}
    values |= {"2.a": torch.randn(2, 6, generator=g), "2.b": torch.randn(5, 2, generator=g)}
    whole = merged(model, options, values)
    for name in ("0", "2"):
        delta = whole.get_parameter(f"{name}.weight") - model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(delta.flatten(1), 3 * values[f"{name}.b"] @ values[f"{name}.a"])
        assert torch.linalg.matrix_rank(delta.flatten(1)) == 2


def test_a_seed_is_a_start() -> None:
    model, _ = network("vit")
    first, same, other = (adapters(adapted(model, LoraOptions(), seeded(s))) for s in (0, 0, 1))
    assert all(torch.equal(v, same[k]) for k, v in first.items())
    assert not torch.equal(first["blocks.0.attn.qkv.a"], other["blocks.0.attn.qkv.a"])


def test_depthwise_and_large_kernels_take_no_adapters() -> None:
    model, _ = network("cnn")
    names = adaptable(model)
    assert {"conv_stem", "conv_head", "blocks.0.0.conv_pw"} <= set(names) and not any("conv_dw" in n for n in names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (LoraOptions(targets=("nothing",)), r"there are: conv_stem, .*conv_head"),
        (LoraOptions(targets=("(",)), "no regular expression"),
        (LoraOptions(rank=28), "`lora.rank` 28 is more than conv_stem has, 27: lower it"),
    ],
)
def test_what_cannot_be_is_said(options: LoraOptions, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adapted(network("cnn")[0], options, seeded())


def test_a_shared_copy_owns_what_it_is_told_to() -> None:
    model, x = network("vit")
    copy = shared_copy(model, ["norm.weight"])
    own = {id(p) for p in copy.parameters()} - {id(p) for p in model.parameters()}
    assert own == {id(copy.get_parameter("norm.weight"))} and copy.get_parameter("norm.weight").requires_grad
    with torch.no_grad():
        before = model(x)
        copy.get_parameter("norm.weight").mul_(2)
        assert torch.equal(model(x), before) and not torch.equal(copy(x), before)
