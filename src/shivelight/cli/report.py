"""`shivelight report`: a self-contained HTML page from the JSON of the other commands."""

from pathlib import Path
from typing import Annotated

import typer

from shivelight.cli import common
from shivelight.evaluation.results import read_results, write_results
from shivelight.report import ReportFigures, build_report


def report(
    results: Annotated[list[Path], typer.Argument(help="One or more results.json files.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Shivelight report",
    json: common.JsonOption = None,
) -> None:
    """Make a self-contained page of tables and plots.

    Example: shivelight report benchmarks/results/evaluate.json --out report.html
    """
    loaded = [read_results(path) for path in results]
    common.say(f"report: {build_report(loaded, ReportFigures(), out, title)}")
    if json is not None:
        write_results(
            json, loaded[0] if len(loaded) == 1 else {**loaded[0], "rows": [r for x in loaded for r in x["rows"]]}
        )
