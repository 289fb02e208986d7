"""The hooks around the blocks: the root notes where a pass stands, two listeners catch the embeddings, and activations may be
exchanged."""

from typing import Any

from diffusers.hooks import ModelHook
from diffusers.models.activations import ApproximateGELU
from torch import Tensor, nn

from shivelight.errors import ShivelightError, UnsupportedBackboneError
from shivelight.execution.routed import Routed


def refuse_parallel(backbone: nn.Module) -> None:
    """UnsupportedBackboneError where the sequence is sharded before the blocks."""
    parallel = getattr(backbone, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        raise UnsupportedBackboneError(
            "Context parallelism shards the sequence before the blocks, so a top-k would be local to each rank. Disable it "
            "to use Shivelight."
        )


class RootHook(ModelHook):
    """On the backbone: begins a step, and resets the state when a pipeline ends a generation."""

    _is_stateful = True

    def __init__(self, routed: Routed) -> None:
        super().__init__()
        self.routed = routed

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Note the timestep, and how much text there is where blocks do not tell."""
        spec = self.routed.spec
        arguments = spec.arguments(args, kwargs)
        if self.routed.enabled:
            refuse_parallel(module)
        x = arguments.get(spec.model_arguments[0])
        if isinstance(x, Tensor) and x.ndim and not len(x):
            raise ShivelightError(
                f"{type(module).__name__} was called with no samples: {tuple(x.shape)}. Give at least one."
            )
        if self.routed.enabled and (reason := spec.call_obstacle(arguments)):
            raise UnsupportedBackboneError(
                f"This call of {type(module).__name__} cannot be routed. {reason} Detach, or use shivelight.dense(model)."
            )
        self.routed.begin(arguments.get(spec.timestep_argument))
        if spec.text_length is not None:
            self.routed.context.text_tokens = spec.text_length(arguments)
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the backbone's forward."""
        forward, replays = self.fn_ref.original_forward, self.routed.replays
        return forward(*args, **kwargs) if replays is None else replays(module, forward, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A generation has ended."""
        self.routed.reset()
        return module


class EmbeddingHook(ModelHook):
    """On the timestep or condition embedder: keeps its output in the context."""

    def __init__(self, routed: Routed, field: str) -> None:
        super().__init__()
        self.routed, self.field = routed, field

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Keep it."""
        context, given = self.routed.context, output
        if self.field == "time_embedding" and context.given_timestep is not None:
            given = self.routed.spec.sample_embeddings(output, context.given_timestep)
        setattr(context, self.field, given)
        return output


# What `RoutingConfig.activation` names, as the classes that compute it after a projection `proj`.
ACTIVATIONS: dict[str, type[nn.Module]] = {"quick-gelu": ApproximateGELU}


class ActivationHook(ModelHook):
    """On the module that projects up and activates: another activation after the same projection.

    The projection is looked up at each call, so that a LoRA around it and narrowed weights count as ever.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.computing = ACTIVATIONS[activation]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the module's forward."""
        return self.computing.forward(module, *args, **kwargs)
