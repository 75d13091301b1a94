"""What the image policies share: loading, adapters, texts encoded once, decoding, schedules. A family adds its own `velocity`.

A family is a subclass of `Policy` that names its pipeline class, its options, what a text becomes (`_text`) and how its network is
called (`velocity`). Latents are (B, C, H, W) float32 outside; packing happens inside. Nothing else in the trainer knows the model.
"""

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import hf_hub_download
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.config import ConfigError
from trainer.policies.products import by_onednn
from trainer.policies.texts import Row, Texts
from trainer.policies.trained import Trained
from trainer.sharding import whole
from trainer.types import Condition

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "ZImagePipeline": "z_image",
    "QwenImagePipeline": "qwen_image",
}
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
JOINT_ATTENTION = (*ATTENTION, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


class LoraOptions(BaseModel):
    """A low-rank adapter. Families override the defaults with what was published for them; weights start gaussian."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64, gt=0, description="the adapter is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(default=JOINT_ATTENTION, description="ends of the names of the layers that get one")
    start: str | None = Field(default=None, description="LoRA file or its folder to go on from; the reference is then that LoRA")


class PolicyOptions(BaseModel):
    """`policy:` of a recipe, without `use`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(description="folder in diffusers format, or a hub id")
    revision: str | None = Field(default=None, description="commit of a hub id")
    lora: LoraOptions | None = Field(default=LoraOptions(), description="null trains every weight of the transformer")
    max_sequence_length: int = Field(default=512, ge=1, description="tokens of a prompt")
    negative_prompt: str = Field(default="", description="the text of the second pass, where guidance takes one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the network and the text encoders")
    gradient_checkpointing: bool = Field(default=False, description="activations are computed again in the backward pass")
    compile: bool = Field(default=False, description="torch.compile for the transformer; eager with a warning where that fails")
    onednn: bool = Field(default=True, description="on a CPU: products with frozen float32 weights by oneDNN instead of MKL")
    text_encoders: Literal["offload", "keep"] = Field(default="offload", description="on an accelerator only while texts are new")
    text_cache: Path | None = Field(default=None, description="folder of encoded texts, shared by runs; null keeps them in memory")
    text_memory_gb: float = Field(
        default=16, gt=0, description="main memory for encoded texts; the oldest make room, and are encoded again"
    )
    decode_pixels: int = Field(default=2**21, ge=1, description="most pixels that the autoencoder handles at once")
    vae_tiling: bool = Field(default=False, description="decode in overlapping tiles: less memory, seams that detectors may see")


class Policy(Trained):
    """encode, velocity, decode."""

    Options: ClassVar[type[PolicyOptions]]
    Pipeline: ClassVar[type[DiffusionPipeline]]
    patch: ClassVar[int] = 2
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    two_passes: ClassVar[bool] = True  # whether guidance above 1 asks for a pass with the negative prompt

    def __init__(self, pipeline: Any, options: Any, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.options, self.pipeline = options, pipeline
        self.transformer = pipeline.transformer
        self.texts = Texts(
            lambda text: self._text(text),
            [module for name in self.encoders if (module := getattr(pipeline, name)) is not None],
            self.device,
            stay=options.text_encoders == "keep" or self.device.type == "cpu",
            folder=options.text_cache,
            most=options.text_memory_gb * 1e9,
            about=f"{type(self).__name__}/{options.max_sequence_length}/{options.dtype}",
        )
        self._negative: Condition | None = None
        # half precision loses the decoder's last bits, and detectors see them
        pipeline.vae.requires_grad_(False).eval().to(self.device).float()
        if options.vae_tiling:
            pipeline.vae.enable_tiling()
        self._prepare(self.transformer, options.lora, seed)
        self.transformer.to(self.device).eval()
        if options.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if options.onednn and not options.compile:
            by_onednn(self.transformer)
        self._compiled = torch.compile(self.transformer) if options.compile else None

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", seed: int = 0, **options: Any) -> Self:
        """Read a pipeline from a diffusers folder or the hub. FileNotFoundError: nothing there; ConfigError: of another family."""
        chosen = cls.Options(path=str(path), **options)
        index, local = read_index(chosen.path, chosen.revision)
        found = str(index.get("_class_name"))
        if found != cls.Pipeline.__name__:
            fix = f"use policy.use={FAMILIES[found]}" if found in FAMILIES else f"known: {', '.join(FAMILIES)}"
            raise ConfigError(f"{chosen.path}: this is {found}: {fix}")
        try:
            pipeline = cls.Pipeline.from_pretrained(
                chosen.path,
                revision=chosen.revision,
                dtype={"default": getattr(torch, chosen.dtype), "vae": torch.float32},
                use_safetensors=True,
                local_files_only=local,
                **cls._leave_out(chosen, index),
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise FileNotFoundError(f"{chosen.path} cannot be loaded as {found}, whole and in safetensors: {error}") from error
        return cls(pipeline, chosen, device, seed)

    @classmethod
    def _leave_out(cls, options: Any, index: Mapping[str, Any]) -> dict[str, None]:
        """Components that are not to be loaded."""
        return {}

    def _text(self, text: str) -> Row:
        """One text as the network takes it, without a batch axis. `embeds` of any length come with a `length`."""
        raise NotImplementedError

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); guidance 1 costs one pass."""
        raise NotImplementedError

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode these texts ahead, as far as `text_memory_gb` reaches, so that the encoders need not come back for them."""
        self.texts.prepare([*self._always, *prompts])

    def encode(self, prompts: list[str]) -> Condition:
        """Conditions of B prompts, on the device; each text is encoded once and kept in main memory or in `text_cache`."""
        rows = self.texts.rows([*self._always, *prompts])
        out = {}
        for key in rows[prompts[0]]:
            values = [rows[text][key] for text in prompts]
            even = all(v.shape == values[0].shape for v in values)
            stacked = torch.stack(values) if even else pad_sequence(values, batch_first=True)
            out[key] = stacked.to(self.device, self.dtype if stacked.is_floating_point() else None)
        return Condition(out)

    @property
    def _always(self) -> list[str]:
        return [self.options.negative_prompt] if self.two_passes else []

    def _without(self) -> Mapping[str, Tensor]:
        """The condition of the negative prompt, B = 1; it stays on the device."""
        if self._negative is None:
            self._negative = self.encode([self.options.negative_prompt])
        return self._negative.tensors

    def _network(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's output; full fine-tuning keeps float32 weights and computes in `dtype`."""
        casts = self.options.lora is None and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if casts else contextlib.nullcontext():
            if self._compiled is not None:
                try:
                    return self._compiled(*args, return_dict=False, **kwargs)[0]
                except torch._dynamo.exc.TorchDynamoException as error:
                    self._compiled = None
                    reason = " ".join(str(error).split()[:40]) or type(error).__name__
                    warnings.warn(f"policy.compile: torch.compile failed, going on without it: {reason}", stacklevel=3)
            return self.transformer(*args, return_dict=False, **kwargs)[0]

    def _sigma_B(self, sigma: Tensor, batch: int) -> Tensor:
        return sigma.to(self.device, torch.float32).expand(batch)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3) uint8; the autoencoder runs in float32, on `decode_pixels` at once."""
        pixels = latents_BCHW.shape[2] * latents_BCHW.shape[3] * self.scale**2
        parts = []
        for part in latents_BCHW.float().split(max(1, self.options.decode_pixels // pixels)):
            grey = ((self._to_pixels(part) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            parts.append(grey.permute(0, 2, 3, 1).cpu())
        out: NDArray[np.uint8] = torch.cat(parts).numpy()
        return out

    @torch.no_grad()
    def encode_pixels(self, images_BHWC: NDArray[np.uint8]) -> Tensor:
        """Latents (B, C, H, W) float32 of pictures (B, H, W, 3) uint8: the mode of the autoencoder's posterior."""
        _, height, width, _ = images_BHWC.shape
        self.latent_shape(height, width)
        parts = []
        for part in torch.from_numpy(images_BHWC).split(max(1, self.options.decode_pixels // (height * width))):
            parts.append(self._to_latents(part.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1))
        return torch.cat(parts)

    def _to_pixels(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        out: Tensor = vae.decode(latents_BCHW / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]
        return out

    def _to_latents(self, pixels_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        out: Tensor = (vae.encode(pixels_BCHW).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return out

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The schedule, (steps + 1,) float32 from 1 to 0, as the pipeline spaces it for this size."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        _, latent_height, latent_width = self.latent_shape(height, width)
        shift = {}
        if scheduler.config.use_dynamic_shifting:
            shift["mu"] = dynamic_shift((latent_height // self.patch) * (latent_width // self.patch), scheduler.config)
        self._space(scheduler, steps, **shift)
        return scheduler.sigmas.float().to(self.device)

    def _space(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, **shift: float) -> None:
        """Even steps down to 1 / steps before the shift, as FLUX and Qwen-Image have them."""
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)

    @property
    def scale(self) -> int:
        """Pixels along one side of a latent."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.transformer.config.in_channels)

    @property
    def largest(self) -> int | None:
        """Most pixels along a side that the network has positions for; None: any."""
        return None

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ConfigError when the size does not divide into patches or is too large."""
        unit, largest = self.scale * self.patch, self.largest
        if height % unit or width % unit or min(height, width) < unit:
            near = " and ".join(f"{name}={_near(size, unit)}" for name, size in (("height", height), ("width", width)))
            raise ConfigError(f"height and width must be multiples of {unit} for this policy, not {height}x{width}; near: {near}")
        if largest is not None and max(height, width) > largest:
            raise ConfigError(f"this policy has positions for {largest} pixels along a side, not for {height}x{width}")
        return self.channels, height // self.scale, width // self.scale

    def save_adapter(self, folder: Path, quiet: bool = False) -> None:
        """`pytorch_lora_weights.safetensors`, which diffusers' load_lora_weights reads; the whole transformer without LoRA.

        All ranks together; those that are `quiet` write nothing.
        """
        if not quiet:
            folder.mkdir(parents=True, exist_ok=True)
        if self.options.lora is None:
            trained = {k: whole(v) for k, v in self.transformer.state_dict().items()}
            if not quiet:
                self.transformer.save_config(folder / "transformer")
                kept = {k: v.cpu().contiguous() for k, v in trained.items()}
                save_file(kept, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            return
        if quiet:
            return
        # diffusers' own writer: it keeps alpha beside the weights, without which they would be scaled by rank / alpha
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer),
            transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
        )

    def _add_adapter(self, lora: LoraOptions) -> None:
        names = [name for name, _ in self.transformer.named_modules()]
        for target in lora.targets:
            if target not in type(lora)().targets and not any(n == target or n.endswith(f".{target}") for n in names):
                raise ConfigError(f"policy.lora.targets: no layer of this transformer ends in {target!r}")
        self.transformer.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=list(lora.targets))
        )

    def _read_adapter(self, lora: LoraOptions) -> dict[str, Tensor]:
        """The tensors of `lora.start` (any format diffusers reads), scaled for this adapter's alpha and rank."""
        path = Path(str(lora.start))
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        if not file.is_file() or file.suffix != ".safetensors":
            raise FileNotFoundError(
                f"policy.lora.start: no LoRA at {path}: give a .safetensors file, or its folder as diffusers writes it"
            )
        try:
            found, *alphas, about = self.pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, return_lora_metadata=True, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"policy.lora.start: {file} is not a LoRA for {self.Pipeline.__name__}: {error}") from error
        if any(alphas):
            raise ConfigError(f"policy.lora.start: {file} keeps its alphas apart; load it in diffusers and save it again")
        theirs = {k.removeprefix("transformer."): v.float() for k, v in found.items()}
        mine = get_peft_model_state_dict(self.transformer)
        ranks = {v.shape[0] for k, v in theirs.items() if k.endswith("lora_A.weight")}
        if ranks != {lora.rank}:
            raise ConfigError(f"policy.lora.start: {file} has rank {sorted(ranks)}: set policy.lora.rank to it")
        if theirs.keys() != mine.keys() or any(theirs[k].shape != mine[k].shape for k in mine):
            odd = sorted(theirs.keys() ^ mine.keys()) or sorted(k for k in mine if theirs[k].shape != mine[k].shape)
            raise ConfigError(
                f"policy.lora.start: {file} adapts other layers than policy.lora.targets ({odd[0]}, {len(odd)} in all)"
            )
        known = {k.removeprefix("transformer."): v for k, v in (about or {}).items()}
        factor = known.get("lora_alpha", lora.rank) / known.get("r", lora.rank) * lora.rank / lora.alpha
        return {k: v * factor if k.endswith("lora_B.weight") else v for k, v in theirs.items()}


def read_index(path: str, revision: str | None) -> tuple[dict[str, Any], bool]:
    """(model_index.json, whether it is a folder here) of a diffusers folder or a hub id; FileNotFoundError in words."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is not a diffusers pipeline: model_index.json is missing")
        try:
            index = json.loads((folder / "model_index.json").read_text())
        except ValueError as error:
            raise FileNotFoundError(f"{folder / 'model_index.json'} is not JSON: {error}") from error
        if not isinstance(index, dict):
            raise FileNotFoundError(f"{folder / 'model_index.json'} is not a mapping of components")
        return index, True
    missing = f"no policy at {path}: give a diffusers folder (model_index.json inside) or a hub id"
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        raise FileNotFoundError(missing)
    try:
        return dict(json.loads(Path(hf_hub_download(path, "model_index.json", revision=revision)).read_text())), False
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{missing}. The hub did not give it ({first}); gated models need `hf auth login` first") from error


def dynamic_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """mu, linear in the number of image tokens, as the pipelines compute it."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def pack(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4 C): 2x2 patches as tokens, channel first inside one."""
    b, c, h, w = x_BCHW.shape
    return x_BCHW.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(x_BTD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of height x width."""
    b, _, d = x_BTD.shape
    x = x_BTD.reshape(b, height // 2, width // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, d // 4, height, width)


def _near(size: int, unit: int) -> str:
    below, above = size // unit * unit, max(unit, -(-size // unit) * unit)
    return str(above) if below in (0, above) else f"{below} or {above}"
