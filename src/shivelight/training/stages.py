"""What a training run is told: settings, and the three stages of Shiva-DiT that they describe."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from shivelight.errors import TrainingError

StageName = Literal["router", "policy", "joint"]
EstimatorName = Literal["residual", "residual-2", "input", "straight-through", "dftopk", "gumbel"]
ESTIMATORS: tuple[EstimatorName, ...] = get_args(EstimatorName)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run. Steps are optimiser steps.

    Attributes:
        router_steps: stage 1, the policy bypassed: every micro-batch gets a keep ratio of its own stratum.
        policy_steps: stage 2, the policy on, with noise on its logits.
        joint_steps: stage 3, router, policy and deltas together, noise off.
        groups: micro-batches per step and process; each has one timestep, so that all its samples keep equally many
            tokens and every gather is a real, smaller batch.
        group_size: samples of a micro-batch.
        lr_router, lr_gates, lr_policy, lr_deltas: peak learning rates (AdamW) of routers, of the heads of block routers,
            of policy and deltas, each after the stage's own linear warm-up.
        warmup: warm-up steps of each stage, at most half of it.
        estimator: how the loss reaches scores and k. "residual", its second order "residual-2" (training/curvature.py), or the
            paper's "input", all three through the soft rank; or a peer of it (training/relaxations.py): "straight-through",
            "dftopk" or "gumbel", at the rank's temperature.
        budget: "anchor" solves for the policy's anchor, so that each micro-batch meets its sampled target; "loss" is the
            paper's EMA budget loss at `target`.
        keep_low, keep_high: range of the sampled keep ratios.
        target: mean keep ratio of the budget loss.
        budget_weight: weight of the budget loss.
        gate_target, width_target: rho_g and rho_w, mean probability of running a block and mean share of its MLP.
        gate_weight: weight of both losses on them (lambda; 1 in the paper).
        gate_low, gate_high: range of the share of gates that are open in the joint stage: each micro-batch moves the dial to
            a share drawn from it, so that one adapter serves every budget. Both None is the paper's: the dial never moves.
        gate_signal: what gates learn from: "gradient", straight through the routed pass, is the paper's; "damage" is measured,
            block by block, where closed gates reuse and no deltas change the blocks meanwhile (see training/damage.py).
        damage_blocks: blocks of a micro-batch of which the damage is measured, one forward pass each.
        max_age: how many steps old the residuals are, at most, that are simulated for what is trained with reuse.
        calibration_batches: micro-batches, after the last step, of which the routers' records are made; 0 keeps those of
            the last steps.
        rank_batches: batches by which the MLPs' channels are ranked before the first step; 0 keeps their own order.
        score_noise: standard deviation of the noise on the scores while routers train alone (stages 1 and 2).
        logit_noise: standard deviation of the noise on the policy's logits (stage 2).
        rank_temperature, selection_temperature: (start, end) of the annealing, which begins after stage 1.
        output_weight: weight of the squared error to the teacher's output.
        feature_weight: weight of the normalised feature distillation.
        flow_weight: weight of the loss to the data: flow matching, or the noise that such models predict.
        feature_every: every how many blocks features are compared.
        caption_drop: share of samples trained with the empty caption.
        max_grad_norm: gradients are clipped to this norm.
        schedule_points: timesteps, one from each of so many intervals, for which the anchor is solved.
        levels: noise levels of a few-step model, falling, all that its sampler ever asks for (`Denoiser.levels`): micro-batches
            are drawn at these alone, and the anchor is solved for them. Empty draws all of the path.
        checkpoint_every: steps between checkpoints.
        preview_every: steps between preview grids; 0 for none.
        seed: of everything that is drawn.
    """

    router_steps: int = 200
    policy_steps: int = 200
    joint_steps: int = 1000
    groups: int = 4
    group_size: int = 4
    lr_router: float = 1e-3
    lr_gates: float = 1e-2
    lr_policy: float = 3e-4
    lr_deltas: float = 5e-4
    warmup: int = 50
    estimator: EstimatorName = "residual-2"
    budget: Literal["anchor", "loss"] = "anchor"
    keep_low: float = 0.35
    keep_high: float = 0.95
    target: float = 0.6
    budget_weight: float = 1.0
    gate_target: float = 0.6
    width_target: float = 0.75
    gate_weight: float = 1.0
    gate_low: float | None = 0.35
    gate_high: float | None = 1.0
    gate_signal: Literal["gradient", "damage"] = "gradient"
    damage_blocks: int = 3
    max_age: int = 3
    rank_batches: int = 8
    calibration_batches: int = 64
    score_noise: float = 0.1
    logit_noise: float = 1.0
    rank_temperature: tuple[float, float] = (0.2, 0.05)
    selection_temperature: tuple[float, float] = (0.1, 0.03)
    output_weight: float = 1.0
    feature_weight: float = 0.1
    flow_weight: float = 0.1
    feature_every: int = 4
    caption_drop: float = 0.1
    max_grad_norm: float = 1.0
    schedule_points: int = 25
    levels: tuple[float, ...] = ()
    checkpoint_every: int = 200
    preview_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("router_steps", "policy_steps", "joint_steps", "warmup", "preview_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more.")
        for name in (
            "groups",
            "group_size",
            "feature_every",
            "schedule_points",
            "checkpoint_every",
            "max_age",
            "damage_blocks",
        ):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give 1 or more.")
        _require(self.total_steps > 0, "All three stages have 0 steps: there is nothing to train.")
        _require(
            0 < self.keep_low <= self.keep_high <= 1,
            f"keep_low is {self.keep_low} and keep_high {self.keep_high}; give 0 < keep_low <= keep_high <= 1.",
        )
        for name in ("gate_target", "width_target"):
            _require(0 < getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; give a share in (0, 1].")
        low, high = self.gate_low, self.gate_high
        _require(
            (low is None and high is None) or (low is not None and high is not None and 0 < low <= high <= 1),
            f"gate_low is {low} and gate_high {high}; give 0 < gate_low <= gate_high <= 1, or None for both.",
        )
        for name in ("rank_batches", "calibration_batches"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more.")
        falling = all(later < sooner for sooner, later in zip(self.levels, self.levels[1:], strict=False))
        _require(
            falling and all(0 < level <= 1 for level in self.levels),
            f"levels are {self.levels}; give falling noise levels in (0, 1], or none.",
        )
        _require(0 < self.target < 1, f"target is {self.target}; give a keep ratio in (0, 1).")
        _require(0 <= self.caption_drop < 1, f"caption_drop is {self.caption_drop}; give a share in [0, 1).")
        _require(self.estimator in ESTIMATORS, f"estimator is {self.estimator!r}; give one of {', '.join(ESTIMATORS)}.")
        _require(
            self.gate_signal in ("gradient", "damage"), f"gate_signal is {self.gate_signal!r}; gradient or damage."
        )
        _require(self.budget in ("anchor", "loss"), f"budget is {self.budget!r}; anchor or loss.")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.router_steps + self.policy_steps + self.joint_steps

    def stage(self, step: int) -> tuple[StageName, int, int]:
        """(stage, step within it, its length) of a step of the run."""
        for name, length in (("router", self.router_steps), ("policy", self.policy_steps)):
            if step < length:
                return name, step, length  # type: ignore[return-value]
            step -= length
        return "joint", step, self.joint_steps

    def rate_factor(self, step: int) -> float:
        """Factor on the peak learning rates: each stage's own linear warm-up; the joint stage falls to 10% at its end."""
        stage, inside, length = self.stage(step)
        warm = min(1.0, (inside + 1) / max(1, min(self.warmup, length // 2)))
        return warm * (1.0 - 0.9 * inside / length) if stage == "joint" else warm

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise TrainingError(f"TrainingConfig.{message}")
