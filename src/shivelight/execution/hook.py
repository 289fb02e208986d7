"""The hooks on blocks: each asks what to do now, and runs the block's own forward on what is to run."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.errors import ShivelightError
from shivelight.execution.call import BlockCall
from shivelight.execution.gates import Decision
from shivelight.execution.region import Loan, Taps, run_some, run_whole
from shivelight.execution.reuse import BlockResiduals, OfBlock
from shivelight.execution.rotary import turning
from shivelight.execution.routed import Routed
from shivelight.execution.span import Passage
from shivelight.execution.stand_ins import values_of
from shivelight.execution.tokens import gather_tokens, merge_samples, sample_index, write_back
from shivelight.execution.width import OwnForward, masked_channels, resized
from shivelight.routing import token_mask, top_k_indices


class WholeHook(ModelHook):
    """On a block that is never routed, where blocks are compiled: it is too."""

    def __init__(self, routed: Routed, kind: BlockSpec) -> None:
        super().__init__()
        self.routed, self.kind = routed, kind

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        arguments, regions = (
            BlockCall(self.kind, args, kwargs, self.routed.context.text_tokens).arguments,
            self.routed.regions,
        )
        return regions.run(
            (*regions.form(module), 1.0, "all"), run_whole, self.fn_ref.original_forward, arguments, None, {}, {}
        )


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
        self._taps = Taps()
        self._own: OwnForward | None = None

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # as diffusers spells it
        """Taken off the block, with the taps on its layers."""
        self._taps.remove()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        routed = self.routed
        call = BlockCall(self.kind, args, kwargs, routed.context.text_tokens)
        x = call.image
        if not routed.enabled:
            key = (*routed.regions.form(module), 1.0, "all")
            output = routed.regions.run(key, run_whole, self.fn_ref.original_forward, call.arguments, None, {}, {})
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
        if self.routed.config.together:  # once for all blocks
            return None
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
        keeps = config.reuse is not None and config.reuse.context and config.granularity
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

    def _prepare(self, module: nn.Module, call: BlockCall, entry: BlockResiduals | None) -> None:
        """Where samples decide for themselves and blocks are compiled: run once, in vain, what this one may be asked for by any
        prompt, so that no later generation waits for a graph."""
        routed, x = self.routed, call.image
        if not routed.samples_decide:
            return
        if entry is not None and not all(entry.complete) and self._context_layers(module):
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

    def _run_together(
        self, module: nn.Module, call: BlockCall, decision: Decision, entry: BlockResiduals
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) where all blocks do the same: the last one adds, or takes in, what all of them add, or make."""
        routed, last = self.routed, self.block == self.routed.routed[-1]
        step, reuse = routed.context.step, routed.config.reuse
        assert reuse is not None
        whole = reuse.whole == "output"
        if self.block == routed.routed[0] and entry.entered is not None:
            routed.context.memo["entered"] = call.image
        if decision.action == "reuse" and (routed.fitting is None or not whole):
            if not last:
                return call.image, call.text
            values = self._known_values(entry)
            own = routed.stand_in() if values else None
            if own is not None and len(own.scale) == len(values):
                return own(values), call.text
            expect = entry.stand_in if whole else entry.add
            return expect(call.image, call.text, step, reuse.max_age)
        if decision.action == "run" and decision.tokens < call.image.shape[1]:
            return self._run_partly(module, call, decision.tokens, entry)
        image, text = self._run_whole(module, call, entry)
        if whole and decision.action == "reuse":
            return self._fit(image, entry, None) if last else image, text
        if whole:
            if last:  # copies: others may write into what a block returns
                entered = routed.context.memo.get("entered")
                entry.refresh(
                    image.clone(), step, None if text is None else text.clone(),
                    None if entered is None else entered.clone(),
                )  # fmt: skip
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

    def _run_whole(self, module: nn.Module, call: BlockCall, entry: BlockResiduals) -> tuple[Tensor, Tensor | None]:
        """(image, text); before a step that runs in part, what its tokens will attend to is kept."""
        step = self.routed.context.step
        # While blocks are timed there is no plan: the first pass computes what the others use.
        feeds = step == 0 if self.routed.forced is not None else self.routed.rests.feeds_part(step)
        if not feeds:
            return self._run(module, call)
        return self._run(module, call, context=self._context_layers(module), entry=self._own_part(entry))

    def _run_partly(
        self, module: nn.Module, call: BlockCall, tokens: int, entry: BlockResiduals
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) where all blocks run on the same tokens, and what stands in for the blocks takes the others' place at the
        end. What is kept of each token stays that of the last whole run."""
        routed, last = self.routed, self.block == self.routed.routed[-1]
        if routed.fitting is not None:
            image, text = self._run(module, call)
            return self._fit(image, entry, tokens) if last else image, text
        if self.block == routed.routed[0]:
            scores = self._paired_scores(call.image)
            scores = torch.cat([scores, scores]) if routed.context.branch == "both" else scores
            routed.context.memo["chosen"] = routed.regions.run(("kept",), top_k_indices, scores, tokens)
        indices = routed.context.memo["chosen"]
        part = self._own_part(entry)
        image, text = self._run(module, call, indices=indices, context=self._context_layers(module), entry=part)
        if not last:
            return write_back(call.image, indices, image), text
        assert routed.config.reuse is not None
        values, own = self._known_values(entry), routed.stand_in()
        if own is not None and len(own.scale) == len(values):
            return write_back(own(values), indices, image), text
        others, _ = entry.stand_in(call.image, None, routed.context.step, routed.config.reuse.max_age)
        return write_back(others, indices, image), text

    def _own_part(self, entry: BlockResiduals) -> OfBlock:
        passes = 2 if self.routed.context.branch in ("cond", "uncond") else 1
        return OfBlock(entry, self.block, 1e6 * self.routed.residuals.max_mb / passes)

    def _fit(self, image: Tensor, entry: BlockResiduals, tokens: int | None) -> Tensor:
        """What a `RestSession` lets stand in for what the blocks made [B, N, D]; on so many tokens they run."""
        routed, values = self.routed, self._known_values(entry)
        assert routed.fitting is not None
        if not values:
            return image
        context = routed.context
        fitted = routed.fitting.fit(routed.rests, context.step, context.call, values, image, context.branch == "both")
        if tokens is None:
            return fitted
        indices = top_k_indices(routed.fitting.needs(context.step, context.call, values), tokens)
        return write_back(fitted, indices, gather_tokens(image, indices))

    def _known_values(self, entry: BlockResiduals) -> list[Tensor]:
        """What a stand-in is worked out from; none where the blocks have not run yet, or longer ago than may be used."""
        routed, history = self.routed, entry.history()
        reuse, entered = routed.config.reuse, routed.context.memo.get("entered")
        if not history or entered is None or reuse is None or entry.image.stale(routed.context.step, reuse.max_age):
            return []
        return values_of(entered, history)

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
        layers = {} if entry is None else self._context_layers(module)
        image, text = self._run(module, call, decision.width, selection.masks, indices, layers, entry)
        if entry is None:
            return image, text, indices
        assert self.routed.config.reuse is not None
        reuse = self.routed.config.reuse
        step = self.routed.context.step
        entry.update_text(call.text, text, step)
        return entry.update(x, indices, image, step, reuse.max_age), text, indices

    def _run(
        self,
        module: nn.Module,
        call: BlockCall,
        width: float = 1.0,
        masks: Tensor | None = None,
        indices: Tensor | None = None,
        context: Mapping[str, nn.Module] | None = None,
        entry: BlockResiduals | OfBlock | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) of the block's own forward.

        Args:
            module: the block.
            call: of it.
            width: share of its MLP that runs.
            masks: [B, H] on the MLP's hidden channels, while widths are trained.
            indices: [B, k], the tokens that run; None for all.
            context: key and value projections, by name, whose outputs for the other tokens `entry` knows or is to know.
            entry: residuals of this (pass, block); with it the image is of the tokens that ran alone, [B, k, D].
        """
        gates = self.routed.gates
        turned, turns, unturned = turning(module, call, indices)
        context = context or {}
        attends_all = entry is not None and entry.completes(context)
        lent = {} if entry is None else entry.lend(context, indices)
        loans: dict[str, Loan] = {**turns, **lent}
        taps = self._taps.on(turned | {name: layer for name, layer in context.items() if name in lent})
        narrow, sizes = None, {}
        if width < 1.0 and gates is not None and gates.narrow is not None:
            replacements = gates.narrow.replacements(self.block, width)
            if replacements:
                narrow, sizes = (self._own_forward(module), replacements), gates.narrow.sizes(self.block, width)
        masking = (
            nullcontext() if masks is None or self.kind.mlp is None else masked_channels(module, self.kind.mlp, masks)
        )
        forward, form = self.fn_ref.original_forward, self.routed.regions.form(module)
        key = (*form, width if narrow else 1.0, *sorted(taps))
        with masking, resized(module, sizes):
            if indices is None:
                image, text = call.split(
                    self.routed.regions.run((*key, "all"), run_whole, forward, call.arguments, narrow, taps, loans)
                )
            else:
                image, text = self.routed.regions.run_tokens(
                    (*key, attends_all, entry is None), indices, self.routed.distinct_counts, run_some, self.kind, forward,
                    call.arguments, call.text_tokens, indices, attends_all, entry is None, unturned, narrow, taps, loans,
                )  # fmt: skip
        if unused := sorted(name for name, loan in loans.items() if not loan.used):
            raise ShivelightError(
                f"Block {self.block} ran without {', '.join(unused)}, whose outputs serve rejected tokens, or are turned by "
                "their places (fused projections, or an attention processor of your own?). Call unfuse_qkv_projections(), "
                "set the model's own processors back, use Reuse(context=False), or route blocks instead of tokens."
            )
        if entry is not None:
            entry.take_back(lent)
        return image, text

    def _own_forward(self, module: nn.Module) -> OwnForward:
        forward = self.fn_ref.original_forward
        if self._own is None or self._own.original is not forward:
            self._own = OwnForward(module, forward)
        return self._own

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
