"""Block routing on the embedded pipeline, one choice at a time: who decides and when, reuse, widths, guidance.

    python benchmarks/blocks.py        # writes benchmarks/results/blocks.json

Validation captions (the test set judges, and tunes nothing), the same seeds, PSNR and SSIM to the dense pictures, the
shipped `blocks` and `blocks-refresh` adapters, and what a generation really spent (`realised`, share of the dense FLOPs):

- adaptive per block, a step late, and static (the same mean cost, blind to the sample);
- passing by against reuse over a grid of margins (delta) and most reuses in a row (K);
- whose gates guidance follows: the conditional branch's for both, or each its own;
- easy against hard pictures: what plain and textured backgrounds spend;
- widths on the dense model: hidden channels in the order of their importance against their own order, every block at one
  width and nothing trained.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import shivelight as sl
from shivelight.adapter import prepare
from shivelight.adapter_files import read_adapter
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Adapter, Comparison, OperatingPoint, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, write_results

MARGINS, MOST = (0.05, 0.1, 0.2, 0.4), (1, 2, 4)


def at_width(comparison: Comparison, share: float, ranked: bool) -> Adapter:
    """An adapter that runs every block at one width and trains nothing; channels in the attached adapter's order, or their
    own."""
    trained = comparison.routed
    assert trained.gates is not None
    widths = trained.gates.config.widths
    fixed = prepare(comparison.pipe, sl.RoutingConfig(None, sl.BlockRouting(widths=widths)))
    assert fixed.gates is not None
    for router in fixed.gates.router.routers.values():
        router.gate_head.bias.data.fill_(30.0)
        router.width_head.bias.data.zero_()[widths.index(share)] = 30.0
    if ranked:
        fixed.gates.set_orders(comparison.backbone, {block: trained.gates.order(block) for block in fixed.routed})
    return fixed, {}


@torch.no_grad()
def main() -> None:
    """Draw every variant and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--adapter", default=str(embedded.BLOCKS))
    parser.add_argument("--refreshing", default=str(embedded.REFRESHING))
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/blocks.json"))
    args = parser.parse_args()
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.load_adapter(pipe, args.adapter)
    setting = Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, {"max_sequence_length": embedded.TEXT_TOKENS})
    comparison = Comparison(pipe, setting)
    every = EmojiData().captions("validation")
    captions = [str(caption) for caption in every[: args.captions]]
    dense = comparison.pictures(comparison.dense(), captions)
    results = new_results(device=common.DEFAULT_DEVICE, backbone=describe(pipe), split="validation")

    def judge(variant: str, point: OperatingPoint, chosen: list[str] = captions, target: Any = dense) -> None:
        pictures = comparison.pictures(point, chosen)
        realised = comparison.realised[point.name]
        row = new_row(
            point.method, point.budget, variant=variant, steps=point.steps, dtype="bfloat16", samples=len(chosen),
            guidance=setting.guidance, planned_ratio=comparison.planned(point), realised=realised,
            **fidelity_to_dense(pictures, target).estimates(),
        )  # fmt: skip
        results["rows"].append(row)
        print(f"{variant:>28} {point.name:<36} realised {realised:.3f}  PSNR {row['psnr_to_dense']:.2f} dB", flush=True)

    refreshing = read_adapter(pipe, args.refreshing)
    ways: dict[str, dict[str, Any]] = {
        f"decided per {decide}": {"decide": decide} for decide in ("block", "step", "static")
    }
    ways["each branch its own gates"] = {"cfg_gates": "each"}
    for compute in args.compute:
        for name, fields in ways.items():
            passing: dict[str, Any] = {"reuse": None, "blocks": fields}
            judge(name, comparison.routed_point("blocks", compute=compute, variant=passing))
            point = comparison.routed_point("blocks-refresh+reuse", compute=compute, variant={"blocks": fields})
            judge(name, comparison.on(refreshing, point))
    middle = args.compute[len(args.compute) // 2]
    for margin in MARGINS:
        for most in MOST:
            reuse = {"reuse": sl.Reuse(margin=margin, max_reuses=most)}
            point = comparison.routed_point("blocks+reuse", compute=middle, variant=reuse)
            judge(f"delta {margin}, K {most}", point)
    for pattern in ("plain", "texture"):
        chosen = [str(caption) for caption in every if caption.background.pattern == pattern][: args.captions]
        target = comparison.pictures(comparison.dense(), chosen)
        judge(f"{pattern} backgrounds", comparison.routed_point("blocks", compute=middle), chosen, target)
        point = comparison.on(refreshing, comparison.routed_point("blocks-refresh+reuse", compute=middle))
        judge(f"{pattern} backgrounds", point, chosen, target)
    assert comparison.routed.gates is not None
    for share in comparison.routed.gates.config.widths[:-1]:
        for ranked in (True, False):
            point = comparison.routed_point("width", threshold=0.5)
            point = comparison.on(at_width(comparison, share, ranked), point)
            judge(f"{'ranked' if ranked else 'own order'}, width {share}", point)
    write_results(args.out, results)


if __name__ == "__main__":
    main()
