"""Random arguments of a backbone's call, for timing it without a pipeline's other parts."""

from typing import Any

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import BackboneSpec
from shivelight.errors import UnsupportedBackboneError


def example_call(
    model: nn.Module, spec: BackboneSpec, samples: int, tokens: int, text_tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of one call of a backbone, on its device and in its dtype; the timestep is left out."""
    if spec.example is None:
        raise UnsupportedBackboneError(
            f"The spec {spec.name!r} does not say what input of a {type(model).__name__} looks like; fill in `example`."
        )
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = spec.example(model, samples, tokens, text_tokens)
    call = {name: _moved(value, reference, name) for name, value in made.items()}
    if "return_dict" in spec.model_arguments:
        call["return_dict"] = False
    return call


def _moved(value: Any, reference: Tensor, name: str) -> Any:
    """On a parameter's device, and in its dtype unless it counts places."""
    if isinstance(value, dict):
        return {key: _moved(entry, reference, key) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    casts = value.is_floating_point() and not name.endswith("_ids")
    return value.to(reference.device, reference.dtype if casts else None)
