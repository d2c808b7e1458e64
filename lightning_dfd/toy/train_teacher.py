"""Train the toy teacher: a genuine, small CogVideoXPipeline of the toy world, with no download.

    python -m lightning_dfd.toy.train_teacher --output teacher_folder

First the video VAE, then its decoder once more on noisy latents, then the transformer on the latents
(v-prediction with CogVideoX's own zero-terminal-SNR schedule, empty captions for a tenth of the batch so that
guidance works), then the judgement: 50-step guided samples are decoded and compared with the world. What the shipped
weights measure at stands in docs/toy.md.

The text encoder is a random T5 that stays as it was drawn: its word vectors are distinct, which is all
that twelve captions need.

Weights are stored in half precision and loaded as float32. One thread is the fastest way on a small CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from lightning_dfd.diffusion.noise import schedule_from_config
from lightning_dfd.files import respect_umask
from lightning_dfd.testing.tiny.cogvideox import cogvideox_scheduler
from lightning_dfd.testing.tiny.parts import text_encoder, text_tokenizer
from lightning_dfd.toy import world
from lightning_dfd.toy.judge_teacher import TEXT_LENGTH, broken_bounds, judge_teacher, table_of

LATENT_CHANNELS = 8
PATCH = 2  # latents to a side of a token
SPATIAL, TEMPORAL = 4, 4  # compression of the VAE
SNR_SHIFT = 8.0  # above CogVideoX-2B's 3, as clips are told apart at very low signal-to-noise ratios here


def build_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=TEMPORAL,
        sample_height=world.SIZE,
        sample_width=world.SIZE,
    )


def build_transformer() -> Any:
    """The published architecture, small. Positions are spread, as 4 x 4 x 3 of them hardly differ at the scale meant
    for 45 x 30 x 13, and the gates of the residual branches start open instead of near 0."""
    transformer: Any = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        patch_size=PATCH,
        text_embed_dim=32,
        sample_height=world.SIZE // SPATIAL,
        sample_width=world.SIZE // SPATIAL,
        sample_frames=world.FRAMES,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=0.1,
        temporal_interpolation_scale=0.1,
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            for gate in norm.linear.bias.data.chunk(6)[2::3]:  # shift, scale, gate of video, then of text
                gate.fill_(1.0)
    return transformer


def draw_loose_scene(rng: np.random.Generator) -> world.Scene:
    """A scene with shapes of any size, place and strength: what the VAE is trained on, so that it knows no grid, and
    shows colours that are stronger than the world's."""
    shape, colour = str(rng.choice(world.SHAPES)), str(rng.choice(list(world.COLOURS)))
    direction, background = str(rng.choice(list(world.STEP))), str(rng.choice(list(world.BACKGROUND_LEVEL)))
    size, strength = float(rng.uniform(8.5, 11.5)), float(rng.uniform(0.2, 1.4))
    travel, turn = float(rng.uniform(0.0, 14.0)), float(rng.uniform(-9.5, 9.5))
    scene = world.Scene(shape, colour, strength, (colour, shape), direction, background, 0.0, 0.0, travel, turn, size)
    low = world.HALF_WIDTH[shape] * size  # the centre's distance from the frame's edge, at least
    x, y = (
        float(rng.uniform(low - min(0.0, way), world.SIZE - low - max(0.0, way)))
        for way in map(float, world.path_of(scene, 1.0))
    )
    return replace(scene, x=x, y=y)


def draw_loose_clips(n: int, seed: int) -> NDArray[np.uint8]:
    """`n` clips of loose scenes, uint8 [N, F, H, W, C]."""
    rng = np.random.default_rng(seed)
    return np.stack([world.render(draw_loose_scene(rng)) for _ in range(n)])


def draw_clips(n: int, seed: int) -> NDArray[np.uint8]:
    """`n` clips of the world, uint8 [N, F, H, W, C]."""
    return world.draw_clips(n, seed)[1]


def to_model(clips: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, F, H, W, C] to float [N, C, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to a hundredth."""
    return min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_vae(
    vae: Any, draw: Callable[[int, int], NDArray[np.uint8]], steps: int, lr: float, noise: float = 0.0, batch: int = 8
) -> None:
    """Train what is trainable of `vae` on clips from `draw(batch, step)`, with up to `noise` of noise on the latents
    (in their standard deviations)."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    bar = tqdm(range(steps), desc="VAE" if noise == 0 else "its decoder", mininterval=5)
    for step in bar:
        clips = to_model(draw(batch, step))
        posterior = vae.encode(clips).latent_dist
        latents = posterior.sample()
        strength = noise * torch.rand(batch, 1, 1, 1, 1) * latents.detach().std()
        decoded = vae.decode(latents + strength * torch.randn_like(latents)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        error = F.mse_loss(decoded, clips)
        loss = F.l1_loss(decoded, clips) + 4 * error + 3e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{-10 * math.log10(error.item() / 4):.1f} dB", kl=f"{kl.item():.2f}")


@torch.no_grad()
def encode_clips(vae: Any, clips: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents [N, F, C, H, W], unscaled, and captions of `clips` clips.

    Their scenes are spread evenly (a Sobol sequence), so that the shares of so few are nearer to the world's than
    those of scenes drawn at random.
    """
    draws = torch.quasirandom.SobolEngine(9, scramble=True, seed=seed).draw(clips).double().numpy()
    scenes = [world.scene_of(row) for row in draws]
    latents = []
    for start in tqdm(range(0, clips, 32), desc="latents", mininterval=5):
        pixels = np.stack([world.render(scene) for scene in scenes[start : start + 32]])
        latents.append(vae.encode(to_model(pixels)).latent_dist.mode())
    return torch.cat(latents).permute(0, 2, 1, 3, 4), [scene.caption for scene in scenes]


def train_transformer(
    pipe: Any, latents: Tensor, captions: list[str], steps: int, output: Path, batch: int = 32
) -> None:
    """Train `pipe.transformer` on scaled latents [N, F, C, H, W]; it ends as its own moving average.

    The average so far is saved in `output` every thousand steps, so that an early end leaves a teacher.
    """
    schedule = schedule_from_config(dict(pipe.scheduler.config))
    texts = ("", *world.CAPTIONS)
    with torch.no_grad():
        embeddings = pipe.encode_prompt(list(texts), None, False, max_sequence_length=TEXT_LENGTH)[0]
    rows = torch.tensor([texts.index(text) for text in captions])
    model, average = pipe.transformer, copy.deepcopy(pipe.transformer).requires_grad_(False)
    # Muon lowered the loss faster than AdamW here; it is for matrices inside the network alone.
    matrices = [p for p in model.transformer_blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]
    rates = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: cosine(step, steps)) for opt in optimizers]
    generator = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="transformer", mininterval=5)
    running = 0.0
    for step in bar:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[pick]
        text = torch.where(torch.rand(batch, generator=generator) < 0.1, 0, rows[pick])
        # more often at little noise than evenly: there the shapes become sharp
        t = torch.floor(1000 * torch.rand(batch, generator=generator) ** 1.5) / 1000
        eps = torch.randn(x0.shape, generator=generator)
        x_t = schedule.add_noise(x0, eps, t)
        target = schedule.from_x0(x0, x_t, t)
        predicted = model(x_t, embeddings[text], schedule.timestep(t), return_dict=False)[0]
        loss = F.mse_loss(predicted, target)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += 0.02 * (loss.item() - running) if step else loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % 1000 == 0:
            copy.deepcopy(average).half().save_pretrained(output / "transformer")
    model.load_state_dict(average.state_dict())


def save_teacher(pipe: Any, output: Path) -> None:
    """Half-precision weights; the text encoder, a few kilobytes, stays float32, as it decides the call's dtype."""
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(output)
    respect_umask(output)
    pipe.vae.float()
    pipe.transformer.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--clips", type=int, default=6144, help="training clips")
    parser.add_argument("--judge", type=int, default=600, help="clips sampled in each way at the end")
    parser.add_argument("--keep-vae", action="store_true", help="take the VAE that is in OUTPUT already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = text_tokenizer(word for text in world.CAPTIONS for word in text.split())
    pipe: Any = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)).requires_grad_(False),
        vae=build_vae(),
        transformer=build_transformer(),
        scheduler=cogvideox_scheduler(SNR_SHIFT),
    )
    if args.keep_vae:
        pipe.vae = AutoencoderKLCogVideoX.from_pretrained(args.output, subfolder="vae", torch_dtype=torch.float32)
    else:
        train_vae(pipe.vae, draw_loose_clips, args.vae_steps, lr=2e-3)
        # Noise that a transformer of this size leaves should not show in pixels; the latents stay as they are.
        pipe.vae.encoder.requires_grad_(False)
        train_vae(pipe.vae, draw_clips, args.decoder_steps, lr=1e-3, noise=0.05)
    pipe.vae.eval()
    latents, captions = encode_clips(pipe.vae, args.clips, seed=1)
    pipe.vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    save_teacher(pipe, args.output)
    train_transformer(pipe, latents * pipe.vae.config.scaling_factor, captions, args.steps, args.output)
    save_teacher(pipe, args.output)
    # what was saved is judged: half the precision, and a pipeline that reads the VAE's scaling factor when it is made
    reports = judge_teacher(args.output, args.judge)
    print(table_of(reports))
    for said in broken_bounds(reports):
        print(f"does not hold: {said}")


if __name__ == "__main__":
    main()
