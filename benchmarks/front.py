"""The front: every method on the embedded pipeline at 4 to 6 operating points, ours and other people's, where a picture takes 25
steps, 8, or 4 of a model distilled to so many.

    python benchmarks/front.py --use 25      # the embedded pipeline
    python benchmarks/front.py --use 8       # the same, by people who have cut their steps already
    python benchmarks/front.py --use 4       # its distilled form (recipes/distil_few_steps.py), without guidance

Writes benchmarks/results/front-25.json (-8, -4) and docs/images/front-25.png; `--plot` draws the latter anew. Captions are of the
test split; nothing was tuned on them. Methods are timed in turns, one sample a call; budgets and fewer steps are also taken
together (ours at fewer steps than the reference). `at` has, for the speed-ups wanted, each method's figures interpolated on its
own front at that speed-up.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from family_quality import FEWEST, judge, teacher_of
from matplotlib.figure import Figure

import shivelight as sl
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.errors import BudgetError
from shivelight.evaluation.comparison import Adapter, Comparison, OperatingPoint, Setting, point_key, take_clock
from shivelight.evaluation.fidelity import IDENTICAL_PSNR
from shivelight.evaluation.pareto import Point, front, quality_at
from shivelight.evaluation.peers import PEERS, TRAINED, peer_points, trained_point
from shivelight.evaluation.results import new_results, read_results, write_results
from shivelight.evaluation.standard import adapter_points, training_free_points
from shivelight.files import replacing
from shivelight.report.style import is_ours, method_styles
from shivelight.report.tables import quality_metrics

OUT = Path("benchmarks/results")
IMAGES = Path("docs/images")
WANTED = (1.2, 1.5, 2.0, 3.0)
# Metrics that are interpolated, and whether more is better.
METRICS = {"psnr_to_dense": True, "kid": False, "caption_agreement": True}
# Share of the dense FLOPs that the maps of steps at rest may take: less than a step is of any use here.
MAPS = 0.008
# Steps with which our budgets are taken together.
FEWER = {25: (16, 10), 8: (6,), 4: (3,)}


def ours(comparison: Comparison, adapters: Sequence[Path], computes: Sequence[float]) -> list[OperatingPoint]:
    """Routing without training and adapters at each budget, those that can serve it; at fewer steps too."""
    loaded = [read_adapter(comparison.pipe, folder) for folder in adapters]
    points = []
    for compute in computes:
        points += training_free_points(comparison, compute=compute)[0]
        for adapter in loaded:
            # What was fitted adds to what runs: the same steps run as without it.
            more = 0.0 if adapter[0].config.stand_ins is None else MAPS
            points += adapter_points(comparison, adapter, ablations=False, compute=round(compute + more, 4))
    steps = comparison.setting.steps
    # What rests together is cheapest, so it is what people would combine.
    together = {"training-free-blocks": range(1, steps), "blocks-fitted": fitted_steps(loaded)}
    both = [replace(p, steps=n) for n in FEWER[steps] for p in points if n in together.get(p.method, ())]
    return [point for point in (*points, *both) if served(comparison, point)]


def fitted_steps(adapters: Sequence[Adapter]) -> set[int]:
    """Numbers of steps that maps were fitted for."""
    settings = [routed.config.stand_ins for routed, _ in adapters if routed.config.stand_ins is not None]
    return {plan.steps for setting in settings for plan in setting.plans}


def served(comparison: Comparison, point: OperatingPoint) -> bool:
    """Whether the budget can be kept: the first steps of few run whole."""
    try:
        comparison.planned(point)
    except BudgetError as error:
        print(f"left out: {point.name}: {error}")
        return False
    return True


def at_speedups(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{speed-up: {method: {metric: value}}}, linear in latency on the method's own front; nothing beyond what was measured."""
    dense = rows[0]["latency_ms"]["median"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric, more in METRICS.items():
        curves: dict[str, list[Point]] = {}
        for row in rows[1:]:
            if metric in row and row["psnr_to_dense"] < IDENTICAL_PSNR:  # it never left anything out
                curves.setdefault(row["method"], []).append(Point(row["method"], dense / row["speedup"], row[metric]))
        for wanted in WANTED:
            for method, points in curves.items():
                value = quality_at(front(points, more), dense / wanted)
                if value is not None:
                    found.setdefault(f"{wanted:g}", {}).setdefault(method, {})[metric] = value
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Each metric against the speed-up: every method's own front, what never left dense out."""
    rows = [row for row in results["rows"] if row.get("psnr_to_dense", 0.0) < IDENTICAL_PSNR]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    styles = method_styles(methods)
    metrics = [metric for metric in quality_metrics(results) if metric.key in METRICS]
    figure = Figure(figsize=(4.6 * len(metrics), 4.9), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for place, metric in zip(axes, metrics, strict=True):
        for method in methods:
            known = [row for row in rows if row["method"] == method and metric.key in row]
            points = [Point(method, 1 / row["speedup"], metric.scale * row[metric.key]) for row in known]
            best = front(points, metric.higher_is_better)
            ours, style = (
                is_ours(method)
                and method.startswith(("training-free", "blocks-fitted", "blocks-tuned", "blocks-part", "blocks-rear")),
                styles[method],
            )
            place.plot(
                [1 / point.latency_ms for point in best], [point.quality for point in best], style.line,
                color=style.colour, marker=style.marker, markersize=7 if ours else 5, linewidth=2.2 if ours else 1.1,
                alpha=1.0 if ours or method.startswith("fewer-steps") else 0.65, zorder=3 if ours else 2, label=method,
            )  # fmt: skip
        dense = rows[0].get(metric.key)
        if dense is not None:
            place.axhline(metric.scale * dense, color="black", linewidth=0.8, linestyle=":")
        place.set_xscale("log")
        ticks = [0.8, 1, 1.2, 1.5, 2, 3, 4]
        place.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        place.set_xticks([], minor=True)
        place.set_xlim(0.7, 4.5)
        place.set_xlabel("speed-up of one generation (right is faster)")
        place.set_title(f"{metric.title}, {'up' if metric.higher_is_better else 'down'} is better", fontsize=10)
        place.grid(True, color="#d9dee3", linewidth=0.6)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def main() -> None:
    """Judge one use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", type=int, choices=sorted(FEWER), required=True, help="steps of the dense reference")
    parser.add_argument("--compute", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.35])
    parser.add_argument("--count", type=int, default=40, help="captions")
    parser.add_argument("--peers", nargs="*", default=[name for name in PEERS if name != "dydit"])
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="folder, besides those that are shipped"
    )
    parser.add_argument(
        "--trained", type=Path, action="append", default=[], help="folder of a trained peer (recipes/train_peers.py)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument(
        "--add", action="store_true", help="judge what results lack alone; other arguments as in their command"
    )
    parser.add_argument("--plot", action="store_true", help="interpolate and draw what is there anew")
    parser.add_argument(
        "--retime",
        action="store_true",
        help="time what results hold anew, and draw nothing; arguments as in their command",
    )
    parser.add_argument(
        "--clock", type=Path, help="take times from these results of the same points; their machine was quieter"
    )
    args = parser.parse_args()
    if args.count < FEWEST:
        parser.error(f"{args.count} captions; an interval of KID needs {FEWEST}")
    out = args.out / f"front-{args.use}.json"
    if args.clock is not None:
        results, timed = read_results(out), read_results(args.clock)
        times = {point_key(row): row for row in timed["rows"]}
        for row in results["rows"]:
            take_clock(row, times[point_key(row)])
        write_results(
            out,
            results | {"clock": timed.get("clock", {name: timed[name] for name in ("command", "commit", "machine")})},
        )
    if args.plot or args.clock is not None:
        results = read_results(out)
        write_results(out, results | {"at": at_speedups(results["rows"])})
        draw(results, IMAGES / f"front-{args.use}.png")
        return
    common.quiet_libraries()
    if torch.device(args.device).type == "cpu":
        common.keep_freed_memory()
    few = args.use == embedded.FEW_STEPS
    load = embedded.load_few_step if few else embedded.load_pipeline
    pipe = load(args.device, getattr(torch, args.dtype))
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    options = teacher_of(None)["options"]
    comparison = Comparison(pipe, Setting(args.use, 1.0 if few else embedded.GUIDANCE, 0, args.batch, options))
    folder = embedded.FEW_STEP / "adapters" if few else embedded.ADAPTER.parent
    tuned = folder / embedded.FINETUNED.name
    shipped = sorted(path for path in folder.iterdir() if path != tuned) if folder.is_dir() else []
    points = [comparison.dense()]
    if tuned.is_dir():
        points.append(comparison.finetuned(read_deltas(pipe, tuned)))
    points += ours(comparison, [*shipped, *args.adapter], args.compute)
    others, reasons = peer_points(comparison, args.peers)
    points += [trained_point(comparison, trained, TRAINED) for trained in args.trained]
    # A schedule that is stretched to its last noise level (shift_terminal) has no single step: diffusers divides by zero.
    points = [point for point in (*points, *others) if point.steps > 1 or not few]
    points = list({point_key(point): point for point in points}.values())
    for reason in reasons:
        print("left out:", reason)
    data = EmojiData()
    chosen = data.captions("test")[: args.count]
    print(f"{args.use} steps: {len(points)} points, {len(chosen)} captions", flush=True)
    if args.retime:
        results = read_results(out)
        comparison.retime(results["rows"], points, args.rounds, [str(caption) for caption in chosen])
        fresh = new_results(device=args.device)
        results["clock"] = {name: fresh[name] for name in ("command", "commit", "machine")}
        write_results(out, results | {"at": at_speedups(results["rows"])})
        draw(results, IMAGES / f"front-{args.use}.png")
        return
    results = new_results(
        device=args.device, split="test", feature_network="efflite0", backbone=describe(pipe), left_out=reasons
    )
    if args.add:
        earlier = read_results(out)
        there = {point_key(row) for row in earlier["rows"][1:]}
        points = [point for point in points if point_key(point) not in there]
        fresh = {name: results[name] for name in ("command", "commit", "machine")}
        results = earlier | {"added": [*earlier.get("added", []), fresh]}
        rows = judge(comparison, points, data, chosen, args.rounds)
        next(rows)  # dense is there
        points = points[1:]
    else:
        rows = judge(comparison, points, data, chosen, args.rounds)
    shown = ("planned_ratio", "speedup", "psnr_to_dense", "kid", "kid_to_dense", "caption_agreement", "named")
    for point, row in zip(points, rows, strict=True):
        results["rows"].append(row)
        print(point.name, {name: round(row[name], 4) for name in shown if name in row}, flush=True)
        write_results(out, results | {"at": at_speedups(results["rows"])})
    draw(results, IMAGES / f"front-{args.use}.png")


if __name__ == "__main__":
    main()
