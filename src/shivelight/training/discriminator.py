"""Tells routed generations from dense ones, so that deltas learn what a mean square error leaves out: texture.

A mean square is least at the mean of all that may come out, which is smooth. Here small heads read what the dense backbone's own
blocks make of noised latents (LADD, arXiv 2403.12015) and learn to tell the dense generation from the routed one of the same prompt
and noise, pair by pair (relativistic: R3GAN, arXiv 2501.05441), with a penalty on gradients at what they read (ADD, arXiv
2311.17042). Deltas learn not to be told apart. None of this is in the adapter.

Shapes: B samples, latents [B, ...], N image tokens, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from shivelight.errors import TrainingError
from shivelight.execution.routed import Routed
from shivelight.training.deltas import LiveDeltas
from shivelight.training.noise import noise_process

# Width of a head.
_HIDDEN = 128
# Noise levels are drawn from 0 up to this: at low ones textures are told apart, at high ones shapes.
_NOISIEST = 0.6
# Weight of the squared slopes of heads at what they read.
_PENALTY = 0.1


class Verdict(NamedTuple):
    """What heads make of a batch.

    Attributes:
        gradient: like the routed latents, and of length 1: against it they become more like dense ones.
        told_apart: share of the tokens at which the dense one of a pair is taken for it; 0.5 where nothing is told apart.
    """

    gradient: Tensor
    told_apart: float


class Discriminator(nn.Module):
    """Heads on a few blocks of the dense backbone.

    Args:
        backbone: with `routed` attached.
        routed: its routing, off while heads read.
        live: its deltas, off while heads read.
        scheduler: of the pipeline; says how noise is added.
        blocks: how many are read, spread evenly up to the last.
    """

    def __init__(
        self,
        backbone: Any,
        routed: Routed,
        live: LiveDeltas,
        scheduler: Any,
        blocks: int = 4,
    ) -> None:
        super().__init__()
        self._parts = routed, live  # in a tuple, where no submodules are looked for
        self._ask: tuple[Any, ...] = (backbone, scheduler)
        self._noise = noise_process(scheduler)
        width, routes = routed.spec.widths(backbone)[0], routed.routed
        count = min(blocks, len(routes))
        self.blocks = tuple(routes[len(routes) * (place + 1) // count - 1] for place in range(count))
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False),
                nn.Linear(width, _HIDDEN),
                nn.SiLU(),
                nn.Linear(_HIDDEN, 1),
            )
            for _ in self.blocks
        ).to(next(backbone.parameters()).device)
        self._asked: dict[str, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """As the pipeline asks the backbone at the first step meanwhile, heads will ask it: prompts and sizes are in that."""
        backbone, _ = self._ask
        spec = self._parts[0].spec
        self._asked = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._asked = self._asked or spec.arguments(args, kwargs)

        handle = backbone.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def judge(self, routed: Tensor, dense: Tensor, generator: torch.Generator) -> Verdict:
        """Gradients of what heads learn are added to theirs; those of the latents are returned.

        Args:
            routed: [B, ...], the end of the generation that was listened to.
            dense: [B, ...], that of the same prompts and noise.
            generator: of noise.
        """
        sigmas = _NOISIEST * torch.rand(len(routed), generator=generator)
        noise = torch.randn(routed.shape, generator=generator)
        sigmas, noise = sigmas.to(routed.device), noise.to(routed.device)
        made = routed.detach().float().requires_grad_()
        routing, live = self._parts
        # The dense model on the way back too: gradient checkpointing runs blocks a second time then.
        with torch.enable_grad(), live.disabled(), routing.switched(False):
            false = self._features(made, noise, sigmas)
            with torch.no_grad():
                true = self._features(dense.float().to(made.device), noise, sigmas)
            slope = torch.autograd.grad(softplus(self._margins(true, false)).mean(), made)[0]
        with torch.enable_grad():
            true, false = ([values.detach().requires_grad_() for values in side] for side in (true, false))
            margins = self._margins(true, false)
            slopes = torch.autograd.grad(margins.sum(), (*true, *false), create_graph=True)
            steep = torch.stack([each.square().sum(-1).mean() for each in slopes]).mean()
            (softplus(-margins).mean() + _PENALTY * steep).backward()
        return Verdict(slope / slope.norm().clamp_min(1e-12), float((margins > 0).float().mean()))

    def _features(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> list[Tensor]:
        """[B', N, D] that leave the blocks that are read; B' = 2 B where guidance doubles the batch."""
        (routed, _), (backbone, scheduler) = self._parts, self._ask
        spec, asked = routed.spec, self._asked
        first, time = asked[spec.model_arguments[0]], asked[spec.timestep_argument]
        if first.shape[1:] != latents.shape[1:]:
            raise TrainingError(
                f"{type(backbone).__name__} is given {tuple(first.shape)} for latents {tuple(latents.shape)}: reference pictures "
                "or masks go in beside them, which a discriminator does not know how to ask for. Tune with adversarial=0."
            )
        repeats = len(first) // len(latents)
        noisy = self._noise.noisy(latents, noise, sigmas).to(first.dtype)
        # Families count time each in their own way: the first step tells by how much.
        scale = spec.sample_times(time).max() / scheduler.timesteps[getattr(scheduler, "begin_index", None) or 0]
        times = (self._noise.timesteps(sigmas) * scale).to(time.dtype)
        call = asked | {
            spec.model_arguments[0]: torch.cat([noisy] * repeats),
            spec.timestep_argument: torch.cat([times] * repeats),
        }
        found: dict[int, Tensor] = {}

        def see(block: int, x: Tensor, out: Tensor, kept: Any, text: Any) -> None:
            found[block] = out.float()

        observer, routed.observer = routed.observer, see
        try:
            backbone(**call)
        finally:
            routed.observer = observer
        return [found[block] for block in self.blocks]

    def _margins(self, true: Sequence[Tensor], false: Sequence[Tensor]) -> Tensor:
        """By how much dense ones are taken for dense more than routed ones are, [blocks, B', N]."""
        with torch.autocast(true[0].device.type, enabled=False):
            return torch.stack(
                [(head(one) - head(other))[..., 0] for head, one, other in zip(self.heads, true, false, strict=True)]
            )
