"""What the library must know of a DiT family: one short spec per family, and the registry."""

from shivelight.backbones import qwen_image, sd3
from shivelight.backbones.spec import BackboneSpec, Streams, find_spec, register_backbone

for _family in (sd3, qwen_image):
    register_backbone(_family.SPEC)

__all__ = ["BackboneSpec", "Streams", "find_spec", "register_backbone"]
