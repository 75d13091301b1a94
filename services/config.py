"""What one process serves, as YAML; every key is checked before anything loads.

    port: 8000
    rewards:
      detector: {use: detector, folder: world/detector}
      realism: {use: realism, parts: {detector: {weight: 1}}}

Paths are relative to the directory that the command runs in, or, where they do not exist there, to the repository.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.auth import KeyOptions, Scope
from shared.image import MAX_PIXELS, MAX_REQUEST_PIXELS

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

    def options(self) -> dict[str, Any]:
        return {k: _resolved(v) if k in PATHS else v for k, v in (self.model_extra or {}).items()}


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
    rewards: dict[str, RewardConfig] = Field(min_length=1)
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
        near = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, 1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(model.model_fields)}")
    return f"{where or 'file'}: {first['msg']}"
