"""Two commands: serve rewards, and score pictures.

verism-serve examples/serve/world.yaml
verism-score picture.jpg --prompt "a photo of a bag"
"""

import argparse
import asyncio
import gc
import importlib
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services import config as configuration
from services import logs
from services.config import ROOT, ServiceConfig
from shared import wire
from shared.errors import BadImage, VerismError
from shared.image import from_file
from shared.schema import ItemAnswer, Score, ScoreItem, ScoreRequest

DEFAULT = "examples/serve/world.yaml"


def _config(path: str) -> ServiceConfig:
    file = Path(path)
    return configuration.load(file if file.exists() else ROOT / path)


def _threads(config: ServiceConfig) -> None:
    """Before torch is imported: how many cores one forward pass takes, and that waiting threads sleep."""
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _fail(message: str) -> int:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}")
    return 2


def serve(argv: Sequence[str] | None = None) -> int:
    """`verism-serve CONFIG.yaml`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="verism-serve",
        description="Serve rewards over HTTP: POST /score (and /rewrite), GET /v1/rewards, /livez, /readyz, /metrics, /docs.",
        epilog=f"Try it: verism-serve {DEFAULT}, then curl -F image=@photo.jpg http://localhost:8000/score",
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help=f"YAML file (default {DEFAULT}); see examples/serve/")
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 for every interface (default: the file's, else loopback)")
    parser.add_argument("--port", type=int, help="port (default: the file's, else 8000)")
    parser.add_argument("--check", action="store_true", help="load everything, say what would be served, and leave")
    arguments = parser.parse_args(argv)
    logs.configure()
    console = Console(stderr=True)
    try:
        config = _config(arguments.config)
        changes = {k: v for k, v in (("host", arguments.host), ("port", arguments.port)) if v is not None}
        config = ServiceConfig.model_validate({**config.model_dump(), **changes})
        _threads(config)
        if not arguments.check:
            _port_is_free(config.host, config.port)
        app_module = importlib.import_module("services.app")
        app = app_module.create_app(config)
        admin = None
        if config.admin is not None:
            _port_is_free(config.admin.host, config.admin.port)
            admin = importlib.import_module("services.admin").create_admin(app.state.verism, {"admin": config.admin.key()})
    except (ValueError, VerismError) as error:
        return _fail(str(error))
    table = Table("reward", "version", "range", "needs", "what it is")
    for served in app.state.verism.rewards.values():
        info = served.info
        low_high = "" if info.range is None else f"{info.range[0]:g} to {info.range[1]:g}"
        table.add_row(info.name, str(info.version), low_high, ", ".join(info.needs), info.description)
    if app.state.verism.rewriter is not None:
        info = app.state.verism.rewriter.info
        table.add_row("rewriter", "", "", "prompt", f"POST /rewrite by {info.name}, up to {info.max_new_tokens} tokens")
    console.print(table)
    if arguments.check:
        return 0
    shown = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::") else config.host
    console.print(f"listening on http://{shown}:{config.port}   try: curl -F image=@photo.jpg http://{shown}:{config.port}/score")
    gc.collect()
    gc.freeze()  # what is loaded stays: to look through it again would take the collector a tenth of a second
    status: int = importlib.import_module("services.server").serve(app, config, admin)
    return status


def _port_is_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); another --port may be free") from error


def score(argv: Sequence[str] | None = None) -> int:
    """`verism-score IMAGE...`; 0 when every picture was scored, 1 when some were not, 2 when nothing could be tried."""
    parser = argparse.ArgumentParser(
        prog="verism-score",
        description="Score pictures and print a table: in this process, or by a running service with --url.",
        epilog='Example: verism-score photo.jpg painting.png --prompt "a photo of a bag"',
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP or QOI files")
    parser.add_argument("--url", help="a running service, e.g. http://localhost:8000; without it rewards load here")
    parser.add_argument(
        "--api-key", default=os.environ.get("VERISM_API_KEY"), help="for --url (default: the variable VERISM_API_KEY)"
    )
    parser.add_argument("--prompt", help="what the pictures should show, for rewards that need it")
    parser.add_argument("--rewards", help="names separated by commas (default: the configuration's)")
    parser.add_argument("--config", default=DEFAULT, help=f"configuration to score with when there is no --url (default {DEFAULT})")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON instead of a table")
    arguments = parser.parse_args(argv)
    items: list[ScoreItem] = []
    failed: dict[str, str] = {}
    for path in arguments.images:
        try:
            image = from_file(path.read_bytes())
            items.append(ScoreItem(id=str(path)[-256:], prompt=arguments.prompt, image=image))
        except BadImage as error:
            failed[str(path)] = error.message
        except OSError as error:
            failed[str(path)] = f"cannot be read: {error.strerror}"
    names = [n.strip() for n in arguments.rewards.split(",")] if arguments.rewards else None
    answers: list[ItemAnswer] = []
    try:
        if items:
            ask = _remote if arguments.url else _local
            answers = ask(arguments, items, names)
    except (ValueError, VerismError) as error:
        return _fail(str(error))
    if arguments.json:
        print(json.dumps({"items": [a.model_dump(mode="json") for a in answers], "failed": failed}, indent=1))
    else:
        _print(answers, failed)
    bad = bool(failed) or any(s.value is None for a in answers for s in a.scores.values())
    return 1 if bad else 0


def _requests(items: list[ScoreItem], names: list[str] | None) -> list[ScoreRequest]:
    return [
        ScoreRequest(request_id=f"cli-{start}", rewards=names, items=items[start : start + 32])
        for start in range(0, len(items), 32)
    ]


def _remote(arguments: argparse.Namespace, items: list[ScoreItem], names: list[str] | None) -> list[ItemAnswer]:
    import httpx

    headers = {"content-type": wire.MSGPACK}
    if arguments.api_key:
        headers["authorization"] = f"Bearer {arguments.api_key}"
    answers: list[ItemAnswer] = []
    for request in _requests(items, names):
        try:
            content, url = wire.pack_request(request), f"{arguments.url.rstrip('/')}/score"
            answer = httpx.post(url, content=content, headers=headers, timeout=120, trust_env=False)
        except httpx.HTTPError as error:
            raise ValueError(
                f"no service answers at {arguments.url}: start one with `verism-serve`, or leave --url away"
            ) from error
        if answer.status_code != 200:
            raise ValueError(f"{arguments.url} refused: {_why(answer.status_code, answer.content)}")
        answers += wire.parse_answer(answer.content, wire.MSGPACK).items
    return answers


def _why(status: int, content: bytes) -> str:
    """What a service, or a proxy before it, said; for a key that is missing or wrong, how to give one."""
    try:
        title = str(json.loads(content)["title"])
    except (ValueError, KeyError, TypeError):
        title = f"HTTP {status}"
    return title + ("; give one by --api-key, or in the variable VERISM_API_KEY" if status in (401, 403) else "")


def _local(arguments: argparse.Namespace, items: list[ScoreItem], names: list[str] | None) -> list[ItemAnswer]:
    """The same app, without a socket: rewards that were not asked for are not loaded."""
    import httpx

    config = _config(arguments.config)
    names = names or config.default or list(config.rewards)
    unknown = [n for n in names if n not in config.rewards]
    if unknown:
        raise ValueError(f"unknown reward {unknown[0]!r}; {arguments.config} has: {', '.join(config.rewards)}")
    parts = {p for n in names for p in (config.rewards[n].model_extra or {}).get("parts", {})}
    kept = {n: r.model_copy(update={"fit": None}) for n, r in config.rewards.items() if n in {*names, *parts}}  # as configured
    _threads(config)
    with Console(stderr=True).status("loading " + ", ".join(kept)):
        config = config.model_copy(update={"rewards": kept, "rewriter": None, "default": names, "keys": {}})
        app = importlib.import_module("services.app").create_app(config, tuned=False)
    logging.getLogger("verism").setLevel(logging.WARNING)

    async def run() -> list[ItemAnswer]:
        answers: list[ItemAnswer] = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://local") as client:
            for request in _requests(items, names):
                answer = await client.post("/score", content=wire.pack_request(request), headers={"content-type": wire.MSGPACK})
                if answer.status_code != 200:
                    raise ValueError(str(answer.json().get("title")))
                answers += wire.parse_answer(answer.content, wire.MSGPACK).items
        return answers

    return asyncio.run(run())


def _cell(score: Score) -> str:
    if score.value is None:
        return f"[red]{escape(score.error.title if score.error else score.status)}[/]"
    return f"{score.value:.4f}" + (" [yellow]?[/]" if score.in_domain is False else "")


def _print(answers: list[ItemAnswer], failed: dict[str, str]) -> None:
    console = Console()
    names = list(dict.fromkeys(name for answer in answers for name in answer.scores))
    table = Table("picture", *names)
    for answer in answers:
        table.add_row(escape(answer.id), *(_cell(answer.scores[name]) for name in names))
    for path, why in failed.items():
        table.add_row(escape(path), f"[red]{escape(why)}[/]", *[""] * max(0, len(names) - 1))
    console.print(table)
    if any(s.in_domain is False for a in answers for s in a.scores.values()):
        console.print("[yellow]?[/] outside what the detector was fitted on: this number says little about such a picture")


if __name__ == "__main__":
    sys.exit(serve())
