"""One run of bench/serving.py as tables and as answers to its targets: met or missed, with the figure."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

START, END = "<!-- serving: written by make bench-serving -->", "<!-- end of serving -->"
Result = dict[str, Any]
VERISM = ("Verism", "Verism, 2 processes")
BY_HAND = "FastAPI, best"  # a server of thirty lines that knows this benchmark's bodies and nothing else
# With 32 pictures in flight in all the model either waits for the callers between two batches of 32, or runs 16 while the other 16 travel:
# 16 / (8 + 1.5 x 16) ms of 32 / (8 + 1.5 x 32) ms.
IN_TURN = (16 / 32) / (32 / 56)


def values(result: Result, key: str, name: str, field: str) -> list[float]:
    rounds = result["cells"].get(key, {}).get(name, [])
    return [each[field] for each in rounds if each.get(field) is not None and not math.isnan(each[field])]


def middle(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def shown(numbers: list[float], digits: int = 0) -> str:
    """Median, and the range where there is one."""
    if not numbers:
        return "-"
    text = f"{statistics.median(numbers):.{digits}f}"
    low, high = (f"{edge:.{digits}f}" for edge in (min(numbers), max(numbers)))
    return text if low == high else f"{text} ({low}-{high})"


def ratio_to_best_peer(result: Result, key: str, field: str, without: tuple[str, ...] = ()) -> tuple[list[float], str]:
    """Verism over the best peer, round by round; the best peer is the one with the largest median."""
    cells = result["cells"].get(key, {})
    medians = {n: m for n in cells if n not in (*VERISM, *without) and (m := middle(values(result, key, n, field)))}
    if not medians or VERISM[0] not in cells:
        return [], ""
    best = max(medians, key=lambda name: medians[name])
    return [a / b for a, b in zip(values(result, key, VERISM[0], field), values(result, key, best, field), strict=False)], best


def adhoc(result: Result, model: str, name: str, field: str = "p50_ms") -> list[float]:
    return [each[field] for each in result["ad_hoc"].get(model, {}).get(name, []) if field in each]


def targets(result: Result) -> list[tuple[str, str, str]]:
    """(target, what was seen, met or missed or not measured)."""
    rows: list[tuple[str, str, str]] = []

    def row(target: str, numbers: list[float], met: bool, note: str = "", digits: int = 2) -> None:
        rows.append((target, f"{shown(numbers, digits)}{note}", ("met" if met else "missed") if numbers else "not measured"))

    def median_is(numbers: list[float], test: Any) -> bool:
        return bool(numbers) and bool(test(statistics.median(numbers)))

    def of_plain(model: str, shape: str, what: str, bound: float, of: float = 1.0) -> None:
        got = [each / of for each in values(result, f"{model} 512 {shape}", VERISM[0], "of_plain")]
        row(f"{model}: {bound:.2f} of {what} ({shape})", got, median_is(got, lambda m: m >= bound))

    of_plain("sleep", "8x4", "its rate in batches of 16 in turn: the most with 32 in flight", 0.95, IN_TURN)
    of_plain("sleep", "1x32", "the same", 0.95, IN_TURN)
    of_plain("sleep", "8x8", "its rate in batches of 32, 64 in flight", 0.95)
    of_plain("sleep", "8x4", "its rate in batches of 32, 32 in flight; 0.875 is the most", 0.95)
    of_plain("detector", "8x4", "its own batched rate, 32 in flight", 0.90)
    for shape, (without, whom) in itertools.product(("24x4", "8x4"), (((), "peer"), ((BY_HAND,), "peer not written by hand"))):
        got, best = ratio_to_best_peer(result, f"fast 512 {shape}", "images_per_second", without)
        row(f"fast: 2x the images/s of the best {whom} ({shape})", got, median_is(got, lambda m: m >= 2), best and f" of {best}")
    got, best = ratio_to_best_peer(result, "sleep 512 24x4", "images_per_second")
    most = (middle(result["plain"].get("sleep 512 24x4", [])) or 0) / (
        middle(values(result, "sleep 512 24x4", best, "images_per_second")) or 1
    )
    row("sleep: the same (24x4)", got, median_is(got, lambda m: m >= 2), best and f" of {best}; {most:.2f} is the most")
    for model in ("sleep", "detector"):
        own = adhoc(result, model, VERISM[0])
        others = {
            n: statistics.median(a) for n in result["ad_hoc"].get(model, {}) if n not in VERISM and (a := adhoc(result, model, n))
        }
        if own and others:
            best = min(others, key=lambda name: others[name])
            got = [a / b for a, b in zip(own, adhoc(result, model, best), strict=False)]
            row(
                f"{model}: ad hoc p50 under load at most half of the best peer's",
                got,
                median_is(got, lambda m: m <= 0.5),
                f" of {best}",
            )
    for shape in ("24x4", "8x4"):
        server, client = (values(result, f"sleep 512 {shape}", VERISM[0], f"{side}_cpu_ms") for side in ("server", "client"))
        total = [a + b for a, b in zip(server, client, strict=False)]
        row(f"client + server CPU at most 1.0 ms a 512x512 picture ({shape})", total, median_is(total, lambda m: m <= 1.0), " ms")
    lone = [values(result, "sleep 512 1x1", name, "p50_ms") for name in (VERISM[0], BY_HAND)]
    got = [a - b for a, b in zip(*lone, strict=False)]
    note = f" ms more; {shown(lone[0], 1)} ms in all" if got else ""
    row(
        f"a lone caller waits less than 2 ms longer than at {BY_HAND}, which has no queue",
        got,
        median_is(got, lambda m: m < 2),
        note,
        1,
    )
    health = result["alive"].get(VERISM[0], {}).get("loaded", {})
    quiet = result["alive"].get(VERISM[0], {}).get("idle", {})
    p99 = [health["p99_ms"]] if health else []
    note = f" ms; {quiet['p99_ms']:.1f} ms with no load" if quiet else ""
    row("/livez p99 under 10 ms during forward passes of 500 ms", p99, median_is(p99, lambda m: m < 10), note, 1)
    idle = [result["idle_percent"][VERISM[0]]] if VERISM[0] in result["idle_percent"] else []
    row("idle CPU under 1 %", idle, median_is(idle, lambda m: m < 1), " %")
    return rows


def against(result: Result) -> tuple[list[str], list[list[str]]]:
    """Verism's images/s over each peer's, round by round; for sleep, 32/56 ms over 24/44 ms is the most that batching groups of 24 gives."""
    keys = [key for key in result["cells"] if " 512 " in key]
    rows = []
    for name in (n for n in result["settings"] if n not in VERISM):
        pairs = [[values(result, key, n, "images_per_second") for n in (VERISM[0], name)] for key in keys]
        rows.append([name, *(shown([a / b for a, b in zip(*pair, strict=False) if b], 2) for pair in pairs)])
    return ["Verism's images/s over those of", *keys], rows


def overview(result: Result) -> tuple[list[str], list[list[str]]]:
    """One row for each contestant, the figures that decide, 512x512."""
    head = ["contestant", "images/s 8x4", "24x4", "1x32", "p50 ms 1x1", "ad hoc p50 ms", "CPU ms server", "client"]
    head += ["idle %", "health p99 ms", "detector images/s 8x4"]
    rows = []
    for name in result["settings"]:
        rate = [shown(values(result, f"sleep 512 {shape}", name, "images_per_second")) for shape in ("8x4", "24x4", "1x32")]
        lone = shown(values(result, "sleep 512 1x1", name, "p50_ms"), 1)
        cpu = [shown(values(result, "sleep 512 24x4", name, f"{side}_cpu_ms"), 2) for side in ("server", "client")]
        idle = result["idle_percent"].get(name)
        health = result["alive"].get(name, {}).get("loaded", {}).get("p99_ms")
        rows.append(
            [name, *rate, lone, shown(adhoc(result, "sleep", name)), *cpu]
            + ["-" if idle is None else f"{idle:.1f}", "-" if health is None else f"{health:.0f}"]
            + [shown(values(result, "detector 512 8x4", name, "images_per_second"))]
        )
    return head, rows


def show(result: Result) -> None:
    head, rows = overview(result)
    table = Table(*head, title=f"512x512, median (min-max); load {result['load_before'][0]} to {result['load_after'][0]}")
    for row in rows:
        table.add_row(*row)
    verdicts = Table("target", "seen", "")
    for target, seen, verdict in targets(result):
        verdicts.add_row(target, seen, {"met": "[green]met[/]", "missed": "[red]missed[/]"}.get(verdict, verdict))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    console.print(verdicts)
    for name, why in result["left_out"].items():
        console.print(f"left out: {name}: {why}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def section(result: Result) -> str:
    """Everything that was measured, for docs/benchmarks.md."""
    names = list(result["settings"])
    cells = []
    for key, by_name in result["cells"].items():
        model, side, shape = key.split()
        row = [model, side, shape.replace("x", " x "), shown(result["plain"][key])]
        for name in names:
            rounds = by_name.get(name, [])
            text = shown(values(result, key, name, "images_per_second"))
            p50, p99 = (middle(values(result, key, name, f)) for f in ("p50_ms", "p99_ms"))
            if p50 is not None and p99 is not None:
                text += f"; {p50:.0f}, {'>' if any(r.get('censored') for r in rounds) else ''}{p99:.0f} ms"
            row.append(text + (" (failures)" if any(r.get("failures") for r in rounds) else ""))
        cells.append(row)
    nice = f", at niceness {result['niceness']}" if result["niceness"] else ""
    load = f"load average {result['load_before'][0]} before and {result['load_after'][0]} after"
    parts = [
        "## Serving (`make bench-serving`)",
        f"{result['when'][:10]}, {result['cores']} shared CPU cores, {load}{nice}, {result['minutes']:.0f} minutes. The model `sleep` waits "
        f"8 + 1.5 n ms for n pictures, at most 32, `fast` 2 + 0.1 n ms; `detector` is `world/detector` on one thread. Clients and servers "
        "share the cores. Median over rounds, with the range; `8x4` is groups of 8 from 4 callers.",
        markdown(*overview(result)),
        "CPU is for groups of 24 from 4 callers; the client's counts encoding. Health is p99 while forward passes of 500 ms run, ad hoc one "
        "picture while four trainers send groups of 24. All encode within the clock but `FastAPI, as written`, whose PNGs were made before it. "
        "With `sleep` a server that sends each group of 24 to the model as it comes can have 0.95 of the rate of batches of 32: no other can "
        "have twice of it. `fast` is quicker than pictures come, and shows what the servers take.",
        markdown(["target", "seen", ""], [list(row) for row in targets(result)]),
        markdown(*against(result)),
        markdown(["contestant", "setting"], [[n, result["settings"][n]] for n in names]),
        "All cells: images/s; p50, p99 of a group. `>`: some groups were not answered within the cell's time and are not in it.",
        markdown(["model", "side", "group x callers", "plain batches", *names], cells),
    ]
    parts += [f"Left out: {name}: {why}" for name, why in result["left_out"].items()]
    return "\n\n".join(parts)


def write(result: Result, path: Path) -> None:
    """Replace what stands between the markers, or add it at the end."""
    text = path.read_text()
    block = f"{START}\n{section(result)}\n{END}"
    if START in text and END in text:
        text = text[: text.index(START)] + block + text[text.index(END) + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    path.write_text(text)
