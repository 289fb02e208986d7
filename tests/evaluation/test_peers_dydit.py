"""DyDiT's gates with random routers: what they slice, and how much they leave out."""

from __future__ import annotations

import pytest
import torch
from peering import STEPS, attributes, bare, compared
from torch import Tensor

import shivelight as sl
from shivelight.evaluation.peers import dydit
from shivelight.evaluation.peers.dydit import active
from shivelight.evaluation.peers.ground import generator


def test_units_at_work_have_the_share_that_was_asked_for() -> None:
    counts = active(20, 16, 0.4, generator(0))
    assert sum(counts) == 192 and len(set(counts)) > 3
    assert min(active(50, 4, 0.9, generator(0))) == 1


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_what_is_left_out_is_as_good_as_nothing(name: str) -> None:
    """Heads and channels that do not run are those whose outputs are not read; tokens below the threshold get nothing."""
    loop = bare(name)
    before, dense, step, skip = attributes(loop.transformer), loop(), 2, 0.5
    block, index = loop.transformer.transformer_blocks[1], 1
    seen: dict[str, list] = {"given": [], "out": [], "mlp": []}
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: seen["given"].append((args, kwargs)), with_kwargs=True),
        block.register_forward_hook(lambda m, args, output: seen["out"].append(output)),
        block.ff.register_forward_pre_hook(lambda m, args: seen["mlp"].append(args[0])),
    ]
    with dydit(loop, skip).state():
        result = loop()
        assert torch.equal(loop(), result), "the second generation depends on the first"
    for handle in handles:
        handle.remove()
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before
    heads = active(STEPS, 4, skip, generator(index, 1))[step]
    channels = 128 * active(STEPS, 4, skip, generator(index, 2))[step] // 4
    assert heads < 4 or channels < 128

    attentions = [a for a in (getattr(block, n, None) for n in ("attn", "attn1", "attn2")) if a is not None]
    with torch.no_grad():
        for attention in attentions:
            width = attention.to_q.out_features // attention.heads * heads
            for layer in (attention.to_out[0], getattr(attention, "to_add_out", None)):
                if layer is not None:
                    layer.weight[:, width:] = 0
        block.ff.net[2].weight[:, channels:] = 0
        router = torch.randn(32, generator=generator(index, 3))
        scores = seen["mlp"][step] @ router
        runs = scores.flatten() >= scores.flatten().sort(descending=True).values[scores.numel() // 2 - 1]

        def gated(module: object, args: object, output: Tensor) -> Tensor:
            return output * runs.view(*output.shape[:2], 1)

        handle = block.ff.register_forward_hook(gated)
        args, kwargs = seen["given"][step]
        expected = block(*args, **kwargs)
        handle.remove()
    torch.testing.assert_close(seen["out"][step], expected, atol=1e-5, rtol=1e-4)


def test_it_is_for_random_weights_and_blocks_that_can_be_sliced() -> None:
    with pytest.raises(sl.ShivelightError, match="dydit cannot run on SD3Transformer2DModel: its gates need training"):
        dydit(compared("sd3"), 0.5)
    for name, reason in (("flux", "MLP of FluxSingle.* does not stand alone"), ("wan", "normalises over all heads")):
        with pytest.raises(sl.ShivelightError, match=reason):
            dydit(bare(name), 0.5)


def test_in_a_compiled_loop_it_is_refused() -> None:
    loop = bare("dit")
    loop.compile(backend="eager")
    with pytest.raises(sl.ShivelightError, match="no single graphs"):
        dydit(loop, 0.5)
