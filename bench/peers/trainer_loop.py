"""A training step over Stable Diffusion 3 as the published scripts take it (Flow-GRPO 2505.05470, RealGen 2512.00473), in our own words.

One prompt at a time and `micro_batch` pictures of it: the text is encoded for each of them anew (the empty one once, as there), every
picture walks its whole way from the noise, and guidance is a doubled batch in sampling and in training. When all pictures are there, the
rewards are asked, one service after another; then each micro-batch is learned from, step by step of the window, with the reference beside.
Same arithmetic as Verism's trainer: float32 steps, mean log-probabilities, x-KL without dt, AdamW on a LoRA through peft.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor

Service = Callable[[NDArray[np.uint8], Sequence[str]], Sequence[float]]
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Settings:
    """What a recipe says. `first` is the first of `window` trained steps; `group` pictures a prompt, in micro-batches of `micro_batch`."""

    folder: str
    side: int
    steps: int = 12
    first: int = 3
    window: int = 3
    noise_level: float = 0.7
    guidance: float = 4.5
    group: int = 9
    micro_batch: int = 3
    clip: float = 1e-4
    beta: float = 0.04
    lr: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    decay: float = 0.9
    rank: int = 32
    alpha: float = 64
    dtype: str = "float32"
    checkpointing: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass
class Trajectory:
    """B pictures of one prompt: `states_BT` (B, window + 1, C, H, W), `logp_BT` (B, window), the text's embeddings, the pictures."""

    prompt: str
    embeds: Tensor
    pooled: Tensor
    states_BT: Tensor
    logp_BT: Tensor
    images: NDArray[np.uint8]


class Loop:
    """The pipeline, a LoRA on its transformer, the optimiser. `step` is one training step."""

    def __init__(self, settings: Settings, services: Sequence[Service]) -> None:
        s, self.services = settings, services
        self.settings, self.device = s, torch.device(s.device)
        self.dtype = getattr(torch, s.dtype)
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            s.folder, dtype=self.dtype, local_files_only=True, text_encoder_3=None, tokenizer_3=None
        ).to(self.device)
        self.pipeline.vae.float()
        self.transformer = self.pipeline.transformer
        for module in (self.transformer, self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            module.requires_grad_(False).eval()
        torch.manual_seed(s.seed)
        targets = [f"attn.{layer}" for layer in LAYERS]
        self.transformer.add_adapter(LoraConfig(r=s.rank, lora_alpha=s.alpha, init_lora_weights="gaussian", target_modules=targets))
        if s.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.weights = {k: p for k, p in self.transformer.named_parameters() if p.requires_grad}
        for parameter in self.weights.values():
            parameter.data = parameter.data.float()
        self.average = {k: p.detach().clone() for k, p in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), s.lr, weight_decay=s.weight_decay)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(s.steps)
        self.sigmas = scheduler.sigmas.float().to(self.device)
        side = s.side // self.pipeline.vae_scale_factor
        self.shape = (self.transformer.config.in_channels, side, side)
        self.empty = self.encode("")

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return embeds, pooled

    def velocity(self, x: Tensor, i: int, embeds: Tensor, pooled: Tensor) -> Tensor:
        """Of step `i`, guided: the empty prompt's pass and the prompt's in one batch."""
        guidance, count = self.settings.guidance, len(x)
        if guidance != 1.0:
            x = torch.cat([x, x])
            embeds = torch.cat([self.empty[0].expand(count, -1, -1), embeds])
            pooled = torch.cat([self.empty[1].expand(count, -1), pooled])
        time_B = (self.sigmas[i] * 1000).expand(len(x))
        v = self.transformer(x.to(self.dtype), embeds, pooled, time_B, return_dict=False)[0].float()
        if guidance == 1.0:
            return v
        without, with_prompt = v.chunk(2)
        return without + guidance * (with_prompt - without)

    def stochastic(
        self, x: Tensor, v: Tensor, i: int, noise: Tensor | None, prev: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """(x', log-probability (B,), mean, g) of the Flow-SDE's step `i`, drawn with `noise` or judged at `prev`."""
        now, then = self.sigmas[i], self.sigmas[i + 1]
        dt = then - now
        g = self.settings.noise_level * torch.sqrt(now / (1 - (self.sigmas[1] if now == 1 else now)))
        mean = x * (1 + g**2 / (2 * now) * dt) + v * (1 + g**2 * (1 - now) / (2 * now)) * dt
        std = g * torch.sqrt(-dt)
        x_next = prev if noise is None else mean + std * noise
        assert x_next is not None
        logp = -((x_next.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * np.log(2 * np.pi)
        return x_next, logp.mean(dim=tuple(range(1, x.ndim))), mean, float(g)

    @torch.no_grad()
    def sample(self, prompt: str, noise_BN: Tensor) -> Trajectory:
        """Pictures from noise (B, 1 + window, C, H, W): the first one's, then each trained step's."""
        s = self.settings
        embeds, pooled = (part.expand(len(noise_BN), *part.shape[1:]) for part in self.encode(prompt))
        x, states, logps = noise_BN[:, 0], [], []
        for i in range(s.steps):
            v, column = self.velocity(x, i, embeds, pooled), i - s.first
            if 0 <= column < s.window:
                states.append(x)
                x, logp, *_ = self.stochastic(x, v, i, noise_BN[:, 1 + column], None)
                logps.append(logp)
                if column == s.window - 1:
                    states.append(x)
            else:
                x = x + (self.sigmas[i + 1] - self.sigmas[i]) * v
        vae = self.pipeline.vae
        pixels = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        images = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return Trajectory(prompt, embeds, pooled, torch.stack(states, 1), torch.stack(logps, 1), images)

    def loss(self, told: Trajectory, column: int, advantages_B: Tensor) -> Tensor:
        """(B,) clipped policy gradient and x-KL of one trained step."""
        s, i = self.settings, self.settings.first + column
        x, prev = told.states_BT[:, column], told.states_BT[:, column + 1]
        _, logp, mean, g = self.stochastic(x, self.velocity(x, i, told.embeds, told.pooled), i, None, prev)
        ratio = torch.exp(logp - told.logp_BT[:, column])
        policy = torch.maximum(-advantages_B * ratio, -advantages_B * ratio.clamp(1 - s.clip, 1 + s.clip))
        if s.beta == 0:
            return policy
        with torch.no_grad():
            self.transformer.disable_adapters()
            _, _, before, _ = self.stochastic(x, self.velocity(x, i, told.embeds, told.pooled), i, None, prev)
            self.transformer.enable_adapters()
        return policy + s.beta * ((mean - before) ** 2).flatten(1).mean(1) / (2 * g**2)

    def learn(self, told: Sequence[Trajectory], advantages: Sequence[Tensor]) -> float:
        """One optimiser step over all; the mean loss."""
        total, mean = sum(len(t.logp_BT) for t in told) * self.settings.window, 0.0
        for trajectory, advantages_B in zip(told, advantages, strict=True):
            for column in range(self.settings.window):
                loss = self.loss(trajectory, column, advantages_B.to(self.device)).sum() / total
                loss.backward()
                mean += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for k, average in self.average.items():
                average.lerp_(self.weights[k], 1 - self.settings.decay)
        return mean

    def step(self, prompts: Sequence[str], number: int) -> dict[str, Any]:
        """One training step; its seconds."""
        s, began = self.settings, time.perf_counter()
        chance = torch.Generator().manual_seed(number)
        told: list[Trajectory] = []
        for prompt in prompts:
            first = torch.randn((1, 1, *self.shape), generator=chance)  # a group starts from one noise
            for start in range(0, s.group, s.micro_batch):
                count = min(s.micro_batch, s.group - start)
                drawn = torch.randn((count, s.window, *self.shape), generator=chance)
                noise = torch.cat([first.expand(count, -1, -1, -1, -1), drawn], 1)
                told.append(self.sample(prompt, noise.to(self.device)))
        sampled = time.perf_counter()
        pictures, texts = np.concatenate([t.images for t in told]), [t.prompt for t in told for _ in t.images]
        rewards_RB = torch.tensor(
            [
                [
                    value
                    for n in range(0, len(texts), s.group)
                    for value in service(pictures[n : n + s.group], texts[n : n + s.group])
                ]
                for service in self.services
            ]
        )
        scored = time.perf_counter()
        sizes = [len(t.images) for t in told]
        loss = self.learn(told, list(advantages(rewards_RB, s.group).split(sizes)))
        end = time.perf_counter()
        seconds = {"sample": sampled - began, "wait": scored - sampled, "train": end - scored, "step": end - began}
        return {**seconds, "loss": loss}


def advantages(rewards_RB: Tensor, group: int) -> Tensor:
    """(B,) mean over rewards of z-scores inside groups of `group`, which stand in a row."""
    grouped = rewards_RB.double().unflatten(1, (-1, group))
    z = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, correction=0, keepdim=True) + 1e-4)
    return z.flatten(1).mean(0).clamp(-5, 5).float()
