"""Tiny random pipelines of every family, built with no download: for tests, and to try a recipe on any machine.

    python -m lightning_dfd.tiny cogvideox outputs/tiny_cogvideox
    lightning fit -c recipes/cogvideox_dfd.yaml --model.teacher outputs/tiny_cogvideox ...

They are genuine diffusers pipelines in all but size and training: what they make is noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text_tokenizer(words: Iterable[str] = ()) -> T5Tokenizer:
    """A T5 tokenizer of `words`, with single letters for everything else."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(set(words))]
    pieces += [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def text_encoder(config_class: Any, model_class: Any, vocabulary: int) -> Any:
    """A random two-layer T5 or UMT5 encoder with 32 features."""
    config = config_class(vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return model_class(config).eval()


def cogvideox_scheduler(snr_shift: float) -> CogVideoXDDIMScheduler:
    """The scheduler of the published pipelines; the 2B's SNR shift is 3, the 5B's 1."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift,
        timestep_spacing="trailing",
    )


def cogvideox(rotary: bool = False) -> CogVideoXPipeline:
    """9 frames of 32x32 by default; sine positions and SNR shift 3 as in the 2B, or rotary and 1 as in the 5B."""
    tokenizer = text_tokenizer()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=32,
            sample_width=32,
            scaling_factor=0.7,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            sample_height=4,
            sample_width=4,
            sample_frames=9,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=rotary,
        ),
        scheduler=cogvideox_scheduler(snr_shift=1.0 if rotary else 3.0),
    )


def wan() -> WanPipeline:
    """Wan 2.1 text-to-video with Euler's scheduler at shift 5."""
    tokenizer = text_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(UMT5Config, UMT5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.0, 2.0],
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def ltx() -> LTXPipeline:
    """LTX-Video with the published compression of 8 and 32, and its scheduler, which shifts by the number of tokens."""
    tokenizer = text_tokenizer()
    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.8, 1.0, 2.0]))
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=vae,
        transformer=LTXVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=32,
            caption_channels=32,
            num_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            base_shift=0.95,
            max_shift=2.05,
            shift_terminal=0.1,
            use_dynamic_shifting=True,
        ),
    )


def mochi() -> MochiPipeline:
    """Mochi 1 with the 12 channels of latents and the compression of 6 and 8 that its pipeline takes for granted."""
    tokenizer = text_tokenizer()
    return MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=12,
            pooled_projection_dim=32,
            text_embed_dim=32,
            time_embed_dim=8,
            num_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


def template_tokenizer() -> T5Tokenizer:
    """A tokenizer by which Hunyuan's template has the 95 tokens before the prompt that its pipeline cuts off."""
    words = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")[0].split()
    spelt = {"relationships", "transitions", "background", "used"}  # letter by letter: 57 words are 57 + 38 tokens
    return text_tokenizer(set(words) - spelt)


def hunyuan() -> HunyuanVideoPipeline:
    """HunyuanVideo with its two text encoders, embedded guidance and shift 7."""
    tokenizer = template_tokenizer()
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    end = len(pieces) - 1
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=LlamaModel(
            LlamaConfig(**small, vocab_size=len(tokenizer), num_hidden_layers=4, pad_token_id=0)
        ).eval(),
        tokenizer_2=CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]),
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(
                **small,
                vocab_size=end + 1,
                num_hidden_layers=2,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        ).eval(),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        transformer=HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


TINY: dict[str, Callable[[], Any]] = {
    "cogvideox": cogvideox,
    "cogvideox_5b": lambda: cogvideox(rotary=True),
    "hunyuan": hunyuan,
    "ltx": ltx,
    "mochi": mochi,
    "wan": wan,
}


def save_tiny(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Save the tiny pipeline `name` of TINY, with weights drawn from `seed`; returns the folder.

    The last layers, which some families start at zero, are drawn as well, so that every output depends on every
    input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = TINY[name]()
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    pipe.save_pretrained(folder)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(TINY))
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"saved {save_tiny(args.name, args.folder, args.seed)}")


if __name__ == "__main__":
    main()
