"""Train the embedded dense teacher: a StableDiffusion3Pipeline folder (SD3 transformer, two CLIP text encoders, AutoencoderTiny).

    python recipes/train_autoencoder.py
    python recipes/train_teacher.py --steps 6000                 # 32 concepts, a CPU's share; resumes by itself
    python recipes/train_teacher.py --init src/shivelight/demo/pipeline --work build/teacher-2     # go on from the shipped weights
    python recipes/train_teacher.py --subset full --tokens 1024 --steps 60000      # where a GPU trains it

Rectified flow matching, logit-normal timesteps shifted towards noise, captions dropped for guidance, text encoders trained along.
What is shipped is the exponential moving average, in fp16.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import checkpoint
import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from shivelight.demo.data import EmojiData

TEXT_WIDTH = 96
TEXT_TOKENS = 16
EMA_DECAY = 0.998
CAPTION_DROP = 0.1
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Three layers of width 96; the pipeline reads the last but one and the projected end-of-text token."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
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
    )


def build_transformer(tokens: int, width: int, layers: int) -> SD3Transformer2DModel:
    """SD3.5-Medium in small: RMS qk-norm, dual attention in the first two blocks, modulation and output start at zero."""
    side = 2 * math.isqrt(tokens)
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=side // 2,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name or "norm1_context.linear" in name or name.startswith(("proj_out", "norm_out")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "embed" not in name:
            nn.init.xavier_uniform_(parameter)
    return model


class Teacher(nn.Module):
    """Transformer and text encoders as one module to train; `forward` is the velocity for token ids."""

    def __init__(self, tokenizer: CLIPTokenizer, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        self.transformer = build_transformer(tokens, width, layers)
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 16] to (prompt embeddings [B, 32, J], pooled [B, P]), laid out as the pipeline does without T5."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        embeddings = torch.cat([clip, torch.zeros_like(clip)], dim=1)
        return embeddings, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Velocity [B, 8, S, S] at timesteps 0 to 1000."""
        embeddings, pooled = self.encode(ids)
        return self.transformer(noisy, embeddings, pooled, timestep, return_dict=False)[0]


def encode_pool(vae: AutoencoderTiny, subset: str, count: int, size: int, path: Path) -> dict:
    """Latents [count, 8, S, S] in fp16 and their captions, rendered and encoded once, then read from disk."""
    if (state := checkpoint.load(path)) is not None:
        return state
    data = EmojiData(subset)
    captions = data.captions("train")
    order = np.concatenate(
        [np.random.default_rng(epoch).permutation(len(captions)) for epoch in range(-(-count // len(captions)))]
    )
    device = checkpoint.device()
    vae = vae.to(device)
    latents, began = [], time.time()
    for first in range(0, count, 64):
        images = [data.render(captions[order[i]], i, size) for i in range(first, min(first + 64, count))]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents.append(vae.encode(checkpoint.to_tensor(images).to(device)).latents.half().cpu())
        if first % 6400 == 0:
            print(f"encoded {first + len(images)} of {count}, {time.time() - began:.0f} s", flush=True)
    state = {"latents": torch.cat(latents), "captions": [str(captions[i]) for i in order[:count]]}
    checkpoint.save(path, state)
    return state


def load_weights(teacher: Teacher, folder: Path) -> None:
    """Start from an exported pipeline: the way to go on where only the shipped files are left."""
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        module = getattr(teacher, name)
        module.load_state_dict(type(module).from_pretrained(folder / name, dtype=torch.float32).state_dict())


def build_optimizers(teacher: Teacher, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, which learns from fewer samples; AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in teacher.named_parameters():
        hidden = name.startswith("transformer.transformer_blocks") and parameter.ndim == 2
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, cosine to 2% over the last half; `progress` runs from 0 to 1."""
    late = max(0.0, 2 * progress - 1)
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


def export(teacher: Teacher, tokenizer: CLIPTokenizer, vae: AutoencoderTiny, folder: Path) -> StableDiffusion3Pipeline:
    """Write the pipeline folder in fp16 beside its final name, then rename."""
    pipe = StableDiffusion3Pipeline(
        transformer=copy.deepcopy(teacher.transformer).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(teacher.text_encoder).half(),
        tokenizer=tokenizer,
        text_encoder_2=copy.deepcopy(teacher.text_encoder_2).half(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    checkpoint.save_folder(pipe.save_pretrained, folder)
    return pipe


@torch.no_grad()
def preview(pipe: StableDiffusion3Pipeline, subset: str, path: Path) -> None:
    """32 validation captions, 25 steps, guidance 4."""
    prompts = [str(caption) for caption in EmojiData(subset).captions("validation")[:32]]
    pipe = pipe.to(checkpoint.device(), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts, num_inference_steps=25, guidance_scale=4.0, max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    checkpoint.grid(images * 2 - 1, 8).save(path)


def main() -> None:
    """Train or go on training; export the average every --export steps; print the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--subset", choices=["basic", "core", "full"], default="basic")
    parser.add_argument("--tokens", type=int, default=256, help="image tokens: 256 for 128 px, 1024 for 256 px")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pool", type=int, default=16000, help="pictures rendered and encoded once")
    parser.add_argument("--vae", type=Path, default=Path("build/autoencoder/vae"))
    parser.add_argument("--work", type=Path, default=Path("build/teacher"))
    parser.add_argument("--export", type=int, default=500)
    parser.add_argument(
        "--init", type=Path, help="pipeline folder (the shipped one) whose weights a new run starts from"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="end after so many minutes, the learning rate falling by the clock: for a lent machine",
    )
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = checkpoint.device()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args.work)
    vae = AutoencoderTiny.from_pretrained(args.vae, dtype=torch.float32)
    pool = encode_pool(
        vae, args.subset, args.pool, 8 * math.isqrt(args.tokens), args.work / f"pool-{args.subset}-{args.tokens}.pt"
    )
    latents = pool["latents"].float() * vae.config.scaling_factor

    def encode(texts: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True, "return_tensors": "pt"}
        return tokenizer(texts, **options).input_ids

    ids, empty = encode(pool["captions"]).to(device), encode([""]).to(device)
    latents = latents.to(device)
    held_out = slice(0, 256)

    teacher = Teacher(tokenizer, args.tokens, args.width, args.layers).to(device)
    if args.init is not None:
        load_weights(teacher, args.init)
    average = copy.deepcopy(teacher).requires_grad_(False)
    optimizers = build_optimizers(teacher, args.lr)
    start = 0
    if state := checkpoint.load(args.work / "state.pt"):
        teacher.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    velocity = torch.compile(teacher) if args.compile else teacher
    checkpoint.use_plain_attention(device)
    print(f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters, from step {start}", flush=True)
    began, smooth = time.time(), None
    for step in range(start, args.steps):
        progress = step / args.steps if args.minutes is None else (time.time() - began) / (60 * args.minutes)
        generator = torch.Generator(device).manual_seed(step)
        draw = {"generator": generator, "device": device}
        picks = torch.randint(held_out.stop, len(latents), (args.batch,), **draw)
        clean, noise = latents[picks], torch.randn((args.batch, *latents.shape[1:]), **draw)
        time_ = torch.sigmoid(torch.randn(args.batch, **draw))
        time_ = SHIFT * time_ / (1 + (SHIFT - 1) * time_)
        dropped = torch.rand(args.batch, **draw) < CAPTION_DROP
        text = torch.where(dropped[:, None], empty, ids[picks])
        noisy = torch.lerp(clean, noise, time_[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = velocity(noisy, 1000 * time_, text)
        loss = (predicted.float() - (noise - clean)).square().mean()
        teacher.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, min(progress, 1.0), args.lr)
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(teacher.parameters()), 1 - decay)
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        last = step + 1 == args.steps or progress >= 1.0
        if step % 50 == 0:
            pace = (time.time() - began) / (step - start + 1)
            print(
                f"step {step} loss {smooth:.4f} {pace:.2f} s/step, {pace * (args.steps - step) / 60:.0f} min left",
                flush=True,
            )
        if (step + 1) % args.export == 0 or last:
            state = {"model": teacher.state_dict(), "average": average.state_dict(), "step": step + 1}
            checkpoint.save(args.work / "state.pt", state | {"optimizers": [o.state_dict() for o in optimizers]})
            pipe = export(average, tokenizer, vae, args.work / "pipeline")
            preview(pipe, args.subset, args.work / f"preview-{step + 1}.png")
        if last:
            break


if __name__ == "__main__":
    main()
