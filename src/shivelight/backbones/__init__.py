"""What the library must know of a DiT family: one short spec per family, and the registry."""

from shivelight.backbones import dit, flux, flux2, hunyuan3d, pixart, qwen_image, sana, sd3, wan
from shivelight.backbones.spec import (
    BackboneSpec,
    BlockSpec,
    Mlp,
    Rotary,
    Streams,
    find_spec,
    register_backbone,
)

for _family in (sd3, flux, flux2, qwen_image, pixart, dit, wan, sana, hunyuan3d):
    register_backbone(_family.SPEC)

__all__ = ["BackboneSpec", "BlockSpec", "Mlp", "Rotary", "Streams", "find_spec", "register_backbone"]
