"""Token losses: outputs of TRL's own code, derivatives in float64, formulas by hand, and what a masked token may not do."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.advantages.gdpo import gdpo
from trainer.advantages.group_relative import group_relative
from trainer.losses import tokens
from trainer.losses.tokens import TokenLoss, importance, k3, step_normaliser, token_loss, without_truncated

FILE = Path(os.environ.get("VERISM_VECTORS", Path(__file__).parents[2] / "data" / "reference_vectors.npz"))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
USES: tuple[Any, ...] = get_args(tokens.Use)
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")


@pytest.fixture(scope="module")
def vectors() -> Any:
    with np.load(FILE, allow_pickle=False) as file:
        return {key.removeprefix("trl_"): torch.from_numpy(np.asarray(file[key])) for key in file.files if key.startswith("trl_")}


# TRL's name: (ours, what else it was given). Its runs had two micro-batches a step, 7 tokens at most, and an older KL without the ratio.
LOSSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    **{f"{use}_token": (use, ()) for use in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")},
    "grpo_sequence": ("gspo", ()),
    "luspo_sequence": ("luspo", ()),
    "dapo_token_beta0.04": ("dapo", ("kl",)),
    "dapo_token_delta1.25": ("dapo", ("delta",)),
}
LOSSES |= {f"{name}_is": (use, (*more, "is")) for name, (use, more) in LOSSES.items()}
LOSSES |= {"vespo_token": ("vespo", ("is",))}  # its ratio was among the inputs


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_are_trls(vectors: Any, name: str) -> None:
    use, more = LOSSES[name]
    mask = vectors["mask"]
    options: dict[str, Any] = (
        {"clip_low": 0.2, "clip_high": 0.28} if use in CLIPPING else {"clip_high": 5.0} if use == "cispo" else {}
    )
    options |= {"beta": 0.04, "ref_BT": vectors["ref_logp"], "unbiased_kl": False} if "kl" in more else {}
    options |= {"delta": 1.25} if "delta" in more else {}
    options |= {"is_ratio_BT": vectors["is_ratio"]} if "is" in more else {}
    whole = step_normaliser(use, rows=2 * len(mask), tokens=int(mask.sum()), batches=2, longest=7)
    args = vectors["new_logp"], vectors["old_logp"], mask, vectors["advantages"]
    out = token_loss(*args, use=use, normaliser=whole, **options)
    np.testing.assert_allclose(out.value, vectors[f"loss_{name}"], **TOLERANCE)
    assert out.diagnostics["tokens"] == float(mask.sum())


ADVANTAGES: dict[str, Callable[..., Any]] = {
    "sum_then_normalize_group": lambda *a, **k: group_relative(*a, **k, combine="sum_then_normalize"),
    "sum_then_normalize_batch": lambda *a, **k: group_relative(*a, **k, combine="sum_then_normalize", std="global"),
    "sum_then_normalize_none": lambda *a, **k: group_relative(*a, **k, combine="sum_then_normalize", std="none"),
    "normalize_then_sum_group": gdpo,
}


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantages_are_trls(vectors: Any, name: str) -> None:
    rewards = vectors["adv_rewards"].T
    args = rewards, ~rewards.isnan(), torch.arange(8) // 4, torch.tensor([1.0, 0.5], dtype=torch.float64)
    out = ADVANTAGES[name](*args, ddof=1, missing="skip", clip=1e9)
    np.testing.assert_allclose(out.values_B, vectors[f"adv_{name}"], **TOLERANCE)
    assert out.weights_B.tolist() == (~rewards.isnan()).any(0).float().tolist(), (
        "what nothing scored has no advantage and no weight"
    )


def test_every_array_of_trl_is_looked_at(vectors: Any) -> None:
    read = {"new_logp", "old_logp", "ref_logp", "mask", "advantages", "is_ratio", "adv_rewards"}
    assert set(vectors) == read | {f"loss_{name}" for name in LOSSES} | {f"adv_{name}" for name in ADVANTAGES}


# By hand and by finite differences

LENGTHS = torch.tensor([5, 7, 3, 6])
MASK = torch.arange(7) < LENGTHS[:, None]
A = torch.tensor([1.2, -0.7, 0.4, -1.5], dtype=torch.float64)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 7)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD, REFERENCE = -1.5 + 0.4 * randn(1), -1.5 + 0.4 * randn(2)
SHARE = torch.exp(0.2 * randn(3))


def loss(use: Any, new: Tensor, old: Tensor = OLD, mask: Tensor = MASK, a: Tensor = A, **options: Any) -> TokenLoss:
    """A step alone; dr_grpo of at most 9 tokens."""
    whole = step_normaliser(use, rows=len(mask), tokens=int(mask.sum()), longest=9)
    return token_loss(new, old, mask, a, use=use, **{"normaliser": whole, **options})


def gradient(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(x), x)
    return found


def slopes(value: Callable[[Tensor], Tensor], at: Tensor, by: float = 1e-6) -> Tensor:
    """Central differences, entry by entry."""
    out = torch.zeros_like(at)
    for place in np.ndindex(*at.shape):
        way = torch.zeros_like(at)
        way[place] = by
        out[place] = (value(at + way) - value(at - way)) / (2 * by)
    return out


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.3, "ref_BT": REFERENCE, "unbiased_kl": False},
    "unbiased kl": {"beta": 0.3, "ref_BT": REFERENCE},
    "corrected": {"is_ratio_BT": SHARE},
    "corrected by rows": {"is_ratio_BT": SHARE[:, :1]},
}


def frozen(use: str, at: Tensor, share: Tensor | None) -> Tensor:
    """(B, T) what cispo and vespo multiply log-probabilities with, in a loop over rows of plain numbers."""
    out = torch.zeros(4, 7, dtype=torch.float64)
    for b in range(4):
        ratios = [math.exp(float(at[b, t] - OLD[b, t])) for t in range(int(LENGTHS[b]))]
        shares = [1.0] * 7 if share is None else [float(share[b, t if share.shape[1] > 1 else 0]) for t in range(7)]
        k, decay = (2.0, 3.0) if A[b] >= 0 else (3.0, 2.0)
        w = math.prod(ratios)
        if share is not None:
            w *= shares[0] if share.shape[1] == 1 else math.prod(shares[: len(ratios)])
        for t, ratio in enumerate(ratios):
            out[b, t] = min(ratio, 5.0) * shares[t] if use == "cispo" else math.exp(decay) * w**k * math.exp(-decay * w)
    return out


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("more", sorted(OPTIONS))
def test_derivatives_are_those_of_the_function(use: Any, more: str) -> None:
    """Far enough from the old policy that some tokens are clipped. What cispo and vespo do not differentiate is held, and made anew here."""
    options, new = OPTIONS[more], OLD + 0.3 * randn(4)
    if use in CLIPPING:
        options = {**options, "clip_low": 0.1, "clip_high": 0.15}
    if use == "luspo":
        options = {**options, "delta": 1.2}
    found = gradient(lambda x: loss(use, x, **options).value, new)
    if use in ("cispo", "vespo"):
        held = frozen(use, new, options.get("is_ratio_BT"))
        rest = {key: value for key, value in options.items() if key != "is_ratio_BT"}

        def value(x: Tensor) -> Tensor:
            policy = -(held * A[:, None] * x)[MASK].sum() / MASK.sum()
            zero = loss(use, x, a=torch.zeros(4, dtype=torch.float64), **rest).value  # the KL is left
            return policy + zero
    else:

        def value(x: Tensor) -> Tensor:
            return loss(use, x, **options).value

    torch.testing.assert_close(found, slopes(value, new), rtol=1e-6, atol=1e-8)
    assert not found[~MASK].any() and found[MASK].abs().max() > 1e-3
    if use in CLIPPING:
        numbers = loss(use, new, **options).diagnostics
        assert numbers["clipfrac_low"] + numbers["clipfrac_high"] > 0, "the clip is in it"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("far", [0.0, 0.5, 50.0])
def test_nothing_is_learned_at_zero_advantage(use: Any, far: float) -> None:
    found = gradient(lambda x: loss(use, x, a=torch.zeros(4)).value, OLD + far * randn(5))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("use", USES)
def test_on_policy_all_are_the_policy_gradient(use: Any) -> None:
    """With their own defaults and weights: -A / normaliser for each token, divided by the row's length where rows count alike."""
    found = gradient(lambda x: loss(use, x).value, OLD)
    expected = torch.where(MASK, -A[:, None], 0.0)
    rows = {"grpo": 4.0, "sapo": 4.0, "gspo": 4.0}
    if use in rows:
        expected = expected / LENGTHS[:, None] / 4
    else:
        expected = expected / {"dr_grpo": 4 * 9.0, "luspo": 4.0}.get(use, float(MASK.sum()))
    torch.testing.assert_close(found, expected)


def test_clipped_terms_by_hand() -> None:
    """Four rows of one token with ratios 2 and 1/2 and both signs: the pessimistic of the two, bounded by delta where that is not clipped."""
    new = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64).log()[:, None].requires_grad_()
    old, mask, a = torch.zeros(4, 1), torch.ones(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = token_loss(new, old, mask, a, use="dapo", clip_low=0.2, clip_high=0.28)
    assert out.value.item() == pytest.approx((-1.28 - 0.5 + 2.0 + 0.8) / 4)
    (found,) = torch.autograd.grad(out.value, new)
    assert found.flatten().tolist() == pytest.approx([0.0, -0.125, 0.5, 0.0])
    assert out.diagnostics == pytest.approx(
        {"ratio": 1.25, "ratio_dev": 1.0, "clipfrac_low": 0.25, "clipfrac_high": 0.25, "tokens": 4.0}
    )
    bounded = token_loss(new, old, mask, a, use="dapo", clip_low=0.2, clip_high=0.28, delta=1.5)
    assert bounded.value.item() == pytest.approx((-1.28 - 0.5 + 1.5 + 0.8) / 4)
    (found,) = torch.autograd.grad(bounded.value, new)
    assert found.flatten().tolist() == pytest.approx([0.0, -0.125, 0.0, 0.0])


def test_a_sequence_has_one_ratio() -> None:
    """GSPO: the geometric mean over the row's tokens; LUSPO: times their number."""
    new, old = torch.log(torch.tensor([[4.0, 1.0, 9.0]])), torch.zeros(1, 3)
    mask, a = torch.tensor([[1, 1, 0]]), torch.tensor([-1.0])
    assert float(token_loss(new, old, mask, a, use="gspo").value) == pytest.approx(2.0)
    assert float(token_loss(new, old, mask, a, use="luspo").value) == pytest.approx(4.0)
    assert float(token_loss(new, old, mask, a, use="grpo", level="sequence").value) == pytest.approx(2.0)
    assert float(token_loss(new, old, mask, a, use="grpo").value) == pytest.approx(2.5)


def test_the_kl_and_its_gradient_over_a_vocabulary() -> None:
    """Summed over all tokens with their probabilities k3 is the KL; its gradient is the KL's with the ratio, and the other KL's without."""
    logits, ref = randn(6, 6).requires_grad_(), torch.log_softmax(randn(7, 6), 0)
    logp = torch.log_softmax(logits, 0)
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - ref)).sum()
    (reverse,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    assert (p * k3(logp, ref)).sum().item() == pytest.approx(kl.item()) and k3(logp, ref).min().item() >= 0

    def through_the_loss(unbiased: bool) -> Tensor:
        total: Any = 0.0
        for token in range(6):  # a row of one token each, as likely as it is
            row = logp[token].reshape(1, 1), logp[token].detach().reshape(1, 1), torch.ones(1, 1), torch.zeros(1)
            out = token_loss(*row, use="dapo", beta=1.0, ref_BT=ref[token].reshape(1, 1), unbiased_kl=unbiased)
            total = total + p[token] * out.value
        assert total.item() == pytest.approx(kl.item())
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    torch.testing.assert_close(through_the_loss(True), reverse)
    torch.testing.assert_close(through_the_loss(False), forward)


def test_the_reference_and_the_old_policy_have_no_gradient() -> None:
    new, old, ref = (x.clone().requires_grad_() for x in (OLD + 0.1, OLD, REFERENCE))
    token_loss(new, old, MASK, A, use="dapo", beta=0.1, ref_BT=ref).value.backward()
    assert old.grad is None and ref.grad is None and new.grad is not None and new.grad.any()


def test_corrections_of_another_engine_by_hand() -> None:
    sampler = torch.tensor([[-1.0, -1.0, -9.0], [-1.0, -1.0, -1.0], [-1.0, math.nan, -1.0]])
    trainer = sampler.nan_to_num(-4.0) + torch.tensor([[0.1, 0.2, 5.0], [2.0, -1.0, 0.5], [-1.0, 3.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    e = math.exp
    for mode, options, expected in (
        ("sequence_mask", {}, [[e(0.3)], [0.0], [e(-2.0)]]),
        ("sequence_mask", {"low": 0.2}, [[e(0.3)], [0.0], [0.0]]),
        ("sequence_mask", {"high": None, "low": 0.2}, [[e(0.3)], [e(1.5)], [0.0]]),
        ("sequence_truncate", {}, [[e(0.3)], [3.0], [e(-2.0)]]),
        ("token_truncate", {}, [[e(0.1), e(0.2), 1.0], [3.0, e(-1), e(0.5)], [e(-1), 1.0, e(-1)]]),
        ("token_mask", {"low": 0.4}, [[e(0.1), e(0.2), 1.0], [0.0, 0.0, e(0.5)], [0.0, 1.0, 0.0]]),
    ):
        out = importance(trainer, sampler, mask, mode=mode, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(out, torch.tensor(expected), msg=f"{mode} {options}")
    dropped = token_loss(trainer, trainer, mask, torch.ones(3), use="dapo", is_ratio_BT=importance(trainer, sampler, mask))
    assert dropped.diagnostics["importance_dropped"] == pytest.approx(1 / 3)
    assert float(dropped.value) == pytest.approx(-(2 * e(0.3) + 3 * e(-2.0)) / 8)


def test_truncated_completions_go_as_a_whole() -> None:
    mask = without_truncated(MASK, torch.tensor([True, False, True, True]))
    assert mask.sum(1).tolist() == [5, 0, 3, 6]
    for use in USES:
        found = gradient(lambda x, use=use: loss(use, x, mask=mask).value, OLD)
        assert not found[1].any() and found[0].any()


# What stands where no token is


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Ratios from far below 1 to far above, rows of any length (0 too, but not all), both signs of the advantage."""
    rows, longest = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10_000))
    lengths = torch.tensor(draw(st.lists(st.integers(0, longest), min_size=rows, max_size=rows)))
    lengths[0] = max(int(lengths[0]), 1)
    old = -1.5 + 0.5 * randn(seed, rows, longest)
    return {
        "new": old + draw(st.sampled_from([0.01, 0.3, 3.0])) * randn(seed + 1, rows, longest),
        "old": old,
        "mask": torch.arange(longest) < lengths[:, None],
        "a": randn(seed + 2, rows),
        "ref": old + 0.2 * randn(seed + 3, rows, longest),
        "share": torch.exp(0.3 * randn(seed + 4, rows, longest)),
    }


def judged(use: Any, batch: dict[str, Tensor], by_row: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient with everything on."""
    new = batch["new"].clone().requires_grad_()
    share = batch["share"][:, :1] if by_row else batch["share"]
    out = token_loss(
        new, batch["old"], batch["mask"], batch["a"], use=use, beta=0.1, ref_BT=batch["ref"], is_ratio_BT=share, **options
    )
    assert all(math.isfinite(number) for number in out.diagnostics.values())
    (found,) = torch.autograd.grad(out.value, new)
    return out.value.detach(), found


@pytest.mark.parametrize("use", USES)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]), by_row=st.booleans())
def test_a_masked_token_has_no_influence(use: Any, batch: dict[str, Tensor], junk: float, by_row: bool) -> None:
    whole = {"normaliser": 7.0}
    value, found = judged(use, batch, by_row, **whole)
    assert value.isfinite() and found.isfinite().all() and not found[~batch["mask"]].any()
    other = {key: torch.where(batch["mask"], batch[key], junk) for key in ("new", "old", "ref", "share")}
    rows = batch["mask"].any(1)
    other["share"][rows, 0] = batch["share"][rows, 0]  # by rows: their own
    other |= {"mask": batch["mask"], "a": torch.where(rows, batch["a"], junk)}
    again, theirs = judged(use, other, by_row, **whole)
    assert torch.equal(value, again) and torch.equal(found, theirs)
    wider = {
        key: torch.cat([batch[key], torch.full_like(batch[key][:, :1], 0 if key == "mask" else junk)], 1)
        for key in batch
        if key != "a"
    }
    again, theirs = judged(use, {**wider, "a": batch["a"]}, by_row, **whole)
    torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theirs[:, :-1], found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use", [use for use in USES if use != "bnpo"])
@settings(max_examples=15, deadline=None)
@given(batch=batches(), cut=st.integers(0, 5), by_row=st.booleans())
def test_micro_batches_add_up_and_rows_have_no_order(use: Any, batch: dict[str, Tensor], cut: int, by_row: bool) -> None:
    rows, whole = len(batch["a"]), {"normaliser": 11.0}
    value, found = judged(use, batch, by_row, **whole)
    order = torch.arange(rows).flip(0)
    for part in (order, order[: min(cut, rows)], order[min(cut, rows) :]):
        if len(part):
            mine, theirs = judged(use, {key: x[part] for key, x in batch.items()}, by_row, **whole)
            value = value - mine if len(part) < rows else value
            torch.testing.assert_close(theirs, found[part], rtol=1e-10, atol=1e-12)
    if 0 < min(cut, rows) < rows:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-9)


def test_bnpo_is_the_mean_of_its_batches() -> None:
    new = OLD + 0.1 * randn(8)
    whole = step_normaliser("bnpo", rows=4, tokens=21, batches=2)
    halves = [
        token_loss(new[part], OLD[part], MASK[part], A[part], use="bnpo", normaliser=whole).value
        for part in (slice(2), slice(2, 4))
    ]
    alone = [
        token_loss(new[part], OLD[part], MASK[part], A[part], use="dapo", clip_high=0.2).value for part in (slice(2), slice(2, 4))
    ]
    assert float(sum(halves)) == pytest.approx(float(sum(alone)) / 2)


@pytest.mark.parametrize("use", USES)
def test_in_float32_far_from_the_old_policy_all_stays_finite(use: Any) -> None:
    far = torch.tensor([[-1e4, -200.0, 0.0], [0.0, -1e-3, -90.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1.0, -1e4], [-300.0, -2.0, 0.0]])
    out = token_loss(far, old, torch.ones(2, 3), torch.tensor([1.0, -1.0]), use=use, normaliser=6.0, beta=0.1, ref_BT=old)
    (found,) = torch.autograd.grad(out.value, far)
    assert out.value.isfinite() and found.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use": "gpro"}, "known: grpo, bnpo"),
        ({"use": "sapo", "clip_low": 0.2}, "does not clip"),
        ({"use": "cispo", "clip_low": 0.2}, "from above alone"),
        ({"use": "cispo", "delta": 2.0}, "leave delta away"),
        ({"use": "gspo", "level": "token"}, "one ratio for a sequence"),
        ({"use": "vespo", "level": "sequence"}, "leave level away"),
        ({"use": "dapo", "clip_low": 1.2}, r"in \[0, 1\)"),
        ({"use": "dapo", "delta": 1.0}, "above 1"),
        ({"use": "dapo", "beta": 0.1}, "give ref_BT"),
        ({"use": "dr_grpo"}, "give `longest`"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_loss(OLD, OLD, MASK, A, **options)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="known: token_truncate"):
        importance(OLD, OLD, MASK, mode="sequence")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a bound"):
        importance(OLD, OLD, MASK, mode="token_truncate", high=None)
    with pytest.raises(ValueError, match="known: grpo"):
        step_normaliser("ppo", rows=1, tokens=1)  # type: ignore[arg-type]
