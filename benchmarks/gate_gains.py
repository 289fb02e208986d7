"""How near a gate's gradient is to what its block is worth: the first order that a straight-through gate gets, and the second.

    python benchmarks/gate_gains.py      # writes benchmarks/results/gate-gains.json, minutes

The embedded pipeline; every sample runs a random 70% of the routed blocks. A block's true gain is the loss (output and data, as
in training) with it running minus the loss with it closed, by running both; what the other blocks do stays. Closed blocks pass by,
or add their residuals of one step earlier. The gradient to the gate is <g, r>, r what running adds to that; its second order takes
h/2 |r|^2 from it where the block runs, and adds it where it does not (`training/estimators.py`, there for tokens), h one scalar for
each block, fitted by least squares to flips on training pictures. Judged on held-out pictures, per block and timestep.

**Check training**: what routers learn by either, from the same start on the same batches, and, where closed blocks reuse, by
measured damage. Judged on held-out pictures at shares of open gates, which the dial is turned to: the mean square of what the
output misses of the dense one's. A finished cell is kept.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from estimators import JUDGED_AT, TIMES, agreement, cache_of, drawn
from torch import Tensor

from shivelight.cli import common
from shivelight.config import BlockRouting, Reuse, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.training.curvature import FixedGates
from shivelight.training.estimators import curvature_moments
from shivelight.training.passes import Batch
from shivelight.training.session import TeacherRecord
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

OUT = Path("benchmarks/results/gate-gains.json")
OPEN = 0.7
SHARES = (0.8, 0.6)
SIGNALS = ("first order", "second order", "damage")
ESTIMATES = ("first order", "second order", "second order refitted")


class Gains:
    """The pipeline with block routers attached, which nobody asks.

    Args:
        pipe: the embedded pipeline, fp32.
        caches: of training and held-out pictures.
        reuse: whether closed blocks add their last residuals.
        scratch: a folder.
    """

    def __init__(self, pipe: Any, caches: tuple[Any, Any], reuse: bool, scratch: Path) -> None:
        routing = RoutingConfig(
            None, BlockRouting(widths=(1.0,), closed="reuse" if reuse else "pass"), reuse=Reuse() if reuse else None
        )
        config = TrainingConfig(router_steps=1, policy_steps=0, joint_steps=0, groups=1, caption_drop=0.0)
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision="no", cpu=common.DEFAULT_DEVICE == "cpu")
        self.trainer = Trainer(pipe, routing, config, caches[0], scratch, accelerator)
        self.caches = caches

    def losses(self, batch: Batch, wanted: Tensor, session: FixedGates) -> Tensor:
        """[B], of each sample."""
        passes, config = self.trainer.passes, self.trainer.config
        self.trainer.routed.gate_session = session
        try:
            prediction = passes.predict(batch)
        finally:
            self.trainer.routed.gate_session = None
        target = passes.denoiser.target(batch.clean, batch.noise, batch.sigmas)
        to_teacher, to_data = ((prediction - other).square().flatten(1).mean(1) for other in (wanted, target))
        return config.output_weight * to_teacher + config.flow_weight * to_data

    def at(self, sigma: float, samples: int, place: int, held_out: bool) -> dict[int, dict[str, Tensor]]:
        """Per block: the true gain of each sample [B], its first order, |r|^2, and whether the block ran."""
        passes, routed = self.trainer.passes, self.trainer.routed.routed
        passes.cache = self.caches[held_out]
        draw = drawn(sigma, samples, samples * place, place)
        batch, teacher = passes.batch(draw), TeacherRecord(())
        wanted, cached = passes.teacher(batch, teacher), passes.cached(draw, batch)
        opened = (torch.rand(len(routed), samples, generator=draw.generator) < OPEN).float()

        def session(gates: Tensor) -> FixedGates:
            given = dict(zip(routed, gates, strict=True))
            return FixedGates(teacher, (1.0,), cached=cached, measures=True, given=given)

        gates = opened.clone().requires_grad_()
        ran = session(gates)
        losses = self.losses(batch, wanted, ran)
        (gradients,) = torch.autograd.grad(losses.sum(), gates)
        found = {}
        for row, block in enumerate(routed):
            flipped = opened.clone()
            flipped[row] = 1 - flipped[row]
            with torch.no_grad():
                change = self.losses(batch, wanted, session(flipped)) - losses.detach()
            signs = 1 - 2 * opened[row]  # +1 where the flip opens the block
            found[block] = {
                "true": signs * change, "first order": gradients[row], "squares": ran.squares[block], "ran": opened[row],
            }  # fmt: skip
        return found


def gathered(gains: Gains, batches: int, samples: int, held_out: bool) -> dict[tuple[int, float], dict[str, Tensor]]:
    """By block and timestep, over all batches."""
    found = {}
    for sigma in TIMES:
        seen = [gains.at(sigma, samples, batch, held_out) for batch in range(batches)]
        for block in seen[0]:
            found[block, sigma] = {name: torch.cat([part[block][name] for part in seen]) for name in seen[0][block]}
    return found


def fitted(flips: dict[tuple[int, float], dict[str, Tensor]]) -> dict[int, float]:
    """h of each block, over all timesteps."""
    found = {}
    for block in sorted({block for block, _ in flips}):
        own = [parts for (other, _), parts in flips.items() if other == block]
        parts = {name: torch.cat([part[name] for part in own]) for name in own[0]}
        signs = 1 - 2 * parts["ran"]
        moments = curvature_moments(signs * parts["true"], signs * parts["first order"], parts["squares"])
        found[block] = float(moments[0] / moments[1])
    return found


def rows_of(closed: str, gains: Gains, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of one meaning of closed gates: per estimate and block, and over all of them."""
    trained = fitted(gathered(gains, args.batches, args.samples, held_out=False))
    flips = gathered(gains, args.batches, args.samples, held_out=True)
    curvatures = {
        "first order": dict.fromkeys(trained, 0.0),
        "second order": trained,
        "second order refitted": fitted(flips),
    }
    rows: list[dict[str, Any]] = []
    for estimate in ESTIMATES:
        cells, estimates = [], {}
        for (block, sigma), parts in flips.items():
            h = curvatures[estimate][block]
            estimates[block, sigma] = parts["first order"] + (0.5 - parts["ran"]) * h * parts["squares"]
            cells.append(agreement(estimates[block, sigma], parts["true"]))
            cosine, correlation = cells[-1]
            rows.append(new_row(
                estimate, {}, check="gain", closed=closed, block=block, time=sigma, samples=len(parts["true"]),
                cosine=cosine, correlation=correlation, curvature=h,
            ))  # fmt: skip
        spread, true = torch.tensor(cells), torch.cat([parts["true"] for parts in flips.values()])
        pooled = torch.cat(list(estimates.values()))
        rows.append(new_row(
            estimate, {}, check="gain, all", closed=closed, samples=len(true), cosine=spread[:, 0].mean().item(),
            correlation=spread[:, 1].mean().item(), pooled_cosine=agreement(pooled, true)[0],
            pooled_correlation=agreement(pooled, true)[1],
            same_sign=(pooled.sign() == true.sign()).float().mean().item(),
        ))  # fmt: skip
        print({key: value for key, value in rows[-1].items() if key != "budget"}, flush=True)
    return rows


@torch.no_grad()
def judged(trainer: Trainer, held_out: Any, samples: int) -> dict[str, dict[str, float]]:
    """By share of open gates that was wanted: that which the dial came to, and the mean square of what the output misses."""
    passes, lessons, seen = trainer.passes, trainer.lessons, trainer.passes.cache
    passes.cache = held_out
    draws = [drawn(sigma, samples, samples * place, 1000 + place) for place, sigma in enumerate(JUDGED_AT)]
    batches = [passes.batch(draw) for draw in draws]
    teachers = [TeacherRecord(()) for _ in draws]
    wanted = [passes.teacher(batch, teacher) for batch, teacher in zip(batches, teachers, strict=True)]
    cached = [passes.cached(draw, batch) for draw, batch in zip(draws, batches, strict=True)]
    found = {}
    for share in SHARES:
        low, high = -20.0, 20.0
        for _ in range(14):
            shift, opened, errors = (low + high) / 2, [], []
            for place, draw in enumerate(draws):
                draw.shift = shift
                session = lessons._block_session(draw, teachers[place], cached[place])
                trainer.routed.gate_session = session
                prediction = passes.predict(batches[place])
                opened.append(session.ran().float().mean())
                errors.append((prediction - wanted[place]).square().mean())
            low, high = (shift, high) if float(torch.stack(opened).mean()) < share else (low, shift)
        found[f"{share:g}"] = {"open": float(torch.stack(opened).mean()), "error": float(torch.stack(errors).mean())}
    trainer.routed.gate_session, passes.cache = None, seen
    return found


def train_cell(
    closed: str, signal: str, seed: int, caches: tuple[Any, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Train routers by one signal, or by none."""
    estimator: Any = "residual-2" if signal == "second order" else "residual"
    config = TrainingConfig(
        router_steps=args.steps, policy_steps=0, joint_steps=0, groups=1, group_size=args.samples, seed=seed,
        estimator=estimator, gate_signal="damage" if signal == "damage" else "gradient", rank_batches=0,
    )  # fmt: skip
    reuse = closed == "reuse"
    routing = RoutingConfig(None, BlockRouting(widths=(1.0,), closed=closed), reuse=Reuse() if reuse else None)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16", cpu=common.DEFAULT_DEVICE == "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            embedded.load_pipeline(common.DEFAULT_DEVICE), routing, config, caches[0], Path(scratch), accelerator
        )
        for _ in range(args.steps):
            trainer.train_step()
        shares = judged(trainer, caches[1], args.samples)
    return new_row(
        signal, {}, check="training", closed=closed, seed=seed, training_steps=args.steps,
        shares=shares,
    )  # fmt: skip


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, and over those of the first order."""
    cells = {(row["closed"], row["method"], row["seed"]): row["shares"] for row in rows if row["check"] == "training"}
    found = []
    for closed, signal in dict.fromkeys((closed, signal) for closed, signal, _ in cells):
        own = {seed: shares for (c, s, seed), shares in cells.items() if (c, s) == (closed, signal)}
        base = {seed: cells[closed, "first order", seed] for seed in own if (closed, "first order", seed) in cells}
        for share in map("{:g}".format, SHARES):
            found.append(new_row(
                signal, {}, check="training, mean", closed=closed, share=float(share), seeds=len(own),
                output_error=sum(shares[share]["error"] for shares in own.values()) / len(own),
                over_first_order=[own[seed][share]["error"] / base[seed][share]["error"] for seed in base],
            ))  # fmt: skip
    return found


def main() -> None:
    """Run what is missing, writing the JSON after every piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help="at each of three timesteps, on either set of pictures")
    parser.add_argument("--samples", type=int, default=8, help="of a batch")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=512, help="to train on")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    common.quiet_libraries()
    results = new_results(device=common.DEFAULT_DEVICE, open=OPEN)
    if args.out.exists():
        results["rows"] = [row for row in read_results(args.out)["rows"] if row["check"] != "training, mean"]
    done = {(row["closed"], row["method"], row.get("seed")) for row in results["rows"]}
    with tempfile.TemporaryDirectory() as scratch:
        count = max(args.batches, len(JUDGED_AT)) * args.samples
        pipe = embedded.load_pipeline(common.DEFAULT_DEVICE)
        caches = (
            cache_of(pipe, Path(scratch) / "train", "train", args.pictures),
            cache_of(pipe, Path(scratch) / "validation", "validation", count),
        )
        for closed in ("pass", "reuse"):
            if (closed, ESTIMATES[0], None) not in done:
                gains = Gains(
                    embedded.load_pipeline(common.DEFAULT_DEVICE), caches, closed == "reuse", Path(scratch) / closed
                )
                results["rows"] += rows_of(closed, gains, args)
                write_results(args.out, results)
        signals = {"pass": SIGNALS[:-1], "reuse": SIGNALS}
        for seed in range(args.seeds):
            for closed, signal in ((closed, signal) for closed, own in signals.items() for signal in own):
                if (closed, signal, seed) not in done:
                    results["rows"].append(train_cell(closed, signal, seed, caches, args))
                    print(results["rows"][-1], flush=True)
                    write_results(args.out, results)
    write_results(args.out, results | {"rows": [*results["rows"], *means(results["rows"])]})


if __name__ == "__main__":
    main()
