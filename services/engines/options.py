"""What every engine is told: which model, from where, and how it runs."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROOT = Path(__file__).resolve().parents[2]
COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
# What chat templates are made of, for models whose own list is not at hand.
_MARKS = r"<\|[^|\s]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:image|img|video|pad|bos|eos|unk)>"


class VllmOptions(BaseModel):
    """Of the vLLM server. Without a `url` one is started here, and started again when it dies."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    python: Path = Field(default=ROOT / ".venv-vllm" / "bin" / "python", description="interpreter that has vLLM: `make vllm`")
    port: int | None = Field(default=None, ge=1, le=65535, description="loopback port of the server; default: any free one")
    memory: float | None = Field(default=None, gt=0, le=1, description="share of a GPU's memory; default: vLLM's")
    cpu_cache_gib: int = Field(default=1, ge=1, description="on a CPU: memory for attention's cache")
    max_num_seqs: int = Field(default=64, ge=1, description="most questions in one forward pass")
    images: int = Field(default=4, ge=1, description="most pictures in one question")
    eager: bool = Field(default=False, description="neither compiled nor captured: starts sooner, runs slower")
    extra: tuple[str, ...] = Field(default=(), description="further arguments of `vllm serve`")
    environment: dict[str, str] = Field(default={}, description="further environment variables of the server")
    start_s: float = Field(default=900.0, gt=0, description="longest start-up")
    log: Path | None = Field(default=None, description="file for what the server says; default: one under the temporary folder")


class EngineOptions(BaseModel):
    """`folder`, or `model` with its `revision`, for both engines; `url` for a vLLM (or another OpenAI-compatible) server that runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="in this process, or a vLLM server")
    folder: Path | None = Field(default=None, description="local folder with config.json, tokenizer, processor, safetensors")
    model: str | None = Field(
        default=None, description="hub id (needs `revision`), or with `url` the name that the server gives it"
    )
    revision: str | None = Field(default=None, description="commit of the hub model, 40 hex digits: scores stay comparable")
    url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$", description="a running server, e.g. http://gpu1:8000")
    dialect: Literal["vllm", "openai"] = Field(default="vllm", description="openai: a server that knows none of vLLM's own fields")
    key_env: str | None = Field(default=None, description="environment variable with the server's API key")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    context: int | None = Field(
        default=None, ge=16, description="longest question in tokens, pictures included; default: the model's"
    )
    processor: dict[str, Any] = Field(
        default={}, description="settings of the model's processor, e.g. {size: {shortest_edge: 3136, longest_edge: 401408}}"
    )
    batch: int = Field(default=16, ge=1, description="transformers: questions in one forward pass")
    concurrent: int = Field(default=64, ge=1, le=1024, description="vllm: questions on their way at once")
    timeout_s: float = Field(default=120.0, gt=0, description="vllm: longest wait for one answer")
    vllm: VllmOptions = VllmOptions()

    @model_validator(mode="after")
    def _one_source(self) -> "EngineOptions":
        if self.url is not None:
            if self.engine != "vllm":
                raise ValueError("a `url` belongs to `engine: vllm`")
            if self.model is None or self.folder is not None or self.revision is not None:
                raise ValueError(
                    "with a `url`, give `model`: the name under which that server has the model (GET /v1/models lists it)"
                )
            if self.vllm != VllmOptions():
                raise ValueError("with a `url` no server is started: leave `vllm` away")
            return self
        if self.dialect != "vllm" or self.key_env is not None:
            raise ValueError("`dialect` and `key_env` are for a server at a `url`; without one, leave them away")
        if (self.folder is None) == (self.model is None):
            raise ValueError("give either `folder` (local), `model` (hub id), or `url` and `model` (a server that runs)")
        if self.model is not None and (self.revision is None or not COMMIT.fullmatch(self.revision)):
            raise ValueError("a hub `model` needs its `revision`: a commit of 40 hex digits, or scores change when the hub does")
        return self

    def place(self) -> Path:
        """The folder, fetched from the hub where `model` names one. FileNotFoundError when it is not there."""
        if self.folder is not None:
            if not (self.folder / "config.json").is_file():
                raise FileNotFoundError(f"{self.folder} holds no config.json; give the folder of a vision-language model")
            return self.folder
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(self.model), revision=self.revision, allow_patterns=_HUB))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.model} cannot be had from the hub ({type(error).__name__}); download it, and give `folder`"
            ) from error


def digest(folder: Path) -> str:
    """SHA-256 of the folder's safetensors: of one file as sha256sum prints it, of several of their digests' lines in order."""
    sums = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            sums.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if not sums:
        raise FileNotFoundError(f"{folder} holds no safetensors; nothing else is read: convert the weights first")
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def reserved(folder: Path | None) -> re.Pattern[str]:
    """Finds tokens that belong to the chat template: in a prompt they would end the question or stand for a picture."""
    tokens: Sequence[str] = ()
    if folder is not None and (folder / "tokenizer.json").is_file():
        listed = json.loads((folder / "tokenizer.json").read_text()).get("added_tokens", [])
        tokens = [str(token["content"]) for token in listed if str(token.get("content", "")).strip()]
    return re.compile("|".join([*(re.escape(token) for token in tokens), _MARKS]))
