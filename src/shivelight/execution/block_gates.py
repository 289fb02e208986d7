"""Block routing of one backbone: its routers, their records from training, the order of its MLP channels, its decisions.

Shapes: B samples, N image tokens, M text tokens, D width, L routed blocks, S widths.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import BackboneSpec
from shivelight.config import BlockRouting, Reuse
from shivelight.errors import BudgetError, UnsupportedBackboneError
from shivelight.execution.context import GRID, StepContext
from shivelight.execution.gate_plan import GatePlan, GatePlanner, aged
from shivelight.execution.gates import Cap, Decision, RouterOutputs, choose_action, choose_width
from shivelight.execution.planning import Budget, Planner, Request, warm_steps
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.width import NarrowMlps
from shivelight.routing import BLOCK_ROUTERS, Dial, GateRecords

# What reads a router: block, samples of the batch from this one on -> [b, 1 + S].
Reader = Callable[[int, int], Tensor]
# Of the 1000 timesteps of a bare transformer, its expectation is over these.
_COARSE = range(9, len(GRID), 20)


class BlockGates(nn.Module):
    """The part of a `Routed` backbone that says which blocks run, and how wide; its parameters are the adapter's.

    Args:
        model: the backbone; only read.
        spec: of its family.
        config: of block routing.
        reuse: of residuals, or None.
        planner: of the backbone; knows the routed blocks and their costs.
    """

    def __init__(
        self, model: nn.Module, spec: BackboneSpec, config: BlockRouting, reuse: Reuse | None, planner: Planner
    ) -> None:
        super().__init__()
        self.config, self.reuse, self.planner, self.spec = config, reuse, planner, spec
        options: dict[str, Any] = {"bottleneck": config.bottleneck, "widths": config.widths, "start": config.start}
        if config.router == "lean":
            options |= {"modulation_rank": config.modulation_rank, "token_stride": config.token_stride}
        self.router = BLOCK_ROUTERS[config.router](*spec.widths(model), planner.routed, **options)
        # Where closed gates reuse: what the log of the residual's age adds to the gate's logit; see training/damage.py for 3.
        self.age_slopes: nn.Parameter | None = None
        if config.closed == "reuse":
            self.age_slopes = nn.Parameter(torch.full((len(planner.routed),), 3.0))
        self.records = GateRecords(len(planner.routed), len(config.widths))
        self.outputs = RouterOutputs(config)
        self.cap: tuple[Budget, Cap] | None = None
        # Blocks whose MLP cannot be narrowed now (a LoRA, quantised weights); looked up once a generation.
        self._whole: frozenset[int] | None = None
        self.narrow: NarrowMlps | None = None
        if len(config.widths) == 1:
            return
        mlps = spec.mlps(model)
        if not mlps.keys() >= set(planner.routed):
            raise UnsupportedBackboneError(
                f"The spec {spec.name!r} names no MLP that can be narrowed; use BlockRouting(widths=(1.0,)), or fill in `mlp`."
            )
        blocks = spec.block_list(model)
        for block in planner.routed:
            self.register_buffer(f"order_{block}", torch.arange(mlps[block].channels(blocks[block][1])))
        self.set_orders(model, {})

    def configure(self, config: BlockRouting, reuse: Reuse | None) -> None:
        """Other settings on the same weights; those that the weights depend on must stay."""
        self.config, self.reuse, self.outputs = config, reuse, RouterOutputs(config)
        self.cap = None

    def set_orders(self, model: nn.Module, orders: dict[int, Tensor]) -> None:
        """Rank the hidden channels of MLPs: for some blocks a permutation [H], the most important first; others stay.

        Call it, with no orders, after loading: it makes the narrow weights follow the buffers.
        """
        if len(self.config.widths) == 1:
            return
        blocks = self.spec.block_list(model)
        for block, order in orders.items():
            self.order(block).copy_(order)
        ranked = {block: self.order(block).cpu() for block in self.planner.routed}
        self.narrow = NarrowMlps(
            {block: blocks[block][1] for block in self.planner.routed},
            self.spec.mlps(model),
            {block: order for block, order in ranked.items() if not torch.equal(order, torch.arange(len(order)))},
            self.config.widths,
        )

    def order(self, block: int) -> Tensor:
        """The channel order [H] of a block's MLP."""
        return self.get_buffer(f"order_{block}")

    def raised(self, age: int) -> Tensor | None:
        """What residuals of this age in steps add to the gates' logits [L], with the slopes' gradient; None where closed gates
        pass by."""
        return None if self.age_slopes is None else self.age_slopes.float() * math.log(age)

    def _slopes(self) -> tuple[float, ...] | None:
        return None if self.age_slopes is None else tuple(self.age_slopes.detach().float().tolist())

    def begin(self, context: StepContext) -> None:
        """A pass begins."""
        self.outputs.begin(context)

    def clear(self) -> None:
        """Drop what belongs to one generation."""
        self.cap, self._whole = None, None
        self.outputs.clear()
        if self.narrow is not None:
            self.narrow.forget()

    def plan(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> GatePlan | None:
        """Where the gates stand in a generation whose token schedule is `kept`, or None where every block runs."""
        if budget.everything or (budget.kind == "keep" and budget.threshold is None):
            return None
        if self._whole is None:
            narrow = self.narrow
            reasons = {} if narrow is None else {block: narrow.can_narrow(block) for block in self.planner.routed}
            self._whole = frozenset(block for block, reason in reasons.items() if reason is not None)
        key = (budget, request, self.config, self.reuse, self._whole, tuple(kept))
        return self.planner.once(key, lambda: self._solve(request, budget, kept))

    def _solve(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> GatePlan:
        if budget.threshold is not None and self.records.filled == 0 and self.config.decide != "static":
            first = self._first_reuse(request, budget, kept)
            return GatePlan(Dial(budget.threshold), None, 1, slopes=self._slopes(), first=first)
        planner = self.gate_planner(request, budget, kept)
        if budget.threshold is not None:
            return planner.plan(0.0)
        if self.config.closed == "reuse" and request.steps is GRID:
            return planner.plan(planner.farthest)  # a bare transformer's passes have nothing to reuse: everything runs
        return planner.solve(self._left(planner, request, budget))

    def gate_planner(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> GatePlanner:
        """What a generation's gates cost as a function of their shift, on the token schedule `kept`."""
        config, reuse, bare = self.config, self.reuse, request.steps is GRID
        places = _COARSE if bare else range(len(kept))
        return GatePlanner(
            [self.planner.costs[block] for block in self.planner.routed],
            self.records,
            config.widths,
            [kept[place] for place in places],
            [request.steps[place] for place in places],
            request.text_tokens,
            request.attended,
            budget.threshold or config.threshold,
            None
            if reuse is None or bare
            else (reuse.margin, reuse.max_reuses, self._first_reuse(request, budget, kept)),
            config.decide,
            [block in (self._whole or ()) for block in self.planner.routed],
            request.tokens,
            self._slopes(),
        )

    def _first_reuse(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> int:
        """The first step at which a block may add its last residual."""
        reuse, planner, steps = self.reuse, self.planner, len(kept)
        if reuse is None or request.steps is GRID:
            return 0
        first = math.ceil(reuse.blocks_after * steps)
        if self.config.closed == "pass" or budget.threshold is not None:
            return first
        # Where all that is closed reuses, the first steps run everything, as far as the budget goes.
        dense, always = planner.dense_flops(request.tokens, request.text_tokens)
        left = (budget.value * dense - always) * steps
        return max(first, warm_steps(reuse.warmup, planner.whole_flops(kept, request), left))

    def _left(self, planner: GatePlanner, request: Request, budget: Budget) -> float:
        """FLOPs that routed blocks may take in a generation, over all steps of the planner."""
        dense, always = self.planner.dense_flops(request.tokens, request.text_tokens)
        left = (budget.value * dense - always) * planner.steps
        if left < planner.least:
            nearest = math.ceil(1e4 * (always + planner.least / planner.steps) / dense) / 1e4
            raise BudgetError(
                f"compute={budget.value} cannot be reached: the blocks that are never routed take {always / dense:.4f} of the "
                f"dense FLOPs. The nearest is compute={nearest}.",
                nearest=nearest,
            )
        return left

    def decide(
        self,
        block: int,
        counts: tuple[int, ...],
        plan: GatePlan,
        context: StepContext,
        entry: BlockResiduals | None,
        cap: Cap | None,
        read: Reader,
        request: Request,
    ) -> tuple[Decision, ...]:
        """What each of the B samples does in this block.

        Args:
            block: index of the block.
            counts: tokens that each sample keeps where it runs [B].
            plan: of the generation.
            context: of the pass.
            entry: residuals of this (pass, block), or None where nothing is reused.
            cap: the hard bound, or None.
            read: runs the block's router.
            request: of the generation.
        """
        logits = self._logits(block, len(counts), plan, context, read)
        if logits is None:
            # Nothing is known yet: run, at the full width, as a NaN does.
            logits = [[math.nan] * (1 + len(self.config.widths))] * len(counts)
        margin = 0.0 if self.reuse is None else self.reuse.margin
        if context.steps is not None and context.step < plan.first:
            entry = None
        if plan.slopes is not None and entry is not None:
            slope, step = plan.slopes[self.planner.routed.index(block)], context.step
            logits = [[own[0] + aged(slope, entry.age(i, step)), *own[1:]] for i, own in enumerate(logits)]
        shifts = None if cap is None else cap.shift(context.call, context.step, len(counts))
        decisions = []
        for sample, (own, kept) in enumerate(zip(logits, counts, strict=True)):
            dial = plan.dial if shifts is None else Dial(plan.dial.threshold, shifts[sample])
            may_reuse = entry is not None and self.reuse is not None and entry.may_serve(sample, self.reuse.max_reuses)
            width = 1.0 if block in (self._whole or ()) else choose_width(own, dial, self.config.widths)
            decision = Decision(choose_action(own[0], dial, margin, may_reuse, self.config.closed), kept, width)
            if cap is not None and decision.action == "run":
                flops = self.planner.costs[block].flops(kept, request.text_tokens, width, request.attended)
                if not cap.spend(context.call, context.step, sample, len(counts), flops):
                    decision = Decision("reuse" if may_reuse else "skip", 0)
            decisions.append(decision if decision.action == "run" else Decision(decision.action, 0))
        return tuple(decisions)

    def hard_bound(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> Cap | None:
        """The hard bound of this generation, made at its first block; None where none was asked for."""
        if not budget.cap or request.steps is GRID:
            return None
        if self.cap is None or self.cap[0] != budget:
            planner = self.gate_planner(request, budget, kept)
            cap = Cap(self._left(planner, request, budget), *planner.remaining())
            if self.cap is not None:  # a new budget in the middle of a generation: what was spent is spent
                cap.spent = self.cap[1].spent
            self.cap = budget, cap
        return self.cap[1]

    def _logits(
        self, block: int, batch: int, plan: GatePlan, context: StepContext, read: Reader
    ) -> Sequence[Sequence[float]] | None:
        """`SampleLogits` of every sample of the batch, or None where nothing is known yet."""
        if plan.logits is not None:
            place = self.planner.routed.index(block)
            rows = [context.step] * batch
            if context.steps is None:
                if "coarse" not in context.memo:  # one transfer a pass
                    context.memo["coarse"] = self._coarse_rows(context, batch)
                rows = context.memo["coarse"]
            return [[plan.logits[0][row][place], *plan.logits[1][row][place]] for row in rows]
        half = batch // 2 if context.branch == "both" and self.config.cfg_gates == "cond" else 0
        logits = self.outputs.of(block, context, lambda: read(block, half))
        return logits if logits is None or not half else [*logits, *logits]

    def _coarse_rows(self, context: StepContext, batch: int) -> list[int]:
        """Where each sample's timestep lies in the plan of a bare transformer."""
        times = [] if context.timestep is None else context.timestep.detach().reshape(-1).float().tolist()
        rows = [min(range(len(_COARSE)), key=lambda row: abs(GRID[_COARSE[row]] - t)) for t in times]
        return rows if len(rows) == batch else rows[:1] * batch
