"""DoRA through peft while training: injected into the backbone, switched off for the teacher, taken out at the end."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from shivelight.backbones import BackboneSpec
from shivelight.config import DeltaConfig
from shivelight.errors import TrainingError
from shivelight.execution.folding import Delta
from shivelight.execution.routed import NAME

_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


class LiveDeltas:
    """DoRA layers of ours inside a backbone; a user's own LoRA layers are left alone.

    Args:
        model: the backbone.
        spec: of its family; says which linears are tuned.
        config: rank and alpha.
        start: deltas to start from, or fresh ones (which change nothing) if empty.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec, config: DeltaConfig, start: dict[str, Delta]) -> None:
        self._model = model
        # peft freezes everything that is not its own; the caller decides what else trains.
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        inject_adapter_in_model(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=spec.delta_targets, use_dora=True),
            model,
            adapter_name=NAME,
        )
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.requires_grad_(wanted[name])
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and NAME in m.lora_A}
        for _, parameter in self.named_parameters():
            # peft gives them the backbone's dtype; in bf16 most of an optimiser's small steps would round to nothing.
            parameter.data = parameter.data.float()
        if not self.layers:
            raise TrainingError(
                f"The spec {spec.name!r} names no linear layer to tune (delta_targets matched nothing)."
            )
        for name, delta in start.items():
            self._set(name, delta)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters by their names in an adapter file."""
        for name, layer in self.layers.items():
            for part in _PARTS:
                yield f"deltas.{name}.{part}.weight", getattr(layer, part)[NAME].weight

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The backbone's own weights, for the teacher; may be nested."""
        # peft's switch also turns gradients off and on; which deltas train is the stage's choice.
        trained = [(parameter, parameter.requires_grad) for _, parameter in self.named_parameters()]
        switched = [layer for layer in self.layers.values() if not layer.disable_adapters]
        for layer in switched:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in switched:
                layer.enable_adapters(True)
            for parameter, wanted in trained:
                parameter.requires_grad_(wanted)

    def extract(self) -> dict[str, Delta]:
        """Copies of the deltas as they are now."""
        return {
            name: Delta(*(getattr(layer, part)[NAME].weight.detach().clone() for part in _PARTS))
            for name, layer in self.layers.items()
        }

    def remove(self) -> None:
        """Put the plain linears back."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            self._model.get_submodule(parent).register_module(leaf, layer.get_base_layer())
        self.layers = {}
        configs = getattr(self._model, "peft_config", {})
        configs.pop(NAME, None)
        if not configs and hasattr(self._model, "peft_config"):
            del self._model.peft_config

    def _set(self, name: str, delta: Delta) -> None:
        if name not in self.layers:
            raise TrainingError(f"The adapter to go on from tunes {name!r}, which this run's settings do not.")
        values: tuple[Tensor, ...] = (delta.down, delta.up, delta.magnitude)
        for part, value in zip(_PARTS, values, strict=True):
            weight = getattr(self.layers[name], part)[NAME].weight
            if weight.shape != value.shape:
                raise TrainingError(
                    f"The adapter to go on from has a delta of shape {tuple(value.shape)} for {name!r}, this run's settings "
                    f"{tuple(weight.shape)}: use the same rank."
                )
            weight.data.copy_(value)
