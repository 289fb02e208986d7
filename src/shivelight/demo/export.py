"""The embedded data set as a folder of captioned images, the form that `shivelight train` reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from shivelight.demo.data import IMAGE_SIZE, EmojiData, Split


def export_images(
    folder: Path, count: int, split: Split = "train", seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw `count` pictures of a split into `folder` with metadata.jsonl; a folder that is already complete is kept.

    Args:
        folder: where they go; complete or absent, never half.
        count: pictures; captions repeat, with other seeds, where there are fewer.
        split: "train", "validation" or "test".
        seed: of the first picture; picture i has seed + i.
        progress: called with (done, total).
    """
    listed = folder / "metadata.jsonl"
    if listed.exists() and len(listed.read_text().splitlines()) == count:
        return folder
    data = EmojiData()
    captions = data.captions(split)
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    lines = []
    for i in range(count):
        caption = captions[i % len(captions)]
        name = f"{i:05d}.png"
        data.render(caption, seed + i, IMAGE_SIZE).save(unfinished / name)
        lines.append(json.dumps({"file_name": name, "text": str(caption)}))
        if progress is not None:
            progress(i + 1, count)
    (unfinished / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder
