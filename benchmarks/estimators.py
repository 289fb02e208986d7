"""Every estimator on the embedded pipeline: how near its gradient is to the true gain, and what a router learns from it.

    python benchmarks/estimators.py        # writes benchmarks/results/estimators.json; goes on where it stopped

**Check gain**, on the shipped `tokens` adapter at keep 0.6: the loss (output and features, as in training) with one token in,
minus the loss with it out, by running both; what the other tokens and blocks decided stays. The cosine, and the correlation, of
each estimate of dL/dpi to these gains: per block and timestep, and over all of them. `residual-2` has the curvatures that the
trainer fits by its swaps on training pictures; `residual-2 refitted` those fitted to the very flips it is judged by, which no
run can have. "straight-through", "dftopk" and "gumbel" carry the same gain as `residual`, and differ in how it reaches scores.

**Check training**: one untrained router per seed, the same for all estimators, trained by stage 1 (routers alone, the backbone as
it is, every micro-batch at a keep ratio of its own) on the same batches. Judged on held-out pictures at keep 0.6, ranked as at
inference: the mean square of what the routed output misses of the dense one's. One cell is one estimator and seed; a finished
cell is kept. The full form is the default, 500 steps; `training_steps` says what was run.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from shivelight.adapter import detach
from shivelight.cli import common
from shivelight.config import RoutingConfig, TokenRouting
from shivelight.demo import pipeline as embedded
from shivelight.demo.export import export_images
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.training.cache import LatentCache
from shivelight.training.curvature import FIT_EVERY, SwapSession
from shivelight.training.data import build_cache, read_folder
from shivelight.training.draws import Draw
from shivelight.training.estimators import curvature_moments
from shivelight.training.passes import Batch
from shivelight.training.session import TeacherRecord, TokenSession
from shivelight.training.stages import ESTIMATORS, TrainingConfig
from shivelight.training.trainer import Trainer

KEEP = 0.6
TIMES = (0.9, 0.6, 0.3)
JUDGED_AT = (0.95, 0.8, 0.6, 0.4, 0.2)


def cache_of(pipe: Any, folder: Path, split: str, count: int) -> LatentCache:
    """Pictures of a split."""
    images = read_folder(export_images(folder / split, count, split, seed=100_000))  # type: ignore[arg-type]
    return build_cache(pipe, images, folder / "cache", 128, embedded.TEXT_TOKENS)


def drawn(sigma: float, samples: int, first: int, seed: int) -> Draw:
    """A micro-batch of these pictures, with their captions."""
    indices, generator = list(range(first, first + samples)), torch.Generator().manual_seed(seed)
    return Draw(sigma, KEEP, 0.0, 1, indices, [False] * samples, generator)


# --- gain ------------------------------------------------------------------------------------------------------------


@dataclass
class FlipSession(SwapSession):
    """As a swap, but numbers change: every sample takes out, or puts in, as many tokens as the others."""

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Scores and numbers with the flips."""
        scores, counts = super().decide(block, scores)
        if block == self.block:
            more = int(self.put_in[0].sum()) - int(self.taken_out[0].sum())
            counts = tuple(count + more for count in counts)
        return scores, counts


class Gains:
    """The trained pipeline, its estimates and its true gains.

    Args:
        pipe: the embedded pipeline, fp32.
        train: cache of training pictures: curvatures are fitted there.
        held_out: cache of the others.
        scratch: a folder.
        fits: how often one block's curvature is fitted anew, after the first time.
    """

    def __init__(self, pipe: Any, train: LatentCache, held_out: LatentCache, scratch: Path, fits: int) -> None:
        stored = json.loads((embedded.ADAPTER / "adapter_config.json").read_text())
        config = TrainingConfig(
            router_steps=0, policy_steps=0, joint_steps=1000, groups=1, group_size=8, estimator="residual-2",
            flow_weight=0.0, caption_drop=0.0,
        )  # fmt: skip
        self.trainer = Trainer(pipe, RoutingConfig.from_dict(stored["routing"]), config, train, scratch, _plain())
        tensors = load_file(embedded.ADAPTER / "adapter_model.safetensors")
        named = self.trainer.named_parameters()
        if set(named) != set(tensors):
            raise SystemExit(f"the adapter's tensors differ: {sorted(set(named) ^ set(tensors))[:5]}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])
        self.trainer._train_only("joint")
        self.trainer.routed.train()
        self.fit(fits)
        self.trainer.passes.cache = held_out
        # A micro-batch's loss is a mean over samples; here each sample has its own.
        self.curvatures = {
            block: config.group_size * self.trainer.lessons.curvature.of(block).item()
            for block in self.trainer.routed.routed
        }

    def fit(self, fits: int) -> None:
        """The trainer's own fits."""
        trainer = self.trainer
        for fit in range(fits):
            trainer.step = FIT_EVERY * fit
            trainer.lessons.micro_batch("joint", trainer.draws.at(trainer.step)[0], trainer.step, fit=True)
            trainer.routed.session = None

    def losses(self, wanted: Tensor, teacher: TeacherRecord, prediction: Tensor, features: dict[int, Tensor]) -> Tensor:
        """[B]: output and features of each sample."""
        config, losses = self.trainer.config, (prediction - wanted).square().flatten(1).mean(1)
        for block, theirs in teacher.features.items():
            width = theirs.shape[-1:]
            error = F.layer_norm(features[block], width) - F.layer_norm(theirs, width)
            losses = losses + config.feature_weight / len(teacher.features) * error.square().mean((1, 2))
        return losses

    def estimates(self, draw: Draw) -> tuple[dict[str, dict[int, Tensor]], TokenSession, Batch, Tensor, Tensor]:
        """dL/dpi per estimator and block [B, N], each of the sample's own loss; what ran, and the losses [B]."""
        trainer, batch = self.trainer, self.trainer.passes.batch(draw)
        teacher = TeacherRecord(trainer.lessons.features_at)
        wanted, found = trainer.passes.teacher(batch, teacher), {}
        with torch.no_grad():
            ratios = trainer.lessons.ratios("joint", draw)
        for estimator in ("input", "residual-2"):
            session = TokenSession(
                trainer.routed.routed, ratios.requires_grad_(), teacher, estimator, granularity=8
            )  # fmt: skip
            trainer.routed.session = session
            losses = self.losses(wanted, teacher, trainer.passes.predict(batch), session.features)
            blocks = list(session.inclusions)
            gains = torch.autograd.grad(losses.sum(), [session.inclusions[block] for block in blocks])
            found[estimator] = dict(zip(blocks, gains, strict=True))
        trainer.routed.session = None
        found["residual"] = found.pop("residual-2")
        found["residual-2"] = {
            block: gain + self.correction(session, block, self.curvatures[block])
            for block, gain in found["residual"].items()
        }
        return found, session, batch, wanted, losses.detach()

    @staticmethod
    def correction(session: TokenSession, block: int, curvature: float | Tensor) -> Tensor:
        """The second order alone, [B, N]."""
        half = 0.5 * curvature * session.squares[block]
        return torch.where(session.kept[block], -half, half)

    @torch.no_grad()
    def flipped(self, session: TokenSession, batch: Batch, wanted: Tensor, block: int, tokens: Tensor) -> Tensor:
        """[B] losses with one token of each sample flipped; all of them are kept, or all rejected."""
        chosen = torch.zeros_like(session.kept[block]).scatter_(1, tokens[:, None], True)
        kept = bool(session.kept[block][chosen].all())
        flip = FlipSession(session, block, chosen & kept, chosen & (not kept))
        self.trainer.routed.session = flip
        try:
            return self.losses(wanted, session.teacher, self.trainer.passes.predict(batch), flip.features)
        finally:
            self.trainer.routed.session = None

    def at(self, draw: Draw, tokens: int) -> dict[int, dict[str, Tensor]]:
        """Per block: the true gains of some tokens of each sample, [M], and their estimates."""
        estimates, session, batch, wanted, losses = self.estimates(draw)
        found = {}
        for block in session.kept:
            kept = session.kept[block]
            order = torch.rand(kept.shape, generator=draw.generator)
            parts: dict[str, list[Tensor]] = {name: [] for name in ("true", "kept", "squares", *estimates)}
            for pool in (kept, ~kept):
                places = order.masked_fill(~pool, -1.0).topk(tokens // 2, dim=1).indices
                for place in places.T:
                    change = self.flipped(session, batch, wanted, block, place) - losses
                    parts["true"].append(-change if pool is kept else change)
                    parts["kept"].append(torch.full_like(change, float(pool is kept)))
                    rows = {"squares": session.squares[block], **{n: e[block] for n, e in estimates.items()}}
                    for name, values in rows.items():
                        parts[name].append(values.gather(1, place[:, None])[:, 0])
            found[block] = {name: torch.cat(values) for name, values in parts.items()}
        return found


def check_gain(gains: Gains, batches: int, samples: int, tokens: int) -> list[dict[str, Any]]:
    """Rows per estimator, block and timestep, and one per estimator over all of them."""
    flips: dict[tuple[int, float], dict[str, Tensor]] = {}
    for sigma in TIMES:
        seen = [gains.at(drawn(sigma, samples, samples * batch, batch), tokens) for batch in range(batches)]
        for block in seen[0]:
            flips[block, sigma] = {name: torch.cat([part[block][name] for part in seen]) for name in seen[0][block]}
        print(f"flips at t {sigma}: done", flush=True)
    refitted = {}
    for block in sorted({block for block, _ in flips}):
        own = [parts for (other, _), parts in flips.items() if other == block]
        all_of = {name: torch.cat([parts[name] for parts in own]) for name in own[0]}
        signs = 1.0 - 2.0 * all_of["kept"]
        moments = curvature_moments(signs * all_of["true"], signs * all_of["residual"], all_of["squares"])
        refitted[block] = (moments[0] / moments[1]).item()
        for parts in own:
            parts["residual-2 refitted"] = (
                parts["residual"] + (0.5 - parts["kept"]) * refitted[block] * parts["squares"]
            )
    rows: list[dict[str, Any]] = []
    for name in ("input", "residual", "residual-2", "residual-2 refitted"):
        scores = []
        for (block, sigma), parts in flips.items():
            cosine, correlation = agreement(parts[name], parts["true"])
            scores.append((cosine, correlation))
            curvature = {"residual-2": gains.curvatures, "residual-2 refitted": refitted}.get(name, {}).get(block)
            rows.append(new_row(
                name, {"keep": KEEP}, check="gain", block=block, time=sigma, samples=len(parts["true"]), cosine=cosine,
                correlation=correlation, curvature=curvature,
            ))  # fmt: skip
        pooled = {key: torch.cat([parts[key] for parts in flips.values()]) for key in (name, "true", "kept")}
        kept = pooled["kept"] > 0.5
        spread = torch.tensor(scores)
        rows.append(new_row(
            name, {"keep": KEEP}, check="gain, all", samples=len(kept), cosine=spread[:, 0].mean().item(),
            cosine_std=spread[:, 0].std().item(), correlation=spread[:, 1].mean().item(),
            correlation_std=spread[:, 1].std().item(), pooled_cosine=agreement(pooled[name], pooled["true"])[0],
            pooled_cosine_kept=agreement(pooled[name][kept], pooled["true"][kept])[0],
            pooled_cosine_rejected=agreement(pooled[name][~kept], pooled["true"][~kept])[0],
            same_sign=(pooled[name].sign() == pooled["true"].sign()).float().mean().item(),
        ))  # fmt: skip
        print({key: value for key, value in rows[-1].items() if key != "budget"}, flush=True)
    return rows


def agreement(estimate: Tensor, true: Tensor) -> tuple[float, float]:
    """Cosine and correlation of two vectors."""
    estimate, true = estimate.double(), true.double()
    cosine = F.cosine_similarity(estimate, true, dim=0).item()
    return cosine, F.cosine_similarity(estimate - estimate.mean(), true - true.mean(), dim=0).item()


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def output_error(trainer: Trainer, held_out: LatentCache, samples: int) -> float:
    """Mean square of what the routed output misses of the dense one's at keep 0.6, ranked as at inference."""
    passes, seen, errors = trainer.passes, trainer.passes.cache, []
    passes.cache = held_out
    try:
        for place, sigma in enumerate(JUDGED_AT):
            batch, teacher = passes.batch(drawn(sigma, samples, samples * place, 1000 + place)), TeacherRecord(())
            wanted = passes.teacher(batch, teacher)
            ratios = torch.full((1, len(trainer.routed.routed)), KEEP, device=wanted.device)
            # Without a gradient all estimators are one: this one adds no noise.
            trainer.routed.session = TokenSession(trainer.routed.routed, ratios, teacher, granularity=8)
            errors.append(F.mse_loss(passes.predict(batch).float(), wanted.float()).item())
    finally:
        trainer.routed.session, passes.cache = None, seen
    return sum(errors) / len(errors)


def train_cell(
    pipe: Any, caches: tuple[LatentCache, LatentCache], scratch: Path, args: argparse.Namespace, cell: tuple[str, int]
) -> dict[str, Any]:
    """Train one router with one estimator, or none."""
    estimator, seed = cell
    config = TrainingConfig(
        router_steps=args.steps, policy_steps=0, joint_steps=0, groups=args.groups, group_size=args.group_size,
        estimator="residual" if estimator == "untrained" else estimator, seed=seed, warmup=min(50, args.steps // 4),
        lr_router=args.lr_router,
    )  # fmt: skip
    routing = RoutingConfig(TokenRouting(ratios="fixed"), None, None)
    trainer = Trainer(pipe, routing, config, caches[0], scratch, _plain(args.mixed_precision))
    began = time.perf_counter()
    try:
        for _ in range(0 if estimator == "untrained" else args.steps):
            trainer.train_step()
        seconds = None if estimator == "untrained" else time.perf_counter() - began
        return new_row(
            estimator, {"keep": KEEP}, check="training", seed=seed,
            training_steps=0 if estimator == "untrained" else args.steps,
            output_error=output_error(trainer, caches[1], args.judged), seconds=seconds,
        )  # fmt: skip
    finally:
        detach(pipe)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per estimator the mean over its seeds, and over the same seeds its ratio to `residual`."""
    errors: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["check"] == "training":
            errors.setdefault(row["method"], {})[row["seed"]] = row["output_error"]
    found = []
    for name, own in errors.items():
        shared = [seed for seed in own if seed in errors.get("residual", {})]
        values = torch.tensor([own[seed] for seed in own], dtype=torch.float64)
        found.append(new_row(
            name, {"keep": KEEP}, check="training, mean", seeds=len(own), output_error=values.mean().item(),
            output_error_std=values.std().item() if len(own) > 1 else None,
            ratio_to_residual_per_seed=[own[seed] / errors["residual"][seed] for seed in shared] or None,
        ))  # fmt: skip
    return found


def _plain(mixed_precision: str = "no") -> Accelerator:
    AcceleratorState._reset_state()  # the gains are taken in fp32, whatever routers are trained in
    return Accelerator(mixed_precision=mixed_precision, cpu=common.DEFAULT_DEVICE == "cpu")


def main() -> None:
    """Run what is missing, writing the JSON after every piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--judged", type=int, default=16, help="held-out pictures at each of five timesteps")
    parser.add_argument("--pictures", type=int, default=512, help="to train on")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--batches", type=int, default=2, help="of flips at each of three timesteps")
    parser.add_argument("--samples", type=int, default=4, help="of a batch of flips")
    parser.add_argument(
        "--tokens", type=int, default=12, help="flipped in each sample and block, half of them kept ones"
    )
    parser.add_argument("--fits", type=int, default=42, help="of curvatures, beyond the first of each block")
    parser.add_argument("--lr-router", type=float, default=TrainingConfig.lr_router)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/estimators.json"))
    args = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    device = common.DEFAULT_DEVICE
    pipe = common.open_pipeline(None, device)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "seeds")}
    command = " ".join(["benchmarks/estimators.py", *sys.argv[1:]])
    backbone = {"class": type(pipe.transformer).__name__, "of": "the embedded pipeline"}
    results = new_results(command, device=device, backbone=backbone, settings=settings)
    if args.out.exists():
        earlier = json.loads(args.out.read_text())
        if earlier.get("settings") == settings:
            results["rows"] = [row for row in earlier["rows"] if row["check"] != "training, mean"]
    rows = results["rows"]

    def save() -> None:
        write_results(args.out, {**results, "rows": rows + means(rows)})

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        caches = (
            cache_of(pipe, folder, "train", args.pictures),
            cache_of(pipe, folder, "validation", max(args.judged * len(JUDGED_AT), args.samples * args.batches)),
        )
        if not any(row["check"] == "gain, all" for row in rows):
            gains = Gains(pipe, *caches, folder / "gain", args.fits)
            rows += check_gain(gains, args.batches, args.samples, args.tokens)
            gains.trainer.close()
            save()
        done = {(row["method"], row["seed"]) for row in rows if row["check"] == "training"}
        for seed in range(args.seeds):
            for estimator in ("untrained", *ESTIMATORS):
                if (estimator, seed) in done:
                    continue
                rows.append(train_cell(pipe, caches, folder / "cell", args, (estimator, seed)))
                print({key: value for key, value in rows[-1].items() if key != "budget"}, flush=True)
                save()
    save()


if __name__ == "__main__":
    main()
