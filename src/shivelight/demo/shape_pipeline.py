"""A small image-to-shape pipeline of Hunyuan3D's own classes: what hy3dgen leaves to others, and how the parts are put together.

The condition is a view of a shape (`shapes.view`), 32 x 32 pixels, as 16 tokens; the latents are an unordered set. Nothing is
embedded: `recipes/shapes/train_teacher.py` trains the parts and writes the file that `open_pipeline` reads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shivelight.backbones import hy3dgen
from shivelight.demo.shapes import RESOLUTION, VIEW_SIZE
from shivelight.errors import DataError

PATCH = 8
STEPS = 50
GUIDANCE = 3.0


class _Block(nn.Module):
    """Self-attention and an MLP, residual, normalised before: [B, N, D] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens after this block."""
        qkv = self.to_qkv(self.norm1(tokens)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.to_out(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class ViewConditioner(nn.Module):
    """Views float [B, 1, 32, 32] in [0, 1] to 16 tokens, in the form in which Hunyuan3D's pipeline asks for a condition.

    Patches of 8 x 8 pixels, of the brightness and of whether there is anything, then a small transformer encoder.
    """

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = (VIEW_SIZE // PATCH) ** 2
        self.patches = nn.Conv2d(2, width, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(1, self.tokens, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))

    def forward(self, image: Tensor, **_: Any) -> dict[str, Tensor]:
        """{"main": [B, 16, D]}."""
        both = torch.cat([image, (image > 0).to(image.dtype)], dim=1)
        return {"main": self.blocks(self.patches(both).flatten(2).transpose(1, 2) + self.places)}

    def unconditional_embedding(self, batch: int, **_: Any) -> dict[str, Tensor]:
        """What guidance compares with, {"main": [B, 16, D]}: zeros, as Hunyuan3D's own image encoders give."""
        return {"main": self.places.new_zeros(batch, self.tokens, self.places.shape[-1])}


class ViewProcessor:
    """A view as a picture to {"image": [1, 1, 32, 32]} in [0, 1]."""

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """`DataError` where the picture is not of the size and mode of `shapes.view`."""
        if image.size != (VIEW_SIZE, VIEW_SIZE) or image.mode != "L":
            raise DataError(
                f"A view is a picture of mode L, {VIEW_SIZE} x {VIEW_SIZE}, got {image.mode}, {image.size[0]} x "
                f"{image.size[1]}; make it with shivelight.demo.shapes.view."
            )
        return {"image": torch.from_numpy(np.asarray(image).copy()).float()[None, None] / 255}


def build_denoiser(channels: int, context: int, width: int = 128, double: int = 3, single: int = 6) -> nn.Module:
    """A small Hunyuan3DDiT with heads of 32; modulation and output start at zero, so that each block starts as nothing."""
    heads = width // 32
    model = hy3dgen.load().DiT(
        in_channels=channels, context_in_dim=context, hidden_size=width, num_heads=heads, depth=double,
        depth_single_blocks=single, axes_dim=[32],
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("_mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear")):
            nn.init.zeros_(parameter)
    return model


def build_pipeline(vae: nn.Module, denoiser: nn.Module, conditioner: nn.Module) -> Any:
    """Hunyuan3D's flow-matching pipeline of these parts, on the CPU in float32."""
    classes = hy3dgen.load()
    return classes.Pipeline(
        vae=vae, model=denoiser, scheduler=classes.Scheduler(), conditioner=conditioner,
        image_processor=ViewProcessor(), device="cpu", dtype=torch.float32,
    )  # fmt: skip


def save_pipeline(pipe: Any, settings: dict[str, Any], path: Path) -> None:
    """Write the weights of a pipeline and the `settings` {"vae", "denoiser", "conditioner"} that its parts were made with."""
    parts = {"vae": pipe.vae, "denoiser": pipe.model, "conditioner": pipe.conditioner}
    torch.save({"settings": settings} | {name: part.state_dict() for name, part in parts.items()}, path)


def open_pipeline(path: Path) -> Any:
    """The pipeline that `save_pipeline` wrote, in evaluation mode."""
    if not path.exists():
        raise DataError(f"There is no shape pipeline {path}; train one with `python recipes/shapes/train_teacher.py`.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["settings"]
    vae = hy3dgen.load().ShapeVAE(**settings["vae"])
    denoiser = build_denoiser(**settings["denoiser"])
    conditioner = ViewConditioner(**settings["conditioner"])
    for name, part in {"vae": vae, "denoiser": denoiser, "conditioner": conditioner}.items():
        part.load_state_dict(state[name])
        part.eval().requires_grad_(False)
    return build_pipeline(vae, denoiser, conditioner)


def generate(
    pipe: Any, views: Sequence[Image.Image], steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0
) -> Tensor:
    """Latents [n, N, C] by the pipeline itself; view i starts from the noise of seed + i, whatever the others."""
    seeds = [torch.Generator().manual_seed(seed + index) for index in range(len(views))]
    return pipe(
        image=list(views), num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent",
        enable_pbar=False,
    )  # fmt: skip


@torch.no_grad()
def occupancy(pipe: Any, latents: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """bool [n, R, R, R]: the pipeline's latents decoded by its own volume decoder, at the middles of the cells."""
    grids = []
    for latent in latents.split(1):
        decoded = pipe.vae(latent / pipe.vae.scale_factor)
        logits = pipe.vae.volume_decoder(
            decoded, pipe.vae.geo_decoder, bounds=1 - 1 / resolution, octree_resolution=resolution - 1,
            num_chunks=resolution**3, enable_pbar=False,
        )  # fmt: skip
        grids.append(logits > 0)
    return torch.cat(grids)
