"""How near a gate's gradient is to what its block is worth: the first order that a straight-through gate gets, and the second.

    python benchmarks/gate_gains.py      # writes benchmarks/results/gate-gains.json, minutes

The embedded pipeline; every sample runs a random 70% of the routed blocks. A block's true gain is the loss (output and data, as
in training) with it running minus the loss with it closed, by running both; what the other blocks do stays. Closed blocks pass by,
or add their residuals of one step earlier. The gradient to the gate is <g, r>, r what running adds to that; its second order takes
h/2 |r|^2 from it where the block runs, and adds it where it does not (`training/estimators.py`, there for tokens), h one scalar for
each block, fitted by least squares to flips on training pictures. Judged on held-out pictures, per block and timestep.

That routers learn no better by it was seen with a trainer that had it (docs/decisions/estimator.md), whose rows are kept.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from estimators import TIMES, agreement, cache_of, drawn
from torch import Tensor

from shivelight.cli import common
from shivelight.config import BlockRouting, Reuse, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.training.estimators import curvature_moments
from shivelight.training.passes import Batch
from shivelight.training.session import BlockSession, TeacherRecord
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

OUT = Path("benchmarks/results/gate-gains.json")
OPEN = 0.7
ESTIMATES = ("first order", "second order", "second order refitted")


@dataclass
class FixedGates(BlockSession):
    """A pass in which gates are given, and |r|^2 of both streams is noted, r what running a block adds.

    Attributes:
        given: per block [B], 0 or 1.
        squares: per block [B].
    """

    given: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)

    def choose(self, block: int, logits: Tensor) -> tuple[tuple[bool, ...], Tensor | None]:
        """As given."""
        self._gates[block] = self.given[block]
        return tuple((self.given[block].detach() > 0.5).tolist()), None

    def leave(
        self, block: int, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Also note how much running adds; of a block that is closed, as the teacher's."""
        ran, cached = self.given[block].detach() > 0.5, self.cached.get(block)
        missed = self.teacher.residuals[block], self.teacher.text_residuals.get(block)
        stale = (None, None) if cached is None else (cached.residual, cached.text_residual)
        total = torch.zeros(len(ran), device=ran.device)
        for x, out, closed, old in zip(before, after, missed, stale, strict=True):
            if x is not None and out is not None and closed is not None:
                added = torch.where(ran[:, None, None], (out - x).detach(), closed)
                total += (added if old is None else added - old).float().square().flatten(1).sum(1)
        self.squares[block] = total
        return super().leave(block, before, after)


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
            return FixedGates(teacher, (1.0,), cached=cached, given=given)

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


def main() -> None:
    """Measure both meanings of closed gates; rows of training that are there stay, with what made them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="at each of three timesteps, on either set of pictures")
    parser.add_argument("--samples", type=int, default=4, help="of a batch")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    common.quiet_libraries()
    results = new_results(device=common.DEFAULT_DEVICE, open=OPEN)
    if args.out.exists():
        earlier = read_results(args.out)
        results["rows"] = [row for row in earlier["rows"] if row["check"].startswith("training")]
        made = {name: earlier[name] for name in ("command", "commit", "machine")}
        results["training"] = earlier.get("training", made)
    with tempfile.TemporaryDirectory() as scratch:
        pipe, count = embedded.load_pipeline(common.DEFAULT_DEVICE), args.batches * args.samples
        caches = (
            cache_of(pipe, Path(scratch) / "train", "train", count),
            cache_of(pipe, Path(scratch) / "validation", "validation", count),
        )
        for closed in ("pass", "reuse"):
            gains = Gains(
                embedded.load_pipeline(common.DEFAULT_DEVICE), caches, closed == "reuse", Path(scratch) / closed
            )
            results["rows"] += rows_of(closed, gains, args)
    write_results(args.out, results)


if __name__ == "__main__":
    main()
