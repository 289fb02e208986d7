"""The clock of an earlier `shivelight evaluate`, measured anew on a quiet machine.

    python benchmarks/retime.py benchmarks/results/axes.json --also build/adapters/tokens+blocks/adapter

Pictures do not depend on what else a machine does, times do. The rows of the file are timed again in turns, one sample, and
their clock is replaced: `latency_ms`, `speedup`, `speedup_end_to_end`, `efficiency`. What was drawn and judged stays, and
`clock` says by which command and on what the times were taken. With --drop nothing is timed: a clock that other load has spoilt is
taken out, since a figure that was not measured is absent.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import shivelight as sl
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cli import common
from shivelight.cli.evaluate import budgeted_points, judged_on
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.comparison import CLOCK, Comparison, OperatingPoint, Setting
from shivelight.evaluation.results import new_results, read_results, write_results
from shivelight.evaluation.standard import references


def main() -> None:
    """Time every row and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--also", nargs="*", default=[], help="folders of adapters in it that are not shipped")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drop", action="store_true", help="take the clock out instead")
    args = parser.parse_args()
    earlier = read_results(args.results)
    rows = earlier["rows"]
    if args.drop:
        for row in rows:
            for name in CLOCK:
                row.pop(name, None)
                row.get("ci95", {}).pop(name, None)
        write_results(args.results, earlier)
        return
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, getattr(torch, rows[0]["dtype"]))
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, Setting(rows[0]["steps"], rows[0]["guidance"], 0, 1, common.call_options(pipe, None)))
    points = known_points(comparison, args.also, rows)
    captions, _ = judged_on(None, 2, pipe)
    with common.progress_bar("timing", len(rows) * (args.rounds + 1)) as advance:
        comparison.retime(rows, points, args.rounds, captions, advance)
    for row in rows:
        print(
            f"{row['method']:<28} {row['budget']} {row['latency_ms']['median']:9.1f} ms  {row['speedup']:.2f}x",
            flush=True,
        )
    ours = new_results(device=common.DEFAULT_DEVICE)
    earlier["clock"] = {name: ours[name] for name in ("command", "commit", "machine")}
    write_results(args.results, earlier)
    efficiencies = [row["efficiency"] for row in rows if row["method"] == "fewer-steps"]
    if efficiencies:
        print(f"fewer steps, whose efficiency is 1 by construction: {statistics.median(efficiencies):.2f}")


def known_points(comparison: Comparison, also: list[str], rows: list[dict[str, Any]]) -> list[OperatingPoint]:
    """Every point that `shivelight evaluate` makes of the shipped adapters and `also` at the budgets of the rows."""
    pipe = comparison.pipe
    points = references(comparison, read_deltas(pipe, str(embedded.FINETUNED)))
    adapters = [read_adapter(pipe, folder) for folder in (*embedded.OTHERS, *also)]
    keeps = sorted({row["budget"]["keep"] for row in rows if "keep" in row["budget"]})
    computes = sorted({row["budget"]["compute"] for row in rows if "compute" in row["budget"]})
    points += budgeted_points(comparison, adapters, keeps, [] if keeps else computes, baselines=bool(keeps))
    return points + [comparison.dense(row["steps"]) for row in rows if row["method"] == "fewer-steps"]


if __name__ == "__main__":
    main()
