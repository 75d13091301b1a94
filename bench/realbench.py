"""1,000 pictures through two detectors and a judge: what `verism-eval realbench` takes, against the services' own batches.

    make bench-realbench ARGS="--pictures 1000"

The services' own rate is what the same rewards do in one process, in plain batches of decoded pictures, each reward in a thread of its own
and with one thread a forward pass, as the service has them. The bench asks them over HTTP, reads and checks the files, and writes every
answer. Rounds are interleaved; medians count; the load of the machine stands beside them. Weights of one detector of realism are embedded,
so both detectors are that one, loaded twice: what they answer is the same, and what they compute is not shared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.process import ENVIRONMENT, ROOT, running
from shared.panel import Panel
from trainer.realbench.ask import FIELDS, Away, rewards
from trainer.realbench.bench import looked_at
from trainer.realbench.ledger import Ledger
from trainer.realbench.pictures import entry
from trainer.realbench.screen import Screen
from world import photographs

BATCH = 32
SERVED = {
    "detector": {"use": "detector", "folder": "world/detector"},
    "detector-again": {"use": "detector", "folder": "world/detector"},
    "judge": {"use": "forensic_chat", "folder": "world/judge", "dtype": "float32"},
}
PLAIN = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from world import photographs
from services.registry import resolve
from services.reward import Item
served, count, batch = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rewards = [resolve(told.pop("use")).load(name, told, "cpu") for name, told in served.items()]
items = [Item(p) for p in photographs.load("test")[0][:count]]
def whole(reward):
    for start in range(0, len(items), batch):
        reward.score(items[start : start + batch])
for reward in rewards:
    reward.score(items[:batch])
lanes = ThreadPoolExecutor(len(rewards))
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    list(lanes.map(whole, rewards))
    print(time.perf_counter() - began, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.realbench", description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts; a first one warms up")
    told = parser.parse_args()
    load = os.getloadavg()[0]
    served = {name: {**one, "cache_items": 0, "batch_cap": BATCH} for name, one in SERVED.items()}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "pictures").mkdir()
        for i, image in enumerate(photographs.load("test")[0][: told.pictures]):
            Image.fromarray(image).save(place / "pictures" / f"{i:04d}.png")
        (place / "serve.yaml").write_text(json.dumps({"threads": 1, "rewards": served}))
        plain = subprocess.Popen(
            [sys.executable, "-c", PLAIN, json.dumps(SERVED), str(told.pictures), str(BATCH)],
            cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            with running(place / "serve.yaml", stderr=subprocess.DEVNULL, limit_s=900) as url:
                assert plain.stdout is not None and plain.stdout.readline() == "ready\n"
                rounds = [(_plain(plain), _asked(place, url, i)) for i in range(told.rounds + 1)][1:]
        finally:
            plain.terminate()
            plain.wait(30)
    return _show(rounds, told.pictures, load)


def _plain(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _asked(place: Path, url: str, turn: int) -> float:
    """Seconds from the folder to the last line of the ledger."""
    began, screen = time.perf_counter(), Screen(Console(quiet=True))
    one = entry("pictures", place / "pictures", [])
    looked = looked_at([one], screen)["pictures"]
    away = Away()
    with Panel(dict.fromkeys(SERVED, url)) as panel, Ledger(place / f"{turn}.jsonl", FIELDS) as ledger:
        rewards(panel, list(SERVED), one, looked, ledger, away, lambda count: None)
        assert not away.why and all(row["value"] is not None for row in ledger.rows.values()), away.why
        assert len(ledger.rows) == len({seen.sha for seen in looked.values()}) * len(SERVED)
    return time.perf_counter() - began


def _show(rounds: list[tuple[float, float]], pictures: int, load: float) -> int:
    plain, asked = (statistics.median(values) for values in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    table = Table("way", "seconds", "pictures/s", title=f"{pictures} pictures: one detector twice, and a judge")
    for name, seconds in (("plain batches, a thread each", plain), ("realbench", asked)):
        table.add_row(name, f"{seconds:.1f}", f"{pictures / seconds:.0f}")
    console = Console()
    console.print(table)
    console.print(f"realbench does {ratio:.2f} of the rate of plain batches, a thread for each reward (at least 0.9 is asked for)")
    out = ROOT / "bench" / "results" / "realbench.json"
    out.parent.mkdir(exist_ok=True)
    told = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count(), "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2), "pictures": pictures, "rounds": rounds, "ratio": ratio, "seconds": asked,
    }  # fmt: skip
    out.write_text(json.dumps(told, indent=1) + "\n")
    console.print(f"written to {out.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
