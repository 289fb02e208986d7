"""The house: imports point one way, and no room reaches into one it must not know (DESIGN.md, rooms)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src/shivelight"
# What each room may import of ours; a room that is not listed may import anything below the command line.
ALLOWED = {
    "routing": {"routing", "errors"},
    "backbones": {"backbones", "errors"},
    "execution": {"execution", "routing", "backbones", "cost", "config", "errors"},
    "cost": {"backbones", "errors"},
    "measurement": {"measurement", "errors"},
    "calibration": {"calibration", "measurement", "execution", "backbones", "routing", "config", "files", "errors"},
    "adapter": {"execution", "backbones", "config", "errors"},
    "budgets": {"adapter", "calibration", "execution", "routing", "config", "pipelines", "errors"},
    "pipelines": {"errors"},
    "config": {"errors"},
    "files": set(),
}
FAMILIES = ("sd3", "flux", "qwen", "pixart", "hunyuan")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "shivelight" else node.module for alias in node.names
            }
    return found


def files_of(room: str) -> list[Path]:
    return sorted((SOURCE / room).rglob("*.py")) if (SOURCE / room).is_dir() else [SOURCE / f"{room}.py"]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    for path in files_of(room):
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("shivelight.")}
        assert ours <= ALLOWED[room], path


def test_routing_is_plain_pytorch_and_execution_names_no_family() -> None:
    for path in files_of("routing"):
        assert not {name for name in imports_of(path) if name.split(".")[0] in ("diffusers", "transformers")}, path
    for path in files_of("execution"):
        assert not [family for family in FAMILIES if family in path.read_text().lower()], path


def test_only_the_command_line_imports_the_command_line() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert not [name for name in imports_of(path) if name.startswith("shivelight.cli")], path
