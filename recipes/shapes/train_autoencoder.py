"""Train an autoencoder of shapes: our encoder, hy3dgen's ShapeVAE as decoder, 64 latents of 8 channels.

    python recipes/shapes/train_autoencoder.py --steps 1500        # resumes from --work by itself

Loss: binary cross-entropy of cells, half of them anywhere, half within two cells of the surface, and a pull of every channel to
mean 0 and variance 1. Noise is added to the latents before decoding, so that the decoder forgives a diffusion model's small
errors. Prints the IoU of the validation shapes; writes `autoencoder.pt` (encoder, decoder, their settings).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import optimizing
import torch
from encoder import SurfaceEncoder
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from shivelight.demo import hunyuan3d
from shivelight.demo.shapes import RESOLUTION, ShapeData, centres, surface, turned
from shivelight.evaluation.shapes import iou

sys.path.append(str(Path(__file__).parents[1]))
import checkpoint  # noqa: E402

LATENT_NOISE = 0.1
POINTS = 512
QUERIES = 768
POSES = 8


class Autoencoder(nn.Module):
    """Encoder and decoder; `settings` are the decoder's, so that a file can be opened without this script's arguments."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = SurfaceEncoder(settings["num_latents"], settings["embed_dim"])
        self.decoder = hunyuan3d.load().ShapeVAE(**settings)

    def logits(self, latents: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits [B, Q] of points [B, Q, 3]; the latents are the encoder's, not scaled."""
        return self.decoder.geo_decoder(queries=queries, latents=self.decoder(latents)).squeeze(-1)


def settings(latents: int, channels: int) -> dict[str, Any]:
    """Of a small ShapeVAE: width 128, three layers over the latents, a point decoder of half the width."""
    return {
        "num_latents": latents, "embed_dim": channels, "width": 128, "heads": 4, "num_decoder_layers": 3,
        "geo_decoder_downsample_ratio": 2, "num_freqs": 5, "include_pi": True, "qk_norm": True,
    }  # fmt: skip


def open_autoencoder(path: Path) -> Autoencoder:
    """The trained one, in evaluation mode."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Autoencoder(state["settings"])
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False)


class Cells:
    """Indices of the surface cells of grids bool [n, 32, 32, 32], to draw points and queries from."""

    def __init__(self, grids: Tensor) -> None:
        self.grids = grids.flatten(1)
        self.surfaces = [mask.flatten().nonzero().squeeze(1) for mask in surface(grids)]
        self.centres = centres().reshape(-1, 3)

    def points(self, picks: list[int], generator: torch.Generator) -> Tensor:
        """float [B, POINTS, 3]: centres of surface cells in a random order, repeated where a shape has too few."""
        rows = []
        for pick in picks:
            cells = self.surfaces[pick]
            cells = cells[torch.randperm(len(cells), generator=generator)]
            rows.append(cells.repeat(-(-POINTS // len(cells)))[:POINTS])
        return self.centres[torch.stack(rows)]

    def queries(self, picks: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points [B, QUERIES, 3], half anywhere and half near the surface, and whether they are inside, float [B, QUERIES]."""
        half = QUERIES // 2
        near = []
        for pick in picks:
            cells = self.surfaces[pick]
            near.append(cells[torch.randint(len(cells), (half,), generator=generator)])
        places = torch.stack(near)
        triples = torch.stack([places // RESOLUTION**2, places // RESOLUTION % RESOLUTION, places % RESOLUTION], dim=-1)
        triples = (triples + torch.randint(-2, 3, triples.shape, generator=generator)).clamp(0, RESOLUTION - 1)
        places = (triples * torch.tensor([RESOLUTION**2, RESOLUTION, 1])).sum(-1)
        anywhere = torch.randint(RESOLUTION**3, (len(picks), QUERIES - half), generator=generator)
        cells = torch.cat([places, anywhere], dim=1)
        return self.centres[cells], self.grids[torch.tensor(picks)].gather(1, cells).float()


@torch.no_grad()
def reconstruct(model: Autoencoder, cells: Cells, picks: list[int]) -> tuple[Tensor, Tensor]:
    """(grids bool [n, 32, 32, 32] that come back, latents [n, N, C])."""
    grids, latents = [], []
    for pick in picks:
        latent = model.encoder(cells.points([pick], torch.Generator().manual_seed(pick)))
        with torch.autocast("cpu", torch.bfloat16):
            grids.append(model.logits(latent, cells.centres[None]) > 0)
        latents.append(latent)
    return torch.cat(grids).reshape(-1, *(RESOLUTION,) * 3), torch.cat(latents)


def main() -> None:
    """Train or go on training, then write the autoencoder and print what it reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--minutes", type=float, help="end after so many, the learning rate falling by the clock")
    parser.add_argument("--work", type=Path, default=Path("build/shapes/autoencoder"))
    args = parser.parse_args()
    torch.manual_seed(0)
    # Before hy3dgen is imported, which takes torch's attention by its name.
    checkpoint.use_plain_attention(torch.device("cpu"))
    model = Autoencoder(settings(args.latents, args.channels))
    optimizers = optimizing.build(model, args.lr, lambda name: "blocks" in name or "cross" in name)
    data = ShapeData()
    train = Cells(torch.cat([turned(data.grids("train"), turn) for turn in range(POSES)]))
    held_out = Cells(data.grids("validation"))
    start, spent = 0, 0.0
    if state := checkpoint.load(args.work / "state.pt"):
        model.load_state_dict(state["model"])
        optimizing.restore(optimizers, state["optimizers"])
        start, spent = state["step"], state["seconds"]
    began = time.time() - spent
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(train.surfaces), (args.batch,), generator=generator).tolist()
        points, (queries, inside) = train.points(picks, generator), train.queries(picks, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(points).float()
            logits = model.logits(latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator), queries)
        mean, variance = latents.mean((0, 1)), latents.var((0, 1))
        pull = mean.square().mean() + (variance - 1).square().mean()
        loss = binary_cross_entropy_with_logits(logits.float(), inside)
        seconds = time.time() - began
        progress = step / args.steps if args.minutes is None else min(1.0, seconds / (60 * args.minutes))
        optimizing.step(optimizers, model, loss + 0.02 * pull, optimizing.rate(step, progress, args.lr))
        if step % 50 == 0:
            right = ((logits > 0) == (inside > 0.5)).float().mean()
            print(f"step {step} loss {loss:.4f} pull {pull:.3f} right {right:.4f} {seconds:.0f} s", flush=True)
        last = step + 1 == args.steps or progress >= 1.0
        if (step + 1) % 200 == 0 or last:
            state = {"model": model.state_dict(), "optimizers": optimizing.states(optimizers), "step": step + 1}
            checkpoint.save(args.work / "state.pt", state | {"seconds": time.time() - began})
            few = list(range(len(held_out.surfaces) if last else 12))
            grids, latents = reconstruct(model.eval(), held_out, few)
            model.train()
            found = iou(grids, held_out.grids[few].reshape(grids.shape))
            print(
                f"step {step + 1}: validation IoU {found.mean():.3f} of {len(few)}, worst {found.min():.3f}", flush=True
            )
        if last:
            model.settings["scale_factor"] = round(1 / latents.std().item(), 4)
            checkpoint.save(args.work / "autoencoder.pt", {"model": model.state_dict(), "settings": model.settings})
            print(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f}")
            break


if __name__ == "__main__":
    main()
