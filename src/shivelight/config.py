"""What is attached to a backbone: plain, validated dataclasses with a JSON round trip."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from shivelight.errors import AdapterError

FORMAT_VERSION = 1


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
class DeltaConfig:
    """DoRA deltas of the backbone's attention and MLP linears, trained jointly with the routing.

    Attributes:
        rank: rank of the deltas; 8 keeps adapters small (32 on SD3.5-Medium is 95 MB).
        alpha: scale numerator; the delta is alpha / rank * B A.
    """

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        _integer("DeltaConfig.rank", self.rank)
        _require(self.rank >= 1, f"DeltaConfig.rank is {self.rank}; give at least 1.")
        _require(0 < self.alpha < math.inf, f"DeltaConfig.alpha is {self.alpha}; give a positive number.")


@dataclass(frozen=True)
class Reuse:
    """What is left out adds its last residual instead of nothing.

    Attributes:
        max_age: a residual that was computed more than this many steps ago is not used; such tokens run first.
        max_cache_mb: bound on the memory of the residuals, in units of 1e6 bytes; blocks whose residuals do not fit go
            without. They take blocks x samples x tokens x width x bytes per number, three times that with `context`.
        context: whether tokens that run also attend to the others, by the keys and values they last had.
        warmup: share of the steps, at the start of a generation, that run everything; at least one step if above 0.
    """

    max_age: int = 10
    max_cache_mb: float = 4096.0
    context: bool = True
    warmup: float = 0.25

    def __post_init__(self) -> None:
        _integer("Reuse.max_age", self.max_age)
        _require(self.max_age >= 1, f"Reuse.max_age is {self.max_age}; give at least 1 step.")
        _require(0 <= self.warmup < 1, f"Reuse.warmup is {self.warmup}; give a share of the steps in [0, 1).")
        _require(self.max_cache_mb > 0, f"Reuse.max_cache_mb is {self.max_cache_mb}; give a positive number.")


@dataclass(frozen=True)
class RoutingConfig:
    """Everything an adapter of a backbone holds.

    Attributes:
        tokens: token routing, or None to run every token (deltas alone: the dense fine-tuned baseline).
        deltas: DoRA deltas, or None where the backbone's weights stay as they are.
        reuse: whether rejected tokens add their last residual, or None to let them pass through unchanged.
        keep: the `keep` budget in force once attached; 1.0 runs everything until `set_budget`.
    """

    tokens: TokenRouting | None = field(default_factory=TokenRouting)
    deltas: DeltaConfig | None = None
    reuse: Reuse | None = None
    keep: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self.tokens is not None or self.deltas is not None,
            "RoutingConfig has neither tokens nor deltas: there is nothing to attach.",
        )
        drifting = self.tokens is not None and self.tokens.scores == "drift"
        _require(
            not drifting or self.reuse is not None,
            "TokenRouting.scores='drift' ranks by the residuals of earlier steps; give RoutingConfig reuse=Reuse() too.",
        )
        _require(
            self.reuse is None or self.tokens is not None,
            "RoutingConfig.reuse is about rejected tokens; give tokens too.",
        )
        _require(
            isinstance(self.keep, int | float) and 0 < self.keep <= 1,
            f"RoutingConfig.keep is {self.keep!r}; give a mean keep ratio in (0, 1].",
        )
        _require(self.keep == 1 or self.tokens is not None, "RoutingConfig.keep below 1 needs tokens.")

    @classmethod
    def training_free(cls, keep: float = 0.6, **reuse: Any) -> "RoutingConfig":
        """Routing that needs no adapter: tokens whose residual moves run, the others add their last residual.

        Args:
            keep: the budget in force once attached; `set_budget` changes it.
            reuse: fields of `Reuse`.
        """
        return cls(TokenRouting(scores="drift", ratios="fixed"), reuse=Reuse(**reuse), keep=keep)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RoutingConfig":
        """The config written by `to_dict`; unknown or missing names raise `AdapterError`."""
        _check_names(cls, data)
        parts = {"tokens": TokenRouting, "deltas": DeltaConfig, "reuse": Reuse}
        read = {name: _part(part, data.get(name)) for name, part in parts.items()}
        return cls(**read, keep=data.get("keep", 1.0))


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
