"""Rebuild src/shivelight/demo/data/emoji.zip from two npm packages (both MIT).

npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0   # run by this script, needs npm
python recipes/build_data.py
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from shivelight.demo.data import ARCHIVE
from shivelight.files import replacing

PACKAGES = {"pictures": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emojibase-data@17.0.0"}
STORED_SIZE = 112
NOTICE = """The pictures in this archive are Fluent Emoji, Copyright (c) Microsoft Corporation, under the MIT licence,
resized from the npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT, LobeHub).
The names and groups come from the npm package emojibase-data 17.0.0, Copyright (c) 2017-2019 Miles Johnson, MIT.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def download(folder: Path) -> dict[str, Path]:
    """Fetch both packages with npm into `folder`; returns the path of each tarball."""
    paths = {}
    for role, package in PACKAGES.items():
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        paths[role] = folder / done.stdout.strip().splitlines()[-1]
    return paths


def read_names(path: Path) -> dict[str, dict]:
    """hexcode (lower case, every -fe0f stripped) -> label, group, subgroup; regional letters have no group and fall out."""
    with tarfile.open(path) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None
        records = json.load(member)
    return {
        stripped(record["hexcode"]): {
            "label": record["label"],
            "group": record["group"],
            "subgroup": record["subgroup"],
        }
        for record in records
        if record.get("group") is not None
    }


def stripped(hexcode: str) -> str:
    """The join key of both packages."""
    return hexcode.lower().replace("-fe0f", "")


def main() -> None:
    """Write the archive, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ARCHIVE)
    parser.add_argument(
        "--quality", type=int, default=60, help="WebP quality of colour; alpha is kept at the same quality"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tarballs = download(Path(scratch))
        names = read_names(tarballs["names"])
        concepts, pictures = [], {}
        with tarfile.open(tarballs["pictures"]) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                hexcode = stripped(Path(member.name).stem)
                if not member.name.endswith(".webp") or hexcode not in names or hexcode in pictures:
                    continue
                handle = tar.extractfile(member)
                assert handle is not None
                image = Image.open(handle).convert("RGBA").resize((STORED_SIZE, STORED_SIZE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", quality=args.quality, alpha_quality=args.quality, method=6)
                pictures[hexcode] = buffer.getvalue()
                concepts.append({"hexcode": hexcode, **names[hexcode]})
    with replacing(args.out) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("LICENSE.txt", NOTICE)
        archive.writestr("concepts.json", json.dumps(concepts, ensure_ascii=False, indent=0))
        for hexcode, data in pictures.items():
            archive.writestr(f"{hexcode}.webp", data)
    print(f"{len(concepts)} captioned pictures, {args.out.stat().st_size / 1e6:.1f} MB: {args.out}")


if __name__ == "__main__":
    main()
