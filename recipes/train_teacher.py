"""Train a dense teacher: a pipeline folder of one of three families (SD3, FLUX.1, PixArt-Sigma; see teachers.py) that draws the
embedded data set through the small autoencoder.

    python recipes/train_autoencoder.py
    python recipes/train_teacher.py --steps 6000                 # SD3, 32 concepts, a CPU's share; resumes by itself
    python recipes/train_teacher.py --init src/shivelight/demo/pipeline --work build/teacher-2     # go on from the shipped weights
    python recipes/train_teacher.py --subset full --tokens 1024 --steps 60000      # where a GPU trains it
    python recipes/train_teacher.py --family flux --concepts 8 --batch 8 --minutes 75 --steps 100000 \\
        --text src/shivelight/demo/pipeline --work build/flux    # another family, fewer concepts, from trained text encoders

Captions are dropped for guidance, text encoders trained along. What is exported is the exponential moving average, in fp16, with
teacher.json beside: the family, its concepts, and the arguments that its pipeline wants.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from teachers import FAMILIES, RECORD, Teacher, concept_of
from text_encoders import TEXT_TOKENS, build_tokenizer

from shivelight.demo.data import EmojiData

EMA_DECAY = 0.998
CAPTION_DROP = 0.1
HELD_OUT = 256  # the pool's first pictures, which are not trained on


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


def build_optimizers(teacher: Teacher, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, which learns from fewer samples; AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in teacher.named_parameters():
        block = name.startswith(("transformer.transformer_blocks", "transformer.single_transformer_blocks"))
        hidden = block and parameter.ndim == 2 and not name.endswith("scale_shift_table")
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, cosine to 2% over the last half; `progress` runs from 0 to 1."""
    late = max(0.0, 2 * progress - 1)
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


def export(teacher: Teacher, vae: AutoencoderTiny, record: dict[str, Any], folder: Path) -> DiffusionPipeline:
    """Write the pipeline folder in fp16 and teacher.json beside its final name, then rename."""
    pipe = teacher.pipeline(vae)

    def write(unfinished: Path) -> None:
        pipe.save_pretrained(unfinished)
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    checkpoint.save_folder(write, folder)
    return pipe


def main() -> None:
    """Train or go on training; export the average every --export steps; print the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="sd3")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--subset", choices=["basic", "core", "full"], default="basic")
    parser.add_argument("--concepts", type=int, help="only the first so many concepts of the subset")
    parser.add_argument("--tokens", type=int, default=256, help="image tokens: 256 for 128 px, 1024 for 256 px")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument(
        "--layers", type=int, help="blocks, 8 by default; of FLUX double ones, 3, and twice as many single"
    )
    parser.add_argument("--pool", type=int, default=16000, help="pictures rendered and encoded once")
    parser.add_argument("--vae", type=Path, default=Path("build/autoencoder/vae"))
    parser.add_argument("--work", type=Path, default=Path("build/teacher"))
    parser.add_argument("--export", type=int, default=500)
    parser.add_argument("--previews", type=int, default=32, help="validation captions drawn at each export")
    parser.add_argument(
        "--init", type=Path, help="pipeline folder of the same family whose weights a new run starts from"
    )
    parser.add_argument(
        "--text", type=Path, help="SD3 pipeline folder whose text encoder a new run of a family starts from"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="end after so many minutes, those before an interruption counted; the learning rate falls by the clock",
    )
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = checkpoint.device()
    args.work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderTiny.from_pretrained(args.vae, dtype=torch.float32)
    teacher = FAMILIES[args.family](build_tokenizer(args.work), args.tokens, args.width, args.layers).to(device)
    labels = [concept.label for concept in EmojiData(args.subset).concepts[: args.concepts]]
    pool = encode_pool(
        vae, args.subset, args.pool, 8 * math.isqrt(args.tokens), args.work / f"pool-{args.subset}-{args.tokens}.pt"
    )
    chosen = [i for i, caption in enumerate(pool["captions"]) if i >= HELD_OUT and concept_of(caption) in labels]
    latents = (pool["latents"][chosen].float() * vae.config.scaling_factor).to(device)
    ids = teacher.ids([pool["captions"][i] for i in chosen]).to(device)
    empty = teacher.ids([""]).to(device)
    del pool
    validation = [
        str(caption) for caption in EmojiData(args.subset).captions("validation") if caption.concept.label in labels
    ]
    record = {
        "family": args.family,
        "subset": args.subset,
        "concepts": labels,
        "text_tokens": TEXT_TOKENS,
        "steps": teacher.steps,
        "guidance": teacher.guidance,
        "options": teacher.options,
    }

    if args.text is not None:
        teacher.load_text(args.text)
    if args.init is not None:
        teacher.load_weights(args.init)
    average = copy.deepcopy(teacher).requires_grad_(False)
    optimizers = build_optimizers(teacher, args.lr)
    parts = {"model": teacher, "average": average, "optimizers": optimizers}
    state = checkpoint.resume(args.work / "state.pt", **parts)
    start, seconds = state.get("step", 0), state.get("seconds", 0.0)
    predict = torch.compile(teacher) if args.compile else teacher
    checkpoint.use_plain_attention(device)
    size = sum(p.numel() for p in teacher.parameters()) / 1e6
    print(f"{args.family}: {size:.1f} M parameters, {len(chosen)} pictures, from step {start}", flush=True)
    began, smooth = time.time(), None
    for step in range(start, args.steps):
        spent = seconds + time.time() - began
        progress = step / args.steps if args.minutes is None else spent / (60 * args.minutes)
        generator = torch.Generator(device).manual_seed(step)
        draw = {"generator": generator, "device": device}
        picks = torch.randint(0, len(latents), (args.batch,), **draw)
        noisy, time_, target = teacher.corrupt(latents[picks], draw)
        dropped = torch.rand(args.batch, **draw) < CAPTION_DROP
        text = torch.where(dropped[:, None], empty, ids[picks])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(noisy, time_, text)
        loss = (predicted.float() - target).square().mean()
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
            left = (args.steps - step) * pace if args.minutes is None else 60 * args.minutes - spent
            print(f"step {step} loss {smooth:.4f} {pace:.2f} s/step, {left / 60:.0f} min left", flush=True)
        if (step + 1) % args.export == 0 or last:
            spent = seconds + time.time() - began
            checkpoint.save(args.work / "state.pt", checkpoint.capture(**parts) | {"step": step + 1, "seconds": spent})
            pipe = export(average, vae, record, args.work / "pipeline")
            images = teacher.sample(pipe, validation[: args.previews])
            checkpoint.grid(images * 2 - 1, 8).save(args.work / f"preview-{step + 1}.png")
        if last:
            break


if __name__ == "__main__":
    main()
