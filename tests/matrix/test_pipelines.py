"""The other pipelines of the families: pictures to start from, masks, ControlNets, IP-Adapters and reference pictures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.models.attention_processor import FluxIPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from families import FAMILIES, build, small_vae
from matrix_help import close, free, gated, of_samples, one_batch, run
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of

Draw = Callable[..., Tensor]
PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
MASKS = (PICTURES[:, :1] > 0.5).float()


def other(name: str, kind: Any, **more: Any) -> Any:
    """Another pipeline of the family, of the same parts."""
    parts, wanted = build(name).components, kind._get_signature_keys(kind)[0]
    if name == "sd3":  # of as many channels as its pipelines ask for
        torch.manual_seed(0)
        model = parts["transformer"]
        larger = type(model).from_config(dict(model.config) | {"in_channels": 16, "out_channels": 16})
        vae = small_vae(16)
        with torch.no_grad():  # its ControlNet's pipeline draws latents of the picture from the global generator
            vae.quant_conv.weight[16:] = 0
            vae.quant_conv.bias[16:] = -30
        parts |= {"transformer": larger.requires_grad_(False).eval(), "vae": vae}
    if "controlnet" in wanted:
        more["controlnet"] = controlnet(name, parts["transformer"])
    mine = kind(**{key: part for key, part in parts.items() if key in wanted}, **more)
    mine.set_progress_bar_config(disable=True)
    return mine


def drawing(name: str, pipe: Any, steps: int = 6, **inputs: Any) -> Draw:
    """One call for some of three samples; tensors among the inputs have a row for each."""
    call = FAMILIES[name]

    def draw(*samples: int) -> Tensor:
        rows = list(samples)
        torch.manual_seed(4)
        own = {key: value[rows] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        return call(pipe, *samples, steps=steps, **own)

    return draw


def holds_what_routing_promises(pipe: Any, draw: Draw, tokens: bool = True) -> None:
    """Dense at full budget, the plan met below it, a batch its samples, and nothing left behind."""
    dense = draw(0, 1)
    assert torch.isfinite(dense).all()
    for axis in ("blocks", "tokens") if tokens else ("blocks",):
        config = sl.RoutingConfig.training_free(compute=0.6, axis=axis)
        sl.attach(pipe, config)
        together = draw(0, 1)
        assert not torch.equal(together, dense)
        assert config.compute - 0.21 < routed_of(pipe).spending.ratio <= config.compute
        for sample in range(2):
            close(draw(sample), together[sample : sample + 1])
        sl.set_budget(pipe, compute=1.0)
        assert torch.equal(draw(0, 1), dense)
    sl.detach(pipe)
    assert torch.equal(draw(0, 1), dense)


IMAGE_TO_IMAGE = {
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
    "qwen-image": QwenImageImg2ImgPipeline,
    "wan": WanVideoToVideoPipeline,
}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image(name: str) -> None:
    pipe = other(name, IMAGE_TO_IMAGE[name])
    inputs = {"image": PICTURES, "strength": 0.75}
    if name == "wan":
        inputs = {"video": PICTURES[:, None].repeat(1, 5, 1, 1, 1), "strength": 0.75}
    seen: list[int] = []
    draw = drawing(name, pipe, 8, **inputs)
    holds_what_routing_promises(pipe, draw)
    routed = free(pipe)
    routed.observer = lambda *_: seen.append(routed.context.step)
    draw(0)
    assert sorted(set(seen)) == list(range(6))  # of eight steps, the last six


INPAINTING = {
    "sd3": StableDiffusion3InpaintPipeline,
    "flux": FluxInpaintPipeline,
    "qwen-image": QwenImageInpaintPipeline,
}


@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting(name: str) -> None:
    pipe = other(name, INPAINTING[name])
    holds_what_routing_promises(pipe, drawing(name, pipe, 8, image=PICTURES, mask_image=MASKS, strength=0.7))


def controlnet(name: str, model: Any) -> Any:
    torch.manual_seed(3)
    kind = {"sd3": SD3ControlNetModel, "flux": FluxControlNetModel, "qwen-image": QwenImageControlNetModel}[name]
    shape = (
        {"num_extra_conditioning_channels": 0}
        if name == "sd3"
        else {"attention_head_dim": 16, "num_attention_heads": 2}
    )
    single = {"num_single_layers": 1} if name == "flux" else {}
    net = kind.from_transformer(model, num_layers=2, load_weights_from_transformer=False, **shape, **single)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # fresh ones add nothing
    return net.requires_grad_(False).eval()


CONTROLNETS = {
    "sd3": StableDiffusion3ControlNetPipeline,
    "flux": FluxControlNetPipeline,
    "qwen-image": QwenImageControlNetPipeline,
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets(name: str) -> None:
    pipe = other(name, CONTROLNETS[name])
    draw = drawing(name, pipe, control_image=PICTURES)
    plain = drawing(name, pipe, control_image=PICTURES, controlnet_conditioning_scale=0.0)
    assert not torch.allclose(draw(0), plain(0), atol=1e-3)
    holds_what_routing_promises(pipe, draw)


def test_reference_pictures_of_flux_kontext() -> None:
    pipe = other("flux", FluxKontextPipeline)
    draw = drawing("flux", pipe, image=PICTURES, max_area=32 * 32, _auto_resize=False)
    holds_what_routing_promises(pipe, draw)
    free(pipe)
    draw(0)
    assert routed_of(pipe).shape[0] == 2 * FAMILIES["flux"].tokens


def test_reference_pictures_of_flux2() -> None:
    pipe = build("flux2")
    from PIL import Image

    picture = Image.fromarray((PICTURES[0].permute(1, 2, 0) * 255).byte().numpy()).resize((64, 64))
    draw = drawing("flux2", pipe, image=[picture])
    assert not torch.equal(draw(0), FAMILIES["flux2"](pipe, 0))
    holds_what_routing_promises(pipe, draw)
    free(pipe)
    draw(0)
    assert routed_of(pipe).shape[0] > FAMILIES["flux2"].tokens


def test_reference_pictures_of_qwen_image_edit() -> None:
    """The edit pipeline's own text encoder is too large for a test; this is what it asks of the backbone."""
    pipe = build("qwen-image")
    model, call = pipe.transformer, one_batch(pipe, "qwen-image", 0, 1)
    call["hidden_states"] = torch.cat([call["hidden_states"], call["hidden_states"].flip(1)], dim=1)
    call["img_shapes"] = [[*shapes, *shapes] for shapes in call["img_shapes"]]
    dense = run(model, call)
    gated(model, reuse=False, widths=(0.5, 1.0), cfg_gates="each")
    together = run(model, call)
    assert not torch.equal(together, dense) and routed_of(model).shape[0] == 2 * FAMILIES["qwen-image"].tokens
    for sample in range(2):
        close(run(model, of_samples(call, 2, sample)), together[sample : sample + 1])
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    sl.set_budget(model, keep=0.5)
    together = run(model, call)
    for sample in range(2):
        close(run(model, of_samples(call, 2, sample)), together[sample : sample + 1])


def flux_ip_adapter(model: Any) -> dict[str, dict[str, Tensor]]:
    """A file of an IP-Adapter for a tiny FLUX, as its authors lay it out."""
    torch.manual_seed(6)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    attention: dict[str, Tensor] = {}
    for block in range(model.config.num_layers):
        own = FluxIPAdapterJointAttnProcessor2_0(width, model.config.joint_attention_dim, scale=1.0).state_dict()
        for part in ("to_k_ip", "to_v_ip"):
            for kind in ("weight", "bias"):
                attention[f"{block}.{part}.{kind}"] = own[f"{part}.0.{kind}"]
    projection = ImageProjection(image_embed_dim=32, cross_attention_dim=32, num_image_text_embeds=4).state_dict()
    return {
        "image_proj": {
            "proj.weight": projection["image_embeds.weight"], "proj.bias": projection["image_embeds.bias"],
            "norm.weight": projection["norm.weight"], "norm.bias": projection["norm.bias"],
        },
        "ip_adapter": attention,
    }  # fmt: skip


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_ip_adapter_of_flux(order: str) -> None:
    pipe = build("flux")
    embeds = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(8))

    def draw(*samples: int) -> Tensor:
        # One picture for all samples, which is how the pipeline has it.
        return FAMILIES["flux"](
            pipe, *samples, ip_adapter_image_embeds=[embeds], negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 32)]
        )

    def load() -> None:
        pipe.load_ip_adapter(
            flux_ip_adapter(pipe.transformer), None, None, image_encoder_pretrained_model_name_or_path=None
        )

    steps = [load, lambda: free(pipe)]
    for step in steps if order == "before" else reversed(steps):
        step()
    plain = draw(0, 1)
    pipe.set_ip_adapter_scale(0.0)
    assert not torch.allclose(draw(0, 1), plain, atol=1e-4)
    pipe.set_ip_adapter_scale(1.0)
    assert torch.equal(draw(0, 1), plain)
    sl.detach(pipe)
    holds_what_routing_promises(pipe, draw, tokens=False)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.6))
    with pytest.raises(sl.UnsupportedBackboneError, match="tokens of this FluxTransformerBlock cannot be routed"):
        draw(0)
