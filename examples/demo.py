"""The whole system on real photographs: services, scores over HTTP, a training run, the trap beside it, a report.

    make demo                       or python -m examples.demo
    make demo ARGS="--fresh"        again from nothing; without it a finished demo says so and an interrupted one goes on

Everything lands in runs/demo/: world/ and naive/ are run folders, *.log what the processes said. Ctrl-C stops every process.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from shared.client import RewardClientSync
from world import photographs

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("detector", "judge", "alignment")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
READY_SECONDS = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 1 a part failed, 130 interrupted."""
    parser = argparse.ArgumentParser("demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="remove the demo's earlier runs first")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="change both recipes, e.g. steps=4")
    args = parser.parse_args(argv)
    console, out = Console(), args.out.resolve()
    started = time.monotonic()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if (out / "finished.json").exists():
        console.print(f"The demo has run: {out / 'world' / 'report.html'}. Again from nothing: make demo ARGS=--fresh")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are stopped then too
    try:
        with ExitStack() as stack:
            console.rule("1. services")
            urls = {name: stack.enter_context(service(name, out, console)) for name in SERVICES}
            _wait(urls, out, console)
            console.rule("2. scores over HTTP")
            show_scores(urls, out, console)
            console.rule("3. training with recipe world: feature detector, judge and alignment")
            train("world", out, [*(f"rewards.{name}.url={url}" for name, url in urls.items()), *args.set])
            console.rule("4. the trap: a frozen detector alone, until the alarm")
            train("naive", out, [f"rewards.detector.url={urls['detector']}", *args.set])
    except KeyboardInterrupt:
        console.print("interrupted; the services are stopped. `make demo` goes on where it was.")
        return 130
    except (RuntimeError, httpx.HTTPError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.rule("5. before and after")
    compare(out, console)
    from trainer.report import write_report  # matplotlib loads only now

    report = write_report(out / "world", [out / "naive"])
    (out / "finished.json").write_text(json.dumps({"seconds": time.monotonic() - started}) + "\n")
    console.print(f"report: {report}\nrun folders: {out / 'world'}, {out / 'naive'}", soft_wrap=True)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 0


@contextmanager
def service(name: str, out: Path, console: Console) -> Iterator[str]:
    """`verism-serve examples/serve/NAME.yaml` as a process of its own on a free port; ends with the block. Yields its URL."""
    port = _free_port()
    command = [_program("verism-serve"), str(ROOT / "examples" / "serve" / f"{name}.yaml"), "--port", str(port)]
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        console.print(f"verism-serve examples/serve/{name}.yaml --port {port}")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def show_scores(urls: Mapping[str, str], out: Path, console: Console) -> None:
    """Photographs and pictures of the untrained policy, scored over HTTP; and the same by curl."""
    images, labels = photographs.load("test")
    names = {line["class"]: line["class_name"] for line in _lines(ROOT / "world" / "prompts" / "train.jsonl")}
    real = images[:4]
    prompts = [f"a photo of a {names[int(label)]}" for label in labels[:4]]
    noise = np.random.default_rng(0).integers(0, 256, real[:1].shape, dtype=np.uint8)
    rows = [("photograph", image, text) for image, text in zip(real, prompts, strict=True)]
    rows.append(("noise", noise[0], prompts[0]))
    rows += [("generated", image, text) for image, text in _painted(prompts)]
    with RewardClientSync(dict(urls)) as client:
        scores = client.score([image for _, image, _ in rows], [text for *_, text in rows])
    table = Table("picture", "prompt", *scores.rewards)
    for n, (kind, _, text) in enumerate(rows):
        table.add_row(kind, text, *(f"{value:.3f}" for value in scores.values_RB[:, n]))
    console.print(table)
    picture = out / "photograph.png"
    Image.fromarray(real[0]).save(picture)
    console.print(f"the same by curl:\n  curl -F image=@{picture} {urls['detector']}/score", markup=False, soft_wrap=True)


def train(recipe: str, out: Path, overrides: Sequence[str]) -> None:
    """`verism-train RECIPE` to its end; goes on where an earlier demo was interrupted. RuntimeError when it fails."""
    folder = out / recipe
    if (folder / "done.json").exists():
        return
    shown = ["verism-train", recipe, *overrides, "--resume", "--run-dir", str(folder)]
    print("$ " + " ".join(shown), flush=True)
    command = [_program("verism-train"), *shown[1:]]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}  # the services rest while the trainer works
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT | threads)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C reaches the child too: it saves and leaves by itself
        process.send_signal(signal.SIGTERM) if process.poll() is None else None
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise RuntimeError(f"verism-train {recipe} ended with status {status}; its words stand above, the services' in {out}/*.log")


def compare(out: Path, console: Console) -> None:
    """First and best evaluation of the good run, first and last of the trap."""
    table = Table("measure", "before", "recipe world, best", "recipe naive, at the end", title="lower distance is better")
    world = [line for line in _lines(out / "world" / "metrics.jsonl") if line["kind"] == "eval"]
    naive = [line for line in _lines(out / "naive" / "metrics.jsonl") if line["kind"] == "eval"]
    best = json.loads((out / "world" / "done.json").read_text())["best_step"]
    chosen = next(line for line in world if line["step"] == best)
    trained = [f"reward/{name}/mean" for name in SERVICES]
    for key in (*trained, "heldout_cnn", "heldout_spectrum", "distance", "class_hit"):
        cells = [line.get(key) for line in (world[0], chosen, naive[-1])]
        table.add_row(key, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    console.print(table)
    for name in ("world", "naive"):
        done = json.loads((out / name / "done.json").read_text())
        console.print(f"{name}: {done['reason']} (best step {done['best_step']})", markup=False, soft_wrap=True)


def _wait(urls: Mapping[str, str], out: Path, console: Console) -> None:
    """Until every service is ready. RuntimeError names the log of one that is not."""
    deadline = time.monotonic() + READY_SECONDS
    for name, url in urls.items():
        while True:
            try:
                if httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} at {url} is not ready after {READY_SECONDS:g} s; see {out / f'{name}.log'}")
            time.sleep(0.2)
        console.print(f"{name}: ready at {url}")


def _painted(prompts: Sequence[str]) -> list[tuple[np.ndarray, str]]:
    """One picture of the untrained policy for each prompt."""
    from trainer import loop
    from trainer.config import load
    from trainer.sampling.rollout import sample
    from trainer.types import Prompt

    config = load("world")
    policy = loop.load_policy(config)
    s = config.sampling
    rollout = sample(
        policy,
        [Prompt(n, text) for n, text in enumerate(prompts)],
        list(range(len(prompts))),
        sigmas=policy.sigmas(config.eval.steps, s.height, s.width),
        shape=policy.latent_shape(s.height, s.width),
        window=None,
    )
    return list(zip(rollout.images_BHWC, prompts, strict=True))


def _program(name: str) -> str:
    """The console script beside this Python."""
    return str(Path(sys.executable).parent / name)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
