"""What training minimises: the budget loss, feature distillation and the loss to the data; and how its draws are stratified.

Shapes: B samples, N tokens, D width; latents are [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shivelight.errors import TrainingError

Reduce = Callable[..., Tensor]


class BudgetLoss(nn.Module):
    """The paper's budget loss, with one average for fixed and for sampled targets.

        mu <- beta * (rbar - target) + (1 - beta) * mu,      L = rbar * sg[2 mu]

    With a fixed target this is the paper's rbar * sg[2 (mu' - target)], since averaging commutes with subtracting a
    constant. With a sampled target it is the only form that works: an average of rbar alone forgets which target each
    batch was asked for. The first batch sets mu (the paper leaves its start open), so no pull comes from an empty
    average. The state is in buffers: saved, resumed and moved like any module's.

    Args:
        beta: weight of the newest batch; 0.2 in the paper.
        reduce: mean over processes, called as `reduce(tensor, reduction="mean")`: `accelerate.Accelerator.reduce`
            as it is; None for a single process. Only the average is reduced: the gradient stays each process's own
            and the data-parallel wrapper averages it.
    """

    deviation: Tensor
    updates: Tensor

    def __init__(self, beta: float = 0.2, reduce: Reduce | None = None) -> None:
        super().__init__()
        if not 0.0 < beta <= 1.0:
            raise TrainingError(f"The budget loss has beta={beta}; give a weight in (0, 1], 0.2 in the paper.")
        self.beta = beta
        self.reduce = reduce
        self.register_buffer("deviation", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, mean_keep: Tensor, target: Tensor | float) -> Tensor:
        """Update the average with one batch and return its loss.

        Args:
            mean_keep: scalar, the batch's mean keep ratio rbar, with its gradient.
            target: the mean keep ratio this batch was asked for; a number, or a scalar tensor.

        Returns:
            Scalar; its gradient pushes rbar down while the average is above the target, up while it is below.
        """
        newest = (mean_keep.detach() - target).to(self.deviation)
        if self.reduce is not None:
            newest = self.reduce(newest, reduction="mean")
        weight = torch.where(self.updates == 0, 1.0, self.beta)
        self.deviation.mul_(1.0 - weight).add_(weight * newest)
        self.updates.add_(1)
        return mean_keep * (2.0 * self.deviation).to(mean_keep.dtype)


def feature_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of || LN(h_student) - LN(h_teacher) ||^2 per element; LayerNorm without affine, in fp32.

    Normalised, because features of late layers are orders of magnitude larger and would drown the others. A mean per
    element and layer, not the paper's sum, so that its weight means the same on every backbone.

    Args:
        student: features [B, N, D] of some blocks and the final output.
        teacher: the dense model's, in the same order; no gradient goes there.
    """
    if not student or len(student) != len(teacher):
        raise TrainingError(f"{len(student)} student and {len(teacher)} teacher features; give as many, at least one.")
    layers = []
    for place, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise TrainingError(
                f"Feature {place} has shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the "
                "teacher; scatter the kept tokens back before comparing."
            )
        width = ours.shape[-1:]
        layers.append(F.mse_loss(F.layer_norm(ours.float(), width), F.layer_norm(theirs.detach().float(), width)))
    return torch.stack(layers).mean()


def noisy_latents(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Rectified flow's path, x_sigma = (1 - sigma) x + sigma noise, as diffusers' flow-matching samplers walk it.

    Args:
        clean: [B, ...].
        noise: like `clean`, standard normal.
        sigmas: [B], 0 for data and 1 for noise; the timestep is 1000 * sigma.
    """
    sigma = sigmas.to(clean.dtype).view(-1, *[1] * (clean.dim() - 1))
    return (1.0 - sigma) * clean + sigma * noise


def prediction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of prediction - target over samples of equal weight, in fp32.

    Args:
        prediction: [B, ...], the model's output.
        target: like `prediction`: of flow matching noise - clean, the path's velocity.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1).mean()


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards noise as FlowMatchEulerDiscreteScheduler does: shift s / (1 + (shift - 1) s)."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def stratified_uniform(
    count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """One draw from each 1/count interval of [0, 1), in random order: [count] fp32.

    Drawn where the generator lives, then moved: a CPU generator gives the same draws for every device.
    """
    if count < 1:
        raise TrainingError(f"Cannot draw {count} stratified values; ask for at least one.")
    home = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(count, generator=generator, device=home)
    inside = torch.rand(count, generator=generator, device=home)
    # 15 + 0.99999994 rounds to 16 in fp32: the last draw must stay below 1.
    draws = ((order + inside) / count).clamp(max=1.0 - torch.finfo(torch.float32).eps / 2)
    return draws.to(device)


def stratified_ratios(
    groups: int,
    low: float,
    high: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One keep ratio from each of `groups` strata of [low, high], in random order: [groups] fp32 (router warm-up)."""
    if not 0.0 < low <= high <= 1.0:
        raise TrainingError(f"Keep ratios from {low} to {high}; give 0 < low <= high <= 1.")
    return low + (high - low) * stratified_uniform(groups, generator, device)
