"""How the trainer encodes data for each family, adds noise to it and asks its backbone; and the registry."""

from shivelight.training.denoisers import diffusion, flow, hunyuan3d
from shivelight.training.denoisers.base import Conditions, Denoiser, denoiser_for, register_denoiser

for _families in (flow.FAMILIES, diffusion.FAMILIES, hunyuan3d.FAMILIES):
    for _name, _kind in _families.items():
        register_denoiser(_name, _kind)

__all__ = ["Conditions", "Denoiser", "denoiser_for", "register_denoiser"]
