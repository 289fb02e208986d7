"""results.json, which `demo`, `bench` and `evaluate` write: built, checked, written whole or not at all, read back.

A figure that was not measured is absent, never 0, null or NaN.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shivelight.errors import DataError
from shivelight.files import replacing
from shivelight.measurement.machine import machine_info
from shivelight.measurement.statistics import Estimate

SCHEMA = 1
REQUIRED = {"schema": int, "command": str, "commit": str, "machine": dict, "seed": int, "backbone": dict, "rows": list}
ROW_REQUIRED = {"method": str, "budget": dict}
# Figures that a row may have; each is a finite number. The second set cannot be 0 when it was measured.
FIGURES = frozenset(
    {
        "psnr_to_dense",
        "ssim_to_dense",
        "kid",
        "fd",
        "kid_to_finetuned",
        "kid_to_dense",
        "realised",
        "caption_agreement",
        "agreement_to_dense",
        "named",
        "named_to_dense",
        "placed",
        "guidance",
    }
)
POSITIVE_FIGURES = frozenset(
    {
        "planned_ratio",
        "flops_ratio",
        "speedup",
        "speedup_end_to_end",
        "efficiency",
        "peak_memory_mb",
        "steps",
        "batch",
        "samples",
    }
)


def git_commit() -> str:
    """The commit of the checkout this package runs from, "-dirty" added where files differ; "unknown" if installed."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A site-packages folder may lie inside somebody else's repository: ask whether git tracks this very file.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return "unknown"
    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def new_results(
    command: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backbone: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The frame of a results object with no rows yet. `command` defaults to the one this process was started with."""
    if command is None:
        program = Path(sys.argv[0]).name
        command = " ".join(["shivelight" if program == "__main__.py" else program, *sys.argv[1:]])
    return {
        "schema": SCHEMA,
        "command": command,
        "commit": git_commit(),
        "machine": machine_info(device),
        "seed": seed,
        "backbone": dict(backbone or {}),
        **more,
        "rows": [],
    }


def new_row(method: str, budget: Mapping[str, float] | None = None, **figures: Any) -> dict[str, Any]:
    """One row. None means not measured and is left out; an `Estimate` becomes a figure and its entry in `ci95`."""
    row: dict[str, Any] = {"method": method, "budget": dict(budget or {})}
    intervals: dict[str, list[float]] = dict(figures.pop("ci95", None) or {})
    for name, figure in figures.items():
        if isinstance(figure, Estimate):
            row[name] = figure.value
            intervals[name] = figure.interval
        elif figure is not None:
            row[name] = figure
    if intervals:
        row["ci95"] = intervals
    return row


def validate(results: Mapping[str, Any]) -> None:
    """Raises a DataError that names the entry when results are not what INTERFACE.md promises."""
    _require(results, REQUIRED, "results")
    if results["schema"] != SCHEMA:
        raise DataError(
            f"results have schema {results['schema']}, this version reads {SCHEMA}: "
            "use the version of Shivelight that wrote them"
        )
    for index, row in enumerate(results["rows"]):
        if not isinstance(row, dict):
            raise DataError(f"results.rows[{index}] must be an object, not {type(row).__name__}")
        where = f"results.rows[{index}] ({row.get('method', 'no method')})"
        _require(row, ROW_REQUIRED, where)
        _check_row(row, where)
    _check_finite(results, "results")


def _require(entry: Mapping[str, Any], required: Mapping[str, type], where: str) -> None:
    for key, kind in required.items():
        if key not in entry:
            raise DataError(f"{where} has no {key!r}: every results file needs {', '.join(required)}")
        if not isinstance(entry[key], kind):
            raise DataError(f"{where}.{key} must be of type {kind.__name__}, not {type(entry[key]).__name__}")


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for key in (FIGURES | POSITIVE_FIGURES) & row.keys():
        if isinstance(row[key], bool) or not isinstance(row[key], int | float):
            raise DataError(f"{where}.{key} must be a number, not {row[key]!r}: leave out what was not measured")
        if key in POSITIVE_FIGURES and row[key] <= 0:
            raise DataError(f"{where}.{key} is {row[key]}: it is above 0 when measured, and absent when not")
    latency = row.get("latency_ms")
    if latency is not None:
        _require(latency, {"median": float, "p10": float, "p90": float, "runs": int}, f"{where}.latency_ms")
        if not 0 < latency["p10"] <= latency["median"] <= latency["p90"] or latency["runs"] < 1:
            raise DataError(f"{where}.latency_ms is not 0 < p10 <= median <= p90 over 1 run or more: {latency}")
    for key, interval in row.get("ci95", {}).items():
        if key not in row:
            raise DataError(f"{where}.ci95 has {key!r}, which the row does not: give the figure too")
        if not isinstance(interval, list | tuple) or len(interval) != 2 or not interval[0] <= row[key] <= interval[1]:
            raise DataError(f"{where}.ci95.{key} must be [low, high] around {row[key]}, not {interval}")


def _check_finite(entry: Any, where: str) -> None:
    if entry is None:
        raise DataError(f"{where} is null: leave out what was not measured")
    if isinstance(entry, float) and not math.isfinite(entry):
        raise DataError(f"{where} is {entry}: leave out what was not measured")
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            _check_finite(value, f"{where}.{key}")
    elif isinstance(entry, list | tuple):
        for index, value in enumerate(entry):
            _check_finite(value, f"{where}[{index}]")


def write_results(path: Path | str, results: Mapping[str, Any]) -> Path:
    """Checks results and writes them as JSON, whole or not at all."""
    validate(results)
    return write_atomic(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def write_atomic(path: Path | str, text: str) -> Path:
    """Writes text to a neighbour, then renames it: an interruption or a full disk never leaves half a file."""
    path = Path(path)
    try:
        with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    return path


def read_results(path: Path | str) -> dict[str, Any]:
    """Reads and checks a results file."""
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read results from {path}: {error.strerror or error}; run `shivelight demo` or `evaluate` first"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): pass a results file that Shivelight wrote") from error
    if not isinstance(results, dict):
        raise DataError(f"{path} holds {type(results).__name__} instead of one results object")
    validate(results)
    return results
