"""One block's own forward on what is to run: all of it or some tokens, its MLP whole or narrow."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.errors import ShivelightError
from shivelight.execution.call import BlockCall
from shivelight.execution.region import Loan, Taps, run_some, run_whole
from shivelight.execution.reuse import BlockResiduals, OfBlock
from shivelight.execution.rotary import turning
from shivelight.execution.routed import Routed
from shivelight.execution.width import OwnForward, masked_channels, resized


class BlockRun:
    """Runs a block.

    Args:
        routed: state of the backbone.
        block: its index.
        kind: of block, as its spec says.
        forward: gives the block's own forward, which is known once a hook is on it.
    """

    def __init__(self, routed: Routed, block: int, kind: BlockSpec, forward: Callable[[], Callable[..., Any]]) -> None:
        self.routed, self.block, self.kind, self._forward = routed, block, kind, forward
        self._taps = Taps()
        self._own: OwnForward | None = None

    def remove(self) -> None:
        """Take the taps off the block's layers."""
        self._taps.remove()

    def dense(self, module: nn.Module, call: BlockCall) -> Any:
        """What the block returns where nothing is routed."""
        regions = self.routed.regions
        return regions.run(
            (*regions.form(module), 1.0, "all"), run_whole, self._forward(), call.arguments, None, {}, {}
        )

    def context_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """The projections whose last outputs stand for the tokens that are left out: only where tokens are, of a block that
        runs, is there anything to complete."""
        config = self.routed.config
        keeps = config.reuse is not None and config.reuse.context and config.granularity
        return self.kind.context_layers(module) if keeps else {}

    def __call__(
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
        forward, form = self._forward(), self.routed.regions.form(module)
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
        forward = self._forward()
        if self._own is None or self._own.original is not forward:
            self._own = OwnForward(module, forward)
        return self._own
