"""The hooks on blocks: each asks what to do now, and runs the block's own forward on what is to run."""

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.execution.block_run import BlockRun
from shivelight.execution.call import BlockCall
from shivelight.execution.gates import Decision
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.routed import Routed
from shivelight.execution.scoring import paired_scores
from shivelight.execution.together import Together
from shivelight.execution.tokens import merge_samples, sample_index
from shivelight.routing import token_mask, top_k_indices


class WholeHook(ModelHook):
    """On a block that is never routed, where blocks are compiled: it is too."""

    def __init__(self, routed: Routed, block: int, kind: BlockSpec) -> None:
        super().__init__()
        self.routed, self.kind = routed, kind
        self._run = BlockRun(routed, block, kind, lambda: self.fn_ref.original_forward)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        return self._run.dense(module, BlockCall(self.kind, args, kwargs, self.routed.context.text_tokens))


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
        self._run = BlockRun(routed, block, kind, lambda: self.fn_ref.original_forward)
        self._together = Together(self._run)

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # as diffusers spells it
        """Taken off the block, with the taps on its layers."""
        self._run.remove()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        routed = self.routed
        call = BlockCall(self.kind, args, kwargs, routed.context.text_tokens)
        x = call.image
        if not routed.enabled:
            output = self._run.dense(module, call)
            if routed.observer is not None:
                self._show(call, *call.split(output), None)
            return output
        if routed.session is not None or routed.gate_session is not None:
            return self._train(module, call)
        decisions = routed.decide(self.block, x, call.text, call.text_tokens)
        scores = self._scores_for(x, decisions)  # before the entry: a new one would have nothing to rank by
        entry = routed.remember(self.block, x, call.text)
        self._prepare(module, call, entry)
        if entry is not None and routed.config.together:
            image, text, indices = *self._together(module, call, decisions[0], entry), None
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
        if self.routed.config.together:  # once for all blocks
            return None
        selects = any(decision.action == "run" and decision.tokens < x.shape[1] for decision in decisions)
        # What the conditional pass scores also serves an unconditional one that runs a block it skips itself.
        if not selects and not (self.routed.context.branch == "cond" and self.routed.selects):
            return None
        return paired_scores(self.routed, self.block, x, partial(self.routed.scores, self.block))

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

    def _prepare(self, module: nn.Module, call: BlockCall, entry: BlockResiduals | None) -> None:
        """Where samples decide for themselves and blocks are compiled: run once, in vain, what this one may be asked for by any
        prompt, so that no later generation waits for a graph."""
        routed, x = self.routed, call.image
        if not routed.samples_decide:
            return
        if entry is not None and not all(entry.complete) and self._run.context_layers(module):
            return  # later, when keys and values are known
        batch, tokens = x.shape[:2]
        if not routed.regions.new_to((self.block, batch, tokens, call.text_tokens, entry is None, routed.budget)):
            return
        scores = torch.zeros(batch, tokens, device=x.device)
        paired = routed.context.branch == "both" and routed.pairs_decide
        sizes = {batch, 2} if paired else {batch, 1, min(2, batch)}  # torch has one graph for 1, and one for 2 and more
        for members in (range(size) for size in sorted(sizes, reverse=True)):
            samples = sample_index(members, x.device)
            for decision in routed.possible(self.block, tokens, call.text_tokens):
                inner = call.of_samples(samples, runs=True) if len(members) < batch else call
                own = None if entry is None else entry.take(samples, members)
                self._run_as(module, inner, decision, Selection(scores[: len(members)]), own)

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
            indices = self.routed.regions.run(("kept",), top_k_indices, selection.scores, decision.tokens)
        layers = {} if entry is None else self._run.context_layers(module)
        image, text = self._run(module, call, decision.width, selection.masks, indices, layers, entry)
        if entry is None:
            return image, text, indices
        assert self.routed.config.reuse is not None
        reuse = self.routed.config.reuse
        step = self.routed.context.step
        entry.update_text(call.text, text, step)
        return entry.update(x, indices, image, step, reuse.max_age), text, indices

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
