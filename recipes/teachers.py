"""The families that `train_teacher.py` trains: what each one's modules are, how a caption reaches its transformer, what the
transformer predicts of a noisy picture, and the pipeline that is exported.

All share the latents of `train_autoencoder.py`, the tokenizer, a width of 192 and 16 text tokens.
"""

import copy
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
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from shivelight.demo.data import EmojiData

TEXT_WIDTH = 96
TEXT_TOKENS = 16
LATENT_CHANNELS = 8
# SD3's own. Which object and where is decided above t = 0.8, and the plain logit-normal draws 8% of its times there.
SHIFT = 3.0


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP BPE tokenizer trained on every caption of the full set; reused if it is already there."""
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    start, end = "<|startoftext|>", "<|endoftext|>"
    template = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = template.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[start, end], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator((str(c) for c in EmojiData("full").captions()), trainer)
    tokenizer.model.save(str(folder))
    trained = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TEXT_TOKENS
    )
    trained.save_pretrained(folder)
    return trained


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Three layers of width 96."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """Two layers of width 96, over the ids of the CLIP tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=24,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def attention_mask(ids: Tensor, end: int) -> Tensor:
    """1 up to and with the first end-of-text token of ids [B, M], as the tokenizer gives it: its padding is that token too."""
    ended = (ids == end).long()
    return (ended.cumsum(1) - ended == 0).long()


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
        parts: names of the trained modules, here and in the pipeline.
        steps: of the previews.
        guidance: name and value of the pipeline's argument.
        options: further arguments of every pipeline call.
    """

    parts: tuple[str, ...]
    steps = 25
    guidance: tuple[str, float] = ("guidance_scale", 4.0)

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

    def components(self) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
        """The pipeline's class, and what it needs beside the trained parts and the VAE."""
        raise NotImplementedError

    def pipeline(self, vae: AutoencoderTiny) -> DiffusionPipeline:
        """The pipeline in fp16, on copies of the weights."""
        kind, others = self.components()
        trained = {name: copy.deepcopy(getattr(self, name)).half() for name in self.parts}
        return kind(vae=copy.deepcopy(vae).half(), **trained, **others)

    def sample(self, pipe: DiffusionPipeline, prompts: list[str]) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] from the pipeline, with seed 0."""
        pipe = pipe.to(checkpoint.device(), torch.float32)
        pipe.set_progress_bar_config(disable=True)
        options = dict(self.options)
        if "negative_prompt" in options:
            options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
        name, scale = self.guidance
        return pipe(
            prompts, num_inference_steps=self.steps, generator=torch.Generator().manual_seed(0), output_type="pt",
            **{name: scale}, **options,
        ).images  # fmt: skip

    def load_weights(self, folder: Path) -> None:
        """Start from an exported pipeline of this family: the way to go on where only the shipped files are left."""
        for name in self.parts:
            module = getattr(self, name)
            module.load_state_dict(type(module).from_pretrained(folder / name, dtype=torch.float32).state_dict())

    def load_text(self, folder: Path) -> None:
        """Start the text encoders from the first one of a trained SD3 pipeline: CLIP whole, T5 with its token embeddings."""
        source = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32).text_model
        for name in self.parts:
            module = getattr(self, name)
            if isinstance(module, CLIPTextModel):
                inner = getattr(module, "text_model", module)
                inner.load_state_dict(source.state_dict())
            elif isinstance(module, T5EncoderModel):
                tokens = source.embeddings.token_embedding.weight.data
                # T5 begins with embeddings of variance 1 and normalises only what it adds to them.
                module.shared.weight.data.copy_(tokens / tokens.std())


class SD3Teacher(Teacher):
    """SD3.5-Medium in small: RMS qk-norm, dual attention in the first two blocks; two CLIP text encoders, no T5."""

    parts = ("transformer", "text_encoder", "text_encoder_2")

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

    def components(self) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
        return StableDiffusion3Pipeline, {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer,
            "text_encoder_3": None,
            "tokenizer_3": None,
        }


class FluxTeacher(Teacher):
    """FLUX.1 in small: three double and six single blocks with RoPE; CLIP gives the pooled embedding, T5 the sequence. Not
    distilled: guidance is the pipeline's `true_cfg_scale`, two passes a step."""

    parts = ("transformer", "text_encoder", "text_encoder_2")
    guidance = ("true_cfg_scale", 4.0)

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int, width: int, layers: int | None) -> None:
        super().__init__(tokenizer, tokens)
        pixels = 4 * self.side
        # The pipeline would draw 128 x 128 latents; its negative prompts must be as many as its prompts.
        self.options |= {"height": pixels, "width": pixels, "negative_prompt": ""}
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
        initialise(
            self.transformer, ("norm1.linear", "norm1_context.linear", ".norm.linear"), ("proj_out", "norm_out")
        )
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

    def components(self) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
        return FluxPipeline, {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer,
        }


class PixArtTeacher(Teacher):
    """PixArt-Sigma in small: eight blocks with cross-attention to T5; noise prediction under DDPM's linear betas, sampled by
    DPM-Solver++. Of the 16 output channels only the first eight are trained; the others, the variance, stay as they began,
    and the pipeline drops them."""

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
        self.register_buffer("signal", DDPMScheduler(beta_end=0.02).alphas_cumprod, persistent=False)

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

    def components(self) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
        return PixArtSigmaPipeline, {
            "scheduler": DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
            "tokenizer": self.tokenizer,
        }


FAMILIES: dict[str, type[Teacher]] = {"sd3": SD3Teacher, "flux": FluxTeacher, "pixart": PixArtTeacher}
