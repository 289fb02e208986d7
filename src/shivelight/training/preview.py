"""Preview grids while training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shivelight.execution.planning import Budget
from shivelight.execution.routed import Routed
from shivelight.files import replacing
from shivelight.pipelines import draw


def save_grid(
    pipe: Any,
    routed: Routed,
    deltas_off: Callable[[], Any],
    captions: Sequence[str],
    path: Path,
    keep: float,
    **options: Any,
) -> None:
    """Dense pictures above routed ones, same captions and seeds, 20 steps.

    Args:
        pipe: the pipeline in training.
        routed: its state.
        deltas_off: context manager that switches live deltas off.
        captions: one column each.
        path: PNG to write.
        keep: budget of the routed row where tokens are routed; blocks run at their own threshold.
        options: further arguments of the pipeline's call.
    """

    def images() -> Sequence[Image.Image]:
        return draw(pipe, captions, range(len(captions)), 20, **options)

    with routed.switched(False), deltas_off():
        rows = [images()]
    routed.planner.forget()
    tokens, blocks = routed.config.tokens, routed.config.blocks
    budget = Budget("keep", 1.0 if tokens is None else keep, None if blocks is None else blocks.threshold)
    previous, routed.budget = routed.budget, budget
    try:
        rows.append(images())
    finally:
        routed.budget = previous
        routed.planner.forget()
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(captions), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    with replacing(path) as unfinished:
        sheet.save(unfinished)
