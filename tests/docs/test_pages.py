"""The pages that promise to be run."""

import re
from pathlib import Path

import pytest

from shivelight.backbones import BackboneSpec, spec

PAGES = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, BackboneSpec]:
    """What a page registers is gone after it."""
    mine = dict(spec._REGISTRY)
    monkeypatch.setattr(spec, "_REGISTRY", mine)
    return mine


def test_bring_your_own_dit_works_as_written(capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / "bring-your-own-dit.md").read_text(), re.DOTALL)
    model, reader = blocks[0], blocks[1:]
    assert len([line for line in model.splitlines() if line.strip()]) <= 60
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks:
        exec(compile(code, "bring-your-own-dit.md", "exec"), names)
    assert "my-dit" in capsys.readouterr().out
    # What the reader writes beside the model and the loop they have.
    spec_lines = [line for line in reader[0].splitlines() if line.strip()]
    assert len(spec_lines) < 30
