"""What the commands share."""

from __future__ import annotations

import pytest

from shivelight.cli.common import print_rows
from shivelight.evaluation.results import new_row


def test_the_printed_table_has_the_figures_that_were_measured_and_cuts_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    figures = {
        "planned_ratio": 0.5123, "speedup": 1.5, "speedup_end_to_end": 1.4, "efficiency": 0.97, "psnr_to_dense": 24.04,
        "ssim_to_dense": 0.9119, "kid": 0.0523, "kid_to_finetuned": -0.0011, "fd": 154.21,
    }  # fmt: skip
    row = new_row("tokens+blocks-refresh+reuse", {"compute": 0.5123}, steps=25, **figures)
    print_rows([row], "without")
    assert "agree" not in capsys.readouterr().out
    print_rows([row | {"caption_agreement": 91.71, "agreement_to_dense": -1.14, "named": 0.969}], "with")
    printed = capsys.readouterr().out
    for text in ("tokens+blocks-refresh+reuse", "compute 0.5123", "1.50x", "0.912", "-1.1", "154.2", "91.7", "97%"):
        assert text in printed, text
