"""Ours on top of what people do already, on the embedded pipeline: int8 weights and activations (torchao), fewer steps, both,
and First Block Cache, in whose passes a quarter of the FLOPs is left out, blocks with the freshest residuals first.

    python benchmarks/composition.py      # writes benchmarks/results/composition.json

Every way is compared with the float32 model at 25 steps, same captions of the test split and same seeds, timed in turns.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from family_quality import FEWEST
from torch import Tensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import shivelight as sl
from shivelight.cli import common
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.features import feature_network
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.judging import Judge
from shivelight.evaluation.peers.first_block_cache import first_block_cache
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.measurement.latency import interleave

OPTIONS = {"max_sequence_length": embedded.TEXT_TOKENS}
FEWER, COMPUTE, BATCH = 13, 0.5, 20
THRESHOLD, ON_TOP = 0.1, 0.75  # of First Block Cache; what is left of its passes


@dataclass(frozen=True)
class Way:
    """Weights, steps, whether a cache looks at the data, and whether half of the FLOPs are left out on top."""

    weights: str
    steps: int
    ours: bool
    comparison: Comparison
    cache: bool = False

    @property
    def name(self) -> str:
        """Of its row."""
        cache = " first-block-cache" if self.cache else ""
        return f"{self.weights} {self.steps} steps{cache}" + (f" compute {self.compute}" if self.ours else "")

    @property
    def compute(self) -> float:
        """Our budget."""
        return ON_TOP if self.cache else COMPUTE

    @property
    def budget(self) -> dict[str, float]:
        """Of its row."""
        cache = {"threshold": THRESHOLD} if self.cache else {}
        return cache | ({"compute": self.compute} if self.ours else {})

    @property
    def method(self) -> str:
        """Of its row."""
        names = ["first-block-cache"] * self.cache + ["training-free-blocks"] * self.ours
        return "+".join(names) or ("dense" if self.steps == embedded.STEPS else "fewer-steps")

    @contextmanager
    def state(self) -> Iterator[None]:
        """The pipeline as it says."""
        sl.set_budget(self.comparison.pipe, compute=self.compute)
        routed = self.comparison.routed
        with ExitStack() as stack:
            if self.cache:
                stack.enter_context(first_block_cache(self.comparison, THRESHOLD).state())
                # Which steps run is the cache's to say; which of their blocks, ours.
                stack.enter_context(routed.variant(blocks={"router": "age"}))
            stack.enter_context(routed.switched(self.ours))
            yield

    def draw(self, captions: list[str]) -> Tensor:
        """All pictures."""
        with self.state():
            starts = range(0, len(captions), BATCH)
            parts = [self.comparison.call(captions[s : s + BATCH], self.steps, s) for s in starts]
        return torch.cat(parts)

    def planned(self) -> float | None:
        """FLOPs over those of the dense float32 model at all steps; a product in int8 counts as one. None where data decide."""
        if self.cache:
            return None
        with self.state():
            ratio = sl.planned_ratio(self.comparison.pipe, self.steps) if self.ours else 1.0
        return self.steps / embedded.STEPS * (ratio or 1.0)


def ways() -> list[Way]:
    """All of them, the reference first."""
    found = []
    for weights in ("float32", "int8"):
        pipe = embedded.load_pipeline("cpu")
        if weights == "int8":
            for block in pipe.transformer.transformer_blocks:
                quantize_(block, Int8DynamicActivationInt8WeightConfig())
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
        comparison = Comparison(pipe, Setting(embedded.STEPS, embedded.GUIDANCE, 0, BATCH, OPTIONS))
        found += [Way(weights, steps, ours, comparison) for steps in (embedded.STEPS, FEWER) for ours in (False, True)]
        if weights == "float32":
            found += [Way(weights, embedded.STEPS, ours, comparison, cache=True) for ours in (False, True)]
    return found


def main() -> None:
    """Time, draw and judge all ways; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="captions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/composition.json"))
    args = parser.parse_args()
    if args.count < FEWEST:
        parser.error(f"{args.count} captions; an interval of KID needs {FEWEST}")
    common.quiet_libraries()
    common.keep_freed_memory()
    data, all_ways = EmojiData(), ways()
    chosen = data.captions("test")[: args.count]
    captions = [str(caption) for caption in chosen]
    timings = interleave(
        {way.name: lambda way=way: way.comparison.call(captions[:1], way.steps) for way in all_ways},
        args.rounds, 1, states={way.name: way.state for way in all_ways},
    )  # fmt: skip
    results = new_results(
        device="cpu", split="test", feature_network="efflite0", backbone={"class": "the embedded pipeline"}
    )
    real = to_tensor([data.render(caption, seed) for seed, caption in enumerate(chosen)])
    judge: Judge | None = None
    for way in all_ways:
        pictures = way.draw(captions)
        judge = judge or Judge(pictures, 0, real, feature_network("efflite0"), captions)
        row = new_row(
            way.method, way.budget, steps=way.steps, batch=1, guidance=embedded.GUIDANCE,
            samples=len(captions), planned_ratio=way.planned(), latency_ms=timings.latency_ms(way.name),
            speedup=timings.speedup(way.name, all_ways[0].name), **judge.figures(way.method, pictures),
        )  # fmt: skip
        results["rows"].append(row | {"variant": way.weights})
        print(way.name, {name: round(row[name], 3) for name in ("speedup", "psnr_to_dense") if name in row}, flush=True)
        write_results(args.out, results)


if __name__ == "__main__":
    main()
