"""Who writes the rewrites: a model in this process (a folder, an adapter, a run), or a service at a URL that has POST /rewrite."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from pydantic import ValidationError

from shared import rewrite_wire
from shared.rewriting import Fault, clean, fault, row_seed
from trainer.config import ConfigError, load
from trainer.scoring import NoService

MAX_ANSWER = 16 << 20
EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Written:
    """One rewrite: cleaned, with what the model `said`; a `fault` where it is of no use. `tokens` were drawn for it."""

    text: str
    said: str
    tokens: int
    logp: float
    ended: bool
    fault: Fault | None


class Writer(Protocol):
    """`most` tokens at most are drawn for a rewrite."""

    name: str
    most: int

    def write(self, prompt: str, n: int, seed: int, temperature: float, first: int = 0) -> list[Written]:
        """n rewrites from number `first` on, a function of prompt, seed and weights. ConfigError for a prompt that is too long."""


class LocalWriter:
    """A `RewriterPolicy`."""

    def __init__(self, policy: Any, name: str, most: int) -> None:
        self.policy, self.name, self.most = policy, name, most

    def write(self, prompt: str, n: int, seed: int, temperature: float, first: int = 0) -> list[Written]:
        seeds = [row_seed(seed, prompt, first + copy) for copy in range(n)]
        drawn = self.policy.sample([prompt] * n, seeds, temperature=temperature, max_new_tokens=self.most)
        tokens, logps = drawn.mask_BT.sum(1).tolist(), (drawn.logp_BT * drawn.mask_BT).sum(1).tolist()
        instruction, out = self.policy.chat.instruction, []
        for said, count, logp, ended in zip(drawn.texts, tokens, logps, drawn.ended_B.tolist(), strict=True):
            text = clean(said).text
            out.append(Written(text, said, count, logp, ended, fault(prompt, text, instruction)))
        return out


class RemoteWriter:
    """A service; its key is in VERISM_API_KEY. NoService where none answers."""

    def __init__(self, url: str, timeout_s: float = 120.0, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        key = os.environ.get("VERISM_API_KEY")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._http = httpx.Client(headers=headers, timeout=timeout_s, trust_env=False, transport=transport)
        info = self._read(rewrite_wire.RewriterInfo, "GET", "/v1/rewriter")
        self.name, self.most = f"{info.name} at {self.url}", int(info.max_new_tokens)

    def write(self, prompt: str, n: int, seed: int, temperature: float, first: int = 0) -> list[Written]:
        out: list[Written] = []
        for start in range(first, first + n, 64):
            asked = {
                "n": min(64, first + n - start),
                "seed": row_seed(seed, "", start) if start else seed,
                "temperature": temperature,
            }
            answer = self._read(rewrite_wire.RewriteAnswer, "POST", "/rewrite", rewrite_wire.pack([prompt], **asked))
            for one in answer.items[0].rewrites:
                if one.error is not None:
                    raise NoService(f"{self.url} could not rewrite the prompt: {one.error.title}")
                text = clean(one.said).text if one.fault else one.text
                out.append(Written(text, one.said, len(one.logps), one.logp, one.ended, one.fault))
        if len(out) != n or any(len(one.said) > 64 * 1024 or one.tokens > self.most for one in out):
            raise NoService(f"{self.url} answered other than asked: is it a rewriter of Verism?")
        return out

    def close(self) -> None:
        self._http.close()

    def _read(self, kind: Any, method: str, path: str, body: bytes | None = None) -> Any:
        start = "start one with `verism-serve CONFIG.yaml` that has `rewriter: {folder: ...}` (docs/rewriting.md)"
        said = bytearray()
        try:
            with self._http.stream(method, f"{self.url}{path}", content=body) as answer:
                for part in answer.iter_bytes():
                    said += part
                    if len(said) > MAX_ANSWER:
                        raise NoService(f"{self.url} answers with more than {MAX_ANSWER >> 20} MiB: is it a rewriter of Verism?")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoService(f"no rewriter answers at {self.url}: {start}") from error
        if answer.status_code == 422:
            raise ConfigError(_title(answer.status_code, said))
        if answer.status_code == 404:
            raise NoService(f"{self.url} serves no rewriter: {start}")
        if answer.status_code != 200:
            more = "; put its key into VERISM_API_KEY" if answer.status_code in (401, 403) else ""
            raise NoService(f"{self.url} refused: {_title(answer.status_code, said)}{more}")
        try:
            return kind.model_validate_json(bytes(said))
        except ValidationError as error:
            raise NoService(f"{self.url} answers, but not as a rewriter of Verism does: {start}") from error


def open_writer(where: str, *, device: str, most: int, base: str | None = None, instruction: str | None = None) -> Writer:
    """By URL, run folder, PEFT adapter folder, model folder, hub id or "smollm2". ConfigError and NoService say what to give."""
    if where.startswith(("http://", "https://")):
        if base is not None or instruction is not None:
            raise ConfigError("--base and --instruction belong to a model that loads here; a service has its own")
        return RemoteWriter(where)
    from trainer.language.policy import RewriterPolicy  # torch loads only once the command line is right

    path, options = _source(where, base)
    if instruction is not None:
        options["instruction"] = instruction
    try:
        return LocalWriter(RewriterPolicy.load(path, device=device, **options), where, most)
    except FileNotFoundError as error:
        raise ConfigError(f"--rewriter {where}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"--rewriter {where}: {error.errors(include_url=False)[0]['msg']}") from error


def _source(where: str, base: str | None) -> tuple[str, dict[str, Any]]:
    """What RewriterPolicy.load is told."""
    folder = Path(where).expanduser()
    if (folder / "config.yaml").is_file():
        return _of_run(folder)
    if (folder / "adapter_config.json").is_file():
        return _of_adapter(folder, base)
    if base is not None:
        raise ConfigError(
            f"--base is the model that an adapter is of, and {where} is no folder of an adapter (adapter_config.json)"
        )
    return where, {}


def _of_run(run: Path) -> tuple[str, dict[str, Any]]:
    language = getattr(load(str(run / "config.yaml")), "language", None)
    if language is None or language.policy is None:
        raise ConfigError(f"--rewriter {run}: this run trained pictures alone; give one of a recipe with `language:`")
    trained, options = run / "rewriter", language.policy.options()
    if not trained.is_dir():
        raise ConfigError(
            f"--rewriter {run}: the run has not given its rewriter yet ({trained}): let it end, or stop it with Ctrl-C"
        )
    if (trained / "config.json").is_file():  # all weights were trained
        return str(trained), {**options, "lora": None}
    return language.policy.path, {**options, "lora": {**(options.get("lora") or {}), **_lora(trained)}}


def _of_adapter(folder: Path, base: str | None) -> tuple[str, dict[str, Any]]:
    if base is None:
        named = str(_config(folder).get("base_model_name_or_path") or "")
        base = "smollm2" if named == EMBEDDED or Path(named).name.startswith("smollm2") else named
        if not base or (base != "smollm2" and not Path(base).is_dir()):
            raise ConfigError(
                f"--rewriter {folder}: an adapter of {named or 'an unnamed model'}; name the folder or hub id of that by --base"
            )
    return base, {"lora": _lora(folder)}


def _lora(folder: Path) -> dict[str, Any]:
    told = _config(folder)
    try:
        targets = told["target_modules"]
        more = {"targets": "all-linear" if targets == "all-linear" else sorted(map(str, targets))}
        return {"rank": int(told["r"]), "alpha": float(told["lora_alpha"]), "start": folder, **more}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--rewriter {folder}: adapter_config.json is not of a LoRA in PEFT's format") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rewriter {folder}: adapter_config.json cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f"--rewriter {folder}: adapter_config.json is no mapping")
    return told


def _title(status: int, said: bytearray) -> str:
    try:
        return str(json.loads(said)["title"])[:400]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def usable(written: Sequence[Written], prompt: str) -> tuple[list[Written], dict[str, int]]:
    """Those of use, none twice, and how many were left out, by why: a fault, or `again`."""
    seen, out, left = {prompt}, list[Written](), dict[str, int]()
    for one in written:
        why = one.fault or ("again" if one.text in seen else None)
        if why is None:
            seen.add(one.text)
            out.append(one)
        else:
            left[why] = left.get(why, 0) + 1
    return out, left
