"""Where latency tables come from: memory, the disk, or a measurement now."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shivelight.calibration.measure import SECONDS, Progress, measure_table
from shivelight.calibration.rehearsal import is_bare
from shivelight.execution.compiled import CompiledRegions
from shivelight.execution.latency_table import LatencyTable
from shivelight.execution.pricing import Load
from shivelight.execution.routed import NAME, Routed
from shivelight.files import replacing
from shivelight.measurement.machine import machine_info

FORMAT = 2


def cache_folder() -> Path:
    """Where tables are kept: $SHIVELIGHT_CACHE, else $XDG_CACHE_HOME/shivelight, else ~/.cache/shivelight."""
    own = os.environ.get("SHIVELIGHT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shivelight"


def setting_of(backbone: nn.Module, routed: Routed, load: Load) -> dict[str, Any]:
    """All that a table depends on, but for the length of the text."""
    reference = next(backbone.parameters())
    device = reference.device
    # Modules and their sizes, as they are now: quantised, with a LoRA, compiled.
    parts = [f"{name} {type(module).__name__}" for name, module in backbone.named_modules() if not _ours(name)]
    sizes = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in backbone.named_parameters() if not _ours(name)]
    routing = routed.config.to_dict() | {"keep": None, "compute": None}
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _host(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(reference.dtype).removeprefix("torch."),
        "tokens": load.tokens,
        "samples": load.samples,
        "branch": load.branch,
        "steps": not is_bare(routed),
        "compiled": compiled_as(backbone, routed),
        "backbone": type(backbone).__name__,
        "weights": _digest(parts, sizes),
        "routing": _digest(routing, sorted(routed.deltas) if routed.folded is None else []),
    }


def compiled_as(backbone: nn.Module, routed: Routed) -> str:
    """How the backbone or its blocks are compiled; "eager" where they are not."""
    if isinstance(routed.regions, CompiledRegions):
        return f"blocks {routed.regions.options}"
    modules = [backbone, *(block for _, block in routed.spec.block_list(backbone))]
    return "compiled" if any(getattr(m, "_compiled_call_impl", None) is not None for m in modules) else "eager"


def _ours(name: str) -> bool:
    return name.split(".")[0] == NAME


def _host() -> str:
    return f"{machine_info()['device']}, {os.cpu_count()} cores"


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


class TableFile:
    """The tables of one setting on disk, by length of the text; a file that cannot be read, or is about something else, counts as
    none, with a warning.

    Args:
        setting: from `setting_of`.
        folder: where files are; `cache_folder()` by default.
    """

    def __init__(self, setting: dict[str, Any], folder: Path | None = None) -> None:
        self.setting = setting
        self.path = (folder or cache_folder()) / "latency" / f"{_digest(setting)}.json"

    def read(self) -> dict[int, LatencyTable]:
        """The tables by number of text tokens; none if there is no such file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._unusable(str(error))
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("setting") != self.setting:
                return self._unusable("it is about another machine, backbone or setting")
            return {int(count): LatencyTable.from_dict(table) for count, table in data["tables"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return self._unusable(str(error) or repr(error))

    def _unusable(self, why: str) -> dict[int, LatencyTable]:
        warnings.warn(f"The latency table {self.path} cannot be used ({why}); it is measured anew.", stacklevel=4)
        return {}

    def write(self, tables: dict[int, LatencyTable]) -> None:
        """Whole or not at all; where nothing can be written, a warning says so."""
        data = {"setting": self.setting, "tables": {str(count): table.to_dict() for count, table in tables.items()}}
        try:
            with replacing(self.path) as unfinished:
                unfinished.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"The latency table cannot be kept in {self.path.parent} ({error}), so it is measured in every process; set "
                "SHIVELIGHT_CACHE to a folder that can be written.",
                stacklevel=3,
            )


class Tables:
    """The tables of one attached backbone: from memory, from disk, or measured now.

    Args:
        backbone: () -> the attached backbone.
        routed: its state.
    """

    def __init__(self, backbone: Callable[[], nn.Module | None], routed: Routed) -> None:
        self._backbone, self._routed = backbone, routed
        self._known: dict[str, dict[int, LatencyTable]] = {}
        self._files: dict[Any, TableFile] = {}

    def __call__(
        self,
        load: Load,
        measure: bool,
        *,
        anew: bool = False,
        seconds: float = SECONDS,
        progress: Progress | None = None,
    ) -> LatencyTable | None:
        """The table of this load.

        Text of nearly the same length (to one in 64 tokens) has the same table: in some families it is as long as the prompt.

        Args:
            load: what passes hold.
            measure: whether to, where there is none.
            anew: measure in any case.
            seconds: to take about.
            progress: told of each timed pass.
        """
        backbone = self._backbone()
        if backbone is None:
            return None
        file = self._file(backbone, load)
        key = file.path.name
        tables = self._known.get(key) or file.read()
        self._known[key] = tables
        near = min(tables, key=lambda text: abs(text - load.text_tokens), default=None)
        if near is not None and abs(near - load.text_tokens) * 64 <= load.tokens and not anew:
            return tables[near]
        if not measure:
            return None
        table = measure_table(backbone, self._routed, load, seconds, progress)
        tables = self._known[key] = file.read() | tables | {load.text_tokens: table}
        file.write(tables)
        return table

    def _file(self, backbone: nn.Module, load: Load) -> TableFile:
        """Where the tables of this load are; looked up once for each state that the backbone is found in."""
        reference = next(backbone.parameters())
        routed = self._routed
        kinds = hash(tuple(map(type, backbone.modules())))  # another with a LoRA, or quantised
        key = (
            kinds, reference.device, reference.dtype, torch.get_num_threads(), compiled_as(backbone, routed), routed.config,
            is_bare(routed), load.tokens, load.samples, load.branch, cache_folder(),
        )  # fmt: skip
        if key not in self._files:
            self._files[key] = TableFile(setting_of(backbone, routed, load))
        return self._files[key]


def usual_load(routed: Routed, samples: int | None = None, guided: bool | None = None) -> Load:
    """What the next passes are likely to hold: as the last ones, or a picture of the backbone's own size.

    Args:
        routed: state of the backbone.
        samples: pictures of a call; None: as in the last one, or 1.
        guided: whether its pipeline guides; None: as in the last one, or if the family does so in one batch.
    """
    tokens, text_tokens = routed.shape
    if routed.settling.load is not None and samples is None and guided is None:
        return routed.settling.load
    samples = samples or 1
    mode = "none" if routed.clock.pipeline is None else routed.spec.guidance
    if mode == "batched" and guided is not False:
        return Load(tokens, text_tokens, 2 * samples, "both")
    return Load(tokens, text_tokens, samples, "cond" if mode == "separate" else "single")
