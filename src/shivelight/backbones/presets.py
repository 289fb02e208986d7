"""Published shapes: exact configurations and token counts, without weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from shivelight.backbones import hy3dgen
from shivelight.errors import UnsupportedBackboneError

_FOLDER = Path(__file__).parent / "presets"
# What the constructors of these classes call the numbers of their blocks.
_DEPTHS = ("num_layers", "num_single_layers", "depth", "depth_single_blocks")
_HY3DGEN = "hy3dgen."
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@dataclass(frozen=True)
class Preset:
    """A shape that was published.

    Attributes:
        name: of its file.
        title: what it is, with its resolution.
        model_class: of diffusers, or "hy3dgen.Hunyuan3DDiT".
        config: what its constructor takes.
        image_tokens: of one pass of one sample.
        text_tokens: likewise.
        source: of these figures.
        published: what to check ours against, if anything: "multiply_adds" of so many "passes", and whose they are ("of").
    """

    name: str
    title: str
    model_class: str
    config: dict[str, Any]
    image_tokens: int
    text_tokens: int
    source: str
    published: dict[str, Any]

    @property
    def missing(self) -> str:
        """Why it cannot be built here, a sentence; empty where it can."""
        return hy3dgen.available() if self.model_class.startswith(_HY3DGEN) else ""

    def _class(self) -> Any:
        return hy3dgen.load().DiT if self.model_class.startswith(_HY3DGEN) else getattr(diffusers, self.model_class)

    def build(self, device: str = "meta", dtype: torch.dtype = torch.bfloat16, blocks: int | None = None) -> nn.Module:
        """The backbone; on the meta device it takes no memory, on another one its weights are random.

        Args:
            device: where to build it.
            dtype: of its weights, but on the meta device.
            blocks: at most so many of each kind, for a machine that does not hold all of them.
        """
        config = self.config | {
            name: min(blocks, self.config[name]) for name in _DEPTHS if blocks is not None and name in self.config
        }
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(default if device == "meta" else dtype)  # never twice the memory
            with torch.device(device):
                model = self._class()(**config)
        finally:
            torch.set_default_dtype(default)
        model = model if device == "meta" else model.to(dtype)
        return model.requires_grad_(False).eval()


def read_preset(name: str) -> Preset:
    """A preset by its name; `UnsupportedBackboneError` where there is none."""
    if name not in PRESETS:
        raise UnsupportedBackboneError(f"There is no preset {name!r}; one of {', '.join(PRESETS)}.")
    data = json.loads((_FOLDER / f"{name}.json").read_text())
    model_class, published = data.pop("class"), data.pop("published", {})
    return Preset(name=name, model_class=model_class, published=published, **data)
