"""`shivelight bench` on bare backbones, and options that take several numbers."""

from pathlib import Path

from typer.testing import CliRunner

from shivelight.cli import app, spread
from shivelight.errors import ShivelightError
from shivelight.evaluation.results import read_results


def test_a_shape_with_random_weights_is_timed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = CliRunner().invoke(
        app,
        [
            "bench", "--backbone", "dit-xl-2-256", "--random-weights", "--blocks", "2", "--tokens", "16", "--steps", "3",
            "--rounds", "2", "--keep", "0.5", "--compute", "0.6", "--json", str(path),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = read_results(path)
    assert [row["method"] for row in results["rows"]] == ["dense", "tokens", "tokens+reuse", "blocks+reuse", "blocks"]
    assert "tokens+blocks+reuse: compute=0.6 cannot be reached in 3 steps" in done.output.replace("\n", " ")
    assert {row["image_tokens"] for row in results["rows"]} == {16} and results["rows"][0]["blocks_of_a_kind"] == 2
    # A speed-up that its interval does not tell from 1 is not printed as one.
    for row in results["rows"][1:]:
        low, high = row["ci95"]["speedup"]
        assert (f"{row['speedup']:.2f}x" in done.output) or low <= 1.0 <= high


def test_peers_are_timed_in_the_same_run_and_those_that_cannot_run_say_why(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    common = ["--random-weights", "--blocks", "2", "--tokens", "16", "--steps", "4", "--rounds", "2", "--keep", "0.5"]
    asked = [
        "bench",
        "--backbone",
        "dit-xl-2-256",
        *common,
        "--peers",
        "first-block-cache",
        "fewer-steps",
        "--json",
        str(path),
    ]
    done = CliRunner().invoke(app, spread([*asked, "--peers", "static-drop"]))
    assert done.exit_code == 0, done.output
    rows = read_results(path)["rows"]
    methods = ["dense", "tokens", *["first-block-cache"] * 3, *["fewer-steps"] * 3]
    assert [row["method"] for row in rows] == methods
    assert [row["budget"] for row in rows[2:5]] == [{"skip": 0.25}, {"skip": 0.5}, {"skip": 0.75}]
    assert [(row["steps"], row["planned_ratio"]) for row in rows[5:]] == [(3, 0.75), (2, 0.5), (1, 0.25)]
    assert "left out: static-drop cannot run on DiTTransformer2DModel: it has 2 blocks." in " ".join(
        done.output.split()
    )


def test_an_unknown_peer_is_told_the_known_ones() -> None:
    for command in ("bench", "evaluate"):
        done = CliRunner().invoke(app, [command, "--peers", "tea"])
        assert isinstance(done.exception, ShivelightError)
        assert str(done.exception).startswith("There is no peer 'tea'; known are first-block-cache, ")
    done = CliRunner().invoke(app, ["bench", "--backbone", "dit-xl-2-256", "--peers", "magcache"])
    assert done.exit_code == 2 and "--random-weights" in done.output


def test_counting_takes_no_budget_of_flops() -> None:
    done = CliRunner().invoke(app, ["bench", "--backbone", "dit-xl-2-256", "--compute", "0.5"])
    assert done.exit_code == 2 and "--random-weights" in done.output


def test_several_numbers_after_one_option_are_that_option_repeated() -> None:
    assert spread(["bench", "--keep", "0.8", "0.6", "--json", "x"]) == [
        "bench",
        "--keep",
        "0.8",
        "--keep",
        "0.6",
        "--json",
        "x",
    ]
    whole = ["evaluate", "--keep", "0.8", "--compute", "0.5", "--compute", "0.4", "--seed", "3"]
    assert spread(["evaluate", "--keep", "0.8", "--compute", "0.5", "0.4", "--seed", "3"]) == whole
    peers = ["evaluate", "--peers", "taylorseer", "--peers", "magcache", "--json", "x"]
    assert spread(["evaluate", "--peers", "taylorseer", "magcache", "--json", "x"]) == peers
    for left in (
        [],
        ["report", "a.json", "b.json"],
        ["nothing", "--keep", "1", "2"],
        ["train", "pictures", "--size", "3"],
    ):
        assert spread(left) == left


def test_cuda_graphs_are_of_compiled_blocks_on_cuda() -> None:
    done = CliRunner().invoke(app, ["bench", "--random-weights", "--compile", "--cuda-graphs", "--device", "cpu"])
    assert done.exit_code == 2 and "CUDA graphs are of compiled blocks" in done.output.replace("\n", " ")
