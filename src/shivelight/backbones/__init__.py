"""What the library must know of a DiT family: one short spec per family, and the registry."""

from shivelight.backbones import sd3
from shivelight.backbones.spec import BackboneSpec, Streams, find_spec, register_backbone

register_backbone(sd3.SPEC)

__all__ = ["BackboneSpec", "Streams", "find_spec", "register_backbone"]
