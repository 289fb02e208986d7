"""What stands in for all blocks at a step at rest, fitted to a pipeline: a linear map of what goes in now and of what went in and
came out at the last runs.

Shapes: B samples, N image tokens, D width, K values that are known of each token (3 after one run, 5 from the second on), r rank.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from shivelight.config import RestPlan, StandIns

# Of one pass of one step: (plan, step, pass of the step).
Place = tuple[RestPlan, int, int]


def places(plan: RestPlan) -> Iterator[Place]:
    """Where a plan's maps are: at every step that does not run, in each pass of it."""
    for step in range(plan.steps):
        if step not in plan.runs:
            for call in range(plan.passes):
                yield plan, step, call


def needs_at(plan: RestPlan) -> Iterator[Place]:
    """Where a plan's `NeedScore`s are: in each pass of the step at which some tokens run."""
    return (place for place in places(plan) if place[1] == plan.partial and not plan.rear)


def known_values(plan: RestPlan, step: int) -> int:
    """K at a step: what goes in, and two values for each of the last runs, of two at most."""
    return 1 + 2 * min(2, sum(run < step for run in plan.runs))


class StandInMap(nn.Module):
    """The map of one step: out = last output + own values * scale + (values @ down + shift) @ up + bias.

    Where values move slowly a factor for each channel says most of it; what channels say of each other has rank r.

    Args:
        known: K.
        width: D.
        rank: r.
    """

    def __init__(self, known: int, width: int, rank: int) -> None:
        super().__init__()
        # Parameters, for the adapter's size; a closed form makes them, never a gradient.
        self.scale = _constant(known, width)
        self.bias = _constant(width)
        self.down = _constant(known, width, rank)
        self.shift = _constant(rank)
        self.up = _constant(rank, width)

    def set(self, parts: Mapping[str, Tensor]) -> None:
        """Take these values, by name."""
        for name, value in parts.items():
            self.get_parameter(name).copy_(value)

    def weaken(self, share: float) -> None:
        """Stay nearer to the last output: only this share of what is added to it."""
        for part in (self.scale, self.bias, self.up):
            part.mul_(share)

    def flops(self, tokens: int) -> int:
        """FLOPs on the tokens of one sample (matrix products, as everywhere)."""
        known, width, rank = self.down.shape
        return 2 * tokens * width * rank * (known + 1)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """What is expected to come out [B, N, D] of the K values [B, N, D]: what goes in now, and, for the last run and the one
        before, what went in and what came out."""
        out = values[2] + self.bias
        narrow = self.shift
        for value, scale, down in zip(values, self.scale, self.down, strict=True):
            out = torch.addcmul(out, value, scale)
            narrow = narrow + value @ down
        return out + narrow @ self.up


class NeedScore(nn.Module):
    """How far off a map is expected to be for each token, up to a constant: linear in the K values.

    Args:
        known: K.
        width: D.
    """

    def __init__(self, known: int, width: int) -> None:
        super().__init__()
        self.weight = _constant(known, width)

    def flops(self, tokens: int) -> int:
        """FLOPs on the tokens of one sample."""
        return 2 * tokens * self.weight.numel()

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Scores [B, N] in fp32 of the K values [B, N, D]; rounded to bf16, as autocast would, many would be ties."""
        with torch.autocast(values[0].device.type, enabled=False):
            each = [v.float() @ weight.float() for v, weight in zip(values, self.weight, strict=True)]
        return torch.stack(each).sum(0)


def _constant(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


def values_of(x: Tensor, history: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The K values of a step at which x [B, N, D] goes in."""
    return [x, *(value for pair in history for value in pair)]


class StandInMaps(nn.Module):
    """The maps of all plans that were fitted; part of the adapter.

    Args:
        config: their plans and rank.
        width: D of the image tokens.
    """

    def __init__(self, config: StandIns, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.maps, self.needs = nn.ModuleDict(), nn.ModuleDict()
        for plan in config.plans:
            for place in places(plan):
                self.maps[_name(place)] = StandInMap(known_values(plan, place[1]), width, config.rank)
            for place in needs_at(plan):
                self.needs[_name(place)] = NeedScore(known_values(plan, place[1]), width)

    def find(self, plan: RestPlan, step: int, call: int) -> StandInMap | None:
        """The map of a step that rests, in one pass of it; None where none was fitted."""
        own = self._of(self.maps, plan, step, call)
        assert own is None or isinstance(own, StandInMap)
        return own

    def need(self, plan: RestPlan, step: int, call: int) -> NeedScore | None:
        """What ranks tokens at a step that runs in part, in one pass of it; None where none was fitted."""
        own = self._of(self.needs, plan, step, call)
        assert own is None or isinstance(own, NeedScore)
        return own

    def knows(self, plan: RestPlan) -> bool:
        """Whether something was fitted for a plan."""
        return self._plan(plan) is not None

    def put(self, plan: RestPlan, step: int, call: int, found: StandInMap, need: NeedScore | None = None) -> None:
        """Take over a map, and what ranks tokens by how far off it is."""
        self.maps[_name((plan, step, call))].load_state_dict(found.state_dict())
        if need is not None:
            self.needs[_name((plan, step, call))].load_state_dict(need.state_dict())

    def flops_at(self, plan: RestPlan, step: int, call: int, tokens: int) -> int:
        """FLOPs of what was fitted for one pass of one step, for one sample; 0 where nothing was."""
        own = (self.find(plan, step, call), self.need(plan, step, call))
        return sum(part.flops(tokens) for part in own if part is not None)

    def flops(self, plan: RestPlan, tokens: int) -> list[int]:
        """FLOPs at each step of a generation, for one sample and pass: those of the maps, 0 where none stands in."""
        return [self.flops_at(plan, step, 0, tokens) for step in range(plan.steps)]

    def largest(self) -> StandInMap:
        """The map of the most values."""
        return max((own for own in self.maps.values() if isinstance(own, StandInMap)), key=lambda own: own.flops(1))

    def _of(self, kind: nn.ModuleDict, plan: RestPlan, step: int, call: int) -> nn.Module | None:
        found = self._plan(plan)
        name = "" if found is None else _name((found, step, call))
        return kind[name] if name in kind else None  # noqa: SIM401 - a ModuleDict has no `get`

    def _plan(self, plan: RestPlan) -> RestPlan | None:
        return next((known for known in self.config.plans if known.like(plan)), None)


def _name(place: Place) -> str:
    plan, step, call = place
    runs = "-".join(map(str, plan.runs)) + (f"+{plan.partial}" if plan.partial else "")
    runs += f"r{plan.rear}" if plan.rear else ""
    return f"{plan.steps}:{runs}:{step}:{call}"
