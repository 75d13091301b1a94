"""A rewriter's part of a run's report: no rewriting, the rewriter before training and after it, and the rewrites themselves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

LONGEST = 600  # characters of a text that are shown

PAGE = """
<h2>What rewriting does</h2>
<p>The pictures score {{ over_none }} over no rewriting, and {{ over_untrained }} over the rewriter before training.</p>
<div class="scroll"><table><tr><th>of the same prompts and noise</th><th>no rewriting</th><th>rewriter before</th><th>after</th>
<th>after over no rewriting</th><th>after over before</th></tr>
{% for row in rows %}<tr><td>{{ row[0] }}</td>{% for value in row[1:] %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="soft">Every reward was asked with the user's own words{% if by_rewrite %}, but {{ by_rewrite }} with the rewrite{% endif %}.
Differences are paired over prompts, ± one standard error; "total" is in standard deviations of the first evaluation.</p>
<h2>{{ texts|length }} rewrites, before and after</h2>
<div class="scroll"><table><tr><th>prompt</th><th>rewritten before training</th><th>rewritten after (step {{ step }})</th></tr>
{% for prompt, before, after in texts %}<tr><td>{{ prompt }}</td><td>{{ before }}</td><td>{{ after }}</td></tr>
{% endfor %}</table></div>
"""


def section(folder: Path, config: Mapping[str, Any], judged: Mapping[str, Any]) -> Markup:
    """HTML for a run folder and the evaluation that is judged; nothing where no prompt was rewritten. Files that are damaged or missing leave
    their part out."""
    language = config.get("language")
    if not isinstance(language, Mapping) or "untrained/total" not in judged:
        return Markup("")
    names, own = [str(name) for name in config.get("rewards") or {}], language.get("rewards") or {}
    chosen = [name for name in names if name in own and own[name].get("judged_by") == "rewrite"]
    monitors = [key.removeprefix("none/") for key in judged if key.startswith("none/")]
    others = [key for key in monitors if key not in (*names, "total") and isinstance(judged.get(key), int | float)]
    shown = int(language.get("shown") or 20)
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    step = int(judged["step"])
    texts = rewrites(folder, step)[:shown]
    gains = {f"over_{arm}": _gain(judged, f"over_{arm}/total") or "?" for arm in ("none", "untrained")}
    return Markup(page.render(rows=_rows(judged, names, others), by_rewrite=", ".join(chosen), texts=texts, step=step, **gains))


def rewrites(folder: Path, step: int) -> list[tuple[str, str, str]]:
    """(prompt, rewrite before training, rewrite at `step`) of each evaluation prompt."""
    try:
        before = json.loads((folder / "rewrites" / "before.json").read_text(encoding="utf-8"))["arms"]["untrained"]["texts"]
        lines = (folder / "rewrites" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
        told = [json.loads(line) for line in lines]
        return [(_cut(row["prompt"]), _cut(text), _cut(row["rewrite"])) for row, text in zip(told, before, strict=True)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _rows(judged: Mapping[str, Any], names: Sequence[str], others: Sequence[str]) -> list[tuple[str, ...]]:
    out = []
    for name in (*names, "total", *others):
        now = judged.get("reward/total_mean" if name == "total" else f"reward/{name}/mean" if name in names else name)
        arms = [_number(judged.get(f"{arm}/{name}")) for arm in ("none", "untrained")]
        gains = [_gain(judged, f"over_{arm}/{name}") if name not in others else "" for arm in ("none", "untrained")]
        out.append((name, *arms, _number(now), *gains))
    return out


def _gain(judged: Mapping[str, Any], key: str) -> str:
    mean, error = judged.get(key), judged.get(f"{key}_sem")
    if not isinstance(mean, int | float):
        return ""
    if not isinstance(error, int | float) or not error > 0:
        return f"{mean:+.3g}"
    return f"{mean:+.3g} ± {error:.2g} ({mean / error:+.1f} standard errors)"


def _number(value: Any) -> str:
    return f"{round(value, 9) + 0.0:.3g}" if isinstance(value, int | float) and math.isfinite(value) else ""


def _cut(text: Any) -> str:
    told = str(text)
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"
