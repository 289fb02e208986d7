"""A routed generation followed with gradients, through the pipeline's own call, and cut where a run of the blocks begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shivelight.errors import TrainingError
from shivelight.execution.compiled import Regions
from shivelight.execution.routed import Routed


class Walk:
    """Follows a routed generation with gradients, and cuts it before each run: backward from the difference to the dense latents.

    Args:
        routed: state of the backbone.
        scheduler: of the pipeline.
        wanted: latents [T, B, ...] of the dense generations after each model call.
        keeps_end: the last latents are kept with their graph in `end`, for the caller to go backward from.
    """

    def __init__(self, routed: Routed, scheduler: Any, wanted: Tensor, keeps_end: bool = False) -> None:
        self.routed, self.scheduler, self.wanted, self.keeps_end = routed, scheduler, wanted, keeps_end
        self.losses: list[float] = []
        self.end: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """After a call's latents [B, ...]: those to go on with."""
        step = self.routed.context.step
        self._check_rest(step)
        if not self.ends(step):
            return latents
        if not latents.requires_grad:
            raise TrainingError(
                "The pipeline's call records no gradients. Deltas are tuned through pipelines whose call is wrapped in "
                "torch.no_grad as diffusers' own are, and nothing more."
            )
        wanted = self.wanted[step].to(latents.device)
        own = latents[: len(wanted)]  # DiT's come twice where guidance doubles the batch
        loss = (own.float() - wanted).square().mean()
        if self.keeps_end and step + 1 >= self.routed.rests.steps:
            self.end = own
        else:
            loss.backward()
        self.losses.append(loss.item())
        self.routed.residuals.detach()
        _forget_gradients(self.scheduler)
        return latents.detach()

    def _check_rest(self, step: int) -> None:
        """What is tuned around rests that never were is of no use."""
        routed = self.routed
        shares = routed.spending.shares.get((step, routed.routed[0]), [])
        if not routed.rests.computes(step) and any(share > 0 for share in shares):
            raise TrainingError(
                f"All blocks ran at step {step}, where the budget has them rest: what they made before does not fit into Reuse("
                f"max_cache_mb={routed.residuals.max_mb:g}) with {len(self.wanted[0])} samples. Give it more, or a smaller batch."
            )

    def ends(self, step: int) -> bool:
        """Whether a run of the blocks comes next, or nothing more."""
        plan = self.routed.rests
        return step + 1 >= plan.steps or plan.computes(step + 1)


class CheckpointedRegions(Regions):
    """Runs blocks without keeping what the backward pass needs, which runs them once more."""

    def run(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives."""
        return checkpoint(function, *args, use_reentrant=False)


def recording(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call without the torch.no_grad that diffusers wraps it in."""
    return partial(getattr(type(pipe).__call__, "__wrapped__", type(pipe).__call__), pipe)


@contextmanager
def watched(scheduler: Any, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Each step of the scheduler is seen, and what is returned takes the place of its latents."""
    own = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        if isinstance(made, tuple):
            return (see(made[0]), *made[1:])
        made.prev_sample = see(made.prev_sample)
        return made

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _forget_gradients(scheduler: Any) -> None:
    """Schedulers of several steps keep what earlier calls made."""
    for name, kept in vars(scheduler).items():
        if isinstance(kept, Tensor) and kept.requires_grad:  # others stay the very tensors that they are
            setattr(scheduler, name, kept.detach())
        elif isinstance(kept, list) and any(isinstance(value, Tensor) for value in kept):
            kept[:] = [value.detach() if isinstance(value, Tensor) else value for value in kept]
