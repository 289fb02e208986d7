"""Train the image-text scorer behind caption agreement: which of the embedded captions does a picture show?

    python recipes/train_scorer.py                  # minutes on one core; resumes from --work by itself

Contrastive, as CLIP (Radford et al., arXiv 2103.00020, figure 3): cross entropy both ways over the cosines of a batch of pictures
with the captions of that batch. A batch is 10 concepts on 10 backgrounds, less the combinations that are held out, so that every
caption differs and concept and background must both be told apart. Pictures are rendered from captions of the train split, with
seeds that nothing else uses. Half of them pass through the embedded autoencoder with noise on their latents, and all are blurred,
noised and tinted a little, so that generated pictures are no strangers.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import checkpoint
import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from shivelight.demo.data import BACKGROUNDS, Caption, EmojiData
from shivelight.demo.pipeline import PIPELINE
from shivelight.evaluation.scorer import SCORER, CaptionScorer, save_scorer

# Far from the seeds of the other recipes (0 and 100,000 upwards) and of the pictures that judge (0 upwards).
TRAIN_SEED, VALIDATION_SEED = 10_000_000, 15_000_000
LATENT_NOISE = 0.3
GRID = 10
LARGEST_LOG_SCALE = 3.9  # logits of at most 49 times the cosine


def render(data: EmojiData, captions: list[Caption], first_seed: int) -> Tensor:
    """uint8 [n, 3, 128, 128]."""
    arrays = [np.asarray(data.render(caption, first_seed + i)) for i, caption in enumerate(captions)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@torch.no_grad()
def through(vae: AutoencoderTiny, pictures: Tensor, seed: int) -> Tensor:
    """uint8 pictures [n, 3, 128, 128] encoded, noised by up to LATENT_NOISE of their standard deviation, and decoded."""
    generator = torch.Generator().manual_seed(seed)
    images = (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(images).latents.float()
        amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator) * latents.std()
        decoded = vae.decode(latents + amount * torch.randn(latents.shape, generator=generator)).sample.float()
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()


def render_pool(data: EmojiData, captions: list[Caption], each: int, size: int, path: Path) -> Tensor:
    """uint8 [captions, each, 3, size, size]: the second half of a caption's pictures went through the autoencoder."""
    if (state := checkpoint.load(path)) and state["pool"].shape[:2] == (len(captions), each):
        return state["pool"]
    vae = AutoencoderTiny.from_pretrained(PIPELINE / "vae", torch_dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    parts = []
    for turn in range(each):
        pictures = render(data, captions, TRAIN_SEED + turn * len(captions))
        small = []
        for index, chunk in enumerate(pictures.split(64)):
            if turn >= each // 2:
                chunk = through(vae, chunk, 1000 * turn + index)
            small.append(shrink(chunk, size))
        parts.append(torch.cat(small))
        print(f"rendered {turn + 1} of {each} pictures of each caption", flush=True)
    pool = torch.stack(parts, 1)
    checkpoint.save(path, {"pool": pool})
    return pool


def shrink(pictures: Tensor, size: int) -> Tensor:
    """uint8 [n, 3, H, W] -> uint8 [n, 3, size, size], as the scorer itself resizes."""
    resized = F.interpolate(pictures.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).byte()


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Float pictures [n, 3, H, W] in [0, 1]: blurred, tinted and noised, each by an amount of its own."""

    def amounts(most: float, channels: int = 1) -> Tensor:
        return most * torch.rand(len(pictures), channels, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(pictures, blurred, amounts(1.0))
    x = x * (0.95 + amounts(0.1, 3)) + amounts(0.06, 3) - 0.03
    return (x + amounts(0.05) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def batch_of(places: dict[tuple[str, str], int], scorer: CaptionScorer, generator: torch.Generator) -> list[int]:
    """Indices of training captions: GRID concepts on GRID backgrounds, without what is held out."""
    chosen = [
        [names[i] for i in torch.randperm(len(names), generator=generator)[:GRID].tolist()]
        for names in (scorer.concepts, scorer.backgrounds)
    ]
    return [places[pair] for pair in itertools.product(*chosen) if pair in places]


@torch.no_grad()
def accuracy(scorer: CaptionScorer, captions: list[Caption], pictures: Tensor) -> tuple[float, float]:
    """(right concept on the same background, right background of the same concept) of uint8 pictures [n, 3, H, W]."""
    scorer.eval()
    vectors = scorer.images(pictures.float() / 255)
    every = {c: scorer.captions([f"{c} on {b}" for b in scorer.backgrounds]) for c in scorer.concepts}
    table = torch.stack([every[c] for c in scorer.concepts])  # [concepts, backgrounds, dim]
    concepts = torch.tensor([scorer.concepts.index(c.concept.label) for c in captions])
    backgrounds = torch.tensor([scorer.backgrounds.index(str(c.background)) for c in captions])
    named = (table[:, backgrounds] * vectors).sum(-1).argmax(0) == concepts
    placed = (table[concepts] * vectors[:, None]).sum(-1).argmax(1) == backgrounds
    scorer.train()
    return named.float().mean().item(), placed.float().mean().item()


def main() -> None:
    """Train or go on training, print accuracies on validation captions, then write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--each", type=int, default=6, help="pictures of each training caption")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--work", type=Path, default=Path("build/scorer"))
    parser.add_argument("--out", type=Path, default=SCORER)
    args = parser.parse_args()
    torch.manual_seed(0)
    data, device = EmojiData(), checkpoint.device()
    captions = data.captions("train")
    places = {(caption.concept.label, str(caption.background)): i for i, caption in enumerate(captions)}
    scorer = CaptionScorer([concept.label for concept in data.concepts], [str(b) for b in BACKGROUNDS]).to(device)
    print(json.dumps({"parameters": sum(p.numel() for p in scorer.parameters()), "captions": len(captions)}))
    pool = render_pool(data, captions, args.each, scorer.image_size, args.work / "pool.pt")
    held_out = data.captions("validation")
    judged = render(data, held_out, VALIDATION_SEED).to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    parts = {"model": scorer, "optimizer": optimizer, "schedule": schedule}
    start = checkpoint.resume(args.work / "state.pt", **parts).get("step", 0)
    began = time.time()
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        chosen = batch_of(places, scorer, generator)
        turns = torch.randint(args.each, (len(chosen),), generator=generator)
        pictures = augment(pool[torch.tensor(chosen), turns].float() / 255, generator)
        pictures = pictures.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            vectors = scorer.images(pictures)
        logits = scorer.log_scale.exp() * vectors @ scorer.captions([str(captions[i]) for i in chosen]).T
        right = torch.arange(len(chosen), device=device)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            scorer.log_scale.clamp_(max=LARGEST_LOG_SCALE)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            named, placed = accuracy(scorer, held_out, judged)
            print(
                f"step {step + 1} loss {loss.item():.4f} scale {scorer.log_scale.exp().item():.1f}; validation captions: "
                f"concept {named:.3f}, background {placed:.3f}; {time.time() - began:.0f} s",
                flush=True,
            )
            checkpoint.save(args.work / "state.pt", checkpoint.capture(**parts) | {"step": step + 1})
    save_scorer(scorer.cpu(), args.out)


if __name__ == "__main__":
    main()
