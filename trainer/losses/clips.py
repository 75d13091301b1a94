"""Which clip range belongs to which loss and kind of step: log-probabilities are means over dimensions, so 0.2 would never clip.

The values are the published ones at 512 to 1024 pixels. A mean over fewer dimensions moves more, so small latents want wider ranges.
"""

PUBLISHED: dict[tuple[str, str], tuple[float, str]] = {
    ("grpo", "sde"): (1e-4, "Flow-GRPO's SD3 settings, 2505.05470"),
    ("grpo", "dance"): (1e-4, "DanceGRPO and MixGRPO, 2505.07818"),
    ("grpo", "cps"): (1e-5, "Flow-GRPO's cps settings; its log-probability lacks 1 / (2 std^2)"),
    ("guard", "sde"): (2e-6, "RealGen's FLUX guard settings; GRPO-Guard, 2510.22319"),
    ("awm", ""): (1e-5, "Flow-Factory's settings; AWM, 2509.25050"),
}
FAR, TOO_FAR = 100.0, 1000.0  # times the published value, either way


def published(loss: str, kind: str) -> tuple[float, str] | None:
    """(range, source) of a loss with a kind of step; None for losses that do not clip. ValueError when both do not go together."""
    known = [k for name, k in PUBLISHED if name == loss]
    if not known:
        return None
    if known == [""]:
        return PUBLISHED[loss, ""]
    if kind not in known:
        raise ValueError(
            f"loss.use={loss} is not defined for sampling.kind={kind}: its ratio needs sampling.kind={' or '.join(known)}"
        )
    return PUBLISHED[loss, kind]


def clip_range(loss: str, kind: str, low: float | None, high: float | None) -> tuple[float, float] | None:
    """(low, high) with the published value for what is not given; None for losses that do not clip.

    ValueError for a range that belongs to no such loss, or that is so far from the published one that it is another unit.
    """
    found = published(loss, kind)
    if found is None:
        if (low, high) != (None, None):
            raise ValueError(f"loss.use={loss} does not clip: remove loss.clip_low and loss.clip_high")
        return None
    usual, source = found
    for name, value in (("clip_low", low), ("clip_high", high)):
        if value is not None and not usual / TOO_FAR <= value <= usual * TOO_FAR:
            raise ValueError(
                f"loss.{name}={value:g} does not belong to loss.use={loss} with sampling.kind={kind}, whose published range is "
                f"{usual:g} ({source}): set something near it, or null for it"
            )
    return usual if low is None else low, usual if high is None else high


def far_off(loss: str, kind: str, low: float | None, high: float | None) -> str:
    """A warning in words for a range a hundred times wider or narrower than the published one; "" else."""
    found = published(loss, kind)
    given = [value for value in (low, high) if value is not None]
    if found is None or all(found[0] / FAR <= value * 1.001 and value <= found[0] * FAR * 1.001 for value in given):
        return ""
    return (
        f"loss.clip_low/clip_high = {low}/{high} are far from the published {found[0]:g} of loss.use={loss} with sampling.kind={kind} "
        f"({found[1]}); watch `clipfrac`: 0 means that nothing is ever clipped, 1 that nothing is learned."
    )
