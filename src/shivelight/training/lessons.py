"""What a micro-batch teaches: the student's pass beside the teacher's, and the losses of both.

Shapes: B samples, N image tokens, L routed blocks, S widths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from shivelight.execution.reuse import CachedPass
from shivelight.execution.routed import Routed
from shivelight.routing import Dial, solve_anchor
from shivelight.training.curvature import Curvature, first_order, swapped
from shivelight.training.damage import GateReading, damage_loss
from shivelight.training.draws import Draw, Draws
from shivelight.training.estimators import anneal, curvature_moments
from shivelight.training.gates import gate_loss, width_loss
from shivelight.training.losses import BudgetLoss, feature_distillation
from shivelight.training.passes import Batch, Passes
from shivelight.training.session import BlockSession, TeacherRecord, TokenSession
from shivelight.training.stages import StageName, TrainingConfig


def compared_blocks(config: TrainingConfig, blocks: int) -> tuple[int, ...]:
    """Which of so many blocks' outputs are compared with the teacher's: every so-manieth, and the last."""
    return tuple(sorted({*range(config.feature_every - 1, blocks, config.feature_every), blocks - 1}))


class Lessons:
    """The losses of micro-batches, and what is carried on from one to the next.

    Args:
        config: settings of the run.
        routed: state of the backbone.
        passes: of teacher and student.
        draws: of the micro-batches.
        loss: name of the loss on data.
        accelerator: device and processes.

    Attributes:
        averages: of the losses on targets, over micro-batches.
        curvature: of each block, where tokens' gains are of the second order.
        features_at: blocks whose outputs are compared.
    """

    def __init__(
        self, config: TrainingConfig, routed: Routed, passes: Passes, draws: Draws, loss: str, accelerator: Accelerator
    ) -> None:
        self.config, self.routed, self.passes, self.draws = config, routed, passes, draws
        self.loss, self.accelerator = loss, accelerator
        averaged = ["budget_loss"] + ["gate_loss", "width_loss"] * (routed.config.blocks is not None)
        self.averages = {name: BudgetLoss(reduce=accelerator.reduce).to(accelerator.device) for name in averaged}
        self.curvature: Curvature | None = None
        if config.estimator == "residual-2" and routed.config.tokens is not None:
            self.curvature = Curvature(routed.routed, accelerator.reduce).to(accelerator.device)
        chosen = compared_blocks(config, len(routed.planner.costs))
        self.features_at = tuple(block for block in chosen if block in routed.routed)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        held = {f"{name}.{part}": b for name, loss in self.averages.items() for part, b in loss.named_buffers()}
        if self.curvature is not None:
            held |= {f"curvature.{part}": buffer for part, buffer in self.curvature.named_buffers()}
        return held

    def micro_batch(self, stage: StageName, draw: Draw, step: int, fit: bool = False) -> dict[str, Tensor]:
        """The losses of a micro-batch at a step of the run; with `fit`, curvatures that are due are fitted to it. The sessions of
        its pass stay with the backbone, for the backward pass."""
        config = self.config
        batch, teacher = self.passes.batch(draw), TeacherRecord(self.features_at)
        reading = GateReading(self.routed, teacher) if config.gate_signal == "damage" else None
        wanted = self.passes.teacher(batch, reading or teacher)
        cached = self.passes.cached(draw, batch)
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=wanted.device)
        if reading is not None:
            losses["damage"] = total = self._damage(draw, reading, batch, wanted, cached)
            if self.routed.config.tokens is None:
                return {"total": total} | {name: value.detach() for name, value in losses.items()}
        gating = self._block_session(draw, teacher, cached) if reading is None else None
        session = self._token_session(stage, draw, step, teacher, cached, gating)
        self.routed.session, self.routed.gate_session = session, gating
        prediction = self.passes.predict(batch)
        compared: Any = gating or session
        missed, parts = self._missed(batch, teacher, wanted, prediction, getattr(compared, "features", {}))
        total, losses = total + missed, losses | parts
        if session is not None and self.curvature is not None:
            if fit:
                self._fit_curvature(step, draw, batch, wanted, session, missed)
            total = total + session.second_order(self.curvature.of)
        if session is not None:
            losses["keep"] = session.ratios.mean()
            if stage != "router" and config.budget == "loss" and self.routed.policy is not None:
                total = total + config.budget_weight * self.averages["budget_loss"](losses["keep"], config.target)
        if gating is not None:
            losses["gates"], losses["width"] = gating.ran().float().mean(), gating.chosen_widths().mean()
            # Averaged over micro-batches: each has one timestep, and timesteps may differ in what they need.
            bounds = gate_loss(gating.probabilities(), config.gate_target, self.averages["gate_loss"])
            if len(gating.widths) > 1:
                bounds = bounds + width_loss(
                    gating.width_ratios(), gating.would_run(), config.width_target, self.averages["width_loss"]
                )
            total = total + config.gate_weight * bounds
            gate = torch.stack([own.gate for own in gating.logits.values()], dim=1)
            if gating.raised:  # records are of residuals of one step's age, which raises nothing
                gate = gate - torch.stack(list(gating.raised.values()))
            width = torch.stack([own.width for own in gating.logits.values()], dim=1)
            self._record(1000 * batch.sigmas, gate, width, gating.dial.shift)
        return {"total": total} | {name: value.detach() for name, value in losses.items()}

    def _missed(
        self, batch: Batch, teacher: TeacherRecord, wanted: Tensor, prediction: Tensor, features: dict[int, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a pass of the student misses of the teacher and of the data: the weighted sum, and its parts."""
        config, losses = self.config, {"output": F.mse_loss(prediction.float(), wanted.float())}
        total = config.output_weight * losses["output"]
        if features and config.feature_weight:
            student = [features[block] for block in self.features_at]
            losses["features"] = feature_distillation(student, [teacher.features[block] for block in self.features_at])
            total = total + config.feature_weight * losses["features"]
        if config.flow_weight:
            losses[self.loss] = data_loss = self.passes.data_loss(prediction, batch)
            total = total + config.flow_weight * data_loss
        return total, losses

    def _fit_curvature(
        self, step: int, draw: Draw, batch: Batch, wanted: Tensor, session: TokenSession, missed: Tensor
    ) -> None:
        """Swap a few tokens of each block that is due, and see how far the first order is off."""
        assert self.curvature is not None
        swaps = {block: swapped(session, block, draw.generator) for block in self.curvature.due(step)}
        inclusions = [session.inclusions[block] for block, swap in swaps.items() if swap is not None]
        # Where all tokens are kept there is nothing to swap, and nothing is spent on it.
        gains = iter(torch.autograd.grad(missed, inclusions, retain_graph=True) if inclusions else ())
        before = self.routed.session, self.routed.gate_session
        try:
            for block, swap in swaps.items():
                moments = torch.zeros(2, device=missed.device)
                if swap is not None:
                    gating = None
                    if session.gating is not None:
                        gating = self._block_session(draw, session.teacher, session.cached)
                    self.routed.session, self.routed.gate_session = swap, gating
                    with torch.no_grad():
                        prediction = self.passes.predict(batch)
                        features = (gating or swap).features
                        changed, _ = self._missed(batch, session.teacher, wanted, prediction, features)
                    predicted, squares = first_order(swap, next(gains))
                    moments = curvature_moments((changed - missed.detach())[None], predicted[None], squares[None])
                self.curvature.update(block, moments)
        finally:
            # Gradient checkpointing runs the blocks once more, with the sessions of the pass itself.
            self.routed.session, self.routed.gate_session = before

    def _damage(
        self, draw: Draw, reading: GateReading, batch: Batch, wanted: Tensor, cached: dict[int, CachedPass]
    ) -> Tensor:
        """The loss of the routers' predictions, on a few blocks; what all of them said is recorded."""
        gates, routed = self.routed.gates, self.routed.routed
        assert gates is not None
        raised = gates.raised(draw.age)
        assert raised is not None
        losses = []
        for place in torch.randperm(len(routed), generator=draw.generator)[: self.config.damage_blocks].tolist():
            block = routed[place]
            damage = self.passes.log_damage(block, cached[block], batch, wanted)
            losses.append(damage_loss(reading.logits[block][:, 0] + raised[place], damage, draw.age))
        logits = torch.stack([reading.logits[block] for block in routed], dim=1)
        # What a router says of the dense pass does not depend on the dial.
        self._record(1000 * batch.sigmas, logits[..., 0], logits[..., 1:], 0.0)
        return torch.stack(losses).mean()

    def _token_session(
        self,
        stage: StageName,
        draw: Draw,
        step: int,
        teacher: TeacherRecord,
        cached: dict[int, CachedPass],
        gating: BlockSession | None,
    ) -> TokenSession | None:
        config, tokens = self.config, self.routed.config.tokens
        if tokens is None:
            return None
        # Hardened from the first step, a router that starts out wrong may stay so (benchmarks/synthetic.py, check k).
        progress = (step - config.router_steps) / max(1, config.total_steps - config.router_steps)
        return TokenSession(
            routed=self.routed.routed,
            ratios=self.ratios(stage, draw),
            teacher=teacher,
            estimator=config.estimator,
            rank_temperature=anneal(*config.rank_temperature, progress),
            selection_temperature=anneal(*config.selection_temperature, progress),
            noise=0.0 if stage == "joint" else config.score_noise,
            generator=draw.generator,
            granularity=tokens.granularity,
            cached=cached,
            gating=gating,
        )

    def _block_session(self, draw: Draw, teacher: TeacherRecord, cached: dict[int, CachedPass]) -> BlockSession | None:
        gates, blocks = self.routed.gates, self.routed.config.blocks
        if gates is None or blocks is None:
            return None
        orders = {block: gates.order(block) for block in self.routed.routed} if len(blocks.widths) > 1 else {}
        dial = Dial(blocks.threshold, draw.shift)
        if not self.routed.config.closed_reuse:
            return BlockSession(teacher, blocks.widths, orders, dial)
        logits = gates.raised(draw.age)
        assert logits is not None
        raised = dict(zip(self.routed.routed, logits, strict=True))
        return BlockSession(teacher, blocks.widths, orders, dial, cached, raised)

    @torch.no_grad()
    def _record(self, timesteps: Tensor, gate: Tensor, width: Tensor, shift: float) -> None:
        """Keep the routers' logits [B, L] and [B, L, S]: budgets are solved by them."""
        gates = self.routed.gates
        assert gates is not None
        values = (timesteps, gate.detach(), width.detach(), torch.full_like(timesteps, shift))
        # Of all processes: the dial is turned by them, and a checkpoint holds those of one process for all.
        gates.records.add(*(self.accelerator.gather(value.contiguous()) for value in values))

    def ratios(self, stage: StageName, draw: Draw) -> Tensor:
        """[1, L] keep ratios of a micro-batch, with the policy's gradient where it trains."""
        policy, device, tokens = self.routed.policy, self.accelerator.device, self.routed.config.tokens
        if stage == "router" or policy is None or tokens is None or tokens.ratios == "fixed":
            return torch.full((1, len(self.routed.routed)), draw.keep, device=device)
        logits = policy(torch.tensor([1000.0 * draw.sigma], device=device))
        if stage == "policy" and self.config.logit_noise:
            logits = logits + self.config.logit_noise * torch.randn(logits.shape, generator=draw.generator).to(device)
        if self.config.budget == "anchor":
            logits = logits + solve_anchor(policy(self.draws.grid(draw.generator).to(device)), draw.keep)
        return torch.sigmoid(logits)
