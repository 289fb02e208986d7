"""The hooks: the root notes where we are, two listeners catch the embeddings, and each block runs on its kept tokens."""

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from shivelight.backbones.spec import BackboneSpec
from shivelight.errors import ShivelightError
from shivelight.execution.routed import Routed
from shivelight.execution.tokens import gather_tokens, merge_samples, take_samples, write_back
from shivelight.routing import token_mask, top_k_indices


class RootHook(ModelHook):
    """On the backbone: begins a step, and resets the state when a pipeline ends a generation."""

    _is_stateful = True

    def __init__(self, routed: Routed) -> None:
        super().__init__()
        self.routed = routed

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Note the timestep."""
        spec = self.routed.spec
        place = spec.model_arguments.index(spec.timestep_argument)
        timestep = args[place] if place < len(args) else kwargs.get(spec.timestep_argument)
        self.routed.begin(timestep)
        return args, kwargs

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
        setattr(self.routed.context, self.field, output)
        return output


class BlockCall:
    """One call of a block's forward, with its arguments by name.

    Args:
        spec: of the backbone's family.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    def __init__(self, spec: BackboneSpec, args: tuple, kwargs: dict[str, Any]) -> None:
        self.spec = spec
        self.arguments = dict(zip(spec.block_arguments, args, strict=False)) | kwargs

    @property
    def image(self) -> Tensor:
        """The image tokens [B, N, D]."""
        return self.arguments[self.spec.image_argument]

    @property
    def text_tokens(self) -> int:
        """Length of the text stream; 0 where the block has none."""
        text = self.arguments.get(self.spec.text_argument) if self.spec.text_argument else None
        return 0 if text is None else text.shape[1]

    def on_tokens(self, x: Tensor, indices: Tensor | None) -> dict[str, Any]:
        """The arguments with the image tokens replaced by x, and by those at `indices` alone where given."""
        moved = {self.spec.image_argument: x if indices is None else gather_tokens(x, indices)}
        if indices is not None:
            for name in self.spec.token_arguments:
                if self.arguments.get(name) is not None:
                    moved[name] = gather_tokens(self.arguments[name], indices)
        return self.arguments | moved

    def split(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """(image, text) of what the block returned."""
        if self.spec.returns == ("image",):
            return output, None
        named = dict(zip(self.spec.returns, output, strict=True))
        return named["image"], named.get("text")

    def join(self, image: Tensor, text: Tensor | None) -> Any:
        """What the block would have returned."""
        if self.spec.returns == ("image",):
            return image
        named = {"image": image, "text": text}
        return tuple(named[name] for name in self.spec.returns)


class BlockHook(ModelHook):
    """On a routed block: scores, selects, runs the block's own forward on the kept tokens, writes them back."""

    def __init__(self, routed: Routed, block: int) -> None:
        super().__init__()
        self.routed, self.block = routed, block

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        routed = self.routed
        call = BlockCall(routed.spec, args, kwargs)
        x = call.image
        if not routed.enabled:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if routed.observer is not None:
                routed.observer(self.block, x, call.split(output)[0], None)
            return output
        if routed.session is not None:
            return self._train(call, routed.session)
        batch, tokens = x.shape[:2]
        counts = routed.kept_counts(self.block, batch, tokens, call.text_tokens)
        if counts == (tokens,):
            # A permuted k = N is not bit-identical, so nothing is gathered.
            if routed.reuses and not routed.budget.everything:
                with routed.remembering(self.block, module, x, None) as complete:
                    output = self.fn_ref.original_forward(*args, **kwargs)
                    complete(call.split(output)[0])
            else:
                output = self.fn_ref.original_forward(*args, **kwargs)
            if routed.observer is not None:
                routed.observer(self.block, x, call.split(output)[0], None)
            return output
        if len(counts) == 1:
            indices = self._select(x, counts[0])
            if routed.reuses:
                with routed.remembering(self.block, module, x, indices) as complete:
                    image, text = call.split(self.fn_ref.original_forward(**call.on_tokens(x, indices)))
                    image = complete(image)
            else:
                image, text = self._run(call, x, indices)
        else:
            indices, (image, text) = None, self._run_groups(call, x, self._paired_scores(x), counts)
        if routed.observer is not None:
            routed.observer(self.block, x, image, indices)
        return call.join(image, text)

    def _select(self, x: Tensor, k: int) -> Tensor:
        """Kept indices [B, k] of one batch whose samples keep equally many."""
        indices = top_k_indices(self._paired_scores(x), k)
        return torch.cat([indices, indices]) if self.routed.context.branch == "both" else indices

    def _paired_scores(self, x: Tensor) -> Tensor:
        """Scores [B, N] of the batch, or [B / 2, N] where guidance pairs its halves."""
        routed, context = self.routed, self.routed.context
        if context.branch == "single":
            return routed.scores(self.block, x)
        if context.branch == "both":
            half = x.shape[0] // 2
            if x.shape[0] != 2 * half:
                raise ShivelightError(
                    f"A guided batch has an unconditional and a conditional half, but this one has {x.shape[0]} samples. "
                    "For passes of your own, say what they are with shivelight.branch(model, 'single')."
                )
            if self._combines_both():
                scores = routed.scores(self.block, x)
                return torch.maximum(scores[:half], scores[half:])
            return routed.scores(self.block, x[half:], slice(half, None))
        if self._combines_both():
            raise ShivelightError(
                "cfg_scores='max' needs both guidance branches in one batch, but here they are separate calls. Use "
                "cfg_scores='cond'."
            )
        if context.branch == "cond":
            context.choices[self.block] = routed.scores(self.block, x)
        elif self.block not in context.choices:
            raise ShivelightError(
                "The unconditional pass came before the conditional one of its step; with cfg_scores='cond' the "
                "conditional branch chooses for both. Run it first, under shivelight.branch(model, 'cond')."
            )
        return context.choices[self.block]

    def _combines_both(self) -> bool:
        tokens = self.routed.config.tokens
        return tokens is not None and tokens.cfg_scores == "max"

    def _run(self, call: BlockCall, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block on the kept tokens of a whole batch."""
        image, text = call.split(self.fn_ref.original_forward(**call.on_tokens(x, indices)))
        return write_back(x, indices, image), text

    def _run_groups(
        self, call: BlockCall, x: Tensor, scores: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Samples that keep different numbers of tokens: one real, smaller run for each number."""
        batch, tokens = x.shape[:2]
        if self.routed.context.branch == "both":
            scores = torch.cat([scores, scores])
        counts = counts * (batch // len(counts))
        groups, images, texts = [], [], []
        for k in sorted(set(counts)):
            samples = torch.tensor([i for i, count in enumerate(counts) if count == k], device=x.device)
            part = BlockCall(call.spec, (), take_samples(call.arguments, samples, batch))  # type: ignore[arg-type]
            inner = x.index_select(0, samples)
            if k == tokens:
                image, text = part.split(self.fn_ref.original_forward(**part.on_tokens(inner, None)))
            else:
                image, text = self._run(part, inner, top_k_indices(scores.index_select(0, samples), k))
            groups.append(samples)
            images.append(image)
            texts.append(text)
        merged = merge_samples(images, groups)
        assert merged is not None
        return merged, merge_samples(texts, groups)

    def _train(self, call: BlockCall, session: Any) -> Any:
        """The same selection and the same run, with a session's gradients around them."""
        routed, x = self.routed, call.image
        batch, tokens = x.shape[:2]
        scores, counts = session.decide(self.block, routed.scores(self.block, x))
        if len(set(counts)) == 1:
            indices = top_k_indices(scores, counts[0])
            kept = token_mask(indices, tokens)
            entered = session.enter(self.block, x, kept)
            if counts[0] == tokens:
                image, text = call.split(self.fn_ref.original_forward(**call.on_tokens(entered, None)))
            else:
                image, text = self._run(call, entered, indices)
        else:
            kept = torch.zeros(batch, tokens, dtype=torch.bool, device=x.device)
            for sample, k in enumerate(counts):
                kept[sample, top_k_indices(scores[sample : sample + 1], k)[0]] = True
            entered = session.enter(self.block, x, kept)
            image, text = self._run_groups(call, entered, scores, counts)
        return call.join(session.leave(self.block, entered, image, kept), text)
