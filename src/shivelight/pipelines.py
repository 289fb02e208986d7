"""How the pipelines of all families are asked for pictures: their calls differ in what they name and in what they lack."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shivelight.errors import DataError, ShivelightError


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Of the pipeline's call; none of an object that cannot be called."""
    return inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}


def call_default(pipe: Any, name: str) -> Any:
    """Default of a parameter of the pipeline's call; None where it has no such parameter."""
    parameter = _parameters(pipe).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def accepted(pipe: Any, **options: Any) -> dict[str, Any]:
    """Those of the options that the pipeline's call has a parameter for, and that are not None."""
    known = _parameters(pipe)
    return {name: value for name, value in options.items() if name in known and value is not None}


def pixels_per_latent(pipe: Any) -> int:
    """How many pixels one place of the latents stands for, along one side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if factor := getattr(pipe, name, None):
            return int(factor)
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def native_side(pipe: Any) -> int:
    """Side in pixels of the square pictures that the backbone was made for.

    Raises:
        ShivelightError: nothing in the pipeline says so.
    """
    latent = getattr(pipe.transformer.config, "sample_size", None) or getattr(pipe, "default_sample_size", None)
    if not isinstance(latent, int):
        raise ShivelightError(
            f"{type(pipe).__name__} does not say how large its pictures are; give their side in pixels (--size)."
        )
    return latent * pixels_per_latent(pipe)


def class_labels(pipe: Any, captions: Sequence[str]) -> list[int]:
    """Classes of a class-conditional pipeline, from captions that are numbers or names of classes.

    Raises:
        DataError: a caption is neither.
    """
    count, names, labels = int(pipe.transformer.config.num_embeds_ada_norm), getattr(pipe, "labels", {}), []
    for caption in captions:
        label = int(caption) if caption.strip().isdecimal() else names.get(caption.strip(), -1)
        if not 0 <= label < count:
            raise DataError(
                f"{type(pipe).__name__} draws classes, and {caption!r} is none: write a number from 0 to {count - 1} as the "
                "caption" + (", or a name such as " + repr(next(iter(names))) if names else "") + "."
            )
        labels.append(label)
    return labels


def any_caption(pipe: Any) -> str:
    """A caption, or a class, for what does not depend on it."""
    return "0" if accepted(pipe, class_labels=0) and not accepted(pipe, prompt="") else "a picture"


def draw(
    pipe: Any,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float | None = None,
    *,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Pictures of captions (or classes), one from each seed.

    Args:
        pipe: a text-to-image pipeline of diffusers, a class-conditional one, or a text-to-video one, of which one frame is drawn.
        captions: one for each picture.
        seeds: of the noise, likewise.
        steps: of sampling.
        guidance: scale, by whatever name the pipeline knows it; its own default for None.
        call: in the place of the pipeline's own.
        options: further arguments of the call; those that it does not know are left out.

    Returns:
        PIL images, or with output_type="pt" a tensor [n, 3, H, W] in [0, 1].
    """
    arguments = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        # Sides are those that were asked for.
        "use_resolution_binning": False,
        "num_frames": 1,
        "output_type": "pil",
        **options,
    }
    named = accepted(pipe, prompt=list(captions))
    if not named:
        named = accepted(pipe, class_labels=class_labels(pipe, captions))
    if (call_default(pipe, "true_cfg_scale") or 0) > 1:  # guidance by a second call, which needs a negative prompt
        if guidance is None or guidance > 1:
            arguments["negative_prompt"] = [" "] * len(captions)
        arguments["true_cfg_scale"] = guidance
    else:
        arguments["guidance_scale"] = guidance
    output = (call or pipe)(**named, **accepted(pipe, **arguments))
    if hasattr(output, "frames"):
        return [video[0] for video in output.frames] if isinstance(output.frames, list) else output.frames[:, 0]
    return output.images
