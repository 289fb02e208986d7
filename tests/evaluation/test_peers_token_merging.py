"""Token merging against its definition, token by token, and where it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peering import attributes, bare, captions, compared
from torch import Tensor

import shivelight as sl
from shivelight.backbones.spec import near_square
from shivelight.evaluation.peers import token_merging
from shivelight.evaluation.peers.ground import Ground, generator
from shivelight.evaluation.peers.token_merging import (
    destinations,
    match,
    merge,
    merged_count,
    places,
    unmerge,
)


def by_definition(x: Tensor, chosen: list[int], count: int) -> tuple[list[int], dict[int, int], Tensor]:
    """(tokens that run, source -> destination of the merged, tokens [N, D] with means) of one sample x [N, D]."""
    edges = []
    for source in (token for token in range(len(x)) if token not in chosen):
        likeness = {d: float(x[source] @ x[d] / (x[source].norm() * x[d].norm())) for d in chosen}
        nearest = max(chosen, key=lambda d: likeness[d])
        edges.append((likeness[nearest], source, nearest))
    merged = {source: nearest for _, source, nearest in sorted(edges, reverse=True)[:count]}
    means = x.clone()
    for d in chosen:
        group = [x[d], *(x[source] for source, nearest in merged.items() if nearest == d)]
        means[d] = torch.stack(group).mean(dim=0)
    return [token for token in range(len(x)) if token not in merged], merged, means


@pytest.mark.parametrize(("rows", "columns", "ratio"), [(4, 6, 0.5), (6, 4, 0.75), (5, 4, 0.25), (8, 8, 0.6)])
def test_matching_merging_and_unmerging_by_definition(rows: int, columns: int, ratio: float) -> None:
    x = torch.randn(3, rows * columns, 7, generator=generator(1), dtype=torch.float64)
    chosen = destinations(rows, columns, generator(2))
    count = merged_count(rows * columns, (rows, columns), ratio)
    matching = match(x, chosen, count)
    mixed, added = merge(x, matching), torch.randn(3, rows * columns - count, 7, dtype=torch.float64)
    copied = unmerge(added, matching, rows * columns)
    for sample in range(3):
        kept, merged, means = by_definition(x[sample], chosen.tolist(), count)
        assert matching.kept[sample].tolist() == kept
        assert dict(zip(matching.merged[sample].tolist(), matching.into[sample].tolist(), strict=True)) == merged
        torch.testing.assert_close(mixed[sample][kept], means[kept])
        for token in range(rows * columns):
            assert torch.equal(copied[sample, token], added[sample, kept.index(merged.get(token, token))])


def test_destinations_are_one_of_each_cell() -> None:
    seen = set()
    for seed in range(8):
        chosen = destinations(5, 6, generator(seed)).tolist()
        assert [(token // 6 // 2, token % 6 // 2) for token in chosen] == [(r, c) for r in range(2) for c in range(3)]
        seen.update(token // 6 % 2 * 2 + token % 2 for token in chosen)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_cells_of_equal_tokens_lose_nothing(name: str) -> None:
    """Four equal keys have the share of one among cells that are all merged alike."""
    loop = bare(name)
    rows, columns = near_square(16)

    def equal(module: Any, args: Any, output: Tensor) -> Tensor:
        cells = output.unflatten(1, (rows // 2, 2, columns // 2, 2))
        return cells[:, :, :1, :, :1].expand_as(cells).flatten(1, 4)

    loop.transformer.pos_embed.register_forward_hook(equal)
    dense, before = loop(), attributes(loop.transformer)
    with token_merging(loop, 0.75).state():
        merged = loop()
    torch.testing.assert_close(merged, dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before
    loop.transformer.pos_embed._forward_hooks.clear()
    whole = loop()
    with token_merging(loop, 0.75).state():
        assert (loop() - whole).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "index"), [("sd3", 1), ("flux", 0), ("qwen-image", 2)])
def test_a_block_runs_on_the_means_and_its_update_is_copied(name: str, index: int) -> None:
    loop = bare(name, samples=1)
    block, seen = loop.transformer.transformer_blocks[index], []
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True),
        block.register_forward_hook(lambda m, args, output: seen.append(output)),
    ]
    with token_merging(loop, 0.5).state():
        loop()
    for handle in handles:
        handle.remove()
    step = 3
    given, (text, image) = seen[2 * step], seen[2 * step + 1]
    x = given["hidden_states"]
    kept, merged, means = by_definition(x[0], destinations(4, 4, generator(index, step)).tolist(), 8)
    fewer = given | {"hidden_states": means[None, kept]}
    rotary = given.get("image_rotary_emb")
    if name == "flux":  # cosines and sines of text and image
        fewer["image_rotary_emb"] = tuple(torch.cat([table[:8], table[8:][kept]]) for table in rotary)
    if name == "qwen-image":  # of the image, of the text
        fewer["image_rotary_emb"] = rotary[0][kept], rotary[1]
    with torch.no_grad():
        alone = block(**fewer)
    added = alone[1][0] - means[kept]
    expected = torch.stack([x[0, t] + added[kept.index(merged.get(t, t))] for t in range(16)])
    torch.testing.assert_close(image[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "wan", "flux2"])
def test_pictures_take_less_and_depend_on_nothing_before(name: str) -> None:
    comparison, drawn = compared(name), captions(name)
    point = token_merging(comparison, 0.5)
    both = comparison.pictures(point, drawn)
    assert comparison.counted_flops(point) < 0.8 * comparison.counted_flops(comparison.dense())
    assert torch.equal(comparison.pictures(point, drawn), both)
    planned = comparison.planned(point)
    assert planned is not None and planned < 0.8


def test_where_the_cells_are() -> None:
    wide, flux = Ground(bare("dit")), Ground(bare("flux"))
    assert places({"hidden_states": torch.zeros(1, 4, 4, 12)}, wide, 12) == (2, 6)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    assert places({"hidden_states": torch.zeros(1, 12, 4), "img_ids": ids}, flux, 12) == (3, 4)
    assert places({"hidden_states": torch.zeros(1, 16, 3, 4, 12)}, Ground(bare("wan")), 36) == (6, 6)
    with pytest.raises(sl.ShivelightError, match="token-merging cannot run on SanaTransformer2DModel: "):
        token_merging(bare("sana"), 0.5)
    with pytest.raises(sl.ShivelightError, match=r"0\.9; 2 x 2 cells"):
        token_merging(bare("dit"), 0.9)
