"""How many operators a generation dispatches, dense and routed: on a GPU each is a kernel to launch, so this is what routing adds
beside its arithmetic, whatever the machine.

    python benchmarks/operators.py                     # writes benchmarks/results/operators.json
    python benchmarks/operators.py --before OTHER.json    # with the counts of another commit beside

An SD3 of random weights, eager; views are not counted, they launch nothing. `operators` are those of one step: the mean of a
generation, and `cheapest`, the step that dispatches least (one at rest, where blocks reuse).
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from shivelight.cli import common
from shivelight.evaluation.bare import BareLoop, bare_points
from shivelight.evaluation.results import new_results, new_row, read_results, write_results

OUT = Path("benchmarks/results/operators.json")
STEPS, LAYERS, TOKENS, TEXT = 12, 6, 256, 32


class Counting(TorchDispatchMode):
    """Counts what is dispatched, step by step.

    Attributes:
        steps: one counter for each call of `next_step`, and those before the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def next_step(self, *_: Any) -> None:
        """What comes from now on belongs to the next step."""
        self.steps.append(Counter())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run it and count it, unless its result is a view of what went in."""
        returned = [result.alias_info for result in function._schema.returns]
        if not any(info is not None and not info.is_write for info in returned):
            self.steps[-1][str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def count(loop: BareLoop) -> list[Counter[str]]:
    """Operators of each pass of the backbone in one generation; those between passes are left out."""
    loop()  # schedules and plans are made once
    counting = Counting()
    begin = loop.transformer.register_forward_pre_hook(counting.next_step)
    end = loop.transformer.register_forward_hook(counting.next_step)
    try:
        with counting:
            loop()
    finally:
        begin.remove()
        end.remove()
    return counting.steps[1::2]


def main() -> None:
    """Count; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--before", type=Path, help="what this script wrote at another commit")
    args = parser.parse_args()
    common.quiet_libraries()
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=LAYERS, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=256, caption_projection_dim=256, pooled_projection_dim=256,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ).eval().requires_grad_(False)  # fmt: skip
    loop = BareLoop(model, 1, TOKENS, TEXT, STEPS)
    results = new_results(device="cpu", backbone={"class": type(model).__name__, "blocks": LAYERS, "tokens": TOKENS})
    before = read_results(args.before) if args.before is not None else None
    if before is not None:
        results["before"] = {name: before[name] for name in ("commit", "command")}
    for point in [None, *bare_points(loop, [0.6], [0.5])[0]]:
        if point is None:
            steps = count(loop)
        else:
            with point.state():
                steps = count(loop)
        totals = [sum(step.values()) for step in steps]
        least = min(steps, key=lambda step: sum(step.values()))
        row = new_row(
            "dense" if point is None else point.method, {} if point is None else point.budget,
            operators=sum(totals) / len(totals), cheapest=min(totals), cheapest_operators=dict(least.most_common()),
        )  # fmt: skip
        if before is not None:
            old = next(r for r in before["rows"] if (r["method"], r["budget"]) == (row["method"], row["budget"]))
            row |= {"operators_before": old["operators"], "cheapest_before": old["cheapest"]}
        results["rows"].append(row)
        print({name: row[name] for name in row if name not in ("cheapest_operators", "ci95")}, flush=True)
    write_results(args.out, results)


if __name__ == "__main__":
    main()
