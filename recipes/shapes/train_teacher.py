"""Train a dense teacher of shapes: Hunyuan3DDiT and a small view conditioner on the latents of encoder.py.

    python recipes/shapes/encoder.py
    python recipes/shapes/train_decoder.py                         # may run at the same time
    python recipes/shapes/train_teacher.py --steps 3000            # resumes from --work by itself

Flow matching in hy3dgen's convention: at time t from 0 to 1 the input is (1 - t) noise + t data, and what is learnt is the
velocity data - noise. Times are logit-normal, conditions are dropped for guidance. What is written is the exponential moving
average with the decoder as it is by then: `pipeline.pt`, which `shivelight.demo.shape_pipeline.open_pipeline` reads. Called again
when all steps are done, it writes that file anew.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import encoder
import optimizing
import torch
from encoder import POSES
from PIL import Image
from torch import Tensor, nn

from shivelight.backbones import hy3dgen
from shivelight.demo import shape_pipeline
from shivelight.demo.shapes import view
from shivelight.evaluation.shapes import chamfer, iou

sys.path.append(str(Path(__file__).parents[1]))
import checkpoint  # noqa: E402

EMA_DECAY = 0.995
CONDITION_DROP = 0.1


class Teacher(nn.Module):
    """Denoiser and conditioner as one module to train; `forward` is the velocity."""

    def __init__(self, denoiser: dict[str, int], conditioner: dict[str, int]) -> None:
        super().__init__()
        self.settings = {"denoiser": denoiser, "conditioner": conditioner}
        self.conditioner = shape_pipeline.ViewConditioner(**conditioner)
        self.denoiser = shape_pipeline.build_denoiser(**denoiser)

    def forward(self, noisy: Tensor, times: Tensor, views: Tensor, dropped: Tensor) -> Tensor:
        """[B, N, C] at times [B] of views [B, 1, 32, 32]; bool [B] says whose condition is taken away."""
        given = self.conditioner(views)["main"]
        absent = self.conditioner.unconditional_embedding(len(views))["main"]
        contexts = {"main": torch.where(dropped[:, None, None], absent, given)}
        return self.denoiser(noisy, times, contexts)


def export(average: Teacher, vae_file: Path, held_out: dict[str, Tensor], work: Path, name: str) -> None:
    """Write `pipeline.pt` and a picture: views of validation shapes above what is generated from them, by the pipeline itself;
    print how near that is to the true shapes. Nothing where there is no decoder yet."""
    state = checkpoint.load(vae_file)
    if state is None:
        return
    vae = hy3dgen.load().ShapeVAE(**state["settings"])
    vae.load_state_dict(state["model"])
    pipe = shape_pipeline.build_pipeline(
        vae.eval(), copy.deepcopy(average.denoiser).eval(), copy.deepcopy(average.conditioner).eval()
    )
    shape_pipeline.save_pipeline(pipe, average.settings | {"vae": state["settings"]}, work / "pipeline.pt")
    shown = slice(0, None, 3)
    grids, views = held_out["grids"][shown], [Image.fromarray(v.numpy()) for v in held_out["views"][shown, 0]]
    made = shape_pipeline.occupancy(pipe, shape_pipeline.generate(pipe, views, 25))
    sheet = Image.new("L", (32 * len(views), 64))
    for row, pictures in enumerate((views, [view(grid) for grid in made])):
        for column, image in enumerate(pictures):
            sheet.paste(image, (32 * column, 32 * row))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(work / f"preview-{name}.png")
    distance = chamfer(made, grids)
    near = distance[distance.isfinite()]
    print(
        f"preview-{name}: IoU with the true shapes {iou(made, grids).mean():.3f}, Chamfer {near.mean():.4f}, "
        f"{len(distance) - len(near)} empty of {len(grids)}",
        flush=True,
    )


@torch.no_grad()
def validation_loss(teacher: Teacher, latents: Tensor, views: Tensor) -> float:
    """Mean loss with the condition at 8 times, always with the same noise."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for time_ in (torch.arange(8) + 0.5) / 8:
        noise = torch.randn(latents.shape, generator=generator)
        times = time_.expand(len(latents))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = teacher(torch.lerp(noise, latents, time_), times, views, torch.zeros(len(latents), dtype=bool))
        losses.append((velocity.float() - (latents - noise)).square().mean())
    return torch.stack(losses).mean().item()


def main() -> None:
    """Train or go on training; write the average and a picture every --export steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--double", type=int, default=3)
    parser.add_argument("--single", type=int, default=6)
    parser.add_argument("--minutes", type=float, help="end after so many, the learning rate falling by the clock")
    parser.add_argument("--latents", type=Path, default=Path("build/shapes/latents.pt"))
    parser.add_argument("--decoder", type=Path, default=Path("build/shapes/decoder/vae.pt"))
    parser.add_argument("--work", type=Path, default=Path("build/shapes/teacher"))
    parser.add_argument("--export", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    # Before hy3dgen is imported, which takes torch's attention by its name.
    checkpoint.use_plain_attention(torch.device("cpu"))
    args.work.mkdir(parents=True, exist_ok=True)
    data = encoder.load(args.latents)
    latents, views, held_out = data["train"]["latents"], data["train"]["views"], data["validation"]
    held_latents, held_views = held_out["latents"][:, 0, 0].float(), held_out["views"][:, :1].float() / 255
    sizes = {name: getattr(args, name) for name in ("width", "double", "single")}
    teacher = Teacher({"channels": encoder.CHANNELS, "context": 128} | sizes, {"width": 128})
    average = copy.deepcopy(teacher).requires_grad_(False)
    optimizers = optimizing.build(teacher, args.lr, lambda name: "blocks" in name and "mod" not in name)
    start, spent = 0, 0.0
    if state := checkpoint.load(args.work / "state.pt"):
        teacher.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizing.restore(optimizers, state["optimizers"])
        start, spent = state["step"], state["seconds"]
    print(
        f"{sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6:.2f} M parameters, from step {start}", flush=True
    )
    began, smooth = time.time() - spent, None
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(latents), (args.batch,), generator=generator)
        poses = torch.randint(POSES, (args.batch,), generator=generator)
        times_encoded = torch.randint(latents.shape[2], (args.batch,), generator=generator)
        clean = latents[picks, poses, times_encoded].float()
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.sigmoid(torch.randn(args.batch, generator=generator))
        dropped = torch.rand(args.batch, generator=generator) < CONDITION_DROP
        noisy = torch.lerp(noise, clean, times[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = teacher(noisy, times, views[picks, poses][:, None].float() / 255, dropped)
        loss = (velocity.float() - (clean - noise)).square().mean()
        seconds = time.time() - began
        progress = step / args.steps if args.minutes is None else min(1.0, seconds / (60 * args.minutes))
        optimizing.step(optimizers, teacher, loss, optimizing.rate(step, progress, args.lr))
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(teacher.parameters()), 1 - decay)
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        last = step + 1 == args.steps or progress >= 1.0
        if step % 50 == 0:
            print(f"step {step} loss {smooth:.4f} {seconds:.0f} s", flush=True)
        if (step + 1) % args.export == 0 or last:
            state = {"model": teacher.state_dict(), "average": average.state_dict(), "step": step + 1}
            state |= {"optimizers": optimizing.states(optimizers), "seconds": time.time() - began}
            checkpoint.save(args.work / "state.pt", state)
            loss_there = validation_loss(average.eval(), held_latents, held_views)
            print(f"step {step + 1}: validation loss {loss_there:.4f}", flush=True)
            export(average, args.decoder, held_out, args.work, str(step + 1))
        if last:
            return
    export(average.eval(), args.decoder, held_out, args.work, str(start))


if __name__ == "__main__":
    main()
