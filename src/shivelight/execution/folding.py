"""DoRA deltas folded into the backbone's weights for inference, with the originals kept.

W' = m * (W + alpha / r * B A) / ||W + alpha / r * B A||, norms over each row (Liu et al. 2024, DoRA, eq. 5).
"""

from dataclasses import dataclass

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from torch import Tensor, nn

from shivelight.errors import AdapterError, ShivelightError


@dataclass
class Delta:
    """One linear's DoRA delta: down [r, in], up [out, r], magnitude [out]."""

    down: Tensor
    up: Tensor
    magnitude: Tensor

    def fits(self, weight: Tensor) -> bool:
        """Whether the three parts belong together and to a weight [out, in]."""
        rank = self.down.shape[:1]
        return (self.down.shape, self.up.shape, self.magnitude.shape) == (
            (*rank, weight.shape[1]),
            (weight.shape[0], *rank),
            weight.shape[:1],
        )

    def fold(self, weight: Tensor, scale: float) -> Tensor:
        """The tuned weight, computed in fp32, in the weight's own dtype."""
        moved = weight.float() + scale * (self.up.float().to(weight.device) @ self.down.float().to(weight.device))
        factor = self.magnitude.float().to(weight.device) / torch.linalg.vector_norm(moved, dim=1)
        return (factor[:, None] * moved).to(weight.dtype)


class FoldedWeights:
    """Swaps tuned weights in and out; holds the one set that is not in use.

    Args:
        model: the backbone.
        deltas: by the name of the linear, relative to the backbone.
        scale: alpha / rank.
    """

    def __init__(self, model: nn.Module, deltas: dict[str, Delta], scale: float) -> None:
        self._model = model
        self._linears: dict[str, nn.Linear] = {}
        self._spare: dict[str, Tensor] = {}
        self.active = False
        for name, delta in deltas.items():
            linear = base_linear(model, name)
            if not delta.fits(linear.weight):
                shapes = ", ".join(str(tuple(part.shape)) for part in (delta.down, delta.up, delta.magnitude))
                raise AdapterError(
                    f"The delta of {name!r} has parts of shapes {shapes}, which do not fit the backbone's weight of "
                    f"{' x '.join(map(str, linear.weight.shape))}: the adapter belongs to another backbone."
                )
            self._linears[name] = linear
            self._spare[name] = delta.fold(linear.weight.data, scale)

    def apply(self, active: bool) -> None:
        """Put the tuned weights (True) or the originals (False) in place; exact, and free where nothing changes."""
        if active == self.active:
            return
        if any(_copied(module) for module in self._model.modules()):
            raise ShivelightError(
                "The backbone is offloaded in groups through a stream or to disk, and comes back from copies of its weights that "
                "DoRA deltas cannot reach. Offload to memory without a stream, or load the adapter first and leave it in force."
            )
        for name, linear in self._linears.items():
            weight = linear.weight
            if weight.device.type == "meta":
                raise ShivelightError(
                    f"The weight of {name!r} is offloaded layer by layer, so its DoRA delta cannot be swapped. "
                    "Attach or load the adapter before enable_sequential_cpu_offload()."
                )
            spare = self._spare[name].to(weight.device, weight.dtype)
            self._spare[name], weight.data = weight.data, spare
        self.active = active

    def places(self) -> dict[int, tuple[int, ...]]:
        """Where both sets lie, by the id of the parameter: the same whichever is in place."""
        return {
            id(linear.weight): tuple(sorted((linear.weight.data_ptr(), self._spare[name].data_ptr())))
            for name, linear in self._linears.items()
        }

    def originals(self) -> dict[str, Tensor]:
        """The backbone's own weights by name, wherever they are now."""
        if not self.active:
            return {name: linear.weight.data for name, linear in self._linears.items()}
        # The model may have been cast since; a spare is only cast when it is swapped in.
        return {name: self._spare[name].to(linear.weight.dtype) for name, linear in self._linears.items()}


def _copied(module: nn.Module) -> bool:
    """Whether diffusers brings a module's weights from copies whenever it runs, whatever was put in their place."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(_GROUP_OFFLOADING)
    return hook is not None and (hook.config.stream is not None or hook.config.offload_to_disk_path is not None)


def base_linear(model: nn.Module, name: str) -> nn.Linear:
    """The plain linear layer of that name, also where peft has wrapped it (a user's LoRA)."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"The backbone has no layer {name!r}: the adapter belongs to another backbone.") from error
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise AdapterError(
            f"The layer {name!r} is a {type(module).__name__}: DoRA deltas fold into floating-point nn.Linear weights "
            "only. Load the adapter before quantising, or use an adapter without deltas."
        )
    if type(module.weight.data) is not torch.Tensor:
        raise AdapterError(
            f"The weight of {name!r} is quantised ({type(module.weight.data).__name__}); DoRA deltas cannot be folded into it. "
            "Load the adapter before quantising, or use an adapter without deltas."
        )
    return module
