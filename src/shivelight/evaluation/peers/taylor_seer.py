"""TaylorSeer (arXiv 2503.06923), in diffusers' lite form: the last projection's output is forecast, blocks give zeros meanwhile."""

import torch
from diffusers import TaylorSeerCacheConfig

from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.caches import cached
from shivelight.evaluation.peers.ground import Ground, Where

# The projections whose outputs are forecast, where they have another name than diffusers' lite form looks for.
_PROJECTIONS = ("proj_out", "proj_out_2")
_WARM_UP = 3


def taylor_seer(where: Where, interval: int, order: int = 1) -> OperatingPoint:
    """At every `interval`-th step the backbone runs; in between its output is forecast by a Taylor series of this order.

    Raises:
        ShivelightError: the backbone has no last projection of a name that is known here.
    """
    ground = Ground(where)
    method = f"taylorseer-{order}"
    names = [name for name in _PROJECTIONS if isinstance(getattr(ground.backbone, name, None), torch.nn.Module)]
    if not names:
        raise ground.refuse(method, f"it has no last projection called {' or '.join(_PROJECTIONS)}")
    lite = names[0] == _PROJECTIONS[0]
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=_WARM_UP, max_order=order, use_lite_mode=lite,
        taylor_factors_dtype=torch.float32,
        # What lite mode sets, with the projection's own name.
        skip_predict_identifiers=None if lite else [r"[^.]*block[^.]*\.[^.]+"],
        cache_identifiers=None if lite else [names[0]],
    )  # fmt: skip

    def plan(shape: tuple[int, int]) -> float:
        runs = [step < _WARM_UP or (step - _WARM_UP - 1) % interval == 0 for step in range(ground.steps)]
        return sum(runs) / ground.steps

    return ground.point(method, {"interval": interval}, lambda: cached(ground, config), plan)


def taylor_seer_points(ground: Ground) -> list[OperatingPoint]:
    """First and second order at three intervals."""
    return [taylor_seer(ground.where, interval, order) for order in (1, 2) for interval in (2, 3, 4)]
