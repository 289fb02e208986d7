"""Distil the embedded pipeline, or a folder of its kind, to a few steps without guidance: what users' turbo, schnell and lightning
models are like, and where fewer steps are no way out.

    python recipes/distil_few_steps.py --minutes 60      # resumes by itself

Piecewise rectified flow (PeRFlow, arXiv 2405.07510) on the guided trajectories of the teacher: time is cut where the few steps
cut it, and in each window the student learns the one velocity that leads from the teacher's state at its start to that at its
end; half of the draws are at the start, where sampling asks, half on the straight line within. Trajectories are drawn anew until
there are --trajectories of them. What is exported is the exponential moving average, in fp16.
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import checkpoint
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from teachers import RECORD, known_concepts
from torch import Tensor, nn
from train_teacher import EMA_DECAY, build_optimizers, learning_rate

from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.fidelity import psnr

# Where the last step starts. The scheduler's own grid ends at 0.009, so that the last of its few steps would do nothing.
LAST = 0.4
SUBSTEPS = 4  # of the teacher in each window, of second order
CHUNK = 32  # trajectories drawn together
SEED = 7_000_000  # of the first trajectory; pictures that judge have small ones


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Captions as the transformer wants them: sequences [n, T, C], pooled [n, C], and the empty caption's."""

    sequence: Tensor
    pooled: Tensor
    empty: tuple[Tensor, Tensor]


def encode(pipe: Any, captions: list[str]) -> Prompts:
    """All captions, once; the text encoders stay as they are."""
    parts = []
    for first in range(0, len(captions), 64):
        text = captions[first : first + 64]
        sequence, negative, pooled, pooled_negative = pipe.encode_prompt(
            text, text, text, max_sequence_length=embedded.TEXT_TOKENS, do_classifier_free_guidance=True
        )
        parts.append((sequence, pooled))
    return Prompts(*(torch.cat(part) for part in zip(*parts, strict=True)), (negative[:1], pooled_negative[:1]))


@torch.no_grad()
def trajectories(
    teacher: nn.Module, prompts: Prompts, picks: Tensor, sigmas: Tensor, generator: torch.Generator
) -> Tensor:
    """The teacher's guided states [len(sigmas), n, 8, S, S] at the windows' ends, by Adams and Bashforth's second order."""
    side = teacher.config.sample_size
    state = torch.randn(len(picks), teacher.config.in_channels, side, side, generator=generator).to(picks.device)
    sequence = torch.cat([prompts.sequence[picks], prompts.empty[0].expand(len(picks), -1, -1)])
    pooled = torch.cat([prompts.pooled[picks], prompts.empty[1].expand(len(picks), -1)])
    states, before, last = [state], None, 0.0
    for start, end in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        step = (end - start) / SUBSTEPS
        for part in range(SUBSTEPS):
            when = torch.full((len(sequence),), 1000 * (start + part * step), device=state.device)
            with torch.autocast(state.device.type, torch.bfloat16):
                both = teacher(torch.cat([state, state]), sequence, pooled, when, return_dict=False)[0].float()
            kept, free = both.chunk(2)
            velocity = free + embedded.GUIDANCE * (kept - free)
            # Unequal steps where a window ends: the slope between the two velocities is theirs, the step is ours.
            slope = 0.0 if before is None else (velocity - before) / last
            state = state + step * velocity + 0.5 * step * step * slope
            before, last = velocity, step
        states.append(state)
    return torch.stack(states)


def few_step_scheduler(pipe: Any) -> FlowMatchEulerDiscreteScheduler:
    """The pipeline's scheduler, its last step starting at `LAST`: `num_inference_steps` is all that a call must say."""
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=LAST)


def export(pipe: Any, student: nn.Module, record: dict[str, Any], folder: Path) -> Any:
    """The pipeline folder in fp16 with teacher.json; returns the pipeline in fp32."""
    parts = pipe.components | {"transformer": copy.deepcopy(student).half(), "scheduler": few_step_scheduler(pipe)}
    few = type(pipe)(**parts)

    def write(unfinished: Path) -> None:
        few.save_pretrained(unfinished)
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    checkpoint.save_folder(write, folder)
    few.set_progress_bar_config(disable=True)
    few.transformer = student
    return few


def judge(pipe: Any, few: Any, captions: list[str], steps: int, path: Path) -> float:
    """A grid of the teacher's pictures above the student's; returns the mean PSNR between them."""

    def draw(pipeline: Any, count: int, guidance: float) -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        options = {"guidance_scale": guidance, "max_sequence_length": embedded.TEXT_TOKENS, "output_type": "pt"}
        return pipeline(captions, num_inference_steps=count, generator=seeds, **options).images.float().cpu()

    wanted, drawn = draw(pipe, embedded.STEPS, embedded.GUIDANCE), draw(few, steps, 1.0)
    rows = [images[first : first + 16] for first in range(0, len(captions), 16) for images in (wanted, drawn)]
    checkpoint.grid(torch.cat(rows) * 2 - 1, 16).save(path)
    return float(psnr(drawn, wanted).mean())


def main() -> None:
    """Distil or go on; export at the end and every --export steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=embedded.PIPELINE, help="an SD3 pipeline folder without T5")
    parser.add_argument("--work", type=Path, default=Path("build/few-step"))
    parser.add_argument("--few", type=int, default=4, help="steps that the student takes")
    parser.add_argument("--trajectories", type=int, default=3200)
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="of all runs together; the learning rate falls by the clock"
    )
    parser.add_argument("--between", type=int, default=12, help="training steps between two chunks of trajectories")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--export", type=int, default=400)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = checkpoint.device()
    pipe = embedded.open_pipeline(args.pipeline, device, torch.float32)
    data, known = EmojiData(), known_concepts(args.pipeline)
    captions = {
        split: [str(c) for c in data.captions(split) if c.concept.label in known] for split in ("train", "validation")
    }
    prompts = encode(pipe, captions["train"])
    scheduler = few_step_scheduler(pipe)
    scheduler.set_timesteps(args.few)
    sigmas = scheduler.sigmas.to(device)
    checkpoint.use_plain_attention(device)

    student = nn.ModuleDict({"transformer": copy.deepcopy(pipe.transformer).train().requires_grad_(True)})
    average = copy.deepcopy(student).requires_grad_(False)
    optimizers = build_optimizers(student, args.lr)
    parts = {"model": student, "average": average, "optimizers": optimizers}
    state = checkpoint.resume(args.work / "state.pt", **parts)
    start, seconds = state.get("step", 0), state.get("seconds", 0.0)
    chunks = []
    while (found := checkpoint.load(args.work / f"trajectories-{len(chunks):04d}.pt")) is not None:
        chunks.append((found["states"], found["picks"]))
    record = {
        "family": "sd3",
        "subset": "basic",
        "concepts": sorted(known),
        "text_tokens": embedded.TEXT_TOKENS,
        "steps": args.few,
        "guidance": 1.0,
        "options": {"max_sequence_length": embedded.TEXT_TOKENS},
        "distilled": {"sigmas": sigmas.tolist(), "guidance": embedded.GUIDANCE, "substeps": SUBSTEPS},
    }
    print(f"windows {[round(s, 3) for s in sigmas.tolist()]}, from step {start}, {len(chunks)} chunks", flush=True)
    began, smooth = time.time(), None
    wanted = math.ceil(args.trajectories / CHUNK)
    for step in range(start, args.steps):
        if len(chunks) < wanted and (not chunks or step % args.between == 0):
            generator = torch.Generator().manual_seed(SEED + len(chunks))
            picks = torch.randint(len(captions["train"]), (CHUNK,), generator=generator)
            states = trajectories(pipe.transformer, prompts, picks.to(device), sigmas, generator).half().cpu()
            checkpoint.save(args.work / f"trajectories-{len(chunks):04d}.pt", {"states": states, "picks": picks})
            chunks.append((states, picks))
        spent = seconds + time.time() - began
        progress = max(step / args.steps, spent / (60 * args.minutes))
        generator = torch.Generator().manual_seed(SEED - 1 - step)
        which = torch.randint(len(chunks) * CHUNK, (args.batch,), generator=generator).tolist()
        window = torch.randint(args.few, (args.batch,), generator=generator)
        # 0 at the window's start; half of the draws are just there.
        along = torch.rand(args.batch, generator=generator) * (torch.rand(args.batch, generator=generator) < 0.5)
        pairs = [chunks[i // CHUNK][0][w : w + 2, i % CHUNK] for i, w in zip(which, window.tolist(), strict=True)]
        first, second = torch.stack(pairs, 1).float().to(device)
        picks = torch.stack([chunks[i // CHUNK][1][i % CHUNK] for i in which]).to(device)
        window, along = window.to(device), along.to(device)
        begin, end = sigmas[window], sigmas[window + 1]
        noisy = torch.lerp(first, second, along[:, None, None, None])
        target = (second - first) / (end - begin)[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            when = 1000 * torch.lerp(begin, end, along)
            predicted = student["transformer"](
                noisy, prompts.sequence[picks], prompts.pooled[picks], when, return_dict=False
            )[0]
        loss = (predicted.float() - target).square().mean()
        student.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, min(progress, 1.0), args.lr)
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        if step % 20 == 0:
            print(f"step {step} loss {smooth:.4f} chunks {len(chunks)} {spent / 60:.1f} min", flush=True)
        last = step + 1 == args.steps or progress >= 1.0
        if (step + 1) % args.export == 0 or last:
            spent = seconds + time.time() - began
            checkpoint.save(args.work / "state.pt", checkpoint.capture(**parts) | {"step": step + 1, "seconds": spent})
            few = export(pipe, average["transformer"], record, args.work / "pipeline")
            near = judge(pipe, few, captions["validation"][:32], args.few, args.work / f"preview-{step + 1}.png")
            print(f"step {step + 1}: {near:.2f} dB to the teacher", flush=True)
        if last:
            break


if __name__ == "__main__":
    main()
