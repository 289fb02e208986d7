"""Hunyuan3D's own classes out of the package hy3dgen 2.0, without what its shape model does not need.

`hy3dgen.shapegen` imports pymeshlab and OpenCV on its first line, and `hy3dgen.shapegen.models` torchvision, which no CPU build
of this project's torch has; the denoiser, the autoencoder, the schedulers and the pipeline need none of them. `load` therefore
makes these two packages known by their folders alone while it imports the modules below them, unchanged, and forgets the two
afterwards: who has everything that hy3dgen asks for can still import it as usual, and gets the same classes. What is missing then
is the image encoder (`conditioner.py`): a pipeline takes any module with `forward(image=...)` and `unconditional_embedding`.

hy3dgen is under the Tencent Hunyuan 3D 2.0 Community License, which is no open-source licence (it leaves out the European
Union, the United Kingdom and South Korea, and uses; read it before you install the package). Nothing of it is part of
Shivelight. `pip install 'shivelight[hy3d]' && pip install --no-deps hy3dgen==2.0.2` installs what is needed here.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shivelight.errors import ShivelightError

# Packages whose __init__ is not run, outermost first.
_BARE = ("hy3dgen.shapegen", "hy3dgen.shapegen.models")
_INSTALL = "pip install 'shivelight[hy3d]' && pip install --no-deps hy3dgen==2.0.2 (its licence is yours to accept)"


@dataclass(frozen=True)
class Hunyuan3D:
    """The classes: of the denoiser, the autoencoder (a decoder of latents; hy3dgen has no encoder), the flow-matching pipeline
    and its Euler scheduler."""

    DiT: Any
    ShapeVAE: Any
    Pipeline: Any
    Scheduler: Any


@contextmanager
def _bare_packages() -> Iterator[None]:
    """Packages of `_BARE` that are not imported yet stand in `sys.modules` as empty ones with the right folder."""
    folder = Path(importlib.import_module("hy3dgen").__path__[0])
    added = []
    try:
        for name in _BARE:
            if name not in sys.modules:
                package = ModuleType(name)
                package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
                sys.modules[name] = package
                added.append(name)
        yield
    finally:
        for name in added:
            del sys.modules[name]


def available() -> str:
    """Why `load` would fail, a sentence; empty where it would not."""
    needed = ("hy3dgen", "einops", "skimage", "trimesh", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: {_INSTALL}" if missing else ""


def load() -> Hunyuan3D:
    """The classes; `ShivelightError` where hy3dgen or something that these modules import is not installed."""
    if reason := available():
        raise ShivelightError(f"Hunyuan3D cannot be loaded: {reason}")
    with _bare_packages():
        denoiser = importlib.import_module("hy3dgen.shapegen.models.denoisers.hunyuan3ddit")
        autoencoder = importlib.import_module("hy3dgen.shapegen.models.autoencoders")
        schedulers = importlib.import_module("hy3dgen.shapegen.schedulers")
        pipelines = importlib.import_module("hy3dgen.shapegen.pipelines")
    return Hunyuan3D(
        denoiser.Hunyuan3DDiT,
        autoencoder.ShapeVAE,
        pipelines.Hunyuan3DDiTFlowMatchingPipeline,
        schedulers.FlowMatchEulerDiscreteScheduler,
    )
