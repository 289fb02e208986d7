"""The budget in force: as it was asked for, or, where that is one of time, as what it comes to on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shivelight.errors import BudgetError
from shivelight.execution.context import GRID
from shivelight.execution.planning import Budget
from shivelight.execution.pricing import Load, Stopwatch, equivalent

if TYPE_CHECKING:
    from shivelight.execution.routed import Routed


class Settling:
    """Settles budgets of time: once for a generation; for a bare transformer, once for each kind of pass.

    Args:
        routed: state of the backbone, whose `budget` it is.

    Attributes:
        load: what the last pass held, or None before the first.
        stopwatch: where latency tables come from, or None.
        settlement: what a budget of time was settled for last, and what it came to.
    """

    def __init__(self, routed: Routed) -> None:
        self._routed = routed
        self.load: Load | None = None
        self.stopwatch: Stopwatch | None = None
        self.settlement: tuple[Any, Budget] | None = None

    @property
    def in_force(self) -> Budget:
        """The budget of this pass, of tokens or FLOPs; of time, where it is not settled yet."""
        budget = self._routed.budget
        if self.settlement is None or not budget.timed or self.settlement[0] != self._occasion():
            return budget
        return self.settlement[1]

    def begin(self, load: Load) -> None:
        """A block is about to run in a pass that holds this; at the first one, a budget of time is settled."""
        self.load = load
        budget = self._routed.budget
        if budget.timed and (self.settlement is None or self.settlement[0] != self._occasion()):
            settled = self.settled(budget, self._routed.context.steps or GRID, load, measure=True)
            assert settled is not None
            self.settlement = self._occasion(), settled

    def settled(self, budget: Budget, steps: tuple[float, ...], load: Load, measure: bool = False) -> Budget | None:
        """A budget as one of tokens or FLOPs; None where it is one of time and no table is known, and none is measured.

        Args:
            budget: of any kind.
            steps: timesteps of the generation's model calls.
            load: of its passes.
            measure: blocks are timed now, if they must be.

        Raises:
            BudgetError: not reachable, or there is no stopwatch to measure with.
        """
        if not budget.timed:
            return budget
        if budget.everything:
            return Budget("compute", 1.0)
        table = None if self.stopwatch is None else self.stopwatch(load, measure)
        if table is None:
            if measure:
                raise BudgetError(
                    f"{budget.kind}= needs the times of this backbone's blocks; call shivelight.set_budget."
                )
            return None
        return equivalent(self._routed, table, budget, steps, load)

    def _occasion(self) -> Any:
        context = self._routed.context
        tokens = None if self.load is None else self.load.tokens
        return self._routed.budget, tokens, self.load if context.steps is None else context.generation
