"""Where all blocks run or rest together: one decision a pass, and what they make of it kept once. At a step in part, the same
tokens run in each of them; or the last blocks run on all tokens, and only the first rest together.

Shapes: B samples, N image tokens, D width, K values that are known of each token.
"""

import math

import torch
from torch import Tensor, nn

from shivelight.execution.block_run import BlockRun
from shivelight.execution.call import BlockCall
from shivelight.execution.gates import Decision
from shivelight.execution.reuse import FRONT, BlockResiduals, OfBlock
from shivelight.execution.scoring import paired_scores
from shivelight.execution.span import Passage
from shivelight.execution.stand_ins import StandInMap, values_of
from shivelight.execution.tokens import gather_tokens, write_back
from shivelight.routing import top_k_indices


class Together:
    """Does what was decided for all blocks, in one of them.

    Args:
        run: runs it.
    """

    def __init__(self, run: BlockRun) -> None:
        self._run, self.routed, self.block, self.kind = run, run.routed, run.block, run.kind

    def __call__(
        self, module: nn.Module, call: BlockCall, decision: Decision, entry: BlockResiduals
    ) -> tuple[Tensor, Tensor | None]:
        """(image, text) where all blocks do the same: the last one adds, or takes in, what all of them add, or make."""
        routed, last = self.routed, self.block == self.routed.routed[-1]
        step, reuse = routed.context.step, routed.config.reuse
        assert reuse is not None
        whole = reuse.whole == "output"
        rear = routed.rear
        # While blocks are timed there is no plan.
        feeds_rear = routed.forced is None and routed.rests.feeds_rear(step)
        at_rest = entry  # what is known of the blocks that rest
        if rear or feeds_rear:
            at_rest = routed.remember(FRONT, call.image, call.text) or entry
        if self.block == routed.routed[0] and entry.entered is not None:
            routed.context.memo["entered"] = call.image
        if decision.action == "reuse" and (routed.fitting is None or not whole):
            if self.block != routed.last_at_rest:
                return call.image, call.text
            return self._stand_in(call, at_rest, rear > 0)
        if decision.action == "run" and decision.tokens < call.image.shape[1]:
            return self._run_partly(module, call, decision.tokens, entry)
        image, text = self._run_whole(module, call, entry)
        if whole and decision.action == "reuse":
            if self.block != routed.last_at_rest:
                return image, text
            text = at_rest.stand_in(image, text, step, reuse.max_age)[1] if rear else text
            return self._fit(image, at_rest, None), text
        if whole:
            if feeds_rear and self.block == routed.routed[-1 - routed.rests.rear]:
                self._keep(at_rest, image, text)
            if last and not rear:  # what is kept of a step in part stays that of the last whole run
                self._keep(entry, image, text)
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

    def _stand_in(self, call: BlockCall, entry: BlockResiduals, goes_on: bool) -> tuple[Tensor, Tensor | None]:
        """(image, text) in the place of what blocks at rest make of it; whether blocks that run `goes_on` from there, and read
        the text."""
        routed, reuse = self.routed, self.routed.config.reuse
        assert reuse is not None
        values = self._known_values(entry)
        own = self._map() if values else None
        expect = entry.stand_in if reuse.whole == "output" else entry.add
        if own is None or len(own.scale) != len(values):
            return expect(call.image, call.text, routed.context.step, reuse.max_age)
        if not goes_on:
            return own(values), call.text
        return own(values), expect(call.image, call.text, routed.context.step, reuse.max_age)[1]

    def _keep(self, entry: BlockResiduals, image: Tensor, text: Tensor | None) -> None:
        """Take in what blocks have made; copies, since others may write into what a block returns."""
        entered = self.routed.context.memo.get("entered")
        entry.refresh(
            image.clone(), self.routed.context.step, None if text is None else text.clone(),
            None if entered is None else entered.clone(),
        )  # fmt: skip

    def _run_whole(self, module: nn.Module, call: BlockCall, entry: BlockResiduals) -> tuple[Tensor, Tensor | None]:
        """(image, text); before a step that runs in part, what its tokens will attend to is kept."""
        step = self.routed.context.step
        # While blocks are timed there is no plan: the first pass computes what the others use.
        feeds = step == 0 if self.routed.forced is not None else self.routed.rests.feeds_part(step)
        if not feeds:
            return self._run(module, call)
        return self._run(module, call, context=self._run.context_layers(module), entry=self._own_part(entry))

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
            scores = paired_scores(routed, self.block, call.image, self._needs)
            routed.context.memo["chosen"] = routed.regions.run(("kept",), top_k_indices, scores, tokens)
        indices = routed.context.memo["chosen"]
        part = self._own_part(entry)
        image, text = self._run(module, call, indices=indices, context=self._run.context_layers(module), entry=part)
        if not last:
            return write_back(call.image, indices, image), text
        assert routed.config.reuse is not None
        values, own = self._known_values(entry), self._map()
        if own is not None and len(own.scale) == len(values):
            return write_back(own(values), indices, image), text
        others, _ = entry.stand_in(call.image, None, routed.context.step, routed.config.reuse.max_age)
        return write_back(others, indices, image), text

    def _own_part(self, entry: BlockResiduals) -> OfBlock:
        if torch.is_grad_enabled():  # batches are larger in training than in use, and attend to the same
            return OfBlock(entry, self.block, math.inf)
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

    def _map(self) -> StandInMap | None:
        """What was fitted for this pass; None where the last output, or its forecast, stands in."""
        fitted, context = self.routed.fitted, self.routed.context
        return None if fitted is None else fitted.find(self.routed.rests, context.step, context.call)

    def _needs(self, x: Tensor, samples: slice) -> Tensor:
        """Scores [b, N] of the tokens of some samples x [b, N, D]: how far off what stands in is, as fitted; else how much the last
        output differs from token to token, since what is alike changes alike."""
        routed, context = self.routed, self.routed.context
        entry, fitted = routed.residuals.held((context.call, -1)), routed.fitted
        history = [(entered[samples], out[samples]) for entered, out in entry.history()]
        values = values_of(x, history) if history else []
        need = None if fitted is None else fitted.need(routed.rests, context.step, context.call)
        if need is not None and len(values) == len(need.weight):
            return need(values)
        last = entry.image.last[samples]
        return torch.linalg.vector_norm((last - last.mean(1, keepdim=True)).float(), dim=-1)
