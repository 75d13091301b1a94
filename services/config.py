"""What one process serves, as YAML; every key is checked before anything loads.

    port: 8000
    rewards:
      detector: {use: detector, folder: world/detector}
      realism: {use: realism, parts: {detector: {weight: 1}}}

Paths are relative to the directory that the command runs in, or, where they do not exist there, to the repository.
"""

import difflib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.auth import KeyOptions, Scope
from services.fitting.options import FitOptions, OptimOptions, ReplayOptions
from shared.image import MAX_PIXELS, MAX_REQUEST_PIXELS
from shared.rewriting import INSTRUCTION

ROOT = Path(__file__).resolve().parents[1]
PATHS = (
    "folder",
    "path",
    "weights",
    "head",
    "template",
    "quality_template",
    "rubrics",
    "processor",
    "tokenizer",
    "against",
)  # options that may name a file of the repository
_HUB = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]


class RewardConfig(BaseModel):
    """`use` names a registered reward (or module:Class); every other key is an option of that reward."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    batch_cap: int | None = Field(
        default=None, ge=1, le=4096, description="most pictures in one forward pass; default: found at warm-up"
    )
    batch_most: int = Field(default=64, ge=1, le=4096, description="the largest batch that the warm-up tries")
    cache_items: int = Field(
        default=4096,
        ge=0,
        description="scores kept, so that the same picture is not scored twice; 0 for none, and none of rewards that sample",
    )
    fit: FitOptions | None = Field(default=None, description="refit it while it serves (docs/refitting.md)")

    def options(self) -> dict[str, Any]:
        return {k: _resolved(v) if k in PATHS else v for k, v in (self.model_extra or {}).items()}


class RewriterConfig(BaseModel):
    """`rewriter:` of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path | None = Field(default=None, description="local folder with config.json, tokenizer, chat template, safetensors")
    model: str | None = Field(default=None, description="hub id (needs `revision`)")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$", description="commit of the hub model, 40 hex digits")
    adapter: Path | None = Field(default=None, description="folder of a PEFT LoRA; it is merged into the weights")
    instruction: str | Path | None = Field(
        default=None,
        description="what the model is told, or a .txt file of it; default: instruction.txt of the adapter or the folder, else Verism's own",
    )
    name: str | None = Field(default=None, description="default: the folder's name, or the hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="longest rewrite")
    max_prompt_tokens: int = Field(
        default=512, ge=8, description="longest prompt with the instruction; at most what the model reads"
    )
    batch: int = Field(default=16, ge=1, le=1024, description="rewrites in one forward pass, of whichever callers")
    max_waiting: int = Field(default=1024, ge=1, description="rewrites that may wait; above it the answer is 429")
    licence: str = "see the model card"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.model is None):
            raise ValueError("give either `folder` (a local model) or `model` (hub id) and `revision`")
        if self.model is not None and self.revision is None:
            raise ValueError("a hub `model` needs its `revision`: a commit of 40 hex digits, or rewrites change when the hub does")
        return self

    @field_validator("folder", "adapter", "instruction")
    @classmethod
    def _of_the_repository(cls, value: Any) -> Any:
        return type(value)(_resolved(str(value))) if isinstance(value, Path) or str(value).endswith(".txt") else value

    def place(self) -> Path:
        """The folder, fetched from the hub where `model` names one."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(self.model), revision=self.revision, allow_patterns=_HUB))
        except (OSError, ValueError) as error:
            kind = type(error).__name__
            raise ValueError(f"{self.model} cannot be had from the hub ({kind}); download it, and give `folder`") from error

    def told(self, place: Path) -> str:
        """The instruction; FileNotFoundError for a file that is not there."""
        if self.instruction is not None and not str(self.instruction).endswith(".txt"):
            return str(self.instruction).strip()
        beside = [folder / "instruction.txt" for folder in (self.adapter, place) if folder is not None]
        file = Path(self.instruction) if self.instruction is not None else next((one for one in beside if one.is_file()), None)
        if file is None:
            return INSTRUCTION
        if not file.is_file():
            raise FileNotFoundError(f"no instruction at {file}; give a text, or a .txt file that is there")
        return file.read_text().strip()


class AdminConfig(KeyOptions):
    """The admin listener, with a key of its own."""

    host: str = "127.0.0.1"
    port: int = Field(default=8900, ge=1, le=65535)
    scopes: tuple[Scope, ...] = ("admin",)

    def key(self) -> KeyOptions:
        return KeyOptions(env=self.env, sha256=self.sha256, scopes=self.scopes)


class ServiceConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads of one forward pass; default: found at warm-up")
    decode_threads: int = Field(default=2, ge=1)
    rewards: dict[str, RewardConfig] = {}
    rewriter: RewriterConfig | None = Field(default=None, description="a language model for POST /rewrite")
    default: list[str] | None = Field(default=None, description="rewards asked for when a request names none; default: all")
    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_pixels: int = Field(default=MAX_PIXELS, le=MAX_PIXELS, ge=256)
    max_request_pixels: int = Field(default=MAX_REQUEST_PIXELS, ge=256)
    max_waiting_items: int = Field(default=2048, ge=1)
    max_waiting_bytes: int = Field(default=512 * 1024 * 1024, ge=1024)
    body_timeout_s: float = Field(default=30.0, gt=0)
    header_timeout_s: float = Field(default=10.0, gt=0)
    max_connections: int = Field(default=512, ge=1)
    drain_s: float = Field(default=30.0, gt=0)
    keys: dict[str, KeyOptions] = Field(default={}, description="API keys; none leaves the service open")
    admin: AdminConfig | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.rewards and self.rewriter is None:
            raise ValueError("there is nothing to serve: name `rewards`, or a `rewriter`")
        return self

    @model_validator(mode="after")
    def _refits_are_asked_for(self) -> Self:
        fitted = {name: one.fit.place(name).absolute() for name, one in self.rewards.items() if one.fit is not None}
        if fitted and self.admin is None:
            raise ValueError(
                f"rewards.{next(iter(fitted))}.fit: refits are asked for on the admin listener; add "
                "`admin: {port: 8900, env: VERISM_ADMIN_KEY}`"
            )
        if len(set(fitted.values())) < len(fitted):
            raise ValueError("fit.folder: two rewards name one folder; give each its own")
        return self

    @property
    def caches(self) -> bool:
        """Whether any reward keeps scores."""
        return any(reward.cache_items for reward in self.rewards.values())


def _resolved(value: Any) -> Any:
    """A path, relative to here or else to the repository."""
    if isinstance(value, str) and not Path(value).exists() and (ROOT / value).exists():
        return str(ROOT / value)
    return value


def load(path: Path) -> ServiceConfig:
    """Read and check; ValueError says which key is wrong and which was probably meant."""
    if not path.is_file():
        known = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples" / "serve").glob("*.yaml"))
        raise ValueError(f"no configuration at {path}; there are {', '.join(known)}")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    try:
        config = ServiceConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, ServiceConfig)}") from error
    unknown = set(config.default or []) - set(config.rewards)
    if unknown:
        raise ValueError(f"{path}: default names {sorted(unknown)[0]!r}, which is not under rewards: {', '.join(config.rewards)}")
    return config


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong, in words; a misspelt key comes with the nearest known one."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        known = RewriterConfig.model_fields if first["loc"][0] == "rewriter" and len(first["loc"]) > 1 else model.model_fields
        if "fit" in first["loc"][:-1]:
            inner: dict[str, type[BaseModel]] = {"optim": OptimOptions, "replay": ReplayOptions}
            known = inner.get(str(first["loc"][-2]), FitOptions).model_fields
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
    return f"{where or 'file'}: {first['msg']}"
