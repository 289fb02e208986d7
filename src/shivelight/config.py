"""What is attached to a backbone: plain, validated dataclasses with a JSON round trip."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from shivelight.errors import AdapterError

FORMAT_VERSION = 1
# Block routers that need no training, and what runs under each.
UNTRAINED = {
    "interval": "all run at growing intervals",
    "age": "those whose residual is oldest run",
    "drift": "those whose residual moves most run",
}

# Of whole blocks without training: what regrets least on three pipelines, at four budgets (docs/decisions/training-free.md).
AT_INTERVALS = {"growth": 2.0, "forecast": 0.5}
# What may run of a step at rest.
Part = Literal["tokens", "rear"]


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise AdapterError(message)


@dataclass(frozen=True)
class TokenRouting:
    """Which tokens enter each block (Shiva-DiT).

    Attributes:
        bottleneck: width of the router's hidden layer.
        share: how many adjacent blocks share one router; 2 in the paper.
        policy_width: width of both branches of the ratio policy.
        initial_keep: keep ratio at which a fresh policy starts while training, in (0, 1).
        scores: "learned" ranks by the router; "drift" by how far the token's last residual moved times its age, which
            needs no training (see `RoutingConfig.training_free`); "norm" by the norm of the token's features and
            "random" by chance are baselines.
        ratios: "policy" gives every (timestep, block) its own share of the budget; "fixed" the same share to all.
        cfg_scores: "cond" lets the conditional branch choose for both, batched or split; "max" is the paper's
            element-wise maximum of both branches' scores, for batched guidance only.
        granularity: kept counts are multiples of this many tokens, as far as N divides by it and stays 32 times as
            large; matrix kernels are fastest there, and there are fewer shapes to prepare or compile.
        sees_drift: whether the learned router also sees how far each token's last residual moved times its age, and learns
            what is gained by computing it anew; needs `RoutingConfig.reuse`.
        seed: of the "random" scores.
    """

    bottleneck: int = 64
    share: int = 2
    policy_width: int = 256
    initial_keep: float = 0.7
    scores: Literal["learned", "drift", "norm", "random"] = "learned"
    ratios: Literal["policy", "fixed"] = "policy"
    cfg_scores: Literal["cond", "max"] = "cond"
    granularity: int = 8
    sees_drift: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bottleneck", "share", "policy_width", "granularity", "seed"):
            _integer(f"TokenRouting.{name}", getattr(self, name))
        _require(self.bottleneck >= 1, f"TokenRouting.bottleneck is {self.bottleneck}; give at least 1.")
        _require(self.share >= 1, f"TokenRouting.share is {self.share}; give at least 1.")
        _require(self.granularity >= 1, f"TokenRouting.granularity is {self.granularity}; give at least 1.")
        _require(
            self.policy_width >= 2 and self.policy_width % 2 == 0,
            f"TokenRouting.policy_width is {self.policy_width}; give an even number.",
        )
        _require(0 < self.initial_keep < 1, f"TokenRouting.initial_keep is {self.initial_keep}; give one in (0, 1).")
        _one_of("TokenRouting.scores", self.scores, ("learned", "drift", "norm", "random"))
        _one_of("TokenRouting.ratios", self.ratios, ("policy", "fixed"))
        _one_of("TokenRouting.cfg_scores", self.cfg_scores, ("cond", "max"))


@dataclass(frozen=True)
class BlockRouting:
    """Which blocks run for a sample, and how much of their MLP (E-DiT).

    Attributes:
        router: "lean", ours; "elastic-dit", laid out as the authors' released one, for their weights; or one that needs no
            training: all blocks at some steps and none at the others, at intervals that grow ("interval"); or, as far as the
            budget goes, the blocks whose residual is oldest ("age"), or whose residual's age times how far it moved when last
            seen is largest ("drift").
        bottleneck: width of the router's hidden layer (128 in the released one).
        modulation_rank: rank of the lean router's modulation by timestep and condition.
        token_stride: the lean router reads every so-manieth token.
        widths: shares of the MLP's hidden channels to choose from, ascending, the last 1.0; (1.0,) leaves the MLP whole.
        start: "full" starts a fresh router where nearly everything runs, "random" is the paper's ablation.
        threshold: tau; a block runs where the router's probability is at least this.
        cfg_gates: "cond" lets the conditional branch decide for both, "each" lets every branch decide for itself.
        decide: "block" asks the router of each block when it is reached, one transfer to the host per block; "step" uses
            what the routers said at the step before (the first step runs everything), one transfer per step; "static"
            uses what they said on average in training, at the nearest timesteps: no router runs, nothing is transferred,
            and the cost is known before the first step.
        closed: what a closed gate means. "pass" is the paper's: both streams go by unchanged. "reuse" adds the block's last
            residual, in training too, where there is one that was used fewer than `Reuse.max_reuses` times in a row; else the
            block runs. The older the residual, the sooner the gate opens. Needs `RoutingConfig.reuse`.
        share: of a `compute` budget over tokens and blocks together, compute^share is left to blocks and widths, the rest
            to tokens.
        partial: with router="interval", where nothing is forecast (8 steps and fewer): what whole steps leave of the budget is
            spent at one step at rest. "tokens" (or True): all blocks run on those tokens for which what stands in is worst.
            "rear": the last blocks run on all tokens, and what stands in takes the place of the first alone.
    """

    router: Literal["lean", "elastic-dit", "interval", "age", "drift"] = "lean"
    bottleneck: int = 16
    modulation_rank: int = 4
    token_stride: int = 4
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    start: Literal["full", "random"] = "full"
    threshold: float = 0.5
    cfg_gates: Literal["cond", "each"] = "cond"
    decide: Literal["block", "step", "static"] = "block"
    closed: Literal["pass", "reuse"] = "pass"
    share: float = 0.5
    partial: bool | Part = False

    def __post_init__(self) -> None:
        if self.partial is True:
            object.__setattr__(self, "partial", "tokens")
        _require(
            self.partial in (False, "tokens", "rear"),
            f"BlockRouting.partial is {self.partial!r}; one of False, 'tokens', 'rear'.",
        )
        for name in ("bottleneck", "modulation_rank", "token_stride"):
            _integer(f"BlockRouting.{name}", getattr(self, name))
            _require(getattr(self, name) >= 1, f"BlockRouting.{name} is {getattr(self, name)}; give at least 1.")
        _require(
            isinstance(self.widths, list | tuple) and all(isinstance(w, int | float) for w in self.widths),
            f"BlockRouting.widths is {self.widths!r}; give shares, for example (0.5, 1.0).",
        )
        object.__setattr__(self, "widths", tuple(float(width) for width in self.widths))  # JSON gives a list
        ascending = all(narrow < wide for narrow, wide in zip(self.widths, self.widths[1:], strict=False))
        _require(
            bool(self.widths) and ascending and self.widths[0] > 0 and self.widths[-1] == 1.0,
            f"BlockRouting.widths is {self.widths}; give shares in (0, 1], ascending, the last 1.0.",
        )
        _require(0 < self.threshold < 1, f"BlockRouting.threshold is {self.threshold}; give a probability in (0, 1).")
        _require(0 < self.share < 1, f"BlockRouting.share is {self.share}; give an exponent in (0, 1).")
        _one_of("BlockRouting.router", self.router, ("lean", "elastic-dit", *UNTRAINED))
        _require(
            self.learned or self.widths == (1.0,),
            f"BlockRouting.router={self.router!r} knows no widths; give widths=(1.0,).",
        )
        _one_of("BlockRouting.start", self.start, ("full", "random"))
        _one_of("BlockRouting.cfg_gates", self.cfg_gates, ("cond", "each"))
        _one_of("BlockRouting.decide", self.decide, ("block", "step", "static"))
        _one_of("BlockRouting.closed", self.closed, ("pass", "reuse"))
        _require(
            self.learned or self.closed == "pass",
            f"BlockRouting.router={self.router!r} always reuses; closed='reuse' is about routers that are trained.",
        )
        _require(
            self.router == "interval" or not self.partial,
            f"BlockRouting.partial is about steps at which all blocks rest; give router='interval', not {self.router!r}.",
        )

    @property
    def learned(self) -> bool:
        """Whether its router is trained."""
        return self.router not in UNTRAINED


@dataclass(frozen=True)
class RestPlan:
    """Generations in which all blocks run at some steps and rest at the others.

    Attributes:
        steps: of sampling.
        runs: those, from 0 on, at which all blocks run; the first is among them.
        passes: of the backbone in each step; two where guidance runs its branches as separate calls.
        partial: the step at rest at which they run in part; 0 where there is none.
        rear: how many of the last blocks run there, on all tokens; 0 where all of them do, on some.
    """

    steps: int
    runs: tuple[int, ...]
    passes: int = 1
    partial: int = 0
    rear: int = 0

    def __post_init__(self) -> None:
        _integer("RestPlan.steps", self.steps)
        _integer("RestPlan.passes", self.passes)
        _require(self.passes >= 1, f"RestPlan.passes is {self.passes}; give at least 1.")
        _require(
            isinstance(self.runs, list | tuple) and all(isinstance(run, int) for run in self.runs),
            f"RestPlan.runs is {self.runs!r}; give steps, for example (0, 2).",
        )
        object.__setattr__(self, "runs", tuple(self.runs))  # JSON gives a list
        _require(
            self.runs[:1] == (0,) and list(self.runs) == sorted(set(self.runs)) and self.runs[-1] < self.steps,
            f"RestPlan.runs is {self.runs} of {self.steps} steps; give steps in order, the first of them 0.",
        )
        _integer("RestPlan.partial", self.partial)
        _require(
            self.partial == 0 or (0 < self.partial < self.steps and self.partial not in self.runs),
            f"RestPlan.partial is {self.partial}, where {self.runs} of {self.steps} steps run; give another of them, or 0.",
        )
        _integer("RestPlan.rear", self.rear)
        _require(
            self.rear == 0 or (self.rear > 0 and self.partial > 0),
            f"RestPlan.rear is {self.rear}, of step {self.partial}; give so many blocks of a step in part, or 0.",
        )

    @property
    def key(self) -> tuple[int, tuple[int, ...], int, int]:
        """What tells plans apart: steps, those that run, the one that runs in part, and what of it."""
        return self.steps, self.runs, self.partial, self.rear

    def like(self, other: "RestPlan") -> bool:
        """Whether the same of as many steps run."""
        return self.key == other.key

    def feeds_part(self, step: int) -> bool:
        """Whether tokens of the step that runs in part attend to what this one computes: the last run before it."""
        if not self.partial or self.rear:
            return False
        return step == max(run for run in self.runs if run < self.partial)

    def feeds_rear(self, step: int) -> bool:
        """Whether what stands in for the first blocks, where the last alone run, is worked out from what this step computes."""
        return self.rear > 0 and step in self.runs and step < self.partial

    def computes(self, step: int) -> bool:
        """Whether blocks run at a step, all of them or some, on all tokens or some."""
        return step in self.runs or step == self.partial > 0

    def rear_at(self, step: int) -> int:
        """How many of the last blocks run alone at a step; 0 where it is none of that kind."""
        return self.rear if step == self.partial > 0 else 0


@dataclass(frozen=True)
class DeltaConfig:
    """DoRA deltas of the backbone's attention and MLP linears, trained jointly with the routing.

    Attributes:
        rank: rank of the deltas; 8 keeps adapters small (32 on SD3.5-Medium is 95 MB).
        alpha: scale numerator; the delta is alpha / rank * B A.
        plans: generations that they were tuned for, under which alone they are in force; () for all.
    """

    rank: int = 8
    alpha: float = 8.0
    plans: tuple[RestPlan, ...] = ()

    def __post_init__(self) -> None:
        _integer("DeltaConfig.rank", self.rank)
        _require(self.rank >= 1, f"DeltaConfig.rank is {self.rank}; give at least 1.")
        _require(0 < self.alpha < math.inf, f"DeltaConfig.alpha is {self.alpha}; give a positive number.")
        object.__setattr__(self, "plans", _plans("DeltaConfig", self.plans))


@dataclass(frozen=True)
class Reuse:
    """What is left out adds its last residual instead of nothing.

    Attributes:
        max_age: a residual that was computed more than this many steps ago is not used; such tokens run first.
        max_cache_mb: bound on the memory of the residuals, in units of 1e6 bytes; blocks whose residuals do not fit go
            without. They take blocks x samples x tokens x width x bytes per number, twice that with `forecast` and two more
            with `context`; blocks that only rest together (router="interval", no token routing) share one for all.
        context: whether tokens that run also attend to the others, by the keys and values they last had.
        warmup: share of the steps, at the start of a generation, that run everything; at least one step if above 0, and
            fewer where the budget would leave later steps less than a third of their cost.
        margin: a block whose router is at most this much above the threshold adds its last residual, if it has one;
            delta in E-DiT.
        max_reuses: how often in a row a block may do so before it runs again; K in E-DiT.
        blocks_after: share of the steps, at the start of a generation, in which no block does so (half in E-DiT's released
            code).
        forecast: share of the steps up to which two runs of a block (or token) may lie apart for its residual to be taken to
            go on as it changed between them: wholly where they lie close, not at all where this far apart. 0 adds it as it
            was last, and so does any share in a generation of 8 steps and less (see `horizon`). Doubles the memory.
        growth: where all blocks run at intervals, the last interval over the first, of 8 steps or more; 1 spaces them
            evenly. Which is best depends on the pipeline (`shivelight.evaluation.forecasting.search_reuse` finds out).
        whole: what is forecast where blocks only rest together: the "output" of the last block, or the "residual" that all of
            them add.
    """

    max_age: int = 10
    max_cache_mb: float = 4096.0
    context: bool = True
    warmup: float = 0.25
    margin: float = 0.1
    max_reuses: int = 5
    blocks_after: float = 0.0
    forecast: float = 0.25
    growth: float = 3.0
    whole: Literal["output", "residual"] = "output"

    def spacing(self, steps: int) -> float:
        """The last interval over the first in a generation of so many steps: `growth` from 8 on, 1 at 4 and less, in between a
        part of it (docs/decisions/few-steps.md)."""
        return 1.0 + (self.growth - 1.0) * min(1.0, max(0.0, (steps - 4) / 4))

    def horizon(self, steps: int) -> float:
        """How many steps apart two runs may lie for a forecast in a generation of so many: `forecast` of them from 16 on, none at
        8 and less, in between a share that grows. Few steps lie too far apart to go on as before (docs/decisions/few-steps.md).
        """
        return self.forecast * steps * min(1.0, max(0.0, (steps - 8) / 8))

    def __post_init__(self) -> None:
        _integer("Reuse.max_age", self.max_age)
        _require(self.max_age >= 1, f"Reuse.max_age is {self.max_age}; give at least 1 step.")
        _require(0 <= self.warmup < 1, f"Reuse.warmup is {self.warmup}; give a share of the steps in [0, 1).")
        _require(0 <= self.margin <= 1, f"Reuse.margin is {self.margin}; give a difference of probabilities in [0, 1].")
        _integer("Reuse.max_reuses", self.max_reuses)
        _require(0 <= self.blocks_after < 1, f"Reuse.blocks_after is {self.blocks_after}; give a share in [0, 1).")
        _require(0 <= self.forecast <= 1, f"Reuse.forecast is {self.forecast}; give a share in [0, 1].")
        _require(1 <= self.growth <= 10, f"Reuse.growth is {self.growth}; give a ratio from 1 to 10.")
        _one_of("Reuse.whole", self.whole, ("output", "residual"))
        _require(self.max_reuses >= 1, f"Reuse.max_reuses is {self.max_reuses}; give at least 1.")
        _require(self.max_cache_mb > 0, f"Reuse.max_cache_mb is {self.max_cache_mb}; give a positive number.")


@dataclass(frozen=True)
class StandIns:
    """What stands in for the blocks at steps at rest, where they only rest together: linear maps, fitted to a pipeline
    (`shivelight.fit_stand_ins`), in the place of the last output or its forecast.

    Attributes:
        rank: of the maps.
        plans: generations that there are maps for; others go by `Reuse` alone.
    """

    rank: int = 64
    plans: tuple[RestPlan, ...] = ()

    def __post_init__(self) -> None:
        _integer("StandIns.rank", self.rank)
        _require(self.rank >= 1, f"StandIns.rank is {self.rank}; give at least 1.")
        object.__setattr__(self, "plans", _plans("StandIns", self.plans))


@dataclass(frozen=True)
class RoutingConfig:
    """Everything an adapter of a backbone holds.

    Attributes:
        tokens: token routing, or None to run every token.
        blocks: block routing, or None to run every block whole. Deltas alone are the dense fine-tuned baseline.
        deltas: DoRA deltas, or None where the backbone's weights stay as they are.
        reuse: whether rejected tokens and blocks that a router is unsure about add their last residual, or None to let
            what does not run pass through unchanged.
        keep: the `keep` budget in force once attached; 1.0 runs everything until `set_budget`.
        compute: the `compute` budget in force once attached, in the place of `keep`, or None.
        activation: of the image stream's MLPs, where the backbone's weights were tuned with another one than its class
            has; "quick-gelu" is h * sigmoid(1.702 h). It belongs to the weights, so `dense` keeps it; `detach` takes it
            off. None leaves the class's own.
        stand_ins: linear maps that were fitted for steps at rest, or None.
    """

    tokens: TokenRouting | None = field(default_factory=TokenRouting)
    blocks: BlockRouting | None = None
    deltas: DeltaConfig | None = None
    reuse: Reuse | None = None
    keep: float = 1.0
    compute: float | None = None
    activation: Literal["quick-gelu"] | None = None
    stand_ins: StandIns | None = None

    def __post_init__(self) -> None:
        _require(
            self.tokens is not None or self.blocks is not None or self.deltas is not None,
            "RoutingConfig has neither tokens, blocks nor deltas: there is nothing to attach.",
        )
        drifting = (self.tokens is not None and (self.tokens.scores == "drift" or self.tokens.sees_drift)) or (
            self.blocks is not None and not self.blocks.learned
        )
        _require(
            not drifting or self.reuse is not None,
            "scores='drift', sees_drift and the routers 'interval', 'age' and 'drift' go by the residuals of earlier steps; give "
            "RoutingConfig reuse=Reuse() too.",
        )
        _require(
            not self.closed_reuse or self.reuse is not None,
            "BlockRouting.closed='reuse' adds the residuals of earlier steps; give RoutingConfig reuse=Reuse() too.",
        )
        _require(
            self.reuse is None or self.tokens is not None or self.blocks is not None,
            "RoutingConfig.reuse is about rejected tokens and skipped blocks; give tokens or blocks too.",
        )
        _require(
            isinstance(self.keep, int | float) and 0 < self.keep <= 1,
            f"RoutingConfig.keep is {self.keep!r}; give a mean keep ratio in (0, 1].",
        )
        _require(self.keep == 1 or self.tokens is not None, "RoutingConfig.keep below 1 needs tokens.")
        if self.activation is not None:
            _one_of("RoutingConfig.activation", self.activation, ("quick-gelu",))
        _require(
            self.compute is None
            or (isinstance(self.compute, int | float) and 0 < self.compute <= 1 and self.keep == 1),
            f"RoutingConfig.compute is {self.compute!r}; give a share of the dense FLOPs in (0, 1], and no keep beside it.",
        )

        _require(
            self.blocks is None
            or not self.blocks.partial
            or (self.together and self.reuse is not None and self.reuse.whole == "output"),
            "BlockRouting.partial is about steps at which all blocks rest: give tokens=None and reuse=Reuse(whole='output').",
        )
        _require(
            self.deltas is None or not self.deltas.plans or self.together,
            "DeltaConfig.plans is about steps at which all blocks rest: give blocks=BlockRouting(router='interval', "
            "widths=(1.0,)) and tokens=None.",
        )
        _require(
            self.stand_ins is None or (self.together and self.reuse is not None and self.reuse.whole == "output"),
            "RoutingConfig.stand_ins is about steps at which all blocks rest: give blocks=BlockRouting(router='interval', "
            "widths=(1.0,)), tokens=None and reuse=Reuse(whole='output').",
        )

    @property
    def together(self) -> bool:
        """Whether blocks only ever run or rest together."""
        return self.tokens is None and self.blocks is not None and self.blocks.router == "interval"

    @property
    def granularity(self) -> int:
        """Kept counts of tokens are multiples of this (see `TokenRouting`); 0 where no tokens are left out."""
        if self.tokens is not None:
            return self.tokens.granularity
        return TokenRouting.granularity if self.blocks is not None and self.blocks.partial == "tokens" else 0

    @property
    def closed_reuse(self) -> bool:
        """Whether gates that are closed add the block's last residual."""
        return self.blocks is not None and self.blocks.closed == "reuse"

    @classmethod
    def training_free(
        cls, keep: float = 0.6, *, compute: float | None = None, axis: Literal["tokens", "blocks", "both"] = "tokens",
        partial: bool | Part = False, **reuse: Any,
    ) -> "RoutingConfig":  # fmt: skip
        """Routing that needs no adapter: tokens that move and blocks whose turn it is run, the rest adds its last residual.

        Args:
            keep: the budget in force once attached, for tokens alone; `set_budget` changes it.
            compute: the budget as a share of the dense FLOPs instead; needed for blocks.
            axis: whether tokens, whole blocks, or both are left out.
            partial: `BlockRouting.partial`; for blocks alone.
            reuse: fields of `Reuse`; for blocks alone, growth=2 and forecast=0.5 by default.
        """
        _one_of("axis", axis, ("tokens", "blocks", "both"))
        _require(axis == "blocks" or not partial, f"partial is about whole blocks; give axis='blocks', not {axis!r}.")
        if axis == "blocks":
            reuse = AT_INTERVALS | reuse
        _require(axis == "tokens" or compute is not None, f"axis={axis!r} needs a budget of FLOPs: give compute=.")
        return cls(
            None if axis == "blocks" else TokenRouting(scores="drift", ratios="fixed"),
            None if axis == "tokens" else BlockRouting(router="interval", widths=(1.0,), partial=partial),
            reuse=Reuse(**reuse),
            keep=keep if compute is None else 1.0,
            compute=compute,
        )

    def to_dict(self) -> dict[str, Any]:
        """The dict that its JSON reads as (lists, no tuples); `from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RoutingConfig":
        """The config written by `to_dict`; unknown or missing names raise `AdapterError`."""
        _check_names(cls, data)
        parts = {
            "tokens": TokenRouting, "blocks": BlockRouting, "deltas": DeltaConfig, "reuse": Reuse, "stand_ins": StandIns,
        }  # fmt: skip
        read = {name: _part(part, data.get(name)) for name, part in parts.items()}
        single: dict[str, Any] = {"keep": 1.0, "compute": None, "activation": None}
        return cls(**read, **{name: data.get(name, default) for name, default in single.items()})


def _plans(owner: str, given: Any) -> tuple[RestPlan, ...]:
    """As JSON or as plans; none twice."""
    _require(isinstance(given, list | tuple), f"{owner}.plans is {given!r}; give a list of plans.")
    read = tuple(plan if isinstance(plan, RestPlan) else _part(RestPlan, plan) for plan in given)
    names = {plan.key for plan in read}
    _require(len(names) == len(read), f"{owner}.plans has one plan twice.")
    return read


def _part(cls: type, data: dict[str, Any] | None) -> Any:
    if data is None:
        return None
    _check_names(cls, data)
    try:
        return cls(**data)
    except TypeError as error:
        raise AdapterError(f"{cls.__name__} cannot be read from {data!r}: {error}") from error


def _check_names(cls: type, data: Any) -> None:
    _require(isinstance(data, dict), f"{cls.__name__} must be a JSON object, got {type(data).__name__}.")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    _require(
        not unknown,
        f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}. "
        "An adapter written by a newer Shivelight needs that version.",
    )


def _integer(name: str, value: object) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool), f"{name} is {value!r}; give a whole number.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; one of {', '.join(map(repr, allowed))}.")
