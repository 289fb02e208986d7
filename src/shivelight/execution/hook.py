"""The hooks: the root notes where we are, two listeners catch the embeddings, and each block runs on its kept tokens."""

from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.models.activations import ApproximateGELU
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.errors import ShivelightError, UnsupportedBackboneError
from shivelight.execution.call import BlockCall
from shivelight.execution.gates import Decision
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.rotary import turned
from shivelight.execution.routed import Routed
from shivelight.execution.span import Passage
from shivelight.execution.tokens import merge_samples, sample_index, write_back
from shivelight.execution.width import call_narrow, masked_channels, resized
from shivelight.routing import token_mask, top_k_indices


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
        arguments = dict(zip(spec.model_arguments, args, strict=False)) | kwargs
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


class Selection(NamedTuple):
    """What goes with the samples of a batch into their runs.

    Attributes:
        scores: [B, N] to select tokens by; None where nothing is selected.
        masks: [B, H] on the MLP's hidden channels, while widths are trained; None where the MLP runs as it is.
    """

    scores: Tensor | None = None
    masks: Tensor | None = None

    def take(self, samples: Tensor) -> "Selection":
        """Of some samples."""
        return Selection(*(None if values is None else values.index_select(0, samples) for values in self))


class BlockHook(ModelHook):
    """On a routed block: asks what to do now, and runs the block's own forward on what is to run."""

    def __init__(self, routed: Routed, block: int, kind: BlockSpec) -> None:
        super().__init__()
        self.routed, self.block, self.kind = routed, block, kind

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        routed = self.routed
        call = BlockCall(self.kind, args, kwargs, routed.context.text_tokens)
        x = call.image
        if not routed.enabled:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if routed.observer is not None:
                self._show(call, *call.split(output), None)
            return output
        if routed.session is not None or routed.gate_session is not None:
            return self._train(module, call)
        decisions = routed.decide(self.block, x, call.text, call.text_tokens)
        scores = self._scores_for(x, decisions)  # before the entry: a new one would have nothing to rank by
        entry = routed.remember(self.block, x, call.text)
        if entry is not None and routed.together:
            image, text, indices = *self._run_together(module, call, decisions[0], entry), None
        else:
            image, text, indices = self._route(module, call, decisions, Selection(scores), entry)
        routed.residuals.trim()
        if routed.observer is not None:
            self._show(call, image, text, indices)
        return call.join(image, text)

    def _show(self, call: BlockCall, image: Tensor, text: Tensor | None, indices: Tensor | None) -> None:
        assert self.routed.observer is not None
        texts = None if text is None or call.text is None else (call.text, text)
        self.routed.observer(self.block, call.image, image, indices, texts)

    def _scores_for(self, x: Tensor, decisions: tuple[Decision, ...]) -> Tensor | None:
        """Scores [B, N] to select by; None where no sample selects."""
        selects = any(decision.action == "run" and decision.tokens < x.shape[1] for decision in decisions)
        # What the conditional pass scores also serves an unconditional one that runs a block it skips itself.
        if not selects and not (self.routed.context.branch == "cond" and self.routed.selects):
            return None
        scores = self._paired_scores(x)
        return torch.cat([scores, scores]) if self.routed.context.branch == "both" else scores

    def _paired_scores(self, x: Tensor) -> Tensor:
        """Scores [B, N] of the batch, or [B / 2, N] where guidance pairs its halves."""
        routed, context = self.routed, self.routed.context
        if context.branch == "single":
            return routed.scores(self.block, x)
        if context.branch == "both":
            half = x.shape[0] // 2
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

    def _context_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """The projections whose last outputs stand for the tokens that are left out: only where tokens are, of a block that
        runs, is there anything to complete."""
        config = self.routed.config
        keeps = config.reuse is not None and config.reuse.context and config.tokens is not None
        return self.kind.context_layers(module) if keeps else {}

    def _combines_both(self) -> bool:
        tokens = self.routed.config.tokens
        return tokens is not None and tokens.cfg_scores == "max"

    def _route(
        self,
        module: nn.Module,
        call: BlockCall,
        decisions: tuple[Decision, ...],
        selection: Selection,
        entry: BlockResiduals | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(image, text, indices of the tokens that ran, None where samples differ or all ran): samples that do the same are
        one real, smaller run."""
        # Samples whose keys and values are known and samples whose are not cannot run together.
        known = [True] if entry is None else entry.complete
        if len(decisions) == 1 and len(set(known)) == 1:
            return self._run_as(module, call, decisions[0], selection, entry)
        batch = len(call.image)
        kinds = list(zip(decisions * (batch // len(decisions)), known * (batch // len(known)), strict=True))
        groups, images, texts = [], [], []
        for kind in sorted(set(kinds), key=lambda kind: (kind[0].action, kind[0].tokens, kind[0].width, kind[1])):
            decision, members = kind[0], [i for i, other in enumerate(kinds) if other == kind]
            samples = sample_index(members, call.image.device)
            inner = call.of_samples(samples, runs=decision.action == "run")
            own = None if entry is None else entry.take(samples, members)
            image, text, _ = self._run_as(module, inner, decision, selection.take(samples), own)
            if entry is not None and own is not None:
                entry.put(samples, members, own)
            groups.append(samples)
            images.append(image)
            texts.append(text)
        merged = merge_samples(images, groups)
        assert merged is not None
        return merged, merge_samples(texts, groups), None

    def _run_together(
        self, module: nn.Module, call: BlockCall, decision: Decision, entry: BlockResiduals
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) where all blocks do the same: the last one adds, or takes in, what all of them add, or make."""
        routed, last = self.routed, self.block == self.routed.routed[-1]
        step, reuse = routed.context.step, routed.config.reuse
        assert reuse is not None
        whole = reuse.whole == "output"
        if decision.action == "reuse":
            if not last:
                return call.image, call.text
            expect = entry.stand_in if whole else entry.add
            return expect(call.image, call.text, step, reuse.max_age)
        image, text = self._run(module, call, call.arguments, 1.0, None)
        if whole:
            if last:  # copies: others may write into what a block returns
                entry.refresh(image.clone(), step, None if text is None else text.clone())
            return image, text
        passage = routed.context.memo.setdefault("passage", Passage())
        if self.kind.joined:
            passage.follow_joined(call.stream, call.returned, call.text_tokens)
        else:
            passage.follow(call.image, image, call.text, text)
        if last:
            images, texts = passage.finish()
            entry.refresh(images, step, texts)
        return image, text

    def _run_as(
        self, module: nn.Module, call: BlockCall, decision: Decision, selection: Selection, entry: BlockResiduals | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(image, text, indices) of samples that all do the same."""
        x = call.image
        if decision.action == "skip":
            return x, call.text, None
        if decision.action == "reuse":
            assert entry is not None
            assert self.routed.config.reuse is not None
            context, reuse = self.routed.context, self.routed.config.reuse
            return *entry.add(x, call.text, context.step, reuse.max_age), None
        indices = None
        if decision.tokens < x.shape[1]:  # a permuted k = N is not bit-identical, so nothing is gathered there
            assert selection.scores is not None
            indices = top_k_indices(selection.scores, decision.tokens)
        layers = {} if entry is None else self._context_layers(module)
        arguments = call.on_tokens(x, indices, entry is not None and entry.completes(layers))
        with turned(module, call, indices) as unturned:
            if entry is None:
                image, text = self._run(module, call, arguments | unturned, decision.width, selection.masks)
                return (image if indices is None else write_back(x, indices, image)), text, indices
            with self.routed.remembering(self.block, layers, entry, indices):
                image, text = self._run(module, call, arguments | unturned, decision.width, selection.masks)
        assert self.routed.config.reuse is not None
        reuse = self.routed.config.reuse
        step = self.routed.context.step
        entry.update_text(call.text, text, step)
        return entry.update(x, indices, image, step, reuse.max_age), text, indices

    def _run(
        self, module: nn.Module, call: BlockCall, arguments: dict[str, Any], width: float, masks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) of the block's own forward, its MLP narrowed where asked."""
        if masks is not None and self.kind.mlp is not None:
            with masked_channels(module, self.kind.mlp, masks):
                return call.split(self.fn_ref.original_forward(**arguments))
        forward, gates = self.fn_ref.original_forward, self.routed.gates
        if width == 1.0 or gates is None or gates.narrow is None:
            return call.split(forward(**arguments))
        replacements = gates.narrow.replacements(self.block, width)
        with resized(module, gates.narrow.sizes(self.block, width) if replacements else {}):
            return call.split(call_narrow(module, replacements, forward, **arguments))

    def _train(self, module: nn.Module, call: BlockCall) -> Any:
        """The same selection and the same run, with the sessions' gradients around them."""
        routed, x = self.routed, call.image
        session, gating = routed.session, routed.gate_session
        batch, tokens = x.shape[:2]
        runs: tuple[bool, ...] = (True,) * batch
        counts: tuple[int, ...] = (tokens,)
        masks, scores = None, None
        if gating is not None:
            runs, masks = gating.choose(self.block, routed.read_gates(self.block, x, call.text))
        entered, kept = x, None
        if session is not None:
            scores, counts = session.decide(self.block, routed.scores(self.block, x))
            # A sample that skips the block says nothing about its tokens.
            kept = self._mask_of(scores, counts, tokens)
            entered = self._where_run(runs, session.enter(self.block, x, kept), x)
        inner = call.with_image(entered)
        decisions = tuple(
            Decision("run", k) if run else Decision("skip", 0)
            for run, k in zip(runs, counts * (batch // len(counts)), strict=True)
        )
        decisions = decisions[:1] if len(set(decisions)) == 1 else decisions
        entry = None if session is None else session.residuals(self.block, x)
        image, text, _ = self._route(module, inner, decisions, Selection(scores, masks), entry)
        if session is not None and kept is not None:
            image = self._where_run(runs, session.leave(self.block, entered, image, kept), image)
        if gating is not None:
            image, text = gating.leave(self.block, (entered, call.text), (image, text))
        return call.join(image, text)

    @staticmethod
    def _where_run(runs: tuple[bool, ...], taken: Tensor, other: Tensor) -> Tensor:
        """`taken` for samples that run the block, `other` for the rest, [B, N, D]."""
        if all(runs):
            return taken
        return torch.where(torch.tensor(runs, device=taken.device)[:, None, None], taken, other)

    @staticmethod
    def _mask_of(scores: Tensor, counts: tuple[int, ...], tokens: int) -> Tensor:
        """Mask [B, N] of the tokens that are kept."""
        if len(set(counts)) == 1:
            return token_mask(top_k_indices(scores, counts[0]), tokens)
        each = [top_k_indices(scores[sample : sample + 1], k) for sample, k in enumerate(counts)]
        return torch.cat([token_mask(indices, tokens) for indices in each])
