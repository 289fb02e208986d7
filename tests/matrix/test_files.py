"""Adapters of every family as the Hub's client keeps them, offline."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, gated, widths_of

import shivelight as sl
from shivelight.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from shivelight.backbones import find_spec

REVISIONS = ("1f" * 20, "2e" * 20)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, which may not ask the network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def publish(pipe: Any, hub: Path, revision: str, main: bool) -> None:
    """What `hf_hub_download` leaves of a repository `someone/fast`: files by hash, linked from each revision."""
    root = hub / "models--someone--fast"
    snapshot, blobs, refs = root / "snapshots" / revision, root / "blobs", root / "refs"
    saved = sl.save_adapter(pipe, hub.parent / revision)
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        blob = blobs / f"{revision[:8]}{name[:12]}"
        (saved / name).rename(blob)
        (snapshot / name).symlink_to(blob)
    if main:
        (refs / "main").write_text(revision)


def test_an_adapter_comes_back_from_the_hubs_cache(name: str, hub: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    pictures = []
    for revision, seed in zip(REVISIONS, (2, 3), strict=True):
        gated(pipe, seed=seed, widths=widths_of(name))
        pictures.append(call(pipe, 0, steps=3))
        publish(pipe, hub, revision, main=revision == REVISIONS[1])
        sl.detach(pipe)
    dense = call(pipe, 0, steps=3)
    assert not torch.equal(*pictures)
    for revision, expected in ((None, pictures[1]), (REVISIONS[0], pictures[0]), ("main", pictures[1])):
        sl.load_adapter(pipe, "someone/fast", revision)
        sl.set_budget(pipe, threshold=0.5)
        assert torch.equal(call(pipe, 0, steps=3), expected), revision
        sl.detach(pipe)
    for source, revision in (("someone/fast", "3d" * 20), ("someone/else", None)):
        with pytest.raises(sl.AdapterError, match=f"the Hub could not give {source}.*"):
            sl.load_adapter(pipe, source, revision)
        assert torch.equal(call(pipe, 0, steps=3), dense)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_without_training_are_saved_as_well(name: str, tmp_path: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.6, axis="both"))
    expected = call(pipe, 0, steps=5)
    sl.save_adapter(pipe, tmp_path)
    other = build(name)
    sl.load_adapter(other, tmp_path)  # under the budget that it was attached with
    assert torch.equal(call(other, 0, steps=5), expected)
    assert find_spec(other.transformer).name in (tmp_path / CONFIG_NAME).read_text()
