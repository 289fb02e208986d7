"""Train hy3dgen's ShapeVAE (a decoder) on the latents of encoder.py: points of space to whether they are inside the shape.

    python recipes/shapes/encoder.py
    python recipes/shapes/train_decoder.py --steps 3000        # resumes from --work by itself

Loss: binary cross-entropy of cells, half of them anywhere, half within two cells of the surface. Noise is added to the latents, so
that the decoder forgives a diffusion model's small errors. Prints the IoU of validation shapes; writes `vae.pt` (weights and
settings).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import encoder
import optimizing
import torch
from encoder import POSES
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from shivelight.backbones import hy3dgen
from shivelight.demo.shapes import RESOLUTION, centres, surface
from shivelight.evaluation.shapes import chamfer, iou

sys.path.append(str(Path(__file__).parents[1]))
import checkpoint  # noqa: E402

LATENT_NOISE = 0.1
QUERIES = 384
SETTINGS: dict[str, Any] = {
    "num_latents": encoder.LATENTS, "embed_dim": encoder.CHANNELS, "width": 128, "heads": 4, "num_decoder_layers": 3,
    "geo_decoder_downsample_ratio": 2, "num_freqs": 5, "include_pi": True, "qk_norm": True, "scale_factor": 1.0,
}  # fmt: skip


class Queries:
    """Cells to ask for, of shapes bool [n, 32, 32, 32] in their poses."""

    def __init__(self, grids: Tensor) -> None:
        self.grids = grids.flatten(1)
        self.surfaces = [mask.flatten().nonzero().squeeze(1) for mask in surface(grids)]
        self.centres = centres().reshape(-1, 3)
        self.moves = encoder.moves()

    def draw(self, picks: list[int], poses: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points [B, QUERIES, 3], half anywhere and half near the surface, and whether they are inside, float [B, QUERIES]."""
        points, inside = [], []
        for pick, pose in zip(picks, poses, strict=True):
            near = self.surfaces[pick]
            near = near[torch.randint(len(near), (QUERIES // 2,), generator=generator)]
            triples = torch.stack([near // RESOLUTION**2, near // RESOLUTION % RESOLUTION, near % RESOLUTION], dim=-1)
            triples = (triples + torch.randint(-2, 3, triples.shape, generator=generator)).clamp(0, RESOLUTION - 1)
            near = (triples[:, 0] * RESOLUTION + triples[:, 1]) * RESOLUTION + triples[:, 2]
            anywhere = torch.randint(RESOLUTION**3, (QUERIES - len(near),), generator=generator)
            cells = torch.cat([near, anywhere])
            inside.append(self.grids[pick, cells])
            points.append(self.centres[self.moves[pose][cells]])
        return torch.stack(points), torch.stack(inside).float()


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """bool [n, 32, 32, 32] of latents [n, N, C]."""
    queries, grids = centres().reshape(1, -1, 3), []
    for latent in latents.split(1):
        with torch.autocast("cpu", torch.bfloat16):
            grids.append(vae.geo_decoder(queries=queries, latents=vae(latent)) > 0)
    return torch.cat(grids).reshape(-1, *(RESOLUTION,) * 3)


def main() -> None:
    """Train or go on training, then write the decoder and print what it reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, help="end after so many, the learning rate falling by the clock")
    parser.add_argument("--latents", type=Path, default=Path("build/shapes/latents.pt"))
    parser.add_argument("--work", type=Path, default=Path("build/shapes/decoder"))
    args = parser.parse_args()
    torch.manual_seed(0)
    # Before hy3dgen is imported, which takes torch's attention by its name.
    checkpoint.use_plain_attention(torch.device("cpu"))
    data = encoder.load(args.latents)
    train, held_out = data["train"]["latents"], data["validation"]["latents"][:, 0, 0].float()
    queries, true_grids = Queries(data["train"]["grids"]), data["validation"]["grids"]
    vae = hy3dgen.load().ShapeVAE(**SETTINGS)
    optimizers = optimizing.build(vae, args.lr, lambda name: "resblocks" in name or "cross_attn_decoder" in name)
    start, spent = 0, 0.0
    if state := checkpoint.load(args.work / "state.pt"):
        vae.load_state_dict(state["model"])
        optimizing.restore(optimizers, state["optimizers"])
        start, spent = state["step"], state["seconds"]
    began = time.time() - spent
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(train), (args.batch,), generator=generator)
        poses = torch.randint(POSES, (args.batch,), generator=generator)
        times = torch.randint(train.shape[2], (args.batch,), generator=generator)
        points, inside = queries.draw(picks.tolist(), poses.tolist(), generator)
        latents = train[picks, poses, times].float()
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = vae.geo_decoder(queries=points, latents=vae(latents)).squeeze(-1)
        loss = binary_cross_entropy_with_logits(logits.float(), inside)
        seconds = time.time() - began
        progress = step / args.steps if args.minutes is None else min(1.0, seconds / (60 * args.minutes))
        optimizing.step(optimizers, vae, loss, optimizing.rate(step, progress, args.lr))
        if step % 50 == 0:
            right = ((logits > 0) == (inside > 0.5)).float().mean()
            print(f"step {step} loss {loss:.4f} right {right:.4f} {seconds:.0f} s", flush=True)
        last = step + 1 == args.steps or progress >= 1.0
        if (step + 1) % 200 == 0 or last:
            state = {"model": vae.state_dict(), "optimizers": optimizing.states(optimizers), "step": step + 1}
            checkpoint.save(args.work / "state.pt", state | {"seconds": time.time() - began})
            checkpoint.save(args.work / "vae.pt", {"model": vae.state_dict(), "settings": SETTINGS})
            few = slice(None) if last else slice(12)
            grids = decode(vae.eval(), held_out[few])
            vae.train()
            found, distance = iou(grids, true_grids[few]), chamfer(grids, true_grids[few])
            print(
                f"step {step + 1}: validation IoU {found.mean():.3f} of {len(found)}, worst {found.min():.3f}, "
                f"Chamfer {distance[distance.isfinite()].mean():.4f}",
                flush=True,
            )
        if last:
            break


if __name__ == "__main__":
    main()
