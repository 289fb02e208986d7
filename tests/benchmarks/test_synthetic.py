import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shivelight.evaluation.results import read_results

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "synthetic.py"


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_k_settles_at_eighteen_with_the_signal_kept(synthetic: ModuleType) -> None:
    run = synthetic.learn_k("residual", -torch.eye(16), "never", 0, 500, lambda: None)
    assert synthetic.reached_k(run), run


def test_a_wrong_k_or_a_missed_token_is_not_called_reached(synthetic: ModuleType) -> None:
    good = {"k": 18.4, "k_kept": 18, "precision": 1.0, "recall": 0.9}
    assert synthetic.reached_k(good)
    for change in ({"k": 22.0}, {"k": 14.0}, {"precision": 0.9}, {"recall": 0.8}):
        assert not synthetic.reached_k(good | change)


def test_cosines_tell_the_estimators_apart(synthetic: ModuleType) -> None:
    papers = synthetic.surrogate_cosines("input", 0.5, False, 60, 0, lambda: None)
    assert papers.shape == (60,)
    assert 0.79 < papers.mean().item() < 0.86
    assert synthetic.surrogate_cosines("input", 0.5, True, 60, 0, lambda: None).mean() < 0.6
    assert synthetic.surrogate_cosines("residual", 0.5, False, 60, 0, lambda: None).mean() > 0.98


def test_true_gains_favour_the_residual_estimator(synthetic: ModuleType) -> None:
    outcomes = [synthetic.gain_cosines(False, 0.5, seed) for seed in range(20)]
    assert torch.stack([outcome["residual"] for outcome in outcomes]).mean() > 0.5
    assert torch.stack([outcome["input"] for outcome in outcomes]).mean() < 0.1
    distilled = [synthetic.gain_cosines(True, 0.5, seed) for seed in range(20)]
    assert torch.stack([outcome["residual-2"] - outcome["residual"] for outcome in distilled]).mean() > 0.1


def test_the_command_writes_a_results_file(
    synthetic: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        synthetic.main(out=tmp_path / "synthetic.json", trials=2, seeds=1, steps=3, seed=5)
    finally:
        torch.set_num_threads(threads)
    results = read_results(tmp_path / "synthetic.json")
    assert results["seed"] == 5 and results["machine"]["torch"] == torch.__version__
    checks = [row["check"] for row in results["rows"]]
    assert {check: checks.count(check) for check in checks} == {"k": 6, "cosine": 8, "gain": 6}
    assert "residual" in capsys.readouterr().out
