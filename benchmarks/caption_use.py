"""What the embedded teacher reads from a caption, and at which noise: its flow-matching loss with the right caption and others.

    python benchmarks/caption_use.py        # writes benchmarks/results/caption-use.json

Pictures of validation captions, the same noise for all; `wrong object` and `wrong background` swap one half of the caption
with that of another picture. `coarse` is the error averaged over 8 x 8 latents: outline and colour, not texture.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.results import new_results, new_row, write_results

TIMES = (0.95, 0.8, 0.6, 0.4, 0.2)


@torch.no_grad()
def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=85)
    parser.add_argument("--pipeline", type=Path, default=embedded.PIPELINE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/caption-use.json"))
    args = parser.parse_args()
    device = common.DEFAULT_DEVICE
    pipe = embedded.open_pipeline(args.pipeline, device, torch.float32)
    data = EmojiData()
    captions = data.captions("validation")[: args.count]
    images = to_tensor([data.render(caption, seed) for seed, caption in enumerate(captions)]).to(device)
    clean = pipe.vae.encode(2 * images - 1).latents * pipe.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    others = [*captions[7:], *captions[:7]]
    prompts = {
        "right": [str(caption) for caption in captions],
        "wrong object": [f"{o.concept.label} on {c.background}" for c, o in zip(captions, others, strict=True)],
        "wrong background": [f"{c.concept.label} on {o.background}" for c, o in zip(captions, others, strict=True)],
        "empty": [""] * len(captions),
    }
    results = new_results(device=device, backbone=describe(pipe), split="validation")
    for name, texts in prompts.items():
        text, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=embedded.TEXT_TOKENS
        )
        for time in TIMES:
            steps = torch.full((len(captions),), 1000 * time, device=device)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                velocity = pipe.transformer(torch.lerp(clean, noise, time), text, pooled, steps, return_dict=False)[0]
            error = velocity.float() - (noise - clean)
            loss, coarse = error.square().mean().item(), F.avg_pool2d(error, 8).square().mean().item()
            results["rows"].append(new_row(name, time=time, loss=loss, coarse=coarse, samples=len(captions)))
            print(f"t {time:.2f}  {name:>16}: loss {loss:.4f}, coarse {coarse:.4f}")
    write_results(args.out, results)


if __name__ == "__main__":
    main()
