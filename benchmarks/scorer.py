"""What the image-text scorer behind caption agreement can tell apart: real pictures of captions it never saw, and generated ones.

    python benchmarks/scorer.py

Writes benchmarks/results/scorer.json. Rows: real renders of all captions of the test split; the same pictures with other
captions; and the embedded dense pipeline's pictures of test captions, at its usual number of steps and at few steps, which must
score lower. "named" is the share of pictures whose concept wins among all concepts on the caption's background, "placed" the share
whose background wins among all backgrounds of the caption's concept.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shivelight.cli import common
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.agreement import Agreement, caption_agreement
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.evaluation.scorer import embedded_scorer
from shivelight.measurement.statistics import Estimate, bootstrap
from shivelight.pipelines import draw

# Far from the seeds of everything that trains.
FIRST_SEED = 20_000_000


@torch.no_grad()
def placed(images: Tensor, captions: list[str]) -> Estimate:
    """The share of pictures [n, 3, H, W] whose background has the greatest cosine among all backgrounds of the concept."""
    scorer = embedded_scorer()
    right = []
    for vector, caption in zip(scorer.images(images), captions, strict=True):
        concept, background = scorer.parts(caption)
        rivals = scorer.captions([f"{concept} on {other}" for other in scorer.backgrounds])
        right.append(float((rivals @ vector).argmax().item() == scorer.backgrounds.index(background)))
    return bootstrap(right)


def row_of(
    method: str, images: Tensor, captions: list[str], baseline: Agreement | None = None, **more: Any
) -> dict[str, Any]:
    """One row: agreement, and its paired difference to a baseline."""
    found = caption_agreement(images, captions)
    difference = {} if baseline is None else found.to_dense(baseline)
    row = new_row(
        method, **found.estimates(), **difference, placed=placed(images, captions), samples=len(captions), **more
    )
    print(
        f"{method} {more}: agreement {row['caption_agreement']:.1f}, named {row['named']:.1%}, placed {row['placed']:.1%}"
    )
    return row


def main() -> None:
    """Real pictures, then generated ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=int, default=4, help="real pictures of each test caption")
    parser.add_argument("--captions", type=int, default=32, help="test captions that are drawn")
    parser.add_argument("--steps", type=int, nargs="+", default=[embedded.STEPS, 10, 5, 3])
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scorer.json"))
    args = parser.parse_args()
    data, scorer = EmojiData(), embedded_scorer()
    test = data.captions("test")
    several = [caption for caption in test for _ in range(args.renders)]
    real = to_tensor([data.render(caption, FIRST_SEED + i) for i, caption in enumerate(several)])
    captions = [str(caption) for caption in several]
    rows = [
        row_of("real", real, captions),
        row_of("real, other captions", real, captions[args.renders :] + captions[: args.renders]),
    ]
    pipe = common.open_pipeline(None, args.device, torch.bfloat16)
    chosen = [str(caption) for caption in test[: args.captions]]
    dense: Agreement | None = None
    for steps in args.steps:
        batches = [
            draw(pipe, chosen[first : first + 16], range(first, first + len(chosen[first : first + 16])), steps,
                 embedded.GUIDANCE, output_type="pt", max_sequence_length=embedded.TEXT_TOKENS)
            for first in range(0, len(chosen), 16)
        ]  # fmt: skip
        images = torch.cat(batches).float().clamp(0, 1).cpu()
        shared = {"steps": steps, "guidance": embedded.GUIDANCE, "dtype": "bfloat16"}
        rows.append(row_of("dense" if dense is None else "fewer-steps", images, chosen, dense, **shared))
        dense = dense or caption_agreement(images, chosen)
    parameters = sum(parameter.numel() for parameter in scorer.parameters())
    results = new_results(
        device=args.device, split="test", backbone={"class": "CaptionScorer", "parameters": parameters}
    )
    results["rows"] = rows
    write_results(args.out, results)
    print(f"results: {args.out}")


if __name__ == "__main__":
    main()
