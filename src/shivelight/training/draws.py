"""What each micro-batch trains on, drawn as a function of (seed, step, group, process), so that a resumed run is the
uninterrupted one.

All samples of a micro-batch share one timestep, so they keep equally many tokens and the kept ones form a real, smaller batch;
timesteps, keep ratios and shares of open gates are stratified over the groups of all processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shivelight.training.losses import shift_sigmas, stratified_ratios, stratified_uniform
from shivelight.training.stages import TrainingConfig


@dataclass
class Draw:
    """What one micro-batch trains on.

    Attributes:
        sigma: its noise level, in (0, 1].
        keep: its keep target.
        shift: of the gates' dial.
        age: steps between it and the pass whose residuals it reuses.
        indices: its samples.
        dropped: which of them lose their caption.
        generator: of all else that it draws.
    """

    sigma: float
    keep: float
    shift: float
    age: int
    indices: list[int]
    dropped: list[bool]
    generator: torch.Generator


class Draws:
    """Draws the micro-batches of one process.

    Args:
        config: of the run.
        samples: how many there are.
        shift: of the scheduler's noise levels.
        processes: how many take part, and which one this is.
        shift_to_run: (share of open gates, age of what they reuse) -> shift of the dial.
    """

    def __init__(
        self,
        config: TrainingConfig,
        samples: int,
        shift: float,
        processes: tuple[int, int],
        shift_to_run: Callable[[float, int], float],
    ) -> None:
        self.config, self.samples, self.shift = config, samples, shift
        self.processes, self.shift_to_run = processes, shift_to_run

    def at(self, step: int) -> list[Draw]:
        """The micro-batches of a step."""
        config, (world, index) = self.config, self.processes
        count = config.groups * world
        shared = torch.Generator().manual_seed(_mix(config.seed, step, 0))
        sigmas = self._sigmas(count, shared)
        keeps = stratified_ratios(count, config.keep_low, config.keep_high, shared)
        shares: list[float] | None = None
        if config.stage(step)[0] == "joint" and config.gate_low is not None and config.gate_high is not None:
            shares = stratified_ratios(count, config.gate_low, config.gate_high, shared).tolist()
        draws = []
        for group in range(config.groups):
            place = group * world + index
            own = torch.Generator().manual_seed(_mix(config.seed, step, 1 + place))
            indices = torch.randint(self.samples, (config.group_size,), generator=own).tolist()
            dropped = (torch.rand(config.group_size, generator=own) < config.caption_drop).tolist()
            age = 1 + int(torch.randint(config.max_age, (), generator=own))
            shift = 0.0 if shares is None else self.shift_to_run(shares[place], age)
            draws.append(Draw(float(sigmas[place]), float(keeps[place]), shift, age, indices, dropped, own))
        return draws

    def calibration(self) -> list[Draw]:
        """The micro-batches by which trained gates are recorded: timesteps and budgets spread evenly over all of them."""
        config, count = self.config, self.config.calibration_batches
        generator = torch.Generator().manual_seed(_mix(config.seed, config.total_steps, 0))
        sigmas = self._sigmas(count, generator).tolist()
        # Without a range of its own the dial never moved in training; budgets will move it all the same.
        low = config.keep_low if config.gate_low is None else config.gate_low
        high = 1.0 if config.gate_high is None else config.gate_high
        shares = stratified_ratios(count, low, high, generator).tolist()
        draws = [self.at(config.total_steps + batch)[0] for batch in range(count)]
        for draw, sigma, share in zip(draws, sigmas, shares, strict=True):
            draw.sigma, draw.shift = sigma, self.shift_to_run(share, draw.age)
        return draws

    def grid(self, generator: torch.Generator) -> Tensor:
        """Timesteps of a generation, 0 to 1000, one from each of `schedule_points` intervals, drawn anew each time.

        On fixed points the policy learns to keep little at just those, which raises the anchor and with it all that is
        trained at any other timestep (docs/decisions/budget.md). A few-step model is trained at no other.
        """
        if self.config.levels:
            return 1000 * torch.tensor(self.config.levels)
        return 1000 * shift_sigmas(stratified_uniform(self.config.schedule_points, generator), self.shift)

    def earlier(self, sigma: float, steps: int) -> float:
        """The noise level some sampling steps before this one; 1, or the first of a few, at the earliest."""
        if levels := self.config.levels:
            place = min(range(len(levels)), key=lambda i: abs(levels[i] - sigma))
            return levels[max(0, place - steps)]
        plain = sigma / (self.shift - (self.shift - 1.0) * sigma)
        plain = min(plain + steps / self.config.schedule_points, 1.0)
        return float(shift_sigmas(torch.tensor(plain), self.shift))

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        if self.config.levels:
            places = stratified_uniform(count, generator) * len(self.config.levels)
            return torch.tensor(self.config.levels)[places.long()]
        # The end of the path (pure data) is no input that sampling ever sees.
        return shift_sigmas(stratified_uniform(count, generator), self.shift).clamp(min=1e-3)


def _mix(*parts: int) -> int:
    """One 63-bit seed of several small numbers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ (part + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) % 2**64
        value ^= value >> 31
    return value % 2**63
