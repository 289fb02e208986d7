"""One routed training pass: which tokens and blocks run, and the gradients around those choices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import BackboneSpec
from shivelight.execution.reuse import CachedPass, centred_log_drift
from shivelight.routing import Dial, GateLogits, count_unit, gate_probability, keep_count, width_choice
from shivelight.training.estimators import (
    apply_input_estimator,
    apply_residual_estimator,
    inclusion,
    perturb,
    second_order_term,
    soft_rank,
)
from shivelight.training.gates import apply_gate, expected_width, straight_through_gate, width_mask
from shivelight.training.relaxations import (
    gumbel_inclusion,
    gumbel_noise,
    identity_inclusion,
    threshold_inclusion,
)
from shivelight.training.stages import EstimatorName


@dataclass
class TeacherRecord:
    """What the dense pass leaves behind, as an `Observer`.

    Attributes:
        features_at: blocks whose outputs are compared with the student's.
        residuals: per routed block [B, N, D], what the dense block added to each token.
        text_residuals: per routed block [B, M, D], likewise for the text tokens, where it returns them.
        features: per chosen block [B, N, D].
    """

    features_at: tuple[int, ...]
    residuals: dict[int, Tensor] = field(default_factory=dict)
    text_residuals: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: tuple[Tensor, Tensor] | None
    ) -> None:
        """Keep the block's residuals, and its output where it is compared."""
        self.residuals[block] = out - x
        if text is not None:
            self.text_residuals[block] = text[1] - text[0]
        if block in self.features_at:
            self.features[block] = out


@dataclass
class TokenSession:
    """A `Session` (see execution/routed.py) for one pass of the student.

    Attributes:
        routed: indices of the routed blocks.
        ratios: [B or 1, L] keep ratios of the routed blocks, with the policy's gradient if it trains.
        teacher: the dense pass on the same input.
        estimator: one of `stages.ESTIMATORS`.
        rank_temperature: of the soft rank, or of the inclusion that stands in its place.
        selection_temperature: of the inclusion by soft ranks, as a share of N.
        noise: standard deviation of the noise on the scores; 0 ranks as inference does. "gumbel" has its own noise instead.
        generator: of the noise.
        granularity: of the kept counts, as at inference; k stays continuous in the backward pass.
        cached: per routed block, what rejected tokens add, from an earlier pass; none without reuse.
        features: the student's outputs of the blocks that are compared.
        gating: of the same pass, where blocks are gated too.
        decided: per block, the scores [B, N] that were ranked and the number that each sample keeps.
        inclusions: per block [B, N], with their gradients.
        kept: per block [B, N] bool.
        squares: per block [B, N], |r_i|^2; only for "residual-2".
    """

    routed: tuple[int, ...]
    ratios: Tensor
    teacher: TeacherRecord
    estimator: EstimatorName = "residual"
    rank_temperature: float = 0.2
    selection_temperature: float = 0.1
    noise: float = 0.0
    generator: torch.Generator | None = None
    granularity: int = 1
    cached: dict[int, CachedPass] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    gating: "BlockSession | None" = None
    decided: dict[int, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict)
    inclusions: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # One transfer for the whole pass, not one for each block.
        self._ratios_on_host: list[list[float]] = self.ratios.detach().float().cpu().tolist()
        self._drawn: dict[int, Tensor] = {}
        self._running: dict[int, Tensor] = {}

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Rank the perturbed scores; k = floor(N r) in the forward pass, N r continuous in the backward pass."""
        batch, tokens = scores.shape
        place = self.routed.index(block)
        ranked = scores
        if self.noise or self.estimator == "gumbel":
            if block not in self._drawn:  # drawn once: gradient checkpointing runs the block a second time
                self._drawn[block] = self._noise(scores.detach())
            ranked = scores + self._drawn[block]
        unit = count_unit(tokens, self.granularity)
        counts = tuple(unit * keep_count(row[place], tokens // unit) for row in self._ratios_on_host)
        counts = counts if len(counts) == batch else counts * batch
        k = (tokens * self.ratios[:, place]).expand(batch)
        self._running[block] = self._inclusion(scores, ranked, k, counts)
        # The first one is what the loss depends on: gradient checkpointing runs the block a second time.
        self.inclusions.setdefault(block, self._running[block])
        self.decided[block] = ranked.detach(), counts
        return self.decided[block]

    def _noise(self, scores: Tensor) -> Tensor:
        if self.estimator == "gumbel":
            return gumbel_noise(scores, self.rank_temperature, self.generator)
        return perturb(torch.zeros_like(scores), self.noise, self.generator)

    def _inclusion(self, scores: Tensor, ranked: Tensor, k: Tensor, counts: tuple[int, ...]) -> Tensor:
        """pi [B, N], by the estimator's own way."""
        if self.estimator == "straight-through":
            return identity_inclusion(ranked, k)
        if self.estimator == "dftopk":
            return threshold_inclusion(ranked, k, counts, self.rank_temperature)
        if self.estimator == "gumbel":
            return gumbel_inclusion(scores, ranked, k, counts, self.rank_temperature)
        return inclusion(soft_rank(ranked, self.rank_temperature), k, self.selection_temperature, scores.shape[1])

    def drift(self, block: int) -> Tensor | None:
        """What the router sees of the cached residuals."""
        cached = self.cached.get(block)
        return None if cached is None else centred_log_drift(cached.drift)

    def residuals(self, block: int, x: Tensor) -> CachedPass | None:
        """The cached residuals of a block."""
        return self.cached.get(block)

    def enter(self, block: int, x: Tensor, kept: Tensor) -> Tensor:
        """The paper's estimator scales the inputs."""
        return apply_input_estimator(x, self._running[block], kept) if self.estimator == "input" else x

    def leave(self, block: int, x: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        """The others add (pi - sg(pi)) r to the output; with reuse, r is what running adds to the cached residual."""
        self.kept[block] = kept
        if self.estimator != "input":
            base, missed = x, self.teacher.residuals[block]
            if block in self.cached:
                base, missed = x + self.cached[block].residual, missed - self.cached[block].residual
            if self.estimator == "residual-2":
                self.squares[block] = self._squares(block, base, out, missed)
            out = apply_residual_estimator(base, out, self._running[block], kept, missed)
        if block in self.teacher.features_at:
            self.features[block] = out
        return out

    @torch.no_grad()
    def _squares(self, block: int, base: Tensor, out: Tensor, missed: Tensor) -> Tensor:
        residual = torch.where(self.kept[block][..., None], out - base, missed.to(out.dtype))
        squares = residual.float().square().sum(-1)
        # A sample that skips the block says nothing about its tokens.
        return squares if self.gating is None else squares * self.gating.runs(block)[:, None]

    def second_order(self, curvature: Callable[[int], Tensor]) -> Tensor:
        """The second order of all blocks' gains, to be added to the loss; `curvature` gives a block's h."""
        terms = [
            second_order_term(self.inclusions[block], self.kept[block], squares, curvature(block))
            for block, squares in self.squares.items()
        ]
        return torch.stack(terms).sum()


@dataclass
class BlockSession:
    """A `GateSession` (see execution/routed.py) for one pass of the student.

    Attributes:
        teacher: the dense pass on the same input: a sample that skips a block needs no second run to know what it missed.
        widths: shares of the MLP to choose from.
        orders: per routed block [H], its MLP's channels from the most to the least important.
        dial: threshold, and the shift that this pass is trained at.
        cached: per routed block, what it adds where its gate is closed, from an earlier pass; none where it passes by.
        raised: per routed block, what the age of that pass adds to its gate's logit; none where it passes by.
        logits: per routed block, those that the gate goes by, with their gradients and without the shift.
        features: the student's outputs of the blocks that are compared.
    """

    teacher: TeacherRecord
    widths: tuple[float, ...]
    orders: dict[int, Tensor] = field(default_factory=dict)
    dial: Dial = Dial()
    cached: dict[int, CachedPass] = field(default_factory=dict)
    raised: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, GateLogits] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gates: dict[int, Tensor] = {}

    def choose(self, block: int, logits: Tensor) -> tuple[tuple[bool, ...], Tensor | None]:
        """Gate and width mask with their straight-through gradients."""
        own = self.logits[block] = GateLogits(logits[:, 0] + self.raised.get(block, 0.0), logits[:, 1:])
        gate = self._gates[block] = straight_through_gate(own.gate, self.dial)
        mask = None
        if len(self.widths) > 1:
            order = self.orders[block]
            mask = width_mask(self.dial.moved_widths(own.width), self.widths, len(order), order)
        return tuple((gate.detach() > 0.5).tolist()), mask

    def runs(self, block: int) -> Tensor:
        """[B] bool, which samples run the block in this pass."""
        return self._gates[block].detach() > 0.5

    def leave(
        self, block: int, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """x + g (Block(x) - x) on both streams; for samples that skip the block, the teacher's residual says what it is. With
        cached residuals c instead x + c + g (Block(x) - x - c)."""
        gate, cached = self._gates[block], self.cached.get(block)
        stale = (None, None) if cached is None else (cached.residual, cached.text_residual)
        image = self._gated(before[0], after[0], gate, self.teacher.residuals[block], stale[0])
        text = after[1]
        if text is not None and before[1] is not None and block in self.teacher.text_residuals:
            text = self._gated(before[1], text, gate, self.teacher.text_residuals[block], stale[1])
        if block in self.teacher.features_at:
            self.features[block] = image
        return image, text

    @staticmethod
    def _gated(x: Tensor, out: Tensor, gate: Tensor, residual: Tensor, cached: Tensor | None) -> Tensor:
        ran = (gate.detach() > 0.5)[:, None, None]
        full = torch.where(ran, out, x + residual.to(x.dtype))
        return apply_gate(x if cached is None else x + cached.to(x.dtype), full, gate)

    def probabilities(self) -> Tensor:
        """[L, B], of running at shift 0: what the losses on gates and widths bound."""
        return torch.stack([gate_probability(own.gate) for own in self.logits.values()])

    def width_ratios(self) -> Tensor:
        """[L, B], expected shares of the MLPs at shift 0."""
        return torch.stack([expected_width(own.width, self.widths) for own in self.logits.values()])

    def would_run(self) -> Tensor:
        """[L, B] bool, at shift 0."""
        unmoved = Dial(self.dial.threshold)
        return torch.stack([~unmoved.skips(own.gate.detach()) for own in self.logits.values()])

    def ran(self) -> Tensor:
        """[L, B] bool, in this pass."""
        return torch.stack([gate.detach() > 0.5 for gate in self._gates.values()])

    def chosen_widths(self) -> Tensor:
        """[L, B], shares of the MLPs that were chosen in this pass."""
        shares = torch.tensor(self.widths, device=next(iter(self._gates.values())).device)
        chosen = [width_choice(self.dial.moved_widths(own.width.detach())) for own in self.logits.values()]
        return torch.stack([shares[places] for places in chosen])


class PassRecord:
    """What one dense pass of the student leaves for later ones: residuals [B, N, D] and the projections that are attended to.

    Args:
        backbone: the model.
        spec: of its family.
        routed: indices of the routed blocks.
        context: whether projections are kept.
    """

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, routed: tuple[int, ...], context: bool) -> None:
        self._blocks, self._routed = spec.block_list(backbone), routed
        self._context = context
        self.residuals: dict[int, Tensor] = {}
        self.text_residuals: dict[int, Tensor] = {}
        self.projections: dict[int, dict[str, Tensor]] = {block: {} for block in routed}

    def __call__(
        self, block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: tuple[Tensor, Tensor] | None
    ) -> None:
        """Keep a block's residuals, as an `Observer`, and of its projections those of image tokens, which come last."""
        self.residuals[block] = out - x
        own = self.projections[block]
        self.projections[block] = {name: projection[:, -x.shape[1] :] for name, projection in own.items()}
        if text is not None:
            self.text_residuals[block] = text[1] - text[0]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the projections of every pass in this block."""
        handles = []
        try:
            for block in self._routed:
                kind, module = self._blocks[block]
                layers = kind.context_layers(module) if self._context else {}
                handles += [layer.register_forward_hook(self._keeper(block, name)) for name, layer in layers.items()]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, block: int, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.projections[block][name] = output

        return keep

    def aged(self, older: "PassRecord", age: float) -> dict[int, CachedPass]:
        """The residuals as a pass `age` steps later finds them; `older` says how far they had moved."""
        cached = {}
        for block, residual in self.residuals.items():
            moved = torch.linalg.vector_norm((residual - older.residuals[block]).float(), dim=-1)
            text = self.text_residuals.get(block)
            cached[block] = CachedPass(residual, residual, moved * age, self.projections[block], text)
        return cached
