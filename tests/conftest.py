"""Tiny real pipelines: diffusers' and transformers' own classes with random weights, built once a session."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Some tests want the same bits from weights that have moved in memory. On AMD's processors MKL chooses kernels by where
# tensors lie, unless it is told not to, before torch loads it; workers inherit this.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny import TEXT_TOKENS, tiny_sd3


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process; a test with another precision needs a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder, for everything that loads one."""
    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _session_pipe() -> StableDiffusion3Pipeline:
    return tiny_sd3()


@pytest.fixture
def pipe(_session_pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """A tiny pipeline of this test's own."""
    mine = copy.copy(_session_pipe)
    components = dict(_session_pipe.components)
    components["transformer"] = copy.deepcopy(_session_pipe.transformer)
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    mine = StableDiffusion3Pipeline(**components)
    mine.set_progress_bar_config(disable=True)
    return mine


class Sampler:
    """Runs a pipeline with the settings that every test shares."""

    def __call__(
        self, pipe: StableDiffusion3Pipeline, prompts: list[str], steps: int = 4, **options: object
    ) -> torch.Tensor:
        """Latents [B, C, H, W] of the prompts; sample i always starts from the noise of seed i."""
        first = int(options.pop("first_seed", 0))  # type: ignore[call-overload]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
        settings = {"num_inference_steps": steps, "guidance_scale": 3.0, "height": 32, "width": 32} | options
        return pipe(
            prompts, max_sequence_length=TEXT_TOKENS, generator=generators, output_type="latent", **settings
        ).images


@pytest.fixture(scope="session")
def sample() -> Sampler:
    return Sampler()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write what the tests of all families found."""
    parser.addoption("--matrix", type=Path, help="JSON to write: which test passed for which family.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write what became of the tests in `tests/matrix`."""
    path = config.getoption("--matrix")
    if path is None:
        return
    from families import FAMILIES

    from shivelight.evaluation.results import new_results, write_results

    found: dict[str, dict[str, str]] = {name: {} for name in FAMILIES}
    places: dict[str, tuple[str, int]] = {}
    for outcome in ("passed", "xfailed", "skipped", "failed", "error"):  # the worst that happened counts
        for report in terminalreporter.stats.get(outcome, []):
            file, _, rest = report.nodeid.partition("::")
            test, _, parameters = rest.rstrip("]").partition("[")
            family = next((name for name in FAMILIES if re.search(rf"(^|-){name}($|-)", parameters)), None)
            if Path(file).parent.name != "matrix" or family is None:
                continue
            reason = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else ""
            found[family][row := test.removeprefix("test_").replace("_", " ")] = outcome + (
                f": {reason}" if reason else ""
            )
            places[row] = (file, report.location[1] or 0)
    results = new_results(command=f"pytest tests/matrix --matrix {path}", backbone={"class": "every family, tiny"})
    # In the order of the files, whichever worker was first.
    rows = sorted(places, key=lambda row: places[row])
    results["rows"] = [
        {"method": name, "budget": {}, "tests": {row: tests[row] for row in rows if row in tests}}
        for name, tests in found.items()
    ]
    write_results(path, results)
