"""What the commands share: options, quiet libraries, pipelines by name, progress, tables."""

import ctypes
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shivelight.demo import pipeline as embedded
from shivelight.errors import DataError, ShivelightError
from shivelight.evaluation.results import write_results
from shivelight.pipelines import accepted

console = Console()

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
DeviceOption = Annotated[str, typer.Option(help="Device to run on; cuda where there is one.")]
PipelineOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of a diffusers pipeline; the embedded one by default.")
]
SizeOption = Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the pipeline's own by default.")]
TextOption = Annotated[
    int | None,
    typer.Option("--max-sequence-length", help="Text tokens of a caption; the pipeline's default if left out."),
]
StepsOption = Annotated[
    int, typer.Option(min=1, help="Sampling steps, those of the dense reference where there is one.")
]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
PrecisionOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of what is run.")
]
AdapterOption = Annotated[str | None, typer.Option(help="Folder or hub id of an adapter; the embedded one by default.")]
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries below us would bury ours."""
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def keep_freed_memory() -> None:
    """On a CPU under glibc, keep what tensors free for the next ones, instead of giving it back to the system.

    Shapes that change from block to block make the allocator map and unmap pages all the time, which slows routed runs more
    than dense ones.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 26)):
        mallopt(option, value)


def open_pipeline(source: str | None, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of that name on the device; the embedded one for None."""
    quiet_libraries()
    check_device(device)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if source is None:
        return embedded.load_pipeline(device, dtype)
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.count("/") != 1):
        raise DataError(f"There is no pipeline folder {source}; check the path, or give a hub id such as owner/name.")
    missing = _optional_parts(folder) if folder.is_dir() else {}
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **missing).to(device)
    except Exception as error:  # diffusers raises a dozen kinds: files, formats, network, memory
        raise DataError(
            f"The pipeline {source} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _optional_parts(folder: Path) -> dict[str, None]:
    """Components that model_index.json leaves empty (SD3 without T5) must be passed as None."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{folder} is no diffusers pipeline: its model_index.json cannot be read ({error}).") from error
    return {name: None for name, entry in index.items() if entry == [None, None]}


def check_device(device: str) -> None:
    """A device that torch knows and this machine has."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ShivelightError(f"The device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def call_options(
    pipe: Any, source: str | None, size: int | None = None, max_sequence_length: int | None = None
) -> dict[str, Any]:
    """Arguments that every call of this pipeline needs: what was asked for, and short text for the embedded one and its kin."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if max_sequence_length is None and (
        source is None or getattr(tokenizer, "model_max_length", None) == embedded.TEXT_TOKENS
    ):
        max_sequence_length = embedded.TEXT_TOKENS
    return accepted(pipe, height=size, width=size, max_sequence_length=max_sequence_length)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Any]:
    """A progress bar, endless without a total; yields a function that advances it by one, and may change the text."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(description, total=total)
        yield lambda text=None: bar.update(
            task, advance=1, description=f"{description} {text}" if text else description
        )


def say(text: str) -> None:
    """One line, without rich's markup."""
    console.print(text, markup=False, highlight=False)


# Head, figure of a row, digits, suffix and scale.
_COLUMNS = (
    ("planned", "planned_ratio", 3, "", 1.0),
    ("speed-up", "speedup", 2, "x", 1.0),
    ("end to end", "speedup_end_to_end", 2, "x", 1.0),
    ("efficiency", "efficiency", 2, "", 1.0),
    ("PSNR", "psnr_to_dense", 1, "", 1.0),
    ("SSIM", "ssim_to_dense", 3, "", 1.0),
    ("KID x1000", "kid", 1, "", 1000.0),
    ("- tuned", "kid_to_finetuned", 1, "", 1000.0),
    ("FD", "fd", 1, "", 1.0),
    ("agree", "caption_agreement", 1, "", 1.0),
    ("- dense", "agreement_to_dense", 1, "", 1.0),
    ("named", "named", 0, "%", 100.0),
)


def print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The table that people read, of the figures that some row has; the JSON has more."""
    table = Table(title=title, title_justify="left")
    figures = [figure for figure in _COLUMNS if any(figure[1] in row for row in rows)]
    for head in ("method", "budget"):
        table.add_column(head, no_wrap=True)
    for head in ("steps", *(figure[0] for figure in figures)):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        budget = ", ".join(f"{key} {value:g}" for key, value in row["budget"].items())
        cells = [_cell(row, key, digits, suffix, scale) for _, key, digits, suffix, scale in figures]
        table.add_row(row["method"], budget, str(row["steps"]), *cells)
    # No figure is cut off, whatever the terminal: lines that are too long for it go on below.
    natural = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, 120, natural)).print(table)


def _cell(row: dict[str, Any], name: str, digits: int, suffix: str, scale: float) -> str:
    return f"{scale * row[name]:.{digits}f}{suffix}" if name in row else ""


def save_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results where asked."""
    if path is not None:
        try:
            write_results(path, results)
        except OSError as error:
            raise ShivelightError(f"The results could not be written to {path}: {error}") from error
        say(f"results: {path}")
