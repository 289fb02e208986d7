"""Caches of tensors that someone has already: any shapes, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shivelight.errors import DataError
from shivelight.training.cache import SHARD, LatentCache, write_cache, writing


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_sets_vectors_and_classes_come_back_as_they_were(tmp_path: Path) -> None:
    count = SHARD + 3
    latents = _drawn(count, 5, 3).bfloat16()
    conditions = {"context": _drawn(count, 4, 2), "label": torch.arange(count), "latents": _drawn(count, 2)}
    empty = {"context": torch.zeros(1, 4, 2), "label": torch.tensor([-1]), "latents": torch.ones(1, 2)}
    cache = write_cache(tmp_path / "c", latents, conditions, empty, ["one", "two"], {"height": 32})
    assert len(cache) == count and cache.shape == (5, 3) and cache.captions == ["one", "two"]
    assert cache.options == {"height": 32}
    chosen = [0, SHARD - 1, SHARD, count - 1]
    batch = cache.batch(chosen, [False, False, False, True])
    assert torch.equal(batch.latents, latents[chosen].float())
    for name, value in conditions.items():
        assert torch.equal(batch.conditions[name][:3], value[chosen[:3]])
        assert torch.equal(batch.conditions[name][3], empty[name][0])
        assert batch.conditions[name].dtype == value.dtype


def test_captions_of_several_lengths_are_padded_at_their_ends(tmp_path: Path) -> None:
    texts = [_drawn(2, length, 3) for length in (4, 7)]
    masks = [torch.ones(2, length, dtype=torch.bool) for length in (4, 7)]
    with writing(tmp_path / "c") as writer:
        for text, mask in zip(texts, masks, strict=True):
            writer.add(torch.zeros(2, 1), {"text": text, "mask": mask})
        writer.finish({"text": torch.ones(1, 9, 3), "mask": torch.ones(1, 9, dtype=torch.bool)}, [], {})
    found = LatentCache(tmp_path / "c").batch([1, 2, 3], [False, False, True]).conditions
    assert found["text"].shape == (3, 9, 3) and found["mask"].sum(1).tolist() == [4, 7, 9]
    assert torch.equal(found["text"][0, :4], texts[0][1]) and not found["text"][0, 4:].any()
    assert torch.equal(found["text"][1, :7], texts[1][0]) and found["text"][2].min() == 1.0


def test_a_caption_is_dropped_only_where_there_is_an_empty_one(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c", torch.zeros(2, 3), {"text": torch.ones(2, 1)})
    assert cache.empty is None and cache.batch([0], [False]).conditions["text"].item() == 1.0
    with pytest.raises(DataError, match="no empty caption.*caption_drop=0"):
        cache.batch([0, 1], [False, True])
    without = write_cache(tmp_path / "d", torch.zeros(2, 3), {})
    assert without.batch([0, 1], [True, False]).conditions == {}


def test_a_cache_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cache(folder, torch.zeros(2, 3), {})
    with pytest.raises(DataError, match="do not fit"):
        write_cache(folder, torch.ones(4, 3), {"text": torch.ones(3, 2)})
    with pytest.raises(DataError, match="do not fit"), writing(folder) as writer:
        writer.add(torch.ones(4, 3), {})
        writer.add(torch.ones(4, 2), {})
    assert len(LatentCache(folder)) == 2 and [path.name for path in tmp_path.iterdir()] == ["c"]
    write_cache(folder, torch.ones(4, 3), {})
    assert len(LatentCache(folder)) == 4 and [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(DataError, match="at least one sample"):
        write_cache(folder, torch.ones(0, 3), {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.png").write_bytes(b"")
    with pytest.raises(DataError, match="holds something that is no latent cache"):
        write_cache(tmp_path / "other", torch.ones(4, 3), {})
    assert (tmp_path / "other/photo.png").exists()


def test_a_cache_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", torch.zeros(2, 3), {})
    record = json.loads((tmp_path / "c/cache.json").read_text())
    del record["format"]
    (tmp_path / "c/cache.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="its format is 1.*Delete it"):
        LatentCache(tmp_path / "c")
