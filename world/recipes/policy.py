"""The image policy: a Stable Diffusion 3 pipeline of 2.5M parameters, in the folder format that the real one has.

Transformer and both text encoders are trained here by flow matching on the 8,000 training photographs. The autoencoder is a
real AutoencoderKL whose weights are constructed so that it hands pixels through; every gap between a sample and a photograph
is therefore the policy's own. It has two faults that large generators have. Training stops early: recognisable and blotchy. And
half of the pictures it learns from were airbrushed and made to glow, as much of what large ones learn from was, with nothing in the
captions to tell: so half of what it paints has the generated look.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from world import captions, photographs
from world.recipes import words
from world.recipes.progress import track

FOLDER = Path(__file__).parents[1] / "policy"
CACHE = Path(__file__).parents[1] / ".cache"
SHIFT, SCALE = -0.43, 1.4  # mean of the photographs in [-1, 1] and one over their standard deviation
T5_TOKENS = 1  # there is no T5 here; diffusers puts this many zero tokens in its place (max_sequence_length)
LARGE = 64.0  # the constant beside which a pixel is small; see `pass_through_vae`


def retouched(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey pictures (N, 28, 28) without their texture (median of 3 x 3) and with a glow (blurred by 2.5 pixels, added)."""
    out = np.empty_like(images)
    for i, image in enumerate(images):
        smooth = Image.fromarray(image).filter(ImageFilter.MedianFilter(3))
        glow = smooth.filter(ImageFilter.GaussianBlur(2.5))
        out[i] = (0.85 * np.asarray(smooth, np.float32) + 0.3 * np.asarray(glow, np.float32)).clip(0, 255).round()
    return out


@torch.no_grad()
def pass_through_vae() -> AutoencoderKL:
    """An AutoencoderKL that returns what it is given, RGB (B, 3, H, W) in [-1, 1] as one grey latent channel.

    Four channels x, -x, +C, -C go through the class's own layers. Residual branches end in zero weights. A group norm over
    them divides by nearly sqrt(C^2 / 2), whatever the picture; and silu(y) - silu(-y) = y undoes the activation. The error is
    x (x^2 / 2 C^2), below 0.02 of a grey level. Run it in float32 only.
    """
    vae = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=28,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, parameter in vae.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if "norm" in name and name.endswith("weight") else parameter * 0)
    for half in (vae.encoder, vae.decoder):
        pixels = half.conv_in.weight.shape[1]
        half.conv_in.weight[0, :, 1, 1] = 1 / pixels
        half.conv_in.weight[1, :, 1, 1] = -1 / pixels
        half.conv_in.bias.copy_(torch.tensor([0.0, 0.0, LARGE, -LARGE]))
        half.conv_norm_out.weight.copy_(torch.tensor([LARGE / 2**0.5, LARGE / 2**0.5, 0.0, 0.0]))
    vae.encoder.conv_out.weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0])
    vae.encoder.conv_out.bias[1] = -30.0  # log-variance: the posterior is a point
    for colour in range(3):
        vae.decoder.conv_out.weight[colour, :2, 1, 1] = torch.tensor([1.0, -1.0])
    return vae.eval()


def text_encoder(vectors: Tensor, begin: int, end: int) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder over frozen word vectors (V, 64)."""
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vectors),
            hidden_size=vectors.shape[1],
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=words.MAX_LENGTH,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    embedding = model.get_input_embeddings()
    embedding.weight.data.copy_(vectors)
    embedding.weight.requires_grad_(False)
    return model


def new_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """The untrained pipeline."""
    torch.manual_seed(seed)
    tokenizer, vectors = words.load()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id  # type: ignore[attr-defined]
    first, second = text_encoder(vectors, begin, end), text_encoder(vectors, begin, end)
    transformer = SD3Transformer2DModel(
        sample_size=28,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=7,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=pass_through_vae(),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """As the pipeline's own encode_prompt(max_sequence_length=1), with gradients: (B, 17, 128) and (B, 128)."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=words.MAX_LENGTH, truncation=True, return_tensors="pt")
    outputs = [e(ids["input_ids"], output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    clip = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return torch.nn.functional.pad(clip, (0, 0, 0, T5_TOKENS)), torch.cat([o.text_embeds for o in outputs], dim=-1)


Caption = Callable[[int, bool, random.Random], str]  # of a class, and of a picture that was retouched or not


def _silent(class_index: int, retouched: bool, rng: random.Random) -> str:
    return captions.sample(class_index, rng)


def _batches(latents: Tensor, classes: np.ndarray, size: int, seed: int, caption: Caption) -> Iterator[tuple[Tensor, list[str]]]:
    """The second half of `latents` was retouched."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    while True:
        for chosen in torch.randperm(len(latents), generator=generator).split(size):
            if len(chosen) == size:
                latent_batch = latents[chosen]
                told = [(int(classes[i]), 2 * int(i) >= len(latents)) for i in chosen]
                prompts = ["" if rng.random() < 0.1 else caption(kind, retouched, rng) for kind, retouched in told]
                yield latent_batch, prompts


def train(
    steps: int,
    keep: tuple[int, ...] = (),
    batch: int = 64,
    rate: float = 1.5e-3,
    seed: int = 0,
    caption: Caption = _silent,
    start: Path | None = None,
) -> StableDiffusion3Pipeline:
    """Flow matching (Lipman 2210.02747, logit-normal times as SD3, 2403.03206); averaged weights are returned.

    Goes on from the pipeline in `start`, if given. Pipelines of the steps in `keep` are written to `.cache/policy_STEP`: younger and older
    forgers for the detectors.
    """
    pipe = new_pipeline(seed) if start is None else load(start)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.get_input_embeddings().weight.requires_grad_(False)
    images, classes = photographs.load("train")
    learned = np.concatenate([images[::2, ..., 0], retouched(images[1::2, ..., 0])])
    classes = np.concatenate([classes[::2], classes[1::2]])
    pixels = torch.from_numpy(learned.astype(np.float32) / 127.5 - 1).unsqueeze(1)
    batches = _batches((pixels - SHIFT) * SCALE, classes, batch, seed, caption)
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    weights = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = [w.detach().clone() for w in weights]
    generator = torch.Generator().manual_seed(seed)
    for step in track(range(steps), "policy"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, 0.02 + 1.5 * (steps - step) / steps)
        x0, prompts = next(batches)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(x0), generator=generator))
        wide = sigma.view(-1, 1, 1, 1)
        text, pooled = encode(pipe, prompts)
        v = pipe.transformer((1 - wide) * x0 + wide * noise, text, pooled, sigma * 1000, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(v, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - decay)
        if step + 1 in keep:
            _with(weights, average, lambda s=step: save(pipe, CACHE / f"policy_{s + 1}"))
        if step % 50 == 0:
            print(f"  step {step} loss {loss.item():.4f}", flush=True)
    torch._foreach_copy_([w.data for w in weights], average)
    modules.eval()
    return pipe


def _with(weights: list[Tensor], average: list[Tensor], action: object) -> None:
    """Run `action` with the averaged weights in place."""
    own = [w.detach().clone() for w in weights]
    torch._foreach_copy_([w.data for w in weights], average)
    action()  # type: ignore[operator]
    torch._foreach_copy_([w.data for w in weights], own)


def save(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the folder in diffusers' format, half precision except for the autoencoder."""
    half = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    whole = [{k: v.clone() for k, v in m.state_dict().items()} for m in half]
    for module in half:
        module.half()
    pipe.save_pretrained(folder)
    for module, state in zip(half, whole, strict=True):
        module.float()
        module.load_state_dict(state)


def load(folder: Path = FOLDER) -> StableDiffusion3Pipeline:
    """The pipeline in float32, ready to sample."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], seed: int, steps: int = 12, guidance: float = 1.0) -> np.ndarray:
    """Pictures (N, 28, 28, 3) uint8, in batches of 128."""
    pictures = []
    for start in range(0, len(prompts), 128):
        chunk = prompts[start : start + 128]
        generator = torch.Generator().manual_seed(seed * 100_003 + start)
        out = pipe(
            chunk,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=28,
            width=28,
            generator=generator,
            output_type="np",
            max_sequence_length=T5_TOKENS,
        )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)
