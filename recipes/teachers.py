"""The families that `train_teacher.py` trains: what each one's modules are, how a caption reaches its transformer, what the
transformer predicts of a noisy picture, and the pipeline that is exported.

All share the latents of `train_autoencoder.py`, the tokenizer, a width of 192 and 16 text tokens.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import checkpoint
import torch
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from text_encoders import TEXT_TOKENS, TEXT_WIDTH, attention_mask, build_t5, clip_config, load_trained
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shivelight.demo.data import EmojiData

RECORD = "teacher.json"
LATENT_CHANNELS = 8
# SD3's own. Which object and where is decided above t = 0.8, and the plain logit-normal draws 8% of its times there.
SHIFT = 3.0
# Stable Diffusion's, which end at 1/15 of the signal. PixArt's own end at 1/157, made for far more pixels: there a small model's
# error in the noise is larger than the picture, and the first steps of sampling drew colours by chance.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def concept_of(caption: str) -> str:
    """The thing that a caption puts on a background."""
    return caption.rsplit(" on ", 1)[0]


def known_concepts(pipeline: Path) -> set[str]:
    """What an exported teacher was trained on, by its teacher.json; the basic set where there is none."""
    record = pipeline / RECORD
    if record.exists():
        return set(json.loads(record.read_text())["concepts"])
    return {concept.label for concept in EmojiData().concepts}


def few_levels(pipeline: Path) -> tuple[float, ...]:
    """Noise levels at which a distilled teacher is asked, by its teacher.json; of any other none."""
    record = pipeline / RECORD
    distilled = json.loads(record.read_text()).get("distilled") if record.exists() else None
    return () if distilled is None else tuple(distilled["sigmas"][:-1])


def initialise(transformer: nn.Module, zeros: tuple[str, ...], top: tuple[str, ...]) -> None:
    """Xavier for matrices, zeros for modulation and output: names that contain one of `zeros` or start with one of `top`."""
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in zeros) or name.startswith(top):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "embed" not in name and not name.endswith("scale_shift_table"):
            nn.init.xavier_uniform_(parameter)


class Teacher(nn.Module):
    """Transformer and text encoders as one module to train.

    Attributes:
        kind: the pipeline's class.
        parts: names of the trained modules, here and in the pipeline.
        absent: names of what the pipeline may have and this one does not.
        steps: of the previews.
        guidance: classifier-free, by the pipeline's `guidance_scale`; 1 for none.
        options: further arguments of every pipeline call.
    """

    kind: type[DiffusionPipeline]
    parts: tuple[str, ...]
    absent: tuple[str, ...] = ()
    steps = 25
    guidance = 4.0

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.side = 2 * math.isqrt(tokens)
        self.options: dict[str, Any] = {"max_sequence_length": TEXT_TOKENS}

    def ids(self, texts: list[str]) -> Tensor:
        """Token ids [B, 16]."""
        return self.tokenizer(
            texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    def corrupt(self, clean: Tensor, draw: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, timesteps [B] of 0 to 1000, what to predict): rectified flow, logit-normal times shifted towards
        noise. `draw` has the generator and the device."""
        noise, time = torch.randn(clean.shape, **draw), torch.sigmoid(torch.randn(len(clean), **draw))
        time = SHIFT * time / (1 + (SHIFT - 1) * time)
        return torch.lerp(clean, noise, time[:, None, None, None]), 1000 * time, noise - clean

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """The prediction [B, 8, S, S] for latents and timesteps as `corrupt` gives them."""
        raise NotImplementedError

    def scheduler(self) -> SchedulerMixin:
        """What samples: rectified flow's Euler steps, shifted as in training."""
        return FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def pipeline(self, vae: AutoencoderTiny) -> DiffusionPipeline:
        """The pipeline in fp16, on copies of the weights; every text encoder has the same tokenizer."""
        trained = {name: copy.deepcopy(getattr(self, name)).half() for name in self.parts}
        tokenizers = {
            name.replace("text_encoder", "tokenizer"): self.tokenizer for name in self.parts if name != "transformer"
        }
        others = trained | tokenizers | dict.fromkeys(self.absent)
        return self.kind(vae=copy.deepcopy(vae).half(), scheduler=self.scheduler(), **others)

    def sample(self, pipe: DiffusionPipeline, prompts: list[str]) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] from the pipeline, with seed 0."""
        pipe = pipe.to(checkpoint.device(), torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompts, num_inference_steps=self.steps, guidance_scale=self.guidance, output_type="pt",
            generator=torch.Generator().manual_seed(0), **self.options,
        ).images  # fmt: skip

    def load_weights(self, folder: Path) -> None:
        """Start from an exported pipeline of this family: the way to go on where only the shipped files are left."""
        for name in self.parts:
            module = getattr(self, name)
            module.load_state_dict(type(module).from_pretrained(folder / name, dtype=torch.float32).state_dict())

    def load_text(self, folder: Path) -> None:
        """Start the text encoders from those of a trained SD3 pipeline."""
        for name in self.parts:
            if name.startswith("text_encoder"):
                load_trained(getattr(self, name), folder)


class SD3Teacher(Teacher):
    """SD3.5-Medium in small: RMS qk-norm, dual attention in the first two blocks; two CLIP text encoders, no T5."""

    kind = StableDiffusion3Pipeline
    parts = ("transformer", "text_encoder", "text_encoder_2")
    absent = ("text_encoder_3", "tokenizer_3")

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int, width: int, layers: int | None) -> None:
        super().__init__(tokenizer, tokens)
        self.transformer = SD3Transformer2DModel(
            sample_size=self.side,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=layers or 8,
            attention_head_dim=64,
            num_attention_heads=width // 64,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=self.side // 2,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
        initialise(self.transformer, ("norm1.linear", "norm1_context.linear"), ("proj_out", "norm_out"))
        self.text_encoder = CLIPTextModelWithProjection(clip_config(tokenizer))
        self.text_encoder_2 = CLIPTextModelWithProjection(clip_config(tokenizer))

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Velocity; the text is the last but one layers side by side and as many zeros, as the pipeline does without T5."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        embeddings = torch.cat([clip, torch.zeros_like(clip)], dim=1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return self.transformer(noisy, embeddings, pooled, timestep, return_dict=False)[0]


class FluxTeacher(Teacher):
    """FLUX.1 in small: three double and six single blocks with RoPE; CLIP gives the pooled embedding, T5 the sequence. Drawn
    as that family is, in one pass a step: its pipeline ignores `guidance_scale` here (nothing is distilled into the
    model), and guides by a second pass where it is given `true_cfg_scale` and negative prompts."""

    kind = FluxPipeline
    parts = ("transformer", "text_encoder", "text_encoder_2")
    guidance = 1.0

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int, width: int, layers: int | None) -> None:
        super().__init__(tokenizer, tokens)
        pixels = 4 * self.side
        # The pipeline would draw 128 x 128 latents.
        self.options |= {"height": pixels, "width": pixels}
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=layers or 3,
            num_single_layers=2 * (layers or 3),
            attention_head_dim=64,
            num_attention_heads=width // 64,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 28, 28),
        )
        initialise(self.transformer, ("norm1.linear", "norm1_context.linear", ".norm.linear"), ("proj_out", "norm_out"))
        self.text_encoder = CLIPTextModel(clip_config(tokenizer))
        self.text_encoder_2 = build_t5(tokenizer)

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Velocity; latents go in packed, two by two to a token."""
        batch, channels, height, width = noisy.shape
        where = {"device": noisy.device, "dtype": noisy.dtype}
        packed = self.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            encoder_hidden_states=self.text_encoder_2(ids)[0],
            pooled_projections=self.text_encoder(ids).pooler_output,
            timestep=timestep / 1000,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **where),
            txt_ids=torch.zeros(ids.shape[1], 3, **where),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


class PixArtTeacher(Teacher):
    """PixArt-Sigma in small: eight blocks with cross-attention to T5; noise prediction, sampled by DPM-Solver++. Of the 16
    output channels only the first eight are trained; the others, the variance, stay as they began, and the pipeline drops
    them."""

    kind = PixArtSigmaPipeline
    parts = ("transformer", "text_encoder")
    steps = 20

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int, width: int, layers: int | None) -> None:
        super().__init__(tokenizer, tokens)
        # Binning would draw 256 px; cleaning needs packages that our captions do not.
        self.options |= {"use_resolution_binning": False, "clean_caption": False}
        self.transformer = PixArtTransformer2DModel(
            sample_size=self.side,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            num_layers=layers or 8,
            attention_head_dim=64,
            num_attention_heads=width // 64,
            cross_attention_dim=width,
            caption_channels=TEXT_WIDTH,
        )
        initialise(self.transformer, ("adaln_single.linear", "attn2.to_out"), ("proj_out",))
        self.text_encoder = build_t5(tokenizer)
        self.register_buffer("signal", DDPMScheduler(**BETAS).alphas_cumprod, persistent=False)

    def corrupt(self, clean: Tensor, draw: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, timesteps [B] of 0 to 999, the noise): uniform times."""
        noise, time = torch.randn(clean.shape, **draw), torch.randint(0, 1000, (len(clean),), **draw)
        signal = self.signal[time][:, None, None, None]
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise, time, noise

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """The noise: the first half of the channels."""
        mask = attention_mask(ids, self.tokenizer.eos_token_id)
        both = self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(ids, attention_mask=mask)[0],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return both.chunk(2, dim=1)[0]

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++ on the betas of `corrupt`."""
        return DPMSolverMultistepScheduler(**BETAS)


FAMILIES: dict[str, type[Teacher]] = {"sd3": SD3Teacher, "flux": FluxTeacher, "pixart": PixArtTeacher}
