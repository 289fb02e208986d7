"""The state of a routed backbone: its routers and policy as one submodule, and what the hooks need to know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import BackboneSpec
from shivelight.config import DeltaConfig, RestPlan, Reuse, RoutingConfig
from shivelight.cost import backbone_costs
from shivelight.errors import BudgetError, ShivelightError, UnsupportedBackboneError
from shivelight.execution.block_gates import BlockGates
from shivelight.execution.compiled import Regions
from shivelight.execution.context import GRID, Clock, StepContext
from shivelight.execution.folding import Delta, FoldedWeights
from shivelight.execution.gate_plan import GatePlan
from shivelight.execution.gates import Decision, Spending
from shivelight.execution.planning import Budget, Planner, Request
from shivelight.execution.pricing import Forced, Load
from shivelight.execution.reuse import TOGETHER, BlockResiduals, ResidualCache
from shivelight.execution.scoring import TokenScorer
from shivelight.execution.sessions import GateSession, Observer, RestSession, Session
from shivelight.execution.settling import Settling
from shivelight.execution.stale import StaleGates, StalePlan
from shivelight.execution.stand_ins import StandInMaps
from shivelight.routing import RatioPolicy, Schedule, TokenRouter

NAME = "shivelight"


class Routed(nn.Module):
    """Routers, policy and deltas of one backbone, under the name `shivelight`; moved and cast with it.

    Args:
        model: the backbone; only read.
        spec: of its family.
        config: what to attach.
        pipeline: the pipeline that runs the backbone, or None.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec, config: RoutingConfig, pipeline: Any | None) -> None:
        super().__init__()
        blocks = spec.block_list(model)
        self.spec, self.config = spec, config
        routes = config.tokens is not None or config.blocks is not None
        # The first blocks make the features that routers read; where none reads them, they may be left out like the others.
        first = (
            0 if config.tokens is None and config.blocks is not None and config.blocks.router == "interval" else None
        )
        self.routed = tuple(range(spec.first_routed if first is None else first, len(blocks))) if routes else ()
        self.router: TokenRouter | None = None
        self.policy: RatioPolicy | None = None
        tokens = config.tokens
        width, time_width, condition_width = spec.widths(model)
        if tokens is not None and tokens.scores == "learned":
            self.router = TokenRouter(
                width, time_width, condition_width, self.routed,
                bottleneck=tokens.bottleneck, share=tokens.share, sees_drift=tokens.sees_drift,
            )  # fmt: skip
        if tokens is not None and tokens.ratios == "policy":
            self.policy = RatioPolicy(len(self.routed), target=tokens.initial_keep, hidden=tokens.policy_width)
        self.planner = Planner(
            backbone_costs(model, spec), self.routed, 1 if config.tokens is None else config.tokens.granularity
        )
        self.stand_ins = None if config.stand_ins is None else StandInMaps(config.stand_ins, width)
        self.gates: BlockGates | None = None
        self.stale = self.new_stale()
        if self.stale is None and config.blocks is not None:
            self.gates = BlockGates(model, spec, config.blocks, config.reuse, self.planner)
        reference = next(model.parameters())
        dtype = reference.dtype if reference.dtype in (torch.float32, torch.float16, torch.bfloat16) else None
        device = None if reference.device.type == "meta" else reference.device
        self.to(device, dtype)
        self.deltas: dict[str, Delta] = {}
        self.folded: FoldedWeights | None = None
        self.clock = Clock(pipeline, spec.guidance)
        self.spending = Spending()
        self.budget = Budget("keep", config.keep) if config.compute is None else Budget("compute", config.compute)
        self.residuals = self._new_residuals()
        self.shape = spec.default_shape(model)
        self.shape_seen = False
        # Kinds of all blocks, by where their spec says they are.
        self.kinds = tuple(kind.path for kind, _ in blocks)
        self.settling = Settling(self)
        # While blocks are timed: what each of them does, whatever was decided.
        self.forced: Forced | None = None
        self.enabled = True
        self.session: Session | None = None
        self.gate_session: GateSession | None = None
        self.fitting: RestSession | None = None
        self.observer: Observer | None = None
        self.handles: list[Any] = []
        self.reset_function: Callable[[], None] | None = None
        self.never_cast: tuple[str, ...] = ()
        self.regions = Regions()
        # Takes the backbone's forward and its arguments, in its place.
        self.replays: Callable[[nn.Module, Callable[..., Any], tuple, dict[str, Any]], Any] | None = None
        self._scorer = TokenScorer()

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise ShivelightError(
            "A routed backbone cannot be deep-copied: diffusers' hooks in the copy would run the original's weights. "
            "Call shivelight.detach first, copy, and attach (or load the adapter) to both."
        )

    @property
    def context(self) -> StepContext:
        """Where the current forward pass stands."""
        return self.clock.context

    def begin(self, timestep: Tensor | None) -> None:
        """A forward pass of the backbone begins."""
        if self.enabled and (
            any(parameter.is_meta for parameter in self.parameters())
            or any("_diffusers_hook" in module.__dict__ for module in self.modules())
        ):
            raise UnsupportedBackboneError(
                "The routers are offloaded layer by layer, where their weights cannot be read. Offload the backbone first and "
                "attach (or load the adapter) then; or offload whole models, or groups at block level."
            )
        generation = self.context.generation
        context = self.clock.tick(self._sample_times(timestep))
        context.given_timestep = timestep
        if context.generation != generation:
            self._forget()
        if context.generation != generation or context.steps is None:
            self.spending = Spending()
        for gates in (self.gates, self.stale):
            if gates is not None:
                gates.begin(context)

    def _sample_times(self, timestep: Tensor | None) -> Tensor | None:
        return None if timestep is None else self.spec.sample_times(timestep) * self.spec.timestep_scale

    def note_time(self, timestep: Tensor | None) -> None:
        """The pass that has begun is given its timestep in this tensor."""
        self.context.timestep, self.context.given_timestep = self._sample_times(timestep), timestep

    def note(self, load: Load) -> None:
        """What the passes of this generation hold is known."""
        self.shape, self.shape_seen = (load.tokens, load.text_tokens), True
        self.settling.begin(load)

    def reset(self) -> None:
        """The next pass starts from nothing."""
        self.clock.reset()
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one generation."""
        self.residuals.clear()
        for gates in (self.gates, self.stale):
            if gates is not None:
                gates.clear()

    @property
    def reuses(self) -> bool:
        """Whether residuals are kept now: passes of a bare transformer have no order in time."""
        return self.config.reuse is not None and self.context.steps is not None and not self.in_force.everything

    @property
    def selects(self) -> bool:
        """Whether tokens are left out under the budget in force."""
        return self.config.tokens is not None and not self._token_budget(self.in_force).everything

    @property
    def in_force(self) -> Budget:
        """The budget of this pass, of tokens or FLOPs: one of time, once it is settled, as what it comes to."""
        return self.settling.in_force

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Routing and deltas on or off for a while."""
        previous = self.enabled
        self.enable(enabled)
        try:
            yield
        finally:
            self.enable(previous)

    @contextmanager
    def variant(
        self,
        *,
        reuse: Reuse | Literal["keep"] | None = "keep",
        blocks: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Iterator[None]:
        """Other settings for a while, on the same weights.

        Args:
            reuse: another one, or None for none.
            blocks: fields of `BlockRouting`, such as {"decide": "static"}.
            changes: fields of `TokenRouting`, such as scores="random".
        """
        previous = self.config
        assert previous.tokens is not None or not changes
        assert previous.blocks is not None or not blocks
        self._configure(
            replace(
                previous,
                tokens=replace(previous.tokens, **changes) if previous.tokens is not None else None,
                blocks=replace(previous.blocks, **blocks or {}) if previous.blocks is not None else None,
                reuse=previous.reuse if reuse == "keep" else reuse,
            )
        )
        try:
            yield
        finally:
            self._configure(previous)

    def _configure(self, config: RoutingConfig) -> None:
        self.config = config
        self.residuals = self._new_residuals()
        if self.gates is not None and config.blocks is not None:
            self.gates.configure(config.blocks, config.reuse)
        if self.stale is not None:
            self.stale = self.new_stale()

    def new_stale(self) -> StaleGates | None:
        """What decides which blocks run, where that is not learned, with nothing decided yet."""
        config = self.config
        if config.blocks is None or config.blocks.learned:
            return None
        assert config.reuse is not None
        return StaleGates(config.blocks, config.reuse, self.planner, self.stand_ins)

    def set_stand_ins(self, maps: StandInMaps | None) -> None:
        """Maps for steps at rest, in the place of those that are there."""
        self.stand_ins = maps
        self._configure(replace(self.config, stand_ins=None if maps is None else maps.config))

    def enable(self, enabled: bool) -> None:
        """Routing and deltas on or off."""
        self.enabled = enabled
        if self.folded is not None and not (enabled and self._planned_deltas):
            self.folded.apply(enabled)

    def set_deltas(self, model: nn.Module, deltas: dict[str, Delta], config: DeltaConfig | None = None) -> None:
        """Fold these DoRA deltas into the backbone, in the place of earlier ones; an empty dict removes them. Where they are of
        another kind, `config` says which."""
        if deltas and config is not None:
            self._configure(replace(self.config, deltas=config))
        if self.folded is not None:
            self.folded.apply(False)
        self.deltas, self.folded = deltas, None
        if deltas:
            assert self.config.deltas is not None
            self.folded = FoldedWeights(model, deltas, self.config.deltas.alpha / self.config.deltas.rank)
            self.enable(self.enabled)

    @property
    def _planned_deltas(self) -> tuple[RestPlan, ...]:
        """The generations under which alone the deltas are in force; () for all."""
        return () if self.config.deltas is None else self.config.deltas.plans

    def request(self, steps: tuple[float, ...], tokens: int, text_tokens: int, budget: Budget | None = None) -> Request:
        """What a generation of these timesteps asks of the planner, under the budget in force (or another)."""
        # Without steps in order (a bare transformer) nothing is reused.
        reuse = self.config.reuse if steps is not GRID else None
        return Request(
            self._token_budget(budget or self.in_force),
            steps,
            tokens,
            text_tokens,
            warmup=0.0 if reuse is None else max(reuse.warmup, self._least_warmup),
            attend_all=reuse is not None and reuse.context and any(kind.context_linears for kind in self.spec.blocks),
        )

    @property
    def _least_warmup(self) -> float:
        """Share of the steps that run all tokens: a block has a residual to add once it ran whole, so with blocks at least one
        step, however small the share."""
        return 0.0 if self.config.blocks is None else 1e-9

    def schedule(self, request: Request) -> Schedule:
        """The schedule that answers this request."""
        adaptive = self.config.tokens is not None and self.config.tokens.ratios == "policy"
        return self.planner.schedule(self.policy if adaptive else None, request)

    def _token_budget(self, budget: Budget) -> Budget:
        """What tokens get of it, where blocks get a part too."""
        if budget.timed:
            raise BudgetError(
                f"What {budget.kind}={budget.value} comes to is known once a picture was made: its steps and tokens count."
            )
        blocks = self.config.blocks
        if blocks is None or budget.everything:
            return budget
        if budget.kind == "keep" or self.config.tokens is None:
            return Budget("keep", budget.value if budget.kind == "keep" else 1.0)
        return Budget("compute", budget.value ** (1.0 - blocks.share))

    def planned_ratio(
        self, steps: tuple[float, ...], tokens: int, text_tokens: int, budget: Budget | None = None
    ) -> float | None:
        """Planned FLOPs of a generation of these timesteps over those of the dense blocks; with gates, as expected, or None
        where nothing is known of them, or of the times that the budget is about."""
        budget = budget or self.budget
        if budget.timed:
            load = self.settling.load
            load = None if load is None else replace(load, tokens=tokens, text_tokens=text_tokens)
            settled = None if load is None else self.settling.settled(budget, steps, load)
            if settled is None:
                return None
            budget = settled
        request = self.request(steps, tokens, text_tokens, budget)
        schedule = self.schedule(request)
        gates = self.gates or self.stale
        plan = None if gates is None else gates.plan(request, budget, schedule.keep)
        if plan is None:
            return self.planner.planned_ratio(schedule, request)
        if plan.cost is None:
            return None
        dense, always = self.planner.dense_flops(tokens, text_tokens)
        return (always + plan.cost / plan.steps) / dense

    def decide(self, block: int, x: Tensor, text: Tensor | None, text_tokens: int) -> tuple[Decision, ...]:
        """What a block does now: one decision where all samples agree, else one for each sample.

        Args:
            block: its index.
            x: [B, N, D], image tokens.
            text: [B, M, D], text tokens that it changes, or None.
            text_tokens: how many it changes or attends to.
        """
        batch, tokens = x.shape[:2]
        if self.context.branch == "both" and batch % 2:
            raise ShivelightError(
                f"A guided batch has an unconditional and a conditional half, but this one has {batch} samples. For passes of "
                "your own, say what they are with shivelight.branch(model, 'single')."
            )
        counts = self.kept_counts(block, batch, tokens, text_tokens)
        request, schedule, plan = self._asked(tokens, text_tokens)
        if self.folded is not None and self._planned_deltas and block == self.routed[0]:
            self.folded.apply(any(known.like(self.rests) for known in self._planned_deltas))
        decisions = tuple(Decision("run", k) for k in counts)
        if isinstance(plan, StalePlan) and self.stale is not None:
            row, context = schedule.row(self.context.step), self.context
            decisions = self.stale.decide(
                block, batch, row, plan, context, lambda other: self._entry(other, x, text), request
            )
        elif isinstance(plan, GatePlan) and self.gates is not None:
            decisions = self.gates.decide(
                block,
                counts * (batch // len(counts)),
                plan,
                self.context,
                self._entry(block, x, text),
                self.gates.hard_bound(request, self.in_force, schedule.keep),
                lambda block, first: self.read_gates(block, x[first:], text, first),
                request,
            )
        if self.forced is not None:
            decisions = (self.forced(block, self._entry(block, x, text)),)
        self._account(block, decisions if len(decisions) == batch else decisions * batch, request)
        return decisions[:1] if len(set(decisions)) == 1 else decisions

    def _asked(self, tokens: int, text_tokens: int) -> tuple[Request, Schedule, GatePlan | StalePlan | None]:
        """The request of this generation, its schedule and the plan of its blocks, looked up once in a pass."""
        key = ("asked", tokens, text_tokens, self.in_force)
        found = self.context.memo.get(key)
        if found is None:
            request = self.request(self.context.steps or GRID, tokens, text_tokens)
            schedule, gates = self.schedule(request), self.gates or self.stale
            plan = None if gates is None else gates.plan(request, self.in_force, schedule.keep)
            found = self.context.memo[key] = request, schedule, plan
        return found

    @property
    def asked(self) -> tuple[Request, Schedule, GatePlan | StalePlan | None]:
        """The request of a generation of what passes hold now, its schedule and the plan of its blocks."""
        return self._asked(*self.shape)

    @property
    def samples_decide(self) -> bool:
        """Whether what blocks do depends on the samples, and not on the plan alone."""
        return self.gates is not None and self.gates.config.decide != "static" and not self.budget.everything

    @property
    def pairs_decide(self) -> bool:
        """Whether both halves of a guided batch do the same."""
        return self.config.blocks is not None and self.config.blocks.cfg_gates == "cond"

    def possible(self, block: int, tokens: int, text_tokens: int) -> list[Decision]:
        """All that samples may decide to run in this block, in this generation."""
        place = block - self.routed[0]
        counts = {row[place] for row in self._asked(tokens, text_tokens)[1].keep}
        widths = (1.0,) if self.config.blocks is None else self.config.blocks.widths
        return [Decision("run", count, width) for count in sorted(counts) for width in widths]

    def distinct_counts(self) -> int:
        """How many numbers of tokens blocks run on in this generation."""
        return len({count for row in self.asked[1].keep for count in row})

    def remember(self, block: int, x: Tensor, text: Tensor | None) -> BlockResiduals | None:
        """The residuals of a block that is about to do what was decided in this pass, new ones where there are none; None where
        nothing is reused."""
        if not self.reuses:
            return None
        assert self.config.reuse is not None
        assert self.context.steps is not None
        horizon, plan = self.config.reuse.horizon(len(self.context.steps)), self.asked[2]
        place, text = self._place(block, text)
        remembers = self.fitting is not None or (isinstance(plan, StalePlan) and plan.stand_ins > 0)
        return self.residuals.enter(place, x, text, horizon, remembers)

    @property
    def rests(self) -> RestPlan:
        """Which steps of this generation run, where all blocks run or rest together."""
        plan, steps = self.asked[2], len(self.context.steps or GRID)
        if not isinstance(plan, StalePlan):  # every block runs
            return RestPlan(steps, tuple(range(steps)))
        assert plan.rests is not None
        return plan.rests

    @property
    def rear(self) -> int:
        """How many of the last blocks run alone in this pass; 0 where it is none of that kind, or blocks are timed."""
        return 0 if self.forced is not None else self.rests.rear_at(self.context.step)

    @property
    def last_at_rest(self) -> int:
        """The last block of those that rest in this pass, where any do: what stands in for them comes there."""
        return self.routed[-1 - self.rear]

    @property
    def fitted(self) -> StandInMaps | None:
        """What was fitted, where this generation pays for it."""
        plan = None if self.stand_ins is None else self.asked[2]
        return self.stand_ins if isinstance(plan, StalePlan) and plan.stand_ins else None

    def _fitted_flops(self, tokens: int) -> int:
        fitted = self.fitted
        return 0 if fitted is None else fitted.flops_at(self.rests, self.context.step, self.context.call, tokens)

    def _place(self, block: int, text: Tensor | None) -> tuple[tuple[int, int], Tensor | None]:
        """Where the residuals of a block (or `FRONT`) in this pass are kept, and the text tokens that are among them."""
        place = self.context.call, TOGETHER if self.config.together and block >= 0 else block
        return place, text if self.config.blocks is not None else None

    def _entry(self, block: int, x: Tensor, text: Tensor | None) -> BlockResiduals | None:
        """The residuals of a block in this pass, where some are reused and fit."""
        place, text = self._place(block, text)
        return self.residuals.find(place, x, text) if self.reuses else None

    def read_gates(self, block: int, x: Tensor, text: Tensor | None, first: int = 0) -> Tensor:
        """Gate and width logits [b, 1 + S] of x [b, N, D], the samples of the batch from `first` on."""
        assert self.gates is not None
        time, condition = self.embeddings(len(x), slice(first, None))
        logits = self.gates.router(block, x, time, condition, None if text is None else text[first:])
        return torch.cat([logits.gate[:, None], logits.width], dim=1)

    def _account(self, block: int, decisions: tuple[Decision, ...], request: Request) -> None:
        """Add to the generation's spending."""
        tokens, text_tokens, cost = request.tokens, request.text_tokens, self.planner.costs[block]
        if block == self.routed[0]:
            self.spending.begin(*self.planner.dense_flops(tokens, text_tokens), len(decisions))
        # What was fitted takes the place of tokens that do not run, all or some.
        rest = self._fitted_flops(tokens) if self.config.together and block == self.last_at_rest else 0
        flops = {
            decision: (0 if decision.tokens == tokens else rest)
            + (
                cost.flops(decision.tokens, text_tokens, decision.width, request.attended)
                if decision.action == "run"
                else 0
            )
            for decision in set(decisions)
        }
        dense = cost.flops(tokens, text_tokens)
        self.spending.add(self.context.step, block, decisions, [flops[decision] for decision in decisions], dense)

    def kept_counts(self, block: int, batch: int, tokens: int, text_tokens: int) -> tuple[int, ...]:
        """How many tokens each sample keeps in this block now: one number where all agree, else one for each sample."""
        self.note(Load(tokens, text_tokens, batch, self.context.branch))
        if self.in_force.everything or self.config.tokens is None:
            return (tokens,)
        place = block - self.routed[0]
        context = self.context
        if context.steps is not None:
            return (self._asked(tokens, text_tokens)[1].row(context.step)[place],)
        if context.timestep is None:
            raise BudgetError(
                "The backbone was called without a timestep, so the schedule cannot be read. Pass `timestep`, or attach "
                "to the pipeline instead of the bare transformer."
            )
        counts = tuple(row[place] for row in self._rows_of_timesteps(tokens, text_tokens))
        return counts[:1] if len(set(counts)) == 1 else counts

    def _rows_of_timesteps(self, tokens: int, text_tokens: int) -> list[tuple[int, ...]]:
        """The schedule's row of each sample's timestep on the grid of a bare transformer; one transfer a pass."""
        context, key = self.context, ("rows", tokens, text_tokens, self.in_force)
        if key not in context.memo:
            assert context.timestep is not None
            table = self._asked(tokens, text_tokens)[1]
            times = context.timestep.detach().reshape(-1).float().tolist()
            context.memo[key] = [table.row(min(max(round(time), 1), len(GRID)) - 1) for time in times]
        return context.memo[key]

    def scores(self, block: int, x: Tensor, samples: slice = slice(None)) -> Tensor:
        """Token scores [B, N] in fp32 of the chosen samples; x [B, N, D] holds only those."""
        return self._scorer(self, block, x, samples)

    def embeddings(self, rows: int, samples: slice) -> tuple[Tensor, Tensor | None]:
        """Timestep [rows, T] and condition [rows, C] embeddings of the chosen samples of the pass."""
        context, key = self.context, ("embeddings", rows, samples.start, samples.stop)
        if key in context.memo:
            return context.memo[key]
        if context.time_embedding is None:
            raise UnsupportedBackboneError(
                f"The spec {self.spec.name!r} names {self.spec.timestep_embedding!r} as the timestep embedding, but it did "
                "not run before the blocks; correct `timestep_embedding` in the spec."
            )
        # The embedding may have one row for the whole batch.
        time = context.time_embedding if context.time_embedding.shape[0] == 1 else context.time_embedding[samples]
        condition = context.condition
        if condition is not None and condition.shape[0] != 1:
            condition = condition[samples]
        found = time.expand(rows, -1), None if condition is None else condition.expand(rows, -1)
        context.memo[key] = found
        return found

    def _new_residuals(self) -> ResidualCache:
        return ResidualCache(0.0 if self.config.reuse is None else self.config.reuse.max_cache_mb)
