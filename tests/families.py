"""Every family through its real classes: a tiny pipeline with random weights, and one call of it for some samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import tiny_sd3
from torch import Tensor

TEXT = 6


@dataclass(frozen=True)
class Family:
    """A pipeline and how to call it.

    Attributes:
        build: makes the pipeline.
        arguments: samples' own inputs, each with a first dimension of 3.
        shared: what all samples have in common.
        tokens: image tokens of a pass.
        text_tokens: text tokens of a pass.
        guided: options with which its pipeline runs guidance, where it can; most do so without being told.
        unguided: options with which it does not.
    """

    build: Callable[[], Any]
    arguments: dict[str, Tensor]
    shared: dict[str, Any]
    tokens: int
    text_tokens: int
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})

    @torch.no_grad()
    def __call__(self, pipe: Any, *samples: int, steps: int = 6, **options: Any) -> Tensor:
        """Latents of some of the three samples."""
        chosen = {name: value[list(samples)] for name, value in self.arguments.items()}
        if "class_labels" in chosen:
            chosen["class_labels"] = chosen["class_labels"].tolist()
        seeds = [torch.Generator().manual_seed(sample) for sample in samples]
        options = self.shared | {"generator": seeds, "num_inference_steps": steps, "output_type": "latent"} | options
        known = inspect.signature(type(pipe).__call__).parameters
        output = pipe(**chosen, **{name: value for name, value in options.items() if name in known})
        return torch.as_tensor(output[0])


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def small_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=channels, norm_num_groups=1, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=small_vae(1), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def _flux2() -> Any:
    return Flux2Pipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _pixart() -> Any:
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=4, attention_head_dim=8,
            num_attention_heads=4, cross_attention_dim=32, caption_channels=32, use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(), vae=small_vae(4), text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _dit() -> Any:
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=4, attention_head_dim=8,
            num_attention_heads=4, num_embeds_ada_norm=1000,
        ),
        scheduler=DDIMScheduler(), vae=small_vae(4),
    )  # fmt: skip


def _qwen_image() -> Any:
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            num_layers=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, in_channels=16,
            out_channels=4, axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _wan() -> Any:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=32,
            freq_dim=16, ffn_dim=64, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _sana() -> Any:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_attention_heads=4, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
        ),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _captions() -> dict[str, Tensor]:
    everything = torch.ones(3, TEXT, dtype=torch.int64)
    everything[1, 4:] = 0  # a shorter caption
    return {
        "prompt_embeds": _drawn(TEXT, 32),
        "prompt_attention_mask": everything,
        "negative_prompt_embeds": _drawn(TEXT, 32, seed=1),
        "negative_prompt_attention_mask": torch.ones_like(everything),
    }


_WITHOUT_PROMPTS = {"guidance_scale": 3.0, "prompt": None, "negative_prompt": None, "use_resolution_binning": False}
FAMILIES: dict[str, Family] = {
    "sd3": Family(
        tiny_sd3,
        {
            "prompt_embeds": _drawn(TEXT, 32), "negative_prompt_embeds": _drawn(TEXT, 32, seed=1),
            "pooled_prompt_embeds": _drawn(32, seed=2), "negative_pooled_prompt_embeds": _drawn(32, seed=3),
        },
        {"height": 32, "width": 32, "guidance_scale": 3.0}, 64, TEXT,
    ),
    "qwen-image": Family(
        _qwen_image,
        {
            "prompt_embeds": _drawn(TEXT, 32), "prompt_embeds_mask": torch.ones(3, TEXT, dtype=torch.int64),
            "negative_prompt_embeds": _drawn(TEXT, 32, seed=1),
            "negative_prompt_embeds_mask": torch.ones(3, TEXT, dtype=torch.int64),
        },
        {"height": 32, "width": 32, "true_cfg_scale": 3.0}, 64, TEXT, {"true_cfg_scale": 3.0}, {"true_cfg_scale": 1.0},
    ),
    "flux": Family(
        _flux,
        {
            "prompt_embeds": _drawn(TEXT, 32), "negative_prompt_embeds": _drawn(TEXT, 32, seed=1),
            "pooled_prompt_embeds": _drawn(32, seed=2), "negative_pooled_prompt_embeds": _drawn(32, seed=3),
        },
        {"height": 32, "width": 32, "guidance_scale": 3.0}, 64, TEXT, {"true_cfg_scale": 3.0}, {},
    ),
    "flux2": Family(
        _flux2, {"prompt_embeds": _drawn(TEXT, 32)}, {"height": 32, "width": 32, "guidance_scale": 3.0}, 64, TEXT, {}, {},
    ),
    "pixart": Family(
        _pixart, _captions(),
        _WITHOUT_PROMPTS | {"height": 16, "width": 16},
        16, TEXT,
    ),
    "dit": Family(_dit, {"class_labels": torch.tensor([3, 500, 7])}, {"guidance_scale": 1.0}, 16, 0),
    "wan": Family(
        _wan, {"prompt_embeds": _drawn(TEXT, 32), "negative_prompt_embeds": _drawn(TEXT, 32, seed=1)},
        {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0}, 8, TEXT,
    ),
    "sana": Family(
        _sana, _captions(),
        _WITHOUT_PROMPTS | {"height": 32, "width": 32},
        64, TEXT,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """The tiny pipeline of a family, the same weights each time."""
    torch.manual_seed(0)
    pipe = FAMILIES[name].build()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():  # what a class starts at zero would hide what its blocks do
            if not parameter.any():
                parameter.normal_(std=0.05)
    pipe.transformer.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
