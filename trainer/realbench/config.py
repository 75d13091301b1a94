"""What a bench measures, as a YAML file: `examples/realbench.yaml`. Unknown keys are errors."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from trainer.config import ConfigError, Frozen, _apply

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "examples" / "realbench.yaml"
PHOTOGRAPHS = "photographs"  # the name that they have among the contestants
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,59}$")]
Kind = Literal["generated", "altered", "photographs"]


class Drawing(Frozen):
    """How a diffusers model paints; null leaves its own default."""

    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    height: int | None = Field(default=None, ge=16)
    width: int | None = Field(default=None, ge=16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: int = Field(default=8, ge=1, description="pictures painted at once")
    options: dict[str, Any] = Field(default={}, description="more arguments of the pipeline's call, e.g. max_sequence_length: 512")


class Contestant(Frozen):
    """One of: a folder of pictures, a model in diffusers format (folder or hub id), a run of verism-train."""

    folder: Path | None = None
    model: str | None = None
    run: Path | None = None
    kind: Kind = Field(default="generated", description="photographs: true ones; altered: neither, left out where truth is asked")
    form: Literal["short", "long"] | None = Field(default=None, description="of the prompts it paints; default: the bench's")
    lora: Path | None = Field(default=None, description="of a model: a .safetensors file, or its folder")
    drawing: Drawing | None = Field(default=None, description="of a model; default: the bench's")
    step: int | None = Field(default=None, ge=0, description="of a run: which checkpoint; default: the best")
    trained_on: tuple[str, ...] = Field(default=(), description="rewards it learned from; of a run they are known")

    @model_validator(mode="after")
    def _one(self) -> "Contestant":
        if [self.folder, self.model, self.run].count(None) != 2:
            raise ValueError("give exactly one of folder, model and run")
        if self.model is None and (self.lora or self.drawing):
            raise ValueError("`lora` and `drawing` belong to a model; leave them away")
        if self.run is None and self.step is not None:
            raise ValueError("`step` belongs to a run; leave it away")
        return self


class Reward(Frozen):
    """A reward of a service. Without a URL it is one that `serve` starts."""

    url: str | None = None


class Judge(Frozen):
    """A vision-language model behind an OpenAI-compatible endpoint, vLLM's among them."""

    url: str = Field(description="e.g. http://localhost:8000/v1")
    model: str
    key_env: str | None = Field(default=None, description="the variable that holds the key; it is written nowhere")
    question: str | None = Field(default=None, description="instead of ours; it must ask for the same line of answer")
    workers: int = Field(default=8, ge=1, le=256, description="questions under way")
    timeout_s: float = Field(default=120.0, gt=0)
    tries: int = Field(default=5, ge=1)
    max_tokens: int = Field(default=400, ge=1)
    temperature: float = Field(default=0.0, ge=0)


class Arena(Frozen):
    """Who is more realistic, pair by pair in both orders: asked of a reward that compares, or of one of `judges`."""

    reward: str | None = None
    url: str | None = None
    judge: str | None = Field(default=None, description="a name under `judges`, asked which of two pictures is more realistic")
    pairs: int = Field(default=200, ge=1, description="most pairs between two contestants")

    @model_validator(mode="after")
    def _one(self) -> "Arena":
        if (self.reward is None) == (self.judge is None):
            raise ValueError("give either reward (of a service that compares) or judge (a name under judges)")
        return self


class Bootstrap(Frozen):
    rounds: int = Field(default=2000, ge=100, le=20_000)
    level: float = Field(default=0.95, gt=0.5, lt=1)


class Bench(Frozen):
    """`detectors` give P(photograph) or a realism score; `rewards` measure something else (alignment, preference)."""

    prompts: Path | None = Field(default=None, description="JSONL or text; null: pictures stand for themselves")
    form: Literal["short", "long"] = "short"
    photographs: Path | None = Field(default=None, description="folder of true photographs; null: no arena and no distance to them")
    contestants: dict[Name, Contestant] = {}
    drawing: Drawing = Drawing()
    serve: dict[str, Any] | None = Field(default=None, description="a service's configuration, started for the time of the bench")
    detectors: dict[str, Reward] = {}
    rewards: dict[str, Reward] = {}
    judges: dict[str, Judge] = {}
    arena: Arena | None = None
    monitors: Path | None = Field(default=None, description="folder of verism-train's held-out detectors")
    features: str | None = Field(
        default="efficientnet_lite0",
        description="where distances are taken: efficientnet_lite0, a monitors folder, or a vision model of transformers (folder or hub id)",
    )
    seed: int = 42
    pictures: int | None = Field(default=None, ge=2, description="at most so many of each contestant; null: all")
    bootstrap: Bootstrap = Bootstrap()
    timeout_s: float = Field(default=120.0, gt=0, description="how long a service may be away before its reward is given up")
    device: str = "auto"

    @model_validator(mode="after")
    def _fits(self) -> "Bench":
        names = [*self.detectors, *self.rewards, *self.judges]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is given twice among detectors, rewards and judges: rename one")
        if odd := [name for name in names if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) is None]:
            raise ValueError(f"{odd[0]!r} is no name: write letters, digits and _.-")
        if PHOTOGRAPHS in self.contestants:
            raise ValueError("`photographs` is the name of the photographs: give those as --photographs, or rename that contestant")
        if self.arena is not None and self.arena.judge is not None and self.arena.judge not in self.judges:
            raise ValueError(f"arena.judge: {self.arena.judge!r} is none of judges")
        open_ = [name for name, one in {**self.detectors, **self.rewards}.items() if one.url is None]
        if self.arena is not None and self.arena.reward is not None and self.arena.url is None:
            open_.append(self.arena.reward)
        served = (self.serve or {}).get("rewards") or {}
        if away := [name for name in open_ if name not in served]:
            raise ValueError(f"{away[0]!r} has no url, and `serve` starts no reward of that name: give one")
        return self


def load(path: Path | None, changes: list[str], **more: Any) -> Bench:
    """A bench by its file (default: the shipped one), `a.b=value` changes, and what the command line said; ConfigError in words."""
    path = DEFAULT if path is None else path
    if not path.is_file():
        raise ConfigError(f"no file {path}: give a bench like examples/realbench.yaml")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no bench: it should be a mapping of keys, like examples/realbench.yaml")
    for change in changes:
        _apply(raw, change)
    raw |= {key: value for key, value in more.items() if value is not None}
    return checked(raw, f"{path}: ")


def checked(raw: dict[str, Any], source: str = "") -> Bench:
    """ConfigError in words for what is no bench."""
    try:
        return Bench.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{source}{where}: {first['msg']}".replace(": : ", ": ").removeprefix(": ")) from error


def found(path: Path) -> Path:
    """A path as given, or within the repository, where the small world's are."""
    return path if path.exists() or path.is_absolute() else ROOT / path if (ROOT / path).exists() else path
