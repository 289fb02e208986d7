"""Train the embedded AutoencoderTiny: 128 px pictures to 8 x 32 x 32 latents with about zero mean and unit variance.

    python recipes/train_autoencoder.py --steps 2500          # resumes from --work by itself

Loss: L1 and squared error on pixels and on their differences (edges), and a pull of every latent channel to mean 0 and
variance 1. Noise is added to the latents before decoding, so that the decoder forgives a diffusion model's small errors.
"""

import argparse
import itertools
import time
from pathlib import Path

import checkpoint
import numpy as np
import torch
from diffusers import AutoencoderTiny

from shivelight.demo.data import EmojiData

LATENT_NOISE = 0.15
POOL = 4000


def build() -> AutoencoderTiny:
    """8 latent channels, two downsamplings; small enough to decode in a few milliseconds on a CPU."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(3, 2, 0),
        latent_channels=8,
    )


def render_pool(count: int) -> torch.Tensor:
    """uint8 [count, 3, 128, 128]: random training captions of the full set."""
    data = EmojiData("full")
    captions = data.captions("train")
    order = np.random.default_rng(0).permutation(len(captions))
    chosen = itertools.islice(itertools.cycle(order), count)
    arrays = [np.asarray(data.render(captions[index], seed)) for seed, index in enumerate(chosen)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def crops(pool: torch.Tensor, batch: int, step: int) -> torch.Tensor:
    """Random 64 px windows: the model is convolutional, and a quarter of the picture costs a quarter of the time."""
    generator = torch.Generator().manual_seed(step)
    picks = torch.randint(len(pool), (batch,), generator=generator)
    corners = torch.randint(0, 17, (batch, 2), generator=generator) * 4
    return torch.stack([pool[p, :, y : y + 64, x : x + 64] for p, (y, x) in zip(picks, corners.tolist(), strict=True)])


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical differences of neighbours."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def loss_of(model: AutoencoderTiny, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(training loss, mean squared error of the reconstruction in [-1, 1])."""
    latents = model.encode(images).latents.float()
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    decoded = model.decode(noisy).sample.float()
    pixel = (decoded - images).abs().mean() + 2 * (decoded - images).square().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(images), strict=True))
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    pull = mean.square().mean() + (variance - 1).square().mean()
    return pixel + edge + 0.05 * pull, (decoded - images).square().mean().detach()


def main() -> None:
    """Train or go on training, then write the model folder and print what it reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("build/autoencoder"))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = checkpoint.device()
    model = build().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.05)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start = checkpoint.resume(args.work / "state.pt", **parts).get("step", 0)
    pool = render_pool(POOL)
    train, held_out = pool[64:], pool[:64]
    began = time.time()
    for step in range(start, args.steps):
        images = (crops(train, args.batch, step).float() / 127.5 - 1).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss, error = loss_of(model, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            psnr = 10 * torch.log10(4 / error)
            print(f"step {step} loss {loss.item():.4f} psnr {psnr.item():.2f} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            checkpoint.save(args.work / "state.pt", checkpoint.capture(**parts) | {"step": step + 1})
    report(model, (held_out.float() / 127.5 - 1).to(device), args.work)


@torch.no_grad()
def report(model: AutoencoderTiny, images: torch.Tensor, work: Path) -> None:
    """Print the held-out PSNR and latent statistics; save the model in fp16 and a picture of reconstructions."""
    latents = model.encode(images).latents
    decoded = model.decode(latents).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3)))
    print(f"held-out PSNR {psnr.mean():.2f} dB; latent mean {latents.mean():.3f}, std {latents.std():.3f}")
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    model.to(torch.float16).save_pretrained(work / "vae")
    checkpoint.grid(torch.cat([images[:16], decoded[:16]]).float(), 16).save(work / "reconstructions.png")


if __name__ == "__main__":
    main()
