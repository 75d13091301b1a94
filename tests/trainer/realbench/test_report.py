"""What the page says of figures: which way is better, and what has to be known before."""

import re
from pathlib import Path
from typing import Any

from trainer.realbench.bench import Judged
from trainer.realbench.config import Bench
from trainer.realbench.report import write

NOTHING: dict[str, Any] = {
    name: [] for name in ("contestants", "measures", "figures", "differences", "telling", "agreement", "calibration", "notes")
}


def page(out: Path, **more: Any) -> str:
    found = NOTHING | {"level": 0.95, "rounds": 200, "arena": {}, "features": "", "away": {}} | more
    return write(Judged(Bench(), out, [], {}, {}), found, out).read_text()


def test_a_rise_is_good_where_higher_is_better(tmp_path: Path) -> None:
    both = {"a": "old", "b": "new", "what": "b - a", "paired": True, "n": 40}
    rows = [
        {**both, "measure": f"{higher} {low}", "higher_is_better": higher, "value": low + 0.1, "low": low, "high": low + 0.2}
        for higher in (True, False, None)
        for low in (0.5, -0.1, -0.5)
    ]
    text = page(tmp_path, differences=rows)
    colours = [found[1] for found in re.finditer(r'<td class="n (\w*)" data-v="-?0', text)]
    assert colours == ["good", "", "bad", "bad", "", "good", "", "", ""]


def test_what_a_contestant_has_to_say_stands_before_the_numbers(tmp_path: Path) -> None:
    one = {"name": "tuned", "kind": "generated", "pictures": 3, "sizes": [], "about": {"run": "r", "notes": ["begun <early>"]}}
    text = page(tmp_path, contestants=[one, {**one, "name": "base", "about": {}}], notes=["first"])
    assert "<li>first</li><li>tuned: begun &lt;early&gt;</li></ul>" in text
